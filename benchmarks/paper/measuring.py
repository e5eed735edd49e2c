"""Everything that one command measures, in parts that processes do; each part is kept when done."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch

from .studies import STUDIES, ZOO, Records, Size, beyond
from .training import VERSION

Job = tuple[str, str, int]
"""Study, network (only beyond the paper), seed."""


def jobs(beyond_paper: bool, size: Size) -> list[Job]:
    """Return everything that is measured, in parts that one process does."""
    if beyond_paper:
        return [("beyond", name, seed) for name in reversed(ZOO) for seed in size.seeds]
    return [(study, "", seed) for study in STUDIES for seed in size.seeds]


def do(job: Job, size: Size, cache: Path) -> tuple[Job, Records, float]:
    """Measure one part, unless the cache has it."""
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


def parts(
    todo: Sequence[Job], size: Size, cache: Path, workers: int
) -> Iterator[tuple[Job, Records, float]]:
    """Yield each part when it is done; in this process where one worker is asked for."""
    if workers == 1:
        yield from (do(job, size, cache) for job in todo)
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(do, job, size, cache) for job in todo]):
            yield future.result()


def measure(todo: Sequence[Job], size: Size, cache: Path, workers: int) -> dict[str, list[Records]]:
    """Measure everything in processes of one thread; study -> for each seed: network -> record."""
    done: dict[Job, Records] = {}
    for job, records, seconds in parts(todo, size, cache, workers):
        done[job] = records
        study, name, seed = job
        text = f"  {study} {name + ' ' if name else ''}seed {seed}: {seconds:.0f} s"
        print(text, file=sys.stderr, flush=True)
    out: dict[str, list[Records]] = {}
    for study, name, seed in todo:
        seeds = out.setdefault(study, [{} for _ in size.seeds])
        seeds[size.seeds.index(seed)] |= done[study, name, seed]
    return out
