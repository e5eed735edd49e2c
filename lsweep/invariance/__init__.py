"""Invariance: which changes of weights leave a network's function as it is, and what follows."""
