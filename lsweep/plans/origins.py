"""Origins of a study: which networks, which planes of each, and what each sibling run is called."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from lsweep.errors import LsweepError
from lsweep.storage.tables import plain

LONGEST_LABEL = 100  # characters; file systems allow 255 bytes
CHECKPOINTS = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")


@dataclass(frozen=True)
class Sibling:
    """One run of a study: its name, and what it sets in the sweep.toml that all share.

    >>> Sibling("a-s0", ('problem.options.checkpoint="a.pt"', "directions.seed=0")).name
    'a-s0'
    """

    name: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Study:
    """One sweep that stands for several: a run for each origin and each seed.

    Attributes:
        origins: each a checkpoint (``options.checkpoint``), or a table merged over
            ``problem.options``, whose keys that vary are the hyper-parameters; () is the one
            network that the options name.
        seeds: of the random directions, a plane for each; () is the one that they have. Noise is
            keyed by seed and tensor name, so planes of one seed are alike in every sibling.

    >>> study = Study(("nets/a.pt", {"checkpoint": "b.pt", "weight_decay": 0.5}), (0, 1))
    >>> [s.name for s in study.siblings()]
    ['nets-a-s0', 'nets-a-s1', 'b,weight_decay=0.5-s0', 'b,weight_decay=0.5-s1']
    """

    origins: tuple[str | dict[str, Any], ...] = ()
    seeds: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for seed in self.seeds:
            if not 0 <= seed < 2**63:
                raise LsweepError(f"seeds: {seed} must be between 0 and 2**63 - 1")
        if len(set(self.seeds)) != len(self.seeds):
            raise LsweepError(f"seeds = {list(self.seeds)}: give each once")
        if not self.origins and not self.seeds:
            raise LsweepError("write origins = […] or seeds = […], or leave [study] out")
        names: dict[str, int] = {}
        for i, origin in enumerate(self.origins):
            where = f"origins[{i}]"
            options = options_of(origin)
            if not options:
                raise LsweepError(f"{where} is empty: write a checkpoint, or a table of options")
            for key, value in options.items():
                if not key.isidentifier():
                    raise LsweepError(f"{where}: {key!r} is no name of an option")
                try:
                    json.dumps(value, allow_nan=False)
                except (TypeError, ValueError):
                    raise LsweepError(
                        f"{where}.{key} = {value!r}: a plan holds finite numbers, strings, true "
                        "and false, lists and tables"
                    ) from None
            name = label(origin)
            if name in names:
                raise LsweepError(
                    f"origins[{names[name]}] and {where} would both be called {name}: leave one "
                    "out, or name an option that tells them apart"
                )
            names[name] = i

    def siblings(self, seed: int = 0) -> Iterator[Sibling]:
        """Yield every run of the study; ``seed`` is that of its directions if none is given."""
        for origin in self.origins or ({},):
            options = options_of(origin)
            own = tuple(f"problem.options.{k}={_toml(v)}" for k, v in options.items())
            for s in self.seeds or (seed,):
                name = "-".join(filter(None, (label(origin), f"s{s}")))
                more = (f"directions.seed={s}",) if self.seeds else ()
                yield Sibling(name, own + more)


def options_of(origin: str | Mapping[str, Any]) -> dict[str, Any]:
    """Return what an origin sets in ``problem.options``.

    >>> options_of("a.pt")
    {'checkpoint': 'a.pt'}
    """
    return {"checkpoint": origin} if isinstance(origin, str) else plain(dict(origin))


def label(origin: str | Mapping[str, Any]) -> str:
    """Return what an origin is called: it depends on that origin alone, so a study may grow.

    >>> label({"skip": True, "depth": 14}), label("../runs/net 1.ckpt")
    ('depth=14,skip=true', 'runs-net_1')
    """
    options = options_of(origin)
    words = []
    for key in sorted(options, key=lambda k: (k != "checkpoint", k)):
        value = options[key]
        text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
        if key == "checkpoint":
            path = PurePosixPath(text)
            path = path.with_suffix("") if path.suffix in CHECKPOINTS else path
            words.append("-".join(p for p in path.parts if p not in ("/", ".", "..")))
        else:
            words.append(f"{key}={text}")
    name = re.sub(r"[^\w.=,+-]", "_", ",".join(words)).lstrip(".-")
    if len(name.encode()) > LONGEST_LABEL:
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        name = f"{name.encode()[:LONGEST_LABEL].decode(errors='ignore')}-{digest}"
    return name


def _toml(value: Any) -> str:
    """Return a value of a plan as TOML."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml(str(k))} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)
