"""Fuzz: what is read is what was written, or one honest error; what is written comes back.

Text and tables become `Settings` or an `LsweepError`; altered JSON and HDF5 give the value that
was written, or are refused; points are exact whatever the numbers.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import itertools
import json
import math
import os
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import Died, Raised, each_in_child
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tiny import SWEEP, lsweep, write_sweep
from torch import nn

from lsweep.errors import DamagedFile, LsweepError
from lsweep.plans.plan import Plan
from lsweep.plans.points import Lattice, coordinates
from lsweep.plans.recipes import AXES, Axis
from lsweep.plans.rounds import Rounds
from lsweep.plans.settings import Settings
from lsweep.preparing.planning import BATCH_NORM_BATCH, plan_run
from lsweep.preparing.restoring import settings_of
from lsweep.problems.problem import make_problem
from lsweep.problems.weights import load_state
from lsweep.storage.files import read_json, sealed, unsealed
from lsweep.storage.folder import RunFolder
from lsweep.surfaces.surface import Surface, Trajectory

MANY = int(os.environ.get("LSWEEP_FUZZ", "1"))  # times as many examples, for a night


def examples(count: int):
    """Run a property on ``count`` examples, however long one takes."""
    fine = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    return settings(max_examples=count * MANY, deadline=None, suppress_health_check=fine)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder for the files of one module's worth of examples."""
    return tmp_path_factory.mktemp("fuzz")


# -- settings --------------------------------------------------------------------------------------

TOML = (
    SWEEP
    + """
expected = { train_loss = 0.1 }
batch_size = 7

[grid.y]
range = [-0.25, 1e0]
count = 2

[directions.y]
orthogonalize = true
parameters = ["0.*", "2.*"]

[trajectory]
checkpoints = ["a.pt", "b*.pt"]
"""
)
NASTY = [
    "nan", "-inf", "1e999999999", "1e-999999999", "99999999999999999999", "-1", "0", "1.5", "true",
    '"auto"', '""', '"é\\n"', "[]", "[[]]", "{}", "{x={x={}}}", "2001-01-01", "00:00:00", "0x7f",
    "'''a\nb'''", "[1,'a',[2]]", "_", "=", "]", "[grid]", "[[grid]]", "[grid.x.range]", "\n", "#",
    "\\u0000", "\r", "x", "grid.x.count", "directions", "seed = 1",
]  # fmt: skip


@st.composite
def altered_text(draw: st.DrawFn) -> str:
    """The valid sweep.toml after a few cuts, insertions and replaced words."""
    text = TOML
    for _ in range(draw(st.integers(1, 4))):
        a = draw(st.integers(0, len(text)))
        if draw(st.booleans()):  # at a word, so that what comes out is often still TOML
            starts = [
                i for i in range(1, len(text)) if text[i - 1] in " [\n" and text[i] not in " "
            ]
            a = draw(st.sampled_from(starts)) if starts else 0
            b = a
            while b < len(text) and text[b] not in " ,]\n":
                b += 1
        else:
            b = min(len(text), a + draw(st.integers(0, 30)))
        text = text[:a] + draw(st.sampled_from(["", *NASTY])) + text[b:]
    return text


def outcome(make, *arguments) -> Settings | None:
    """Return settings, or None for an `LsweepError`; any other error is one."""
    try:
        made = make(*arguments)
    except LsweepError:
        return None
    assert isinstance(made, Settings)
    for name, axis in made.grid.items():
        assert name in AXES and name in made.directions and axis.count >= 2
        if axis.range != "auto" and axis.count <= 1000:
            values = coordinates(axis)
            assert np.isfinite(values).all() and (np.diff(values) > 0).all()
    return made


def test_the_text_that_is_altered_here_is_right():
    made = outcome(Settings.from_text, TOML)
    assert made is not None and made.trajectory is not None and len(made.grid) == 2


@examples(150)
@given(st.text(max_size=80))
def test_any_text_is_settings_or_refused(text):
    outcome(Settings.from_text, text)


@examples(400)
@given(altered_text())
def test_any_altered_sweep_file_is_settings_or_refused(text):
    outcome(Settings.from_text, text)


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.decimals(allow_nan=False)
    | st.text(max_size=8)
    | st.just(datetime.date(2001, 1, 1))
    | st.sampled_from(["random", "filter", "auto", "eval", "loss", "p.py:f", "a.b:c", "*"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
NUMBERS = st.floats(-2, 2, allow_nan=False) | st.integers(-2, 2) | st.decimals(-2, 2)
AXIS = st.fixed_dictionaries(
    {"range": st.tuples(NUMBERS, NUMBERS) | ANYTHING, "count": st.integers(0, 9) | ANYTHING}
)


def tables(fields: dict[str, st.SearchStrategy]) -> st.SearchStrategy:
    """Tables with some of the right keys and mostly wrong values."""
    return ANYTHING | st.fixed_dictionaries(
        {}, optional={k: v | ANYTHING for k, v in fields.items()}
    )


RECIPES = {
    "kind": st.sampled_from(["random", "to", "plane", "pca", "file"]),
    "seed": st.integers(-1, 2**63),
    "normalize": st.sampled_from(["filter", "layer", "weight", "none"]),
    "ignore": st.sampled_from(["bias+norm", "none"]),
    "checkpoint": st.just("a.pt"),
    "checkpoints": st.lists(st.text(max_size=3)),
    "file": st.just("d.h5"),
    "parameters": st.lists(st.text(max_size=3)),
    "orthogonalize": st.booleans(),
}
TABLES = st.fixed_dictionaries(
    {
        "problem": st.just({"factory": "p.py:f"})
        | tables({"factory": ANYTHING, "options": ANYTHING}),
        "grid": st.fixed_dictionaries({"x": AXIS}, optional={"y": AXIS | ANYTHING, "z": ANYTHING}),
    },
    optional={
        "directions": tables({**RECIPES, "x": tables(RECIPES), "y": tables(RECIPES)}),
        "evaluate": tables(
            {
                "metrics": st.lists(st.sampled_from(["loss", "a b", "", "é"])),
                "splits": st.lists(st.just("train")),
                "slices": st.integers(),
                "batch_size": st.integers(),
                "expected": st.dictionaries(st.text(max_size=3), NUMBERS),
                "batch_norm": st.sampled_from(["eval", "batch", "recalibrate"]),
            }
        ),
        "trajectory": tables({"checkpoints": st.lists(st.text(max_size=3))}),
        "refine": ANYTHING,
    },
)


@examples(400)
@given(TABLES)
def test_any_table_is_settings_or_refused(table):
    before = copy.deepcopy(table)
    outcome(Settings.from_table, table)
    assert str(table) == str(before)  # text, for NaN is not itself


OVERRIDES = st.text(max_size=30) | st.builds(
    "{}={}".format,
    st.sampled_from(
        ["grid.x.count", "grid.x", "grid", "directions.seed", "a.b.c", "problem.options"]
    ),
    st.sampled_from(NASTY) | st.text(max_size=10),
)


@pytest.fixture(scope="module")
def sweep_file(here):
    """The valid sweep.toml, as a file."""
    path = here / "sweep.toml"
    path.write_text(TOML)
    return path


@examples(200)
@given(override=OVERRIDES)
@example("grid.x.count=11")
@example("grid.x.count=1e999999")
def test_any_override_is_settings_or_refused(sweep_file, override):
    outcome(Settings.from_file, sweep_file, (override,))


# -- sealed JSON -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A complete run with two rounds."""
    toml = write_sweep(tmp_path_factory.mktemp("run"))
    assert lsweep("run", toml, "--on", "inline") == 0
    assert lsweep("run", toml, "--on", "inline", "--set", "grid.x.count=5") == 0
    return RunFolder(toml.with_suffix(".run"))


@st.composite
def damage(draw: st.DrawFn) -> tuple[str, float, bytes]:
    """What is done to bytes: at which share of them, and with what."""
    how = draw(st.sampled_from(["flip", "set", "cut", "drop", "insert", "zero", "copy"]))
    return how, draw(st.floats(0, 1, exclude_max=True)), draw(st.binary(min_size=1, max_size=16))


def damaged(data: bytes, wounds: list[tuple[str, float, bytes]]) -> bytes:
    """Return ``data`` after each of ``wounds``."""
    for how, share, by in wounds:
        at = int(share * len(data))
        n = len(by)
        middle = {
            "flip": bytes(b ^ (1 << (by[0] % 8)) for b in data[at : at + 1]),
            "set": by,
            "cut": b"",
            "drop": b"",
            "insert": by + data[at : at + n],
            "zero": bytes(len(data[at : at + 64 * n])),
            "copy": data[:n],
        }[how]
        rest = {"flip": at + 1, "cut": len(data), "zero": at + 64 * n}.get(how, at + n)
        data = data[:at] + middle + data[rest:]
    return data


def damages(count: int) -> st.SearchStrategy:
    return st.lists(damage(), min_size=1, max_size=count)


KINDS = ["plan", "rounds/0000", "rounds/0001", "source", "devices", "workers"]


def sealed_file(run: RunFolder, kind: str) -> Path:
    path = run.root / kind
    return next(path.glob("*.json")) if path.is_dir() else path.with_suffix(".json")


@pytest.mark.parametrize("kind", KINDS)
@examples(60)
@given(wounds=damages(3))
def test_sealed_files_are_what_was_written_or_damaged(run, kind, wounds):
    path = sealed_file(run, kind)
    good = path.read_bytes()
    bad = damaged(good, wounds)
    try:
        value = unsealed(bad, "here")
    except DamagedFile:
        assert bad != good
    else:
        assert value == unsealed(good, "here")


@examples(60)
@given(kind=st.sampled_from(KINDS[:3]), wounds=damages(2))
def test_a_run_with_a_damaged_plan_or_round_is_the_same_or_refused(run, kind, wounds):
    path = sealed_file(run, kind)
    plan, good = Plan.read(run), path.read_bytes()
    numbers = Rounds.read(run, plan).offsets
    path.write_bytes(damaged(good, wounds))
    try:
        there = Plan.read(run)
        offsets = Rounds.read(run, there).offsets
    except LsweepError:
        pass
    else:
        assert there.digest == plan.digest and offsets.tobytes() == numbers.tobytes()
    finally:
        path.write_bytes(good)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@examples(100)
@given(key=st.sampled_from([f.name for f in dataclasses.fields(Plan)] + ["other"]), value=JSON)
@example("version", "2")
@example("version", None)
@example("version", True)
def test_a_forged_plan_is_a_plan_or_refused(run, here, key, value):
    forged = RunFolder(here / "forged.run")
    forged.root.mkdir(exist_ok=True)
    forged.plan.write_bytes(sealed({**read_json(run.plan), key: value}))
    try:
        assert isinstance(Plan.read(forged), Plan)
    except LsweepError as e:
        assert str(forged.plan) in str(e)


@examples(100)
@given(JSON.filter(lambda v: isinstance(v, dict)))
def test_what_is_sealed_comes_back(value):
    value.pop("sha256", None)
    assert unsealed(sealed(value), "here") == value
    assert json.loads(sealed(value))["sha256"]


# -- surfaces --------------------------------------------------------------------------------------

NAMES = st.sampled_from(["train_loss", "test_loss", "train_accuracy", "weight_sq", "train_loss_se"])
WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20).map(str.strip)
ATTRIBUTES = st.dictionaries(st.sampled_from(["long_name", "units", "metric", "split"]), WORDS)
FLOATS = st.floats(width=64)  # NaN, infinities, -0 and subnormals among them
STATUSES = st.integers(0, 4)


@st.composite
def surfaces(draw: st.DrawFn) -> Surface:
    """Surfaces of one to three axes whose values are anything that a float64 can be."""
    axes = {
        a: np.array(sorted(draw(st.sets(st.floats(-9, 9), min_size=1, max_size=4))))
        for a in AXES[: draw(st.integers(1, 3))]
    }
    shape = tuple(len(c) for c in reversed(axes.values()))
    names = draw(st.lists(NAMES, min_size=1, unique=True))
    values = {n: draw(hnp.arrays(np.float64, shape, elements=FLOATS)) for n in names}
    steps = draw(st.integers(0, 3))
    rows = hnp.arrays(np.float64, steps, elements=FLOATS)
    trajectory = Trajectory(
        draw(hnp.arrays(np.float64, (steps, len(axes)), elements=FLOATS)),
        draw(rows),
        draw(rows),
        {"train_loss": draw(rows)},
        tuple(draw(st.lists(WORDS, min_size=steps, max_size=steps))),
    )
    return Surface(
        axes,
        values,
        draw(hnp.arrays(np.uint8, shape, elements=STATUSES)),
        {n: {"units": "1", **draw(ATTRIBUTES)} for n in [*axes, *names]},
        trajectory if steps else None,
        draw(st.dictionaries(st.sampled_from(["plan", "seconds", "caption"]), JSON | WORDS)),
        draw(WORDS),
        draw(WORDS),
    )


def content(s: Surface) -> list:
    """Return all that a surface says, comparable bit for bit."""
    arrays = {**s.axes, **s.values, "status": s.status}
    track = s.trajectory
    steps = {} if track is None else {**track.values, "o": track.offsets, "r": track.residual}
    return [
        [(n, a.shape, a.dtype.str, a.tobytes()) for n, a in [*arrays.items(), *steps.items()]],
        {n: dict(s.attributes.get(n, {})) for n in arrays if n != "status"},
        None if track is None else (track.labels, track.in_plane.tobytes()),
        dict(s.provenance),
        s.title,
        s.history,
    ]


@examples(60)
@given(surface=surfaces())
def test_a_saved_surface_comes_back_bit_for_bit(here, surface):
    path = here / "surface.h5"
    surface.save(path)
    assert content(Surface.load(path)) == content(surface)
    first = path.read_bytes()
    Surface.load(path).save(path)
    assert path.read_bytes() == first


@pytest.fixture(scope="module")
def rich(here):
    """The bytes of a surface that has everything, and what they say."""
    x, y = np.linspace(-1, 1, 5), np.linspace(0, 1, 3)
    z = np.add.outer(y, x)
    values = {"train_loss": z, "test_loss": 2 * z, "train_loss_se": z / 9, "weight_sq": z**2}
    track = Trajectory(
        np.ones((2, 2)), np.ones(2), np.ones(2), {"train_loss": np.ones(2)}, ("a", "b")
    )
    units = {n: {"units": "1", "long_name": f"the {n}"} for n in [*values, "x", "y"]}
    made = {"plan": {"a": [1, 2.5]}, "seconds": "3.000"}
    ones = np.ones((3, 5), np.uint8)
    surface = Surface({"x": x, "y": y}, values, ones, units, track, made, "a title", "a history")
    path = here / "rich.h5"
    surface.save(path)
    return path.read_bytes(), content(surface)


def same_or_refused(answer: object) -> bool:
    """Whether a child read what was written, or refused it; one that died did neither."""
    return answer is True or (
        isinstance(answer, Raised) and answer.kind in ("DamagedFile", "LsweepError")
    )


@examples(6)
@given(batch=st.lists(damages(2), min_size=40, max_size=60))
def test_a_damaged_surface_is_the_same_or_refused(here, rich, batch):
    good, said = rich
    path = here / "damaged.h5"

    def read(wounds):
        path.write_bytes(damaged(good, wounds))
        return content(Surface.load(path)) == said

    for wounds, answer in zip(batch, each_in_child(read, batch, seconds=10), strict=True):
        assert same_or_refused(answer), (wounds, answer)


def test_each_byte_of_a_surface_counts_or_changes_nothing(here, rich):
    good, said = rich
    path = here / "damaged.h5"
    places = range(0, len(good), max(1, len(good) // (200 * MANY)))

    def read(at):
        path.write_bytes(good[:at] + bytes([good[at] ^ 0x41]) + good[at + 1 :])
        return content(Surface.load(path)) == said

    answers = each_in_child(read, places, seconds=10)
    assert [x for x in zip(places, answers, strict=True) if not same_or_refused(x[1])] == []


def test_a_block_of_zeros_in_a_surface_changes_nothing_or_is_refused(here, rich):
    good, said = rich
    path = here / "damaged.h5"

    def read(at):
        path.write_bytes(damaged(good, [("zero", at / len(good), b"0")]))
        return content(Surface.load(path)) == said

    places = range(0, len(good), max(1, 16 // MANY))
    answers = each_in_child(read, places, seconds=10)
    assert [x for x in zip(places, answers, strict=True) if not same_or_refused(x[1])] == []


def test_a_wrong_bit_in_a_value_is_always_seen(here, rich):
    good, said = rich
    path = here / "damaged.h5"
    for name, _, _, data in said[0]:
        at = good.index(data)
        for place in range(at, at + len(data), 7):
            wrong = bytes([good[place] ^ (1 << place % 8)])
            path.write_bytes(good[:place] + wrong + good[place + 1 :])
            with pytest.raises(DamagedFile):
                Surface.load(path)
                pytest.fail(f"{name}, byte {place}")


# -- checkpoints -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(here):
    """The bytes of one state dict in three formats."""
    from safetensors.torch import save_file

    state = nn.Linear(3, 2).state_dict()
    torch.save(state, here / "a.pt")
    torch.save(state, here / "old.pt", _use_new_zipfile_serialization=False)
    save_file(state, here / "a.safetensors")
    return {n: (here / n).read_bytes() for n in ("a.pt", "old.pt", "a.safetensors")}


@examples(4)
@given(batch=st.lists(damages(2) | st.binary(max_size=50), min_size=30, max_size=50))
def test_any_checkpoint_is_tensors_or_refused(here, checkpoints, batch):
    def read(item):
        kinds = set()
        for name, good in checkpoints.items():
            path = here / f"damaged-{name}"
            path.write_bytes(item if isinstance(item, bytes) else damaged(good, item))
            try:
                state = load_state(path)
                kinds |= {isinstance(t, torch.Tensor) for t in state.values()}
            except LsweepError as e:
                kinds.add(len(str(e).splitlines()) == 1)
        return kinds

    for item, answer in zip(batch, each_in_child(read, batch, seconds=10), strict=True):
        assert not isinstance(answer, Died | Raised) and answer == {True}, (item, answer)


# -- plans -----------------------------------------------------------------------------------------

SMALL = st.decimals(-3, 3, places=3)
PLAIN_AXIS = st.tuples(SMALL, SMALL, st.integers(2, 4))
PLAIN_RECIPE = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**63 - 1),
        "normalize": RECIPES["normalize"],
        "ignore": RECIPES["ignore"],
        "orthogonalize": st.booleans(),
        "parameters": st.sampled_from([["*"], ["0.*"], ["2.*", "0.*"]]),
    },
)


@examples(25)
@given(
    bounds=st.lists(PLAIN_AXIS, min_size=1, max_size=3),
    recipes=st.lists(PLAIN_RECIPE, min_size=3, max_size=3),
    evaluate=st.fixed_dictionaries(
        {
            "metrics": st.permutations(["loss", "accuracy"]),
            "splits": st.permutations(["train", "test"]),
        },
        optional={
            "precision": st.sampled_from(["float64", "float32", "bfloat16"]),
            "batch_norm": st.sampled_from(["eval", "recalibrate"]),
            "batch_size": st.integers(1, 99),
            "expected": st.just({"train_loss": 0.5}),
        },
    ),
    options=st.fixed_dictionaries({}, optional={"width": st.integers(3, 5)}),
)
def test_a_plan_gives_the_settings_that_it_was_made_from(
    tmp_path_factory, bounds, recipes, evaluate, options
):
    assume(all(low < high for low, high, _ in bounds))
    table = {
        "problem": {"factory": "problem.py:make", "options": options},
        "grid": {
            a: {"range": [low, high], "count": n}
            for a, (low, high, n) in zip(AXES, bounds, strict=False)
        },
        "directions": dict(zip(AXES[: len(bounds)], recipes, strict=False)),
        "evaluate": evaluate,
    }
    asked = Settings.from_table(table)
    base = tmp_path_factory.mktemp("plans")
    write_sweep(base)
    folder = RunFolder(base / "a.run")
    planned = plan_run(asked, make_problem(asked.problem, base), base, folder)
    given_back = settings_of(folder, Plan.read(folder))
    kept = dataclasses.replace(asked.evaluate, expected={})  # a check, and no part of a plan
    if kept.batch_norm != "eval" and kept.batch_size == "auto":
        kept = dataclasses.replace(kept, batch_size=BATCH_NORM_BATCH)  # planned: values need it
    assert given_back == dataclasses.replace(asked, evaluate=kept)
    assert planned.rounds.last.lattice.shape == tuple(n for *_, n in reversed(bounds))


# -- points ----------------------------------------------------------------------------------------

BOUNDS = st.decimals(-1000, 1000, places=6) | st.decimals(-1, 1, places=1) | st.integers(-9, 9)


@st.composite
def axes(draw: st.DrawFn, largest: int = 60) -> Axis:
    """Axes whose bounds are decimals as people type them, and as computers print them."""
    a, b = (Decimal(draw(BOUNDS)) for _ in range(2))
    assume(a != b)
    return Axis((min(a, b), max(a, b)), draw(st.integers(2, largest)))


@examples(200)
@given(axes())
def test_coordinates_are_the_float_nearest_to_the_rational(axis):
    low, high = (Fraction(b) for b in axis.range)
    exact = [low + (high - low) * i / (axis.count - 1) for i in range(axis.count)]
    values = coordinates(axis)
    assert values.dtype == np.float64 and len(values) == axis.count
    for value, true in zip(values.tolist(), exact, strict=True):
        for other in (math.nextafter(value, -math.inf), math.nextafter(value, math.inf)):
            assert abs(Fraction(value) - true) <= abs(Fraction(other) - true)
    assert (values[0], values[-1]) == (float(axis.range[0]), float(axis.range[1]))
    mirrored = coordinates(Axis((-axis.range[1], -axis.range[0]), axis.count))
    assert (-mirrored[::-1] == values).all()


@examples(200)
@given(axes(), st.integers(1, 7), st.integers(0, 2), st.integers(0, 2))
def test_finer_and_wider_grids_share_points_exactly(axis, finer, before, after):
    low, high = axis.range
    length, n = high - low, axis.count - 1
    wide = Axis((low - before * length, high + after * length),
                finer * n * (1 + before + after) + 1)  # fmt: skip
    values = coordinates(wide)
    start = finer * n * before
    assert (values[start : start + finer * n + 1 : finer] == coordinates(axis)).all()
    found = Lattice.of({"x": wide}).find(Lattice.of({"x": axis}))
    assert found.tolist() == list(range(start, start + finer * n + 1, finer))


def lattices(largest: int) -> st.SearchStrategy:
    """Lattices of one to three axes."""
    return st.lists(axes(largest), min_size=1, max_size=3).map(
        lambda a: Lattice.of(dict(zip(AXES, a, strict=False)))
    )


@examples(100)
@given(lattices(9))
def test_coarse_to_fine_is_every_point_once_and_coarse_first(lattice):
    order = lattice.coarse_to_fine()
    assert sorted(order.tolist()) == list(range(len(lattice)))
    corners = [0 if n == 1 else (0, n - 1) for n in lattice.shape]
    first = {np.ravel_multi_index(c, lattice.shape) for c in itertools.product(*corners)}
    assert set(order[: len(first)].tolist()) == first
    if len(lattice.shape) == 1:
        # After the ends and 2^k - 1 points between them no gap is wider than a 2^k-th, rounded up.
        n = len(lattice) - 1
        for k in range(n.bit_length() + 1):
            known = np.sort(order[: 2**k + 1])
            assert np.diff(known).max() <= -(-n // 2**k)


@examples(150)
@given(st.data())
def test_find_agrees_with_looking_at_every_point(data):
    mine = data.draw(lattices(6))
    shared = {
        name: np.array(
            sorted(data.draw(st.sets(st.sampled_from([*c.tolist(), -0.5, 2000.0]), min_size=1)))
        )
        for name, c in mine.axes.items()
    }
    other = Lattice(shared)
    index = {tuple(p): i for i, p in enumerate(mine.offsets(np.arange(len(mine))).tolist())}
    wanted = [index.get(tuple(p), -1) for p in other.offsets(np.arange(len(other))).tolist()]
    assert mine.find(other).tolist() == wanted
