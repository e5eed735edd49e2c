"""Outcomes: what has been committed, and what it amounts to."""
