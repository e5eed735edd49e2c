"""Preparing: from a sweep to a frozen plan, and from a plan back to what it says."""
