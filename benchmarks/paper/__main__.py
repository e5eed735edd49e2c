"""Train, sweep, judge and print: see the package's docstring.

What is trained and what is measured is kept under ``--cache``, so that the same command goes on
where it was interrupted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from .claims import BEYOND, PAPER, SEEDS
from .evidence import judge
from .studies import FULL, QUICK, STUDIES, ZOO, Records, Size, beyond
from .table import heading, report
from .training import VERSION

Job = tuple[str, str, int]
"""Study, network (only beyond the paper), seed."""


def jobs(beyond_paper: bool) -> list[Job]:
    """Return everything that is measured, in parts that one process does."""
    if beyond_paper:
        return [("beyond", name, seed) for name in reversed(ZOO) for seed in SEEDS]
    return [(study, "", seed) for study in STUDIES for seed in SEEDS]


def do(job: Job, size: Size, cache: Path) -> tuple[Job, Records, float]:
    """Measure one part, unless the cache has it."""
    import torch

    torch.set_num_threads(1)
    start = time.monotonic()
    study, name, seed = job
    key = hashlib.sha256(f"{VERSION} {job} {size}".encode()).hexdigest()[:16]
    path = cache / f"{study}-{seed}-{key}.json"
    if path.exists():
        return job, json.loads(path.read_text()), 0.0
    if study == "beyond":
        records = beyond(name, seed, size, cache)
    else:
        records = STUDIES[study](seed, size, cache)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(records))
    temporary.replace(path)
    return job, records, time.monotonic() - start


def measure(todo: Sequence[Job], size: Size, cache: Path, workers: int) -> dict[str, list[Records]]:
    """Measure everything in processes of one thread; study -> for each seed: network -> record."""
    os.environ["OMP_NUM_THREADS"] = "1"
    done: dict[Job, Records] = {}
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(do, job, size, cache) for job in todo]
        for future in as_completed(futures):
            job, records, seconds = future.result()
            done[job] = records
            study, name, seed = job
            print(f"  {study} {name + ' ' if name else ''}seed {seed}: {seconds:.0f} s",
                  file=sys.stderr, flush=True)  # fmt: skip
    out: dict[str, list[Records]] = {}
    for study, name, seed in todo:
        seeds = out.setdefault(study, [{} for _ in SEEDS])
        seeds[SEEDS.index(seed)] |= done[study, name, seed]
    return out


def main() -> None:
    """Run one of the two tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__)
    parser.add_argument("--beyond", action="store_true", help="what the paper does not have")
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it works")
    parser.add_argument("--cache", type=Path, help="keeps networks and numbers")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("-o", "--output", type=Path, help="where the page goes, besides stdout")
    options = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        cache = options.cache or Path(scratch)
        cache.mkdir(parents=True, exist_ok=True)
        size = QUICK if options.quick else FULL
        measured = measure(jobs(options.beyond), size, cache, options.workers)
    claims = BEYOND if options.beyond else PAPER
    title = "Beyond the paper" if options.beyond else "The paper's claims"
    command = "python -m benchmarks.paper" + (" --beyond" if options.beyond else "")
    head = heading(command, time.monotonic() - start, options.workers)
    text = report(title, head, claims, judge(claims, measured), measured)
    print(text)
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
