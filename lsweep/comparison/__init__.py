"""Comparison: measures of several networks beside each other."""
