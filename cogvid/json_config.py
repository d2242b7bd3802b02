"""Configs that are read from JSON and checked: the types and the ranges of their values, before anything is built.

A field's annotation says what is a legal value. The bounds are far above every checkpoint's values; they keep a
damaged or hostile file from being built until memory ends.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

# Annotations of fields; "int" and "float" have ranges too, see `_KINDS`.
Count = int  # 0 or more
Depth = int  # of modules that are built one by one
Length = int  # of a sequence; attention takes memory with its square
Positive = float

MAX_INT, MAX_COUNT, MAX_DEPTH, MAX_LENGTH, MAX_LIST = 2**20, 10_000, 1000, 8192, 16
MAX_FLOAT, MIN_POSITIVE = 1e9, 1e-12


def _is_int(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _is_float(value: Any, low: float = -MAX_FLOAT) -> bool:
    return type(value) in (int, float) and low <= value <= MAX_FLOAT  # NaN fails too


_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {  # annotation -> in words, and the check
    "bool": ("true or false", lambda v: isinstance(v, bool)),
    "str": ("a string", lambda v: isinstance(v, str)),
    "int": (f"a positive integer, at most {MAX_INT}", lambda v: _is_int(v, 1, MAX_INT)),
    "Depth": (f"a positive integer, at most {MAX_DEPTH}", lambda v: _is_int(v, 1, MAX_DEPTH)),
    "Length": (f"a positive integer, at most {MAX_LENGTH}", lambda v: _is_int(v, 1, MAX_LENGTH)),
    "Count": (f"an integer, 0 to {MAX_COUNT}", lambda v: _is_int(v, 0, MAX_COUNT)),
    "int | None": (f"a positive integer, at most {MAX_INT}, or null", lambda v: v is None or _is_int(v, 1, MAX_INT)),
    "float": (f"a number from {-MAX_FLOAT:g} to {MAX_FLOAT:g}", _is_float),
    "Positive": (f"a positive number, {MIN_POSITIVE:g} to {MAX_FLOAT:g}", lambda v: _is_float(v, MIN_POSITIVE)),
    "tuple[float, ...] | None": (
        "a list of numbers or null",
        lambda v: v is None or (isinstance(v, tuple) and all(map(_is_float, v))),
    ),
    "tuple[int, ...]": (
        f"a list of 1 to {MAX_LIST} positive integers, at most {MAX_INT}",
        lambda v: isinstance(v, tuple) and 1 <= len(v) <= MAX_LIST and all(_is_int(i, 1, MAX_INT) for i in v),
    ),
}


def short(value: Any) -> str:
    """Write a value that was read from a file for a message: at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _checked(name: str, value: Any, kind: str) -> Any:
    if isinstance(value, list):
        value = tuple(value)
    if isinstance(value, float) and value.is_integer() and kind.startswith(("int", "Depth", "Length", "Count")):
        value = int(value)  # upstream's own type for some of them is float
    words, fits = _KINDS[kind]
    if not fits(value):
        raise ValueError(f"{name}: got {short(value)}, want {words}")
    return float(value) if kind in ("float", "Positive") else value


@dataclass(frozen=True)
class JsonConfig:
    """A dataclass that reads a `config.json` and checks it. A field's annotation says what is a legal value."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a parsed `config.json`; keys that only matter to other libraries are ignored.

        Raises:
            ValueError: a value of the wrong type, or out of range.
        """
        kinds = {f.name: str(f.type) for f in dataclasses.fields(cls)}
        return cls(**{name: _checked(name, value, kinds[name]) for name, value in values.items() if name in kinds})

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
