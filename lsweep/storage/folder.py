"""Where everything in a run folder lies; no other module makes a path inside a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lsweep.storage.insist import insist, names

LEASES_PER_FOLDER = 1024


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run.

    >>> RunFolder(Path("net.run")).lease(0, 2048, 1).as_posix()
    'net.run/leases/0000/002/002048.g1'
    """

    root: Path

    @property
    def plan(self) -> Path:
        """The frozen plan."""
        return self.root / "plan.json"

    @property
    def source(self) -> Path:
        """Where the run was planned: the folder that relative paths of the TOML refer to."""
        return self.root / "source.json"

    @property
    def settings(self) -> Path:
        """The copy of sweep.toml."""
        return self.root / "sweep.toml"

    @property
    def directions(self) -> Path:
        """Norms and cosines of the directions."""
        return self.root / "directions.h5"

    @property
    def rounds(self) -> Path:
        """The folder of rounds."""
        return self.root / "rounds"

    @property
    def devices(self) -> Path:
        """The folder of device files."""
        return self.root / "devices"

    @property
    def workers(self) -> Path:
        """The folder of worker files."""
        return self.root / "workers"

    @property
    def leases(self) -> Path:
        """The folder of leases."""
        return self.root / "leases"

    @property
    def parts(self) -> Path:
        """The folder of parts."""
        return self.root / "parts"

    @property
    def arrays(self) -> Path:
        """The folder of stored arrays."""
        return self.root / "arrays"

    @property
    def submissions(self) -> Path:
        """The folder of what was submitted to Slurm."""
        return self.root / "submissions"

    @property
    def figures(self) -> Path:
        """The folder of pictures."""
        return self.root / "figures"

    @property
    def logs(self) -> Path:
        """The folder of what local workers print."""
        return self.root / "logs"

    @property
    def measures(self) -> Path:
        """The folder of what was measured: child runs and their numbers."""
        return self.root / "measures"

    @property
    def invariance(self) -> Path:
        """The certificate: which rescalings leave the network, and the picture, unchanged."""
        return self.measures / "invariance.json"

    @property
    def surface(self) -> Path:
        """The merged surface."""
        return self.root / "surface.h5"

    @property
    def measured(self) -> Path:
        """The numbers that were measured last."""
        return self.root / "measures.json"

    def child(self, name: str) -> RunFolder:
        """The child run that computes one measure; only its bare name counts."""
        return RunFolder(self.measures / Path(name).name)

    def aligned(self, stem: str, key: str, kind: str) -> Path:
        """Another network's checkpoint with its units in this one's order, by what made it."""
        return self.measures / f"{Path(stem).name}-aligned-{key[:12]}.{kind}"

    def all_children(self) -> list[str]:
        """The names of the child runs that are planned."""
        return [n for n in names(self.measures) if self.child(n).exists]

    def factory(self, name: str) -> Path:
        """The copy of the factory's file; only its bare name counts, so nothing escapes the run."""
        return self.root / Path(name).name

    def array(self, name: str, sha256: str) -> Path:
        """Stored arrays, named by what they hold."""
        return self.arrays / f"{name}-{sha256[:16]}.h5"

    def round(self, number: int) -> Path:
        """One published round."""
        return self.rounds / f"{number:04d}.json"

    def device(self, name: str) -> Path:
        """The file of a device class."""
        return self.devices / f"{name}.json"

    def worker(self, name: str) -> Path:
        """The heartbeat of a worker."""
        return self.workers / f"{name}.json"

    def part(self, worker: str, number: int) -> Path:
        """One part of a worker."""
        return self.parts / f"{worker}.{number:04d}.h5"

    def lease(self, round_: int, unit: int, generation: int) -> Path:
        """One generation of the lease that begins with a unit."""
        folder = self.lease_folder(round_, unit)
        return folder / f"{unit:06d}.g{generation}"

    def lease_folder(self, round_: int, unit: int) -> Path:
        """The folder that holds a lease."""
        return self.leases / f"{round_:04d}" / f"{unit // LEASES_PER_FOLDER:03d}"

    def lease_size(self, round_: int) -> Path:
        """How many units each lease of a round covers."""
        return self.leases / f"{round_:04d}.json"

    def all_leases(self) -> list[Path]:
        """All leases of all rounds, and what was agreed on about them."""
        return sorted([*self.leases.glob("*/*/[0-9]*"), *self.leases.glob("[0-9]*.json")])

    def closing(self, launch: str, generation: int) -> Path:
        """One generation of the claim to merge for all ranks of a launch."""
        return self.leases / "closing" / f"{launch}.g{generation}"

    def log(self, index: int) -> Path:
        """What local worker ``index`` printed."""
        return self.logs / f"worker-{index}.log"

    def slurm_logs(self, name: str) -> Path:
        """What the tasks of one submission printed, and the files with which they start."""
        return self.logs / "slurm" / name

    def submission(self, number: int) -> Path:
        """One submission to Slurm."""
        return self.submissions / f"{number:04d}.json"

    def all_submissions(self) -> list[Path]:
        """All submissions, by number."""
        return [self.submissions / n for n in names(self.submissions) if n.endswith(".json")]

    def all_parts(self) -> list[Path]:
        """All parts, by name."""
        return [self.parts / n for n in names(self.parts) if n.endswith(".h5")]

    def all_workers(self) -> list[Path]:
        """All worker files, by name."""
        return [self.workers / n for n in names(self.workers) if n.endswith(".json")]

    def all_devices(self) -> list[Path]:
        """All device files, by name."""
        return [self.devices / n for n in names(self.devices) if n.endswith(".json")]

    @property
    def planned_by(self) -> str:
        """The command that plans this run; of a child, its parent's."""
        parent = RunFolder(self.root.parent.parent)
        if parent.measures == self.root.parent and parent.exists:
            return f"lsweep plan {parent.root} --measures {self.root.name}"
        return f"lsweep plan SWEEP.toml --run {self.root}"

    @property
    def exists(self) -> bool:
        """True when the folder holds a plan."""
        return insist(self.plan.is_file)
