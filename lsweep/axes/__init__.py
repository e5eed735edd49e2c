"""Axes: the directions that offsets multiply."""
