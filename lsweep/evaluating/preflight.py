"""The pre-flight: what the first worker of a device class checks at the centre and freezes.

A device class is what computes equal bits: device, vector instructions, torch, threads. Its file
in ``devices/`` fixes the batch sizes; the first worker of the class writes it, first wins.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lsweep.axes.directions import Directions
from lsweep.backends.packed import Spot
from lsweep.backends.summing import Samples
from lsweep.errors import DamagedFile, LsweepError
from lsweep.evaluating.acceptance import centre_of, taken
from lsweep.evaluating.choice import Choice, choose, reason_of
from lsweep.evaluating.evaluate import Evaluator
from lsweep.evaluating.following import require_following
from lsweep.evaluating.runnable import runnable
from lsweep.hosts import machine
from lsweep.hosts.device import Spent, device_class, human, is_out_of_memory, memory_used
from lsweep.outcomes.frozen import CHOSEN, of_this_version
from lsweep.plans.plan import Plan
from lsweep.problems import batchnorm
from lsweep.problems.calling import account
from lsweep.problems.data import map_tensors, tensors_of
from lsweep.problems.factory import describe
from lsweep.problems.problem import Problem, classifier
from lsweep.problems.takeover import model_kept
from lsweep.storage.files import publish, read_json, sealed
from lsweep.storage.folder import RunFolder
from lsweep.storage.insist import there

FAILS = "the problem fails at its own weights, before any is moved"
PROBE_SAMPLES = 4
REPEATED_SAMPLES = 512  # are evaluated twice: what is random shows on few
RECALIBRATED_SAMPLES = 256  # tell what recalibrated statistics would change
EXPECTED_TOLERANCE = 0.02  # relative; an expected value is typed from a log with few digits
REPEAT_TOLERANCE = {"cpu": 0.0, "cuda": 1e-6, "mps": 1e-5}


def frozen_class(folder: RunFolder, plan: Plan, name: str) -> dict[str, Any] | None:
    """Return the file of a device class, or None when no worker of the class has come yet.

    Raises:
        DamagedFile: it was altered, or belongs to another plan.
    """
    path = folder.device(name)
    if not there(path):
        return None
    value = read_json(path)
    if value.get("plan") != plan.digest:
        raise DamagedFile(f"{path} belongs to another plan: delete it, it is made again")
    return of_this_version(value, plan)


def preflight(
    folder: RunFolder,
    plan: Plan,
    evaluator: Evaluator,
    expected: dict[str, float],
    worker: str,
    spots: Sequence[Spot] = (),
    points: float = 0.0,
    over_all: Mapping[str, float] | None = None,
    before: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Check the problem at the centre and publish the device class, or return what is there.

    Each split's data is read twice and must come the same; the centre is evaluated, some of it
    twice, and each sample must give the same value; the loss must be what the user expects, where
    that is given. Then a backend is chosen, accepted where its centre is eager's sample by sample,
    and its centre is what all workers compare with.

    Args:
        folder: the run.
        plan: its plan.
        evaluator: on this worker's device, with eager.
        expected: values that the user expects at the centre.
        worker: its name.
        spots: where backends are compared.
        points: how many one worker would evaluate, about.
        over_all: values at the centre over all data, where the plan takes a subset.
        before: how the class computed what is committed, where its file was lost: it stays so.

    Raises:
        LsweepError: with the reason: a loader that shuffles, a dropout left on, another loss.
    """
    name = device_class(evaluator.device)
    data = {s: _check_data(evaluator, s) for s in evaluator.splits}
    for split in evaluator.splits:
        try:
            with model_kept(evaluator.problem.model):  # which has kept nothing yet, below
                _check_batch(evaluator, split)
            if spots:
                require_following(evaluator, split, spots[-1])
        except LsweepError:
            raise
        except Exception as e:
            if is_out_of_memory(e):
                raise  # smaller batches are tried
            raise LsweepError(f"{FAILS}: {describe(e)}; {_account(evaluator, split)}") from e
    first, seconds = centre_of(evaluator)
    again = evaluator.samples([evaluator.origin], limit=REPEATED_SAMPLES)[0]
    _check_repeat(evaluator, evaluator.centre(0), again)
    centre = {v: s.mean for v, s in zip(evaluator.names, first, strict=True)}
    for label, s in zip(evaluator.names, first, strict=True):
        if not bool((s.weights >= 0).all()) or not bool(torch.isfinite(s.weights).all()):
            raise LsweepError(f"{label}: a weight is negative or not finite")
    check_expected(centre, expected)
    changes = _batch_norm_check(evaluator)
    choice = Choice("eager", plan.evaluate["precision"], dict(evaluator.batch_sizes))
    if before is not None:
        choice = Choice(**{key: before[key] for key in CHOSEN})
        first, seconds = _as_before(evaluator, choice)
    elif evaluator.stored:
        everywhere = [evaluator.origin, *spots]
        choice = choose(evaluator, everywhere, seconds.busy, points)
        choice, first, seconds = taken(evaluator, choice, everywhere, (first, seconds))
    centre = {v: s.mean for v, s in zip(evaluator.names, first, strict=True)}
    evaluator.eager.move(evaluator.origin)
    value = {
        "plan": plan.digest,
        "class": name,
        "device": human(evaluator.device),
        **choice.record(),
        **(before or {}),  # what it was measured to be off by, too
        "threads": torch.get_num_threads(),
        "versions": machine.versions(),
        "worker": worker,
        "centre": {v: c if c == c and abs(c) != float("inf") else None for v, c in centre.items()},
        "anchor": {
            v: {"whole": whole, "subset": centre[v]}
            for v, whole in (over_all or {}).items()
            if math.isfinite(centre[v])
        },
        "opaque": [v for v, s in zip(evaluator.names, first, strict=True) if s.opaque],
        "samples": {
            s: _counted(first[i * len(evaluator.metrics)]) for i, s in enumerate(evaluator.splits)
        },
        "data": data,
        "seconds_per_point": seconds.wall,
        "memory": memory_used(evaluator.device),
        "batch_norm": changes,
        "pointwise": list(evaluator.pointwise),
        "derivatives": evaluator.differentiating.note(evaluator.pointwise, evaluator.splits[0]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    publish(folder.device(name), sealed(value))
    there = frozen_class(folder, plan, name)
    assert there is not None
    return there


def _as_before(evaluator: Evaluator, choice: Choice) -> tuple[list[Samples], Spent]:
    """Return the centre, computed as what is committed was, or not at all."""
    try:
        evaluator.use(choice.backend, choice.batch_sizes, choice.precision)
        return centre_of(evaluator)
    except Exception as e:
        raise LsweepError(
            f"this run's parts of this device class were computed by {choice.backend!r} in "
            f"{choice.precision}, and so must be the rest, but: {reason_of(e)}"
        ) from e


def _account(evaluator: Evaluator, split: str) -> str:
    problem = evaluator.problem
    batch = next(iter(evaluator.batches(split)))
    with model_kept(problem.model):
        said = account(problem.model, batch, problem.forward in (None, classifier))
    return f"in {split}, {said}"


def _check_batch(evaluator: Evaluator, split: str) -> None:
    """Check on one batch that the loss is the mean it says, and that inputs are left alone."""
    evaluator.eager.move(evaluator.origin)
    batch = map_tensors(next(iter(evaluator.batches(split))), torch.clone)
    before = [t._version for t in tensors_of(batch)]
    with evaluator.ground.context():
        evaluator.problem.check_mean(batch, evaluator.metrics)
    evaluator.eager.here(batch)
    lost = evaluator.seat.lost()
    if lost:
        raise LsweepError(
            f"the network puts another tensor in the place of {lost} as it runs (such as w.data = "
            "renorm(w)): no point would move it any more; write w.data.copy_(renorm(w))"
        )
    if [t._version for t in tensors_of(batch)] != before:
        raise LsweepError(
            f"the network or the loss changes its {split} input in place (such as x -= mean): the "
            "next point would see other data; write x = x - mean"
        )


def probe(problem: Problem, settings: Mapping[str, Any]) -> dict[str, float | None] | None:
    """Return each variable's mean over the first few samples at the centre, on the CPU.

    It stands for what no digest covers: the network's code, the loss, the metrics. None where the
    problem cannot run on a CPU.
    """
    precision = "float64" if settings["precision"] == "float64" else "float32"
    plain = {**settings, "precision": precision, "batch_norm": "eval", "slices": 1}
    sizes = dict.fromkeys(settings["splits"], PROBE_SAMPLES)
    nowhere = Directions({}, (), {})
    try:
        with Evaluator(problem, plain, nowhere, torch.device("cpu"), sizes) as evaluator:
            return evaluator.first_batch()
    except Exception:  # the pre-flight of a worker tells what is wrong, where it can run
        return None


def _counted(found: Samples) -> int:
    """Return over how many samples a metric was taken; an opaque one has a value for each batch."""
    return round(float(found.weights.sum())) if found.opaque else len(found.values)


def _check_data(evaluator: Evaluator, split: str) -> str:
    source, size = evaluator.problem.splits[split], evaluator.batch_sizes[split]
    once, twice = source.full_digest(size), source.full_digest(size)
    source.require_same(once, twice)
    return once


def _check_repeat(evaluator: Evaluator, first: list[Samples], second: list[Samples]) -> None:
    tolerance = REPEAT_TOLERANCE.get(evaluator.device.type, 1e-5)
    for k, (a, b) in enumerate(zip(first, second, strict=True)):
        split, metric = divmod(k, len(evaluator.metrics))
        where = f"{evaluator.splits[split]} {evaluator.metrics[metric]}"
        n = len(b.values)
        if len(a.values) < n:
            raise LsweepError(f"{where}: {len(a.values)} samples the first time, {n} the second")
        off = (a.values[:n] - b.values).abs() > tolerance * (1 + a.values[:n].abs())
        if bool(off.any()):
            i = int(off.nonzero()[0])
            raise LsweepError(
                f"{where}: the same sample gives another value the second time (sample {i}: "
                f"{float(a.values[i]):.6g}, then {float(b.values[i]):.6g}). The network or the "
                f"loss is random: {_suspects(evaluator)}"
            )


def _suspects(evaluator: Evaluator) -> str:
    model = evaluator.problem.model
    on = [n for n, m in model.named_modules() if m.training]
    if on:
        return f"{on[0] or type(model).__name__} stays in train mode"
    drops = [
        n or type(m).__name__
        for n, m in model.named_modules()
        if "drop" in type(m).__name__.lower()
    ]
    hint = f"look at {', '.join(drops[:3])}, or at" if drops else "look for"
    return (
        f"{hint} a dropout that ignores eval mode, such as F.dropout(x), whose default is "
        "training=True: write F.dropout(x, training=self.training). What draws by torch.randn, "
        "such as a variational autoencoder's noise, must take its mean in eval mode"
    )


def check_expected(centre: Mapping[str, float | None], expected: Mapping[str, float]) -> None:
    """Compare the centre with what the user knows.

    Raises:
        LsweepError: a value is further off than 2 %, or names no variable.
    """
    for name, wanted in expected.items():
        if name not in centre:
            raise LsweepError(f"expected.{name}: the sweep has {', '.join(centre)}")
        found = centre[name]
        if found is None or not abs(found - wanted) <= EXPECTED_TOLERANCE * abs(wanted) + 1e-6:
            raise LsweepError(
                f"{name} at the centre is {'not finite' if found is None else f'{found:.6g}'}, "
                f"expected {wanted:.6g} (within {EXPECTED_TOLERANCE:.0%}): other weights, data, "
                "preprocessing or loss than in training?"
            )


def _batch_norm_check(evaluator: Evaluator) -> dict[str, Any] | None:
    """Measure once how much recalibrated statistics would change the picture at |offset| = 1."""
    if evaluator.settings["batch_norm"] != "eval" or not batchnorm.layers(evaluator.problem.model):
        return None
    axes = len(evaluator.directions.axes)
    offsets = [
        tuple(sign if i == a else 0.0 for i in range(axes))
        for a in evaluator.directions.moving[:2]
        for sign in (1.0, -1.0)
    ]
    spots = runnable(evaluator, [Spot(o) for o in offsets])
    if not spots:
        return None
    split = "train" if "train" in evaluator.problem.splits else evaluator.splits[0]
    few = RECALIBRATED_SAMPLES
    kept = [found[0].mean for found in evaluator.samples(spots, limit=few)]
    try:
        recalibrated = evaluator.samples(spots, recalibrate=split, limit=few)
        anew = [found[0].mean for found in recalibrated]
    except ValueError:  # torch refuses statistics of a lone last sample; the sweep needs none
        return None
    finite = [(a, b) for a, b in zip(kept, anew, strict=True) if abs(a) < 1e300 and abs(b) < 1e300]
    if not finite:
        return None
    return {
        "variable": f"{evaluator.splits[0]}_{evaluator.metrics[0]}",
        "offsets": [list(s.offsets) for s in spots],
        "samples": f"the first {few} of each split, in whole batches",
        "eval": [a for a, _ in finite],
        "recalibrate": [b for _, b in finite],
        "largest_relative": max(abs(b - a) / max(abs(a), 1e-12) for a, b in finite),
    }
