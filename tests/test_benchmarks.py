"""The benchmarks still run: their quick forms print whole tables, and all evaluators agree."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def printed(name: str, *options: str) -> str:
    """What the quick form of a benchmark prints; it exits with 1 where losses do not agree."""
    command = [sys.executable, BENCHMARKS / name, "--quick", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_cost_compares_every_evaluator_with_every_other():
    text = printed("cost.py")
    tables = text.split("times faster than\n")[1:]
    assert len(tables) == 1
    for table in tables:
        columns = re.findall(r"\S+ \S+|\S+", table.splitlines()[0].partition("peak")[2])
        rows = re.findall(r"^(lsweep .+?|plain.*?)  +(\d.*)$", table, re.MULTILINE)
        names = [name for name, _ in rows]
        assert "plain" in names and "plain, its best" in names
        assert any("auto" in name for name in names) and "lsweep float32, eager" in names
        for name, numbers in rows:
            batch, median, fastest, spread, error, peak, *ratios = numbers.split()
            assert int(batch) > 0 and 0 < float(fastest) <= float(median)
            assert float(spread.rstrip("%")) >= 0 and float(error) < 1e-5
            assert 0 <= float(peak.rstrip("%")) < float("inf")
            assert len(ratios) == (len(columns) if name.startswith("lsweep") else 0)
            assert all(0 < float(r) < float("inf") for r in ratios)


def test_resolution_sweeps_to_the_tolerance(tmp_path):
    text = printed("resolution.py", "--figures", str(tmp_path))
    row = re.search(
        r"^MLP, untrained +\S+ in float32 +([\d.]+) s +(\d+) of 289 +([\d.]+)% +([\d.]+)%",
        text,
        re.M,
    )
    assert row, text
    seconds, evaluated, stated, error = map(float, row.groups())
    assert seconds > 0 and 0 < evaluated <= 289
    assert stated <= 1 and error <= 1
    assert re.search(r"peak memory, .+: \d+ MiB \(\d+ to \d+\) above the \d+", text)


def test_honesty_refines_against_dense_truth():
    text = printed("honesty.py")
    row = re.search(r"^2 layers +120 +(\d+) +(\d+) +([\d.]+) +([\d.]+) +([\d.]+) +\S", text, re.M)
    assert row, text
    evaluations, rounds, error, covered, ratio = map(float, row.groups())
    assert 25 < evaluations <= 120 and rounds > 1
    assert error <= 1 and covered >= 90 and 1 < ratio <= 8
    assert "other planes: 1 runs; within the limits: evaluations 100%, error 100%" in text


def claims(*options: str) -> list[list[str]]:
    """The rows of the paper's table, in its quick form: every statistic, no verdict asserted."""
    command = [sys.executable, "-m", "benchmarks.paper", "--quick", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    table = done.stdout.split("| claim |")[1].split("\n\n")[0]
    return [re.split(r" (?<!\\)\| ", line.strip("| ")) for line in table.splitlines()[2:]]


def rows_of_the_table(rows: list[list[str]], least: int) -> None:
    assert len(rows) >= least
    for _claim, _paper, _statistic, threshold, measured, seeds, agrees in rows:
        assert threshold and re.search(r"\d", measured) and "nan" not in measured
        assert seeds == "1" and agrees in ("**yes**", "**no**", "cannot tell")


def test_the_papers_claims_are_all_judged(tmp_path):
    rows_of_the_table(claims("--figure", str(tmp_path / "figure.png")), 27)
    assert (tmp_path / "figure.png").stat().st_size > 1000


@pytest.mark.full
def test_what_the_paper_does_not_have_is_judged():
    rows_of_the_table(claims("--beyond"), 3)
