"""The plan: what a value depends on, frozen; its digest is in every other file of the run."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

from lsweep.errors import DamagedFile, LsweepError, PlanChanged
from lsweep.plans.pointwise import POINTWISE, Pointwise, expanded
from lsweep.plans.recipes import INDEXES, STILL
from lsweep.storage.files import digest, publish, read_json, sealed
from lsweep.storage.folder import RunFolder

VERSION = 1
LIVE = "live:problem"
"""What stands for the factory of a run that was made from a live model."""


@dataclass(frozen=True)
class Plan:
    """What a value depends on; JSON throughout, so that it is the same everywhere.

    Attributes:
        problem: ``factory``, ``options``, ``code`` (sha256 of its file, or None).
        origin: ``tensors``, ``parameters``, ``sha256`` of weights and buffers.
        directions: axis -> the recipe, with the ``sha256`` of the vector it makes.
        steps: checkpoints shown on the plane: ``label``, ``sha256``.
        data: split -> ``samples`` and a cheap ``fingerprint``.
        evaluate: ``metrics``, ``splits``, ``batch_norm``, ``precision``, ``slices``, ...
        facts: what follows from the rest and was found out once: norms, cosines, coefficients,
            projections. Not compared on resuming, for its last bits differ between machines.
    """

    problem: dict[str, Any]
    origin: dict[str, Any]
    directions: dict[str, dict[str, Any]]
    steps: list[dict[str, Any]]
    data: dict[str, dict[str, Any]]
    evaluate: dict[str, Any]
    facts: dict[str, Any]
    version: int = VERSION

    @functools.cached_property
    def digest(self) -> str:
        """The sha256 that names this plan in every other file of the run."""
        return digest(dataclasses.asdict(self))

    @property
    def axes(self) -> tuple[str, ...]:
        """Axis names in the order x, y, z."""
        return tuple(sorted(self.directions))

    @property
    def variables(self) -> tuple[tuple[str, str], ...]:
        """(split, metric) of each stored value, in the order of a row's sums.

        A pointwise metric counts as the variables that it computes.
        """
        metrics = expanded(tuple(self.evaluate["metrics"]))
        return tuple((s, m) for s in self.evaluate["splits"] for m in metrics)

    @property
    def variable_names(self) -> tuple[str, ...]:
        """``train_loss`` and the like, in the order of a row's sums."""
        return tuple(f"{s}_{m}" for s, m in self.variables)

    @functools.cached_property
    def pointwise(self) -> dict[str, Pointwise]:
        """``train_hessian_max`` and the like -> the pointwise metric that computes it."""
        found = {v: POINTWISE[m] for m in self.evaluate["metrics"] if m in POINTWISE
                 for v in POINTWISE[m].variables}  # fmt: skip
        return {f"{s}_{v}": p for s in self.evaluate["splits"] for v, p in found.items()}

    @property
    def counting(self) -> tuple[str, ...]:
        """Axes whose offsets count replicates or layers, in the order in which they vary least."""
        kinds = {self.directions[a]["kind"]: a for a in self.axes}
        return tuple(kinds[k] for k in INDEXES if k in kinds)

    @property
    def moving(self) -> tuple[str, ...]:
        """Axes that move the weights, in the order x, y, z."""
        return tuple(a for a in self.axes if self.directions[a]["kind"] not in STILL)

    @property
    def derived(self) -> tuple[str, ...]:
        """Axes whose directions are stored in the run."""
        return tuple(a for a in self.axes if self.directions[a].get("stored"))

    @property
    def slices(self) -> int:
        """Into how many fixed parts the data is cut."""
        return int(self.evaluate["slices"])

    def freeze(self, folder: RunFolder) -> Plan:
        """Publish this plan, or return the one that is already there.

        Raises:
            PlanChanged: another plan is there; the first differing field is named.
        """
        publish(folder.plan, sealed(dataclasses.asdict(self)))
        there = Plan.read(folder)
        there.require_same(self, folder)
        return there

    @classmethod
    def read(cls, folder: RunFolder) -> Plan:
        """Read the plan of a run.

        Raises:
            LsweepError: there is none, or a newer lsweep made it.
            DamagedFile: it was altered.
        """
        if not folder.exists:
            toml = folder.root / "sweep.toml"
            hint = f"; for its sweep, name {toml}" if toml.is_file() else ""
            raise LsweepError(f"{folder.root} is not a run: it has no plan.json{hint}")
        value = read_json(folder.plan)
        version = value.get("version")
        if isinstance(version, int) and version > VERSION:
            raise LsweepError(
                f"{folder.plan} has version {version}, this lsweep reads up to {VERSION}: "
                "update lsweep"
            )
        try:
            return cls(**value)
        except TypeError as e:
            raise DamagedFile(f"{folder.plan} is not a plan: {e}") from None

    def _edited(self, folder: RunFolder) -> str:
        """What is said where nothing but the factory's file is seen to differ so far."""
        file = self.problem["factory"].rpartition(":")[0]
        return (
            f"{folder.root} holds another plan: problem.code, {file} was edited since. The run "
            f"keeps the file as it was planned ({folder.factory(file)}): --kept-code goes on with "
            "that, where it makes the planned weights, data and values still; for the edited one "
            "give a new folder with --run"
        )

    def require_same(self, other: Plan, folder: RunFolder) -> None:
        """Refuse another plan on this run.

        Raises:
            PlanChanged: with the first field that differs.
        """
        for name in ("problem", "origin", "directions", "steps", "data", "evaluate"):
            found = _difference(getattr(self, name), getattr(other, name), name)
            if found:
                field, old, new = found
                if field == "problem.code" and old and new:
                    raise PlanChanged(self._edited(folder), field)
                if name == "directions" and self.axes != other.axes:
                    there, now = _shape(self.axes), _shape(other.axes)
                    raise PlanChanged(
                        f"{folder.root} holds another plan: it is {there}, now {now} is asked for; "
                        "give a new folder with --run (run=… in Python)",
                        field,
                    )
                remedy = "restore it, or give a new folder with --run"
                if not folder.all_parts():
                    remedy = "nothing was computed there: remove it"
                if field == "origin.sha256":
                    remedy += (
                        "; or the factory makes another network each time it is called: set a "
                        "seed or load a checkpoint"
                    )
                raise PlanChanged(
                    f"{folder.root} holds another plan: {field} is {_short(old)} there and "
                    f"{_short(new)} now; {remedy}",
                    field,
                )


def _difference(old: Any, new: Any, where: str) -> tuple[str, Any, Any] | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            found = _difference(old.get(key), new.get(key), f"{where}.{key}")
            if found:
                return found
        return None
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            found = _difference(a, b, f"{where}[{i}]")
            if found:
                return found
        return None
    return None if old == new else (where, old, new)


def _shape(axes: tuple[str, ...]) -> str:
    return f"a {('line', 'plane', 'volume')[len(axes) - 1]} ({', '.join(axes)})"


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "set"
    if isinstance(value, str) and len(value) > 58:
        value = f"{value[:56]}…"  # and then in quotes, both of them
    text = "not set" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
