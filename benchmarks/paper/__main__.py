"""Train, sweep, judge and print: see the package's docstring.

What is trained and what is measured is kept under ``--cache``, so that the same command goes on
where it was interrupted.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from .claims import BEYOND, PAPER
from .evidence import judge
from .figure import draw
from .measuring import jobs, measure
from .studies import FULL, QUICK
from .table import heading, report


def main() -> None:
    """Run one of the two tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__)
    parser.add_argument("--beyond", action="store_true", help="what the paper does not have")
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it works")
    parser.add_argument("--cache", type=Path, help="keeps networks and numbers")
    parser.add_argument("--workers", type=int, help="processes; default: 2, 1 with --quick")
    parser.add_argument("-o", "--output", type=Path, help="where the page goes, besides stdout")
    parser.add_argument("--figure", type=Path, help="draw depth against skip connections")
    options = parser.parse_args()
    workers = options.workers or (1 if options.quick else 2)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        cache = options.cache or Path(scratch)
        cache.mkdir(parents=True, exist_ok=True)
        size = QUICK if options.quick else FULL
        measured = measure(jobs(options.beyond, size), size, cache, workers)
    claims = BEYOND if options.beyond else PAPER
    title = "Beyond the paper" if options.beyond else "The paper's claims"
    command = "python -m benchmarks.paper" + (" --beyond" if options.beyond else "")
    head = heading(command, time.monotonic() - start, workers)
    text = report(title, head, claims, judge(claims, measured), measured)
    print(text)
    if options.output:
        options.output.write_text(text)
    if options.figure and not options.beyond:
        draw(measured, options.figure)


if __name__ == "__main__":
    main()
