"""Slurm: asking it, and handing runs to it."""
