"""Tables as TOML and JSON give them, made into frozen values with every key and type checked."""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any, TypeVar

from lsweep.errors import LsweepError, nearest

T = TypeVar("T")
LONGEST = 200  # characters of a value that are shown


def parse_toml(text: str, where: str) -> dict[str, Any]:
    """Read TOML, every fraction an exact decimal.

    Raises:
        LsweepError: it is not TOML.

    >>> parse_toml("a = 0.1", "here")
    {'a': Decimal('0.1')}
    """
    try:
        return tomllib.loads(text, parse_float=Decimal)
    except (ValueError, InvalidOperation, RecursionError) as e:
        raise LsweepError(f"{where} is not valid TOML: {e or type(e).__name__}") from None


def override_key(table: dict[str, Any], override: str) -> None:
    """Set ``grid.x.count=11`` in nested tables.

    Raises:
        LsweepError: it is not KEY=VALUE, or a parent is no table.
    """
    key, sign, text = override.partition("=")
    if not sign or not key.strip():
        raise LsweepError(f"--set {override!r}: write KEY=VALUE, such as grid.x.count=11")
    try:
        value = parse_toml(f"v = {text}", "--set")["v"]
    except LsweepError:
        value = text.strip()  # a bare word is a string: --set directions.kind=random
    *parents, last = key.strip().split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise LsweepError(f"--set {key}: {parent} is not a table")
    table[last] = value


def build(cls: type[T], table: Mapping[str, Any], where: str) -> T:
    """Make a dataclass from a table, checking every key and type.

    Raises:
        LsweepError: unknown key (the nearest valid one is named), missing key, or wrong type.

    >>> @dataclasses.dataclass
    ... class Axis:
    ...     count: int
    >>> build(Axis, {"cuont": 3}, "grid.x")
    Traceback (most recent call last):
    lsweep.errors.LsweepError: grid.x: unknown key 'cuont'; did you mean 'count'?
    """
    if not isinstance(table, Mapping):
        raise LsweepError(f"{where}: expected a table, got {_kind(table)}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for key in table:
        if key not in fields:
            raise LsweepError(f"{where}: unknown key {key!r}{nearest(key, fields)}")
    values = {}
    for name, f in fields.items():
        if name in table:
            values[name] = _convert(hints[name], table[name], f"{where}: {name}")
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise LsweepError(f"{where}: {name} is missing")
    try:
        return cls(**values)
    except LsweepError as e:
        raise LsweepError(f"{where}: {e}") from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        reasons = []
        for option in (a for a in args if a is not type(None)):
            try:
                return _convert(option, value, where)
            except LsweepError as e:
                reasons.append(e)
        raise reasons[0]
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise LsweepError(f"{where}: expected a table, got {_kind(value)}")
        if args[1] is Any:
            return plain(value)
        return {k: _convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, list | tuple):
            raise LsweepError(f"{where} = {_shown(value)}: expected a list")
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_convert(args[0], v, where) for v in value)
        if len(value) != len(args):
            raise LsweepError(f"{where} = {plain(value)}: expected {len(args)} values")
        return tuple(_convert(a, v, where) for a, v in zip(args, value, strict=True))
    number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    if hint is Decimal and number:
        return value if isinstance(value, Decimal) else Decimal(repr(value))
    if hint is float and number:
        return float(value)
    within = number and value == value and -(2**63) < value < 2**63  # abs() could overflow
    if hint is int and within and value == int(value):
        return int(value)
    if hint in (str, bool) and isinstance(value, hint):
        return value
    names = {Decimal: "a number", float: "a number", int: "a whole number", str: "a string"}
    raise LsweepError(f"{where} = {_shown(value)}: expected {names.get(hint, 'true or false')}")


def plain(value: Any) -> Any:
    """Return ``value`` with decimals as floats and tuples as lists, ready for JSON.

    >>> plain({"a": (Decimal("0.5"), 1)})
    {'a': [0.5, 1]}
    """
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def _kind(value: Any) -> str:
    names = {str: "a string", bool: "true or false", int: "a number", Decimal: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")


def one_of(name: str, value: Any, valid: tuple[str, ...]) -> None:
    """Refuse a value that is none of the valid ones, naming the nearest.

    >>> one_of("kind", "randm", ("random", "to"))
    Traceback (most recent call last):
    lsweep.errors.LsweepError: kind = 'randm'; did you mean 'random'?
    """
    if value not in valid:
        raise LsweepError(f"{name} = {value!r}{nearest(str(value), valid)}")


def _shown(value: Any) -> str:
    text = repr(plain(value))
    whole = len(text) <= LONGEST and "\n" not in text  # a network, say, where a path belongs
    return text if whole else f"(an object of type {type(value).__name__})"
