"""Refinement: which points are worth an evaluation, and how far off the rest may be."""
