"""Points that fail, kill, are not finite or too large; changed plans; what each is told."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from cases import (
    FACTORY,
    Raised,
    command,
    committed,
    differences,
    evaluated,
    finished,
    merged,
    planned,
    sweep_file,
    truth,
    worked,
)

from lsweep.outcomes.reading import read_part
from lsweep.plans.plan import Plan
from lsweep.plans.rounds import Rounds
from lsweep.runs.status import share_done, status
from lsweep.storage.folder import RunFolder
from lsweep.storage.parts import PartWriter
from lsweep.storage.rows import TEXTS, Kind
from lsweep.storage.workers import all_workers
from lsweep.surfaces.surface import Status, Surface

X = [0.0, 0.25, 0.5, 0.75, 1.0]
OK, NONFINITE, FAILED = Status.OK, Status.NONFINITE, Status.FAILED


def run(toml: Path, *arguments: object) -> tuple[int, str, RunFolder]:
    """Return exit code, what was printed, and the run of ``lsweep run`` with one worker."""
    folder = toml.with_name(f"{toml.stem}.run")
    done = command("run", toml, "--workers", 1, "--no-picture", "--device", "cpu", *arguments)
    return done.code, done.out + done.err, RunFolder(folder)


def calm(base: Path, **options: object) -> Surface:
    return merged(finished(sweep_file(base / "calm", **options)))[0]


# -- failed and not finite -------------------------------------------------------------------------


def test_points_that_raise_are_failed_with_their_reason_and_the_run_exits_3(tmp_path: Path) -> None:
    toml = sweep_file(tmp_path, trouble="raise")
    (tmp_path / "broken").touch()
    code, said, folder = run(toml, "--unit-points", 5)  # a unit of good and bad points
    surface = Surface.load(folder.surface)
    assert code == 3
    assert surface.status.tolist() == [OK, FAILED, OK, FAILED, OK]
    assert np.isnan(surface["train_loss"][[1, 3]]).all()
    assert np.allclose(surface["train_loss"][::2], truth(surface)[::2], rtol=1e-6)
    for x in (0.25, 0.75):
        reason = f"ValueError: no value at {x} (problem.py:{line_of('no value at')})"
        assert f"1 point failed: {reason}" in said
        assert status(folder)["failed"][reason] == 1
        assert surface.provenance["failures"][reason] == 1
    assert share_done(folder) == (5, 5)


def line_of(text: str) -> int:
    return next(i for i, line in enumerate(FACTORY.splitlines(), 1) if text in line)


def test_failed_points_are_asked_again_on_request_and_only_they(tmp_path: Path) -> None:
    toml = sweep_file(tmp_path, trouble="raise")
    (tmp_path / "broken").touch()
    assert run(toml)[0] == 3
    code, said, folder = run(toml)
    assert (code, len(evaluated(folder))) == (3, 5)  # they count as done

    code, said, folder = run(toml, "--retry-failed")  # not yet mended
    assert (code, len(evaluated(folder))) == (3, 7)
    assert "1 point failed: ValueError: no value at 0.25" in said

    (tmp_path / "broken").unlink()
    code, said, folder = run(toml, "--retry-failed")
    assert (code, len(evaluated(folder))) == (0, 9)
    assert " failed: " not in said
    assert run(toml, "--retry-failed")[0] == 0
    assert len(evaluated(folder)) == 9  # nothing is left to retry
    surface = Surface.load(folder.surface)
    assert surface.status.tolist() == [OK] * 5
    assert surface["train_loss"].tobytes() == calm(tmp_path)["train_loss"].tobytes()


def test_one_reason_is_kept_once_however_many_points_fail_by_it(tmp_path: Path) -> None:
    writer = PartWriter(tmp_path / "p.h5", plan="p", variables=1, capacity=256, header={})
    numbers = [writer.note("the same") for _ in range(200)]
    others = [writer.note(f"reason {i}") for i in range(TEXTS)]
    assert set(numbers) == {1}
    assert others == [*range(2, TEXTS), 0, 0]  # then there is no more room
    assert writer.note("the same") == 1
    writer.close()
    texts = read_part(tmp_path / "p.h5", "p", 1).texts
    assert texts == {1: "the same", **{i + 2: f"reason {i}" for i in range(TEXTS - 2)}}


def test_many_different_reasons_are_told_as_far_as_there_is_room_and_never_mixed_up(
    tmp_path: Path,
) -> None:
    toml = sweep_file(tmp_path, x=151, trouble="words")
    (tmp_path / "broken").touch()
    code, _, folder = run(toml)
    surface, report = merged(folder)
    assert code == 3
    assert Counter(surface.status.tolist()) == {OK: 1, FAILED: 150}
    assert report.failed.pop("reason not recorded") == 150 - (TEXTS - 1)
    assert set(report.failed.values()) == {1}
    part, rounds = committed(folder).parts[0], Rounds.read(folder, Plan.read(folder))
    for row in part.rows[part.rows["text"] > 0]:
        x = round(float(rounds.offsets[row["point"], 0]), 4)
        assert part.reason(row).startswith(f"ValueError: no value at {x} (")


def test_nan_and_infinity_are_results(tmp_path: Path) -> None:
    code, said, folder = run(sweep_file(tmp_path, trouble="nan"))
    surface = Surface.load(folder.surface)
    assert code == 0
    assert "2 points are NaN or infinite" in said
    assert surface.status.tolist() == [OK, OK, NONFINITE, NONFINITE, OK]
    assert np.isnan(surface["train_loss"][2])
    assert surface["train_loss"][3] == np.inf
    assert status(folder)["nonfinite"] == 2


# -- sick devices and broken problems --------------------------------------------------------------


@pytest.mark.parametrize(
    ("trouble", "words"),
    [("sick", "the centre fails too"), ("drifts", "the centre gives another value")],
)
def test_a_sick_device_writes_nothing_for_the_point_and_stops_with_exit_3(
    tmp_path: Path, trouble: str, words: str
) -> None:
    code, said, folder = run(sweep_file(tmp_path, trouble=trouble), "--unit-points", 1)
    assert code == 3
    assert words in said
    assert "cpu" in said
    rounds = Rounds.read(folder, Plan.read(folder))
    known = {float(rounds.offsets[p, 0]) for p, _ in evaluated(folder)}
    assert 0.5 not in known
    assert not (committed(folder).parts[0].rows["status"] == FAILED).any()
    assert [w["state"] for w in all_workers(folder)] == ["sick"]
    assert [w["state"] for w in status(folder)["workers"]] == ["sick"]


def test_a_problem_that_fails_at_its_own_weights_is_one_line_and_writes_nothing(
    tmp_path: Path,
) -> None:
    code, said, folder = run(sweep_file(tmp_path, trouble="bug"))
    assert code == 1
    assert said.splitlines()[-1] == (
        "lsweep: the problem fails at its own weights, before any is moved: KeyError: 'labels' "
        f"(problem.py:{line_of('KeyError')}); in train, the batch is (64,) float32, "
        "(64,) float32"
    )
    assert "Traceback" not in said
    assert not folder.all_parts()


# -- points that kill ------------------------------------------------------------------------------


def test_a_point_that_kills_every_worker_is_found_out_and_the_run_ends(tmp_path: Path) -> None:
    toml = sweep_file(tmp_path, x=9, trouble="poison")
    folder = RunFolder(tmp_path / "sweep.run")
    done = command("run", toml, "--workers", 2, "--no-picture", "--unit-points", 3)
    surface, report = merged(folder)
    assert done.code == 3, done.err
    assert surface.status.tolist() == [OK] * 4 + [FAILED] + [OK] * 4
    reference = calm(tmp_path, x=9)
    good = surface.status == OK
    assert surface["train_loss"][good].tobytes() == reference["train_loss"][good].tobytes()
    assert list(report.failed.items()) == [("killed 2 workers that evaluated it alone", 1)]
    assert "1 point failed: killed 2 workers that evaluated it alone" in done.err
    assert "was killed (SIGKILL)" in done.err
    # Three died with the unit, at most three more with the point alone; the others are not blamed.
    dead = [w for w in status(folder)["workers"] if w["state"] == "dead"]
    assert 5 <= len(dead) <= 6


# -- memory ----------------------------------------------------------------------------------------


def test_out_of_memory_halves_the_batch_and_a_new_part_says_so(tmp_path: Path) -> None:
    code, _, folder = run(sweep_file(tmp_path, trouble="memory"), "--unit-points", 1)
    surface = Surface.load(folder.surface)
    assert code == 0
    assert surface.status.tolist() == [OK] * 5
    assert np.allclose(surface["train_loss"], truth(surface), rtol=1e-6)
    sizes = [p.header["batch_sizes"] for p in committed(folder).parts]
    whole = json.loads(folder.all_devices()[0].read_bytes())["batch_sizes"]["train"]
    assert whole > 16
    assert sizes == [f"train={whole}", "train=16"]  # what was committed before stays as it is
    assert evaluated(folder) == [(p, 0) for p in range(5)]


def test_out_of_memory_at_the_centre_halves_the_batch_of_the_whole_class(tmp_path: Path) -> None:
    code, _, folder = run(sweep_file(tmp_path, trouble="memory everywhere"))
    assert code == 0
    assert json.loads(folder.all_devices()[0].read_bytes())["batch_sizes"] == {"train": 16}
    assert [p.header["batch_sizes"] for p in committed(folder).parts] == ["train=16"]
    surface = Surface.load(folder.surface)
    assert np.allclose(surface["train_loss"], truth(surface), rtol=1e-6)


# -- who does what ---------------------------------------------------------------------------------


def test_static_workers_take_their_shards_and_no_leases(tmp_path: Path) -> None:
    folder = planned(sweep_file(tmp_path, x=9), unit_points=2)
    assert worked(folder, index=0, of=2, claims="static") == 5  # units 0, 2 and 4 of 0 to 4
    assert [p for p, _ in evaluated(folder)] == [0, 1, 4, 5, 8]
    assert worked(folder, index=1, of=2, claims="static") == 4
    assert evaluated(folder) == [(p, 0) for p in range(9)]
    assert not folder.leases.exists()
    assert differences(merged(folder)[0], calm(tmp_path, x=9)) == []


@pytest.mark.parametrize("unit_points", [1, 4, 100])
def test_the_size_of_units_and_the_shard_one_begins_with_change_no_bit(
    tmp_path: Path, unit_points: int
) -> None:
    folder = planned(sweep_file(tmp_path, x=9, y=3), unit_points=unit_points)
    assert Rounds.read(folder, Plan.read(folder)).last.unit_points == unit_points
    assert worked(folder, index=unit_points % 3, of=3) == 27
    assert evaluated(folder) == [(p, 0) for p in range(27)]
    assert differences(merged(folder)[0], calm(tmp_path, x=9, y=3)) == []


# -- slices ----------------------------------------------------------------------------------------


def test_slices_give_the_same_values_and_the_same_bits_each_time(tmp_path: Path) -> None:
    whole = calm(tmp_path, x=5, y=3)
    cut = [
        finished(sweep_file(tmp_path / name, x=5, y=3, evaluate="slices = 3"), unit_points=unit)
        for name, unit in (("a", 1), ("b", 4))
    ]
    for folder in cut:
        assert evaluated(folder) == [(p, s) for p in range(15) for s in range(3)]
    first, second = (merged(folder)[0] for folder in cut)
    assert differences(first, second) == []
    for name in whole.values:
        assert np.allclose(first[name], whole[name], rtol=1e-12, atol=1e-12), name


# -- other plans and other grids -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("directions.x.seed", {"seed": 1}),
        ("problem.options.pause", {"pause": 0.001}),
        ("origin.sha256", {"weight": 2.0}),
        ("data.train.fingerprint", {"scale": 2.0}),
        ("evaluate.precision", {"evaluate": 'precision = "float64"'}),
        ("evaluate.slices", {"evaluate": "slices = 2"}),
    ],
)
def test_a_changed_plan_is_refused_with_the_field_named(
    tmp_path: Path, field: str, change: dict[str, object]
) -> None:
    toml = sweep_file(tmp_path, pause=0.0, weight=1.0, scale=1.0)
    folder = finished(toml)
    before = sorted((p, p.read_bytes()) for p in folder.root.rglob("*") if p.is_file())
    options = {"pause": 0.0, "weight": 1.0, "scale": 1.0, **change}
    code, said, folder = run(sweep_file(tmp_path, **options))
    assert code == 1
    # Options come before what they change in the list of fields.
    option = field.split(".")[0] in ("origin", "data")
    named = f"problem.options.{next(iter(change))}" if option else field
    assert f"{folder.root} holds another plan: {named} is " in said
    assert "Traceback" not in said
    after = sorted((p, p.read_bytes()) for p in folder.root.rglob("*") if p.is_file())
    assert before == after


def test_changed_code_weights_or_data_behind_the_same_options_are_refused(tmp_path: Path) -> None:
    toml = sweep_file(tmp_path)
    finished(toml)
    text = FACTORY.replace("nn.init.constant_(net.a.weight, weight)", "net.a.weight.data += 1e-3")
    for now in (FACTORY + "\n# edited\n", text):
        (tmp_path / "problem.py").write_text(now)
        code, said, _ = run(toml)
        assert (code, "problem.code, problem.py was edited" in said) == (1, True), said


def test_a_worker_refuses_weights_or_data_that_are_not_the_planned_ones(tmp_path: Path) -> None:
    # The factory reads them from files beside it, so the code is the same.
    text = FACTORY.replace(
        "    spoiled = []\n",
        "    spoiled = []\n"
        "    if (HERE / 'other weights').exists():\n"
        "        net.a.weight.data += 1e-3\n"
        "    if (HERE / 'other data').exists():\n"
        "        t = t + 1e-3\n",
    )
    for name, field in (
        ("other weights", "origin.sha256"),
        ("other data", "data.train.fingerprint"),
    ):
        base = tmp_path / name.replace(" ", "-")
        toml = sweep_file(base)
        (base / "problem.py").write_text(text)
        folder = planned(toml)
        (base / name).touch()
        answer = worked(folder)
        assert isinstance(answer, Raised)
        assert answer.kind == "PlanChanged"
        # Of weights in words that all workers share, so that it is told once.
        words = "the factory makes another network" if "weights" in name else f"{field} is "
        assert words in answer.text
        assert not folder.all_parts()
        (base / name).unlink()
        assert worked(folder) == 5


def test_a_worker_whose_plan_was_replaced_while_it_began_commits_nothing(tmp_path: Path) -> None:
    """As on mounts whose locks end at a node's door: there nobody knows that it holds the plan."""
    text = FACTORY.replace(
        "        s, t = batch\n",
        "        s, t = batch\n"
        "        if (HERE / 'other.json').exists():\n"
        "            (HERE / 'other.json').replace(HERE / 'sweep.run/plan.json')\n",
    )
    toml = sweep_file(tmp_path, seed=1)
    toml.with_name("problem.py").write_text(text)
    other = planned(toml, run=tmp_path / "other.run")
    toml.write_text(toml.read_text().replace("seed = 1", "seed = 2"))
    folder = planned(toml)
    shutil.copy(other.plan, tmp_path / "other.json")
    refused = worked(folder)
    assert isinstance(refused, Raised) and refused.kind == "PlanChanged"
    assert "another command replaced its plan meanwhile" in refused.text
    assert not folder.all_parts()


@pytest.mark.parametrize(
    ("drawn", "what"),
    [("nn.init.uniform_(net.a.weight)", "another network"), ("s.uniform_()", "other train data")],
)
def test_one_worker_refuses_a_factory_that_makes_another_problem_each_time(
    tmp_path: Path, drawn: str, what: str
) -> None:
    toml = sweep_file(tmp_path)
    text = FACTORY.replace("    spoiled = []\n", f"    spoiled = []\n    torch.seed(), {drawn}\n")
    (tmp_path / "problem.py").write_text(text)
    code, said, _ = run(toml, "--on", "inline")
    assert (code, f"the factory makes {what} each time" in said) == (1, True), said
    assert not RunFolder(tmp_path / "sweep.run").all_parts()


def test_a_finer_grid_and_a_wider_range_reuse_every_common_point(tmp_path: Path) -> None:
    folder = finished(sweep_file(tmp_path, x=5, y=3))  # 0, 0.25, …, 1 times 0, 0.5, 1
    assert len(evaluated(folder)) == 15

    finer = finished(sweep_file(tmp_path, x=9, y=3), run=folder.root)
    assert len(evaluated(finer)) == 27  # 12 new ones, each known one once
    assert differences(merged(folder)[0], calm(tmp_path / "1", x=9, y=3)) == []

    wider = {"x": 9, "y": 5, "low": "-1", "high": "1"}  # steps of 0.25 and of 0.5 again
    finished(sweep_file(tmp_path, **wider), run=folder.root)
    common = 5 * 3
    assert len(evaluated(folder)) == 27 + 9 * 5 - common
    assert differences(merged(folder)[0], calm(tmp_path / "2", **wider)) == []

    # Back to the first grid: nothing is left to compute.
    again = planned(sweep_file(tmp_path, x=5, y=3), run=folder.root)
    assert worked(again) == 0
    assert merged(folder)[0].shape == (3, 5)
    assert differences(merged(folder)[0], calm(tmp_path / "3", x=5, y=3)) == []
    assert len(Rounds.read(folder, Plan.read(folder)).all) == 4


def test_the_same_sweep_again_is_no_new_round(tmp_path: Path) -> None:
    toml = sweep_file(tmp_path)
    folder = finished(toml)
    assert run(toml)[0] == 0
    assert planned(toml).root == folder.root
    assert [r.number for r in Rounds.read(folder, Plan.read(folder))] == [0]
    assert len(evaluated(folder)) == 5


def test_one_point_in_a_hundred_is_audited_and_agrees(tmp_path: Path) -> None:
    folder = finished(sweep_file(tmp_path, x=20, y=15))
    rows = np.concatenate([p.rows for p in committed(folder).parts])
    assert (rows["kind"] == Kind.AUDIT).sum() == 3
    assert merged(folder)[1].audit["largest_relative"] == 0.0
