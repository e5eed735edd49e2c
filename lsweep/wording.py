"""Wording: numbers of things as one says them."""

from __future__ import annotations

HERE = "on this machine "  # so begins why a backend was dropped for the machine, not the network


def counted(count: int, thing: str) -> str:
    """Return how many of a thing, in words that fit one and several.

    >>> counted(1, "point"), counted(0, "point"), counted(30, "child run")
    ('1 point', '0 points', '30 child runs')
    """
    return f"{count} {thing}{'' if count == 1 else 's'}"
