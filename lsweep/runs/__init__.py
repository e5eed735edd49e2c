"""Runs: looking at, checking and tidying a run folder, without its network."""
