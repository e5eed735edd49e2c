"""Weights by canonical name: read from checkpoints, fingerprinted, told apart by module."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lsweep.errors import DamagedFile, LsweepError

State = dict[str, Tensor]
NESTS = ("state_dict", "model_state_dict", "model", "net", "params", "model_ema", "ema")


def canonical_name(name: str) -> str:
    """Return a parameter's name without the wrappers of DataParallel and torch.compile.

    A part of a network may be compiled by itself, so ``_orig_mod`` goes wherever it stands.

    >>> canonical_name("module._orig_mod.layer1._orig_mod.weight")
    'layer1.weight'
    """
    parts = [p for p in name.split(".") if p != "_orig_mod"]
    while parts[0] == "module" and len(parts) > 1:
        parts = parts[1:]
    return ".".join(parts)


def parameters_of(model: nn.Module) -> State:
    """Return parameters by canonical name, tied ones once, in the model's order.

    Raises:
        LsweepError: one is complex or a whole number, and so cannot move by a real offset, or lazy.
    """
    out = {canonical_name(n): p for n, p in model.named_parameters()}
    for name, p in out.items():
        if nn.parameter.is_lazy(p):
            raise LsweepError(
                f"parameter {name} has no shape yet: call the network on a batch once, or load its "
                "checkpoint, before it is given to a Problem"
            )
        if not p.is_floating_point():
            raise LsweepError(
                f"parameter {name} is {str(p.dtype).removeprefix('torch.')}: only floating-point "
                "weights can move; keep a complex one as torch.view_as_real, do not quantise"
            )
    return dict(out)


def buffers_of(model: nn.Module) -> State:
    """Return floating-point buffers by canonical name, those that a checkpoint would hold."""
    kept = model.state_dict().keys()
    return {
        canonical_name(n): b
        for n, b in model.named_buffers()
        if b.is_floating_point() and n in kept
    }


def owners_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return for each parameter's canonical name the module that holds it."""
    return {
        canonical_name(f"{prefix}.{n}" if prefix else n): module
        for prefix, module in model.named_modules()
        for n, _ in module.named_parameters(recurse=False)
    }


def not_finite(state: Mapping[str, Tensor]) -> str:
    """Return which tensor first has a number that is none, as a clause; "" where all are finite.

    >>> not_finite({"a": torch.ones(2), "b": torch.tensor([1.0, float("nan")])})
    'b has 1 NaN (of 2 numbers)'
    """
    for name, t in state.items():
        if t.is_floating_point() and not bool(torch.isfinite(t).all()):
            nans, infinite = int(t.isnan().sum()), int(t.isinf().sum())
            found = f"{nans} NaN" if nans else f"{infinite} Inf"
            return f"{name} has {found} (of {t.numel()} numbers)"
    return ""


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """Return the sha256 over names, shapes and float32 or float64 bytes, sorted by name.

    >>> fingerprint({"w": torch.zeros(2)}) == fingerprint({"w": torch.zeros(2)})
    True
    """
    h = hashlib.sha256()
    for name in sorted(state):
        t = state[name].detach().cpu()
        t = t if t.dtype == torch.float64 or not t.is_floating_point() else t.float()
        h.update(f"{name}{tuple(t.shape)}{t.dtype}".encode())
        h.update(t.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


def load_state(path: str | Path, model: nn.Module | None = None) -> State:
    """Return the tensors of a checkpoint by canonical name; nothing is ever unpickled.

    Reads a plain state dict, one nested under ``state_dict``, ``model`` or the like (Lightning,
    timm), ``.safetensors``, a sharded ``*.index.json`` and a Hugging Face folder.

    Args:
        path: a file or a folder.
        model: whose names and tensors they are to be, as its ``load_state_dict`` takes them: then
            a prefix of the checkpoint's (a Lightning module's ``model.``, ``net.``) goes, and what
            the network does not have is left out.

    Returns:
        name -> tensor on the CPU, in the checkpoint's order and dtype.

    Raises:
        LsweepError: the path is missing, or the file holds objects other than tensors; the model
            has a tensor that it lacks, or that has another shape there.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as d:
    ...     torch.save({"state_dict": {"module.w": torch.ones(2)}, "epoch": 3}, f"{d}/a.pt")
    ...     load_state(f"{d}/a.pt")
    {'w': tensor([1., 1.])}
    """
    if model is not None:
        own = {n: t for n, t in model.state_dict().items() if isinstance(t, Tensor)}
        # Counters of batches, which old checkpoints lack, and torch's loader knows how to make.
        names = {canonical_name(n): n for n in own if not n.endswith("num_batches_tracked")}
        found = match(load_state(path), {c: own[n] for c, n in names.items()}, str(path))
        return {names[c]: t for c, t in found.items()}
    p = Path(path)
    if p.is_dir():
        for name in (
            "model.safetensors.index.json",
            "model.safetensors",
            "pytorch_model.bin.index.json",
            "pytorch_model.bin",
        ):
            if (p / name).is_file():
                return load_state(p / name)
        raise LsweepError(f"{p} holds no model.safetensors and no pytorch_model.bin")
    if not p.is_file():
        raise LsweepError(f"no checkpoint at {p}")
    if p.name.endswith(".index.json"):
        return _load_shards(p)
    if p.suffix == ".safetensors":
        return {canonical_name(n): t for n, t in _load_safetensors(p).items()}
    # timm keeps its command line beside the weights: plain values in a class that runs nothing.
    harmless = getattr(torch.serialization, "safe_globals", contextlib.nullcontext)
    try:
        # Mapped where the format allows: the workers of a node share one copy of the file.
        mapped = zipfile.is_zipfile(p)
        with harmless([argparse.Namespace]):
            value = torch.load(p, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError as e:
        raise LsweepError(f"cannot read checkpoint {p}: {e.strerror or e}") from None
    except Exception:  # what torch says of it are paragraphs, on how to run what it holds
        raise LsweepError(
            f"cannot read checkpoint {p}: it is damaged, or holds more than tensors and plain "
            "containers, which alone are read; save model.state_dict()"
        ) from None
    for key in NESTS:
        if isinstance(value, Mapping) and isinstance(value.get(key), Mapping):
            value = value[key]
            break
    if not isinstance(value, Mapping):
        raise LsweepError(f"{p} holds a {type(value).__name__}, not a state dict")
    state = {canonical_name(str(n)): t for n, t in value.items() if isinstance(t, Tensor)}
    if not state:
        raise LsweepError(f"{p} holds no tensors; its keys: {', '.join(map(str, value))[:120]}")
    return state


def _load_safetensors(path: Path) -> State:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise LsweepError(f"{path} needs safetensors: pip install 'lsweep[safetensors]'") from None
    try:
        state: State = load_file(path)
    except Exception as e:
        raise DamagedFile(f"{path} is damaged or not a safetensors file: {e}") from None
    return state


def _load_shards(index: Path) -> State:
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, AttributeError, OSError) as e:
        raise DamagedFile(f"{index} is not a checkpoint index: {e}") from None
    state: State = {}
    for name in sorted(names):
        if Path(name).name != name:
            raise LsweepError(f"{index} names {name!r}, a path outside its folder")
        state |= load_state(index.parent / name)
    return state


def match(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str) -> State:
    """Return the tensors of ``state`` that belong to ``wanted``, a shared prefix removed.

    Raises:
        LsweepError: a name is missing or a shape differs; the message names the first.

    >>> match({"net.w": torch.ones(2)}, {"w": torch.zeros(2)}, "a.pt")
    {'w': tensor([1., 1.])}
    """
    renamed = dict(state)
    for prefix in _prefixes(state):
        if not set(wanted) <= set(renamed) and any(prefix + n in state for n in wanted):
            renamed = {n.removeprefix(prefix): t for n, t in state.items()}
    found = {}
    for name, tensor in wanted.items():
        if name not in renamed:
            raise LsweepError(
                f"{where}: no tensor for {name!r}; it has {', '.join(list(state)[:4])}, …"
            )
        if renamed[name].shape != tensor.shape:
            raise LsweepError(
                f"{where}: {name} has shape {tuple(renamed[name].shape)}, "
                f"the network's is {tuple(tensor.shape)}"
            )
        found[name] = renamed[name]
    return found


def _prefixes(state: Iterable[str]) -> list[str]:
    return sorted({n.partition(".")[0] + "." for n in state if "." in n})


def natural_order(paths: Iterable[Path]) -> list[Path]:
    """Sort paths so that ``epoch10`` comes after ``epoch9``.

    >>> [p.name for p in natural_order([Path("e10"), Path("e9")])]
    ['e9', 'e10']
    """
    return sorted(
        paths, key=lambda p: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", str(p))]
    )


def find_checkpoints(patterns: Iterable[str], base: Path) -> list[Path]:
    """Return the files that match paths or glob patterns relative to ``base``, in natural order.

    Raises:
        LsweepError: a pattern matches nothing.
    """
    found: list[Path] = []
    for pattern in patterns:
        path = base / pattern
        if path.exists():
            found.append(path)
            continue
        hits: list[Path] = []
        with contextlib.suppress(ValueError, NotImplementedError):  # no glob pattern: no hits
            root = Path(path.anchor) if Path(pattern).is_absolute() else base
            hits = natural_order(root.glob(str(path.relative_to(root))))
        if not hits:
            raise LsweepError(f"no checkpoint matches {pattern!r} in {base}")
        found += hits
    return found


def load_matching(path: Path, wanted: Mapping[str, Tensor]) -> State:
    """Return the tensors of the checkpoint at ``path`` that ``wanted`` names, checked."""
    return match(load_state(path), wanted, str(path))


def describe(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return how many tensors and numbers ``state`` has, with its fingerprint.

    >>> describe({"w": torch.zeros(2, 3)})["parameters"]
    6
    """
    return {
        "tensors": len(state),
        "parameters": sum(t.numel() for t in state.values()),
        "sha256": fingerprint(state),
    }
