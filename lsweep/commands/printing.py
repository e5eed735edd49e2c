"""Printing: what a command says is read, or nobody listens, or the disk that holds it is full."""

from __future__ import annotations

import errno
import os
import sys


def flush() -> None:
    """Let what was printed be read; a reader that has seen enough is no error."""
    try:
        if sys.stdout is not None:  # it is None where it was closed before this began
            sys.stdout.flush()
    except OSError as e:  # what is left would fail again when the interpreter ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(e, BrokenPipeError):
            raise


def named(error: OSError) -> str:
    """Return where the disk refused, and why; what has no name is where this prints."""
    if error.strerror is None or (error.filename is None and error.errno != errno.ENOSPC):
        return str(error)
    return f"{error.filename or 'cannot print to standard output'}: {error.strerror}"
