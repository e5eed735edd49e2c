"""Evaluating: a backend is chosen and checked, then run over units of points."""
