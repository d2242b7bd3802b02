"""Configs that are read from JSON and checked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

Count = int  # 0 or more, where the annotation "int" means 1 or more

_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {  # annotation -> in words, and the check
    "bool": ("true or false", lambda v: isinstance(v, bool)),
    "str": ("a string", lambda v: isinstance(v, str)),
    "int": ("a positive integer", lambda v: type(v) is int and v > 0),
    "Count": ("an integer, 0 or more", lambda v: type(v) is int and v >= 0),
    "int | None": ("a positive integer or null", lambda v: v is None or (type(v) is int and v > 0)),
    "float": ("a number", lambda v: type(v) in (int, float) and math.isfinite(v)),
    "tuple[float, ...] | None": (
        "a list of numbers or null",
        lambda v: v is None or (isinstance(v, tuple) and all(_KINDS["float"][1](x) for x in v)),
    ),
    "tuple[int, ...]": (
        "a list of positive integers",
        lambda v: isinstance(v, tuple) and bool(v) and all(type(i) is int and i > 0 for i in v),
    ),
}


def _checked(name: str, value: Any, kind: str) -> Any:
    if isinstance(value, list):
        value = tuple(value)
    if isinstance(value, float) and value.is_integer() and kind.startswith("int"):
        value = int(value)  # upstream writes some of them as floats
    words, fits = _KINDS[kind]
    if not fits(value):
        raise ValueError(f"{name}: got {value!r}, want {words}")
    return value


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
