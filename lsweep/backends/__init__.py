"""Backends: ways to compute a problem's metrics at a point; all agree with eager."""
