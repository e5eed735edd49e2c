"""Surfaces: merged values on a lattice, and the files of others."""
