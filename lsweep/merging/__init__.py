"""Merging: from committed rows to a surface."""
