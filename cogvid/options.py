"""What an option is: a field of a frozen dataclass with its default, its check and its help, written once.

`Settings` has those of a run and `LoadOptions` those of a load. Calls, the command line, batches and records derive
from the fields. This file imports no torch, so that `cogvid --help` answers at once.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])
Options = Mapping[str, "dataclasses.Field[Any]"]


def option(
    default: Any,
    kind: type,
    help: str,
    *,
    model: str | None = None,
    choices: Callable[[], Iterable[str]] | tuple[str, ...] | None = None,
    above: float | None = None,
    low: float | None = None,
    high: float | None = None,
    parse: Callable[[Any], Any] | None = None,
    many: str | None = None,
    upstream: Mapping[str, Any] | None = None,
) -> Any:
    """Make the field of an option.

    kind: int, float, str or bool, on the command line. help: one line. model: the field of `ModelConfig` that None
    stands for. choices: of a string. above: a number must be greater. low, high: the least and the greatest number.
    parse: for a value with a grammar of its own; it checks what was given and returns what is kept. The other checks
    are then not made. many: of a list, which the command line takes one by one: what it calls one of them. upstream:
    what None stands for, by the `follows` of `ModelConfig`.
    """
    metadata = {"kind": kind, "help": help, "model": model, "choices": choices, "parse": parse, "many": many}
    metadata["upstream"] = upstream
    return dataclasses.field(default=default, metadata={**metadata, "above": above, "low": low, "high": high})


def options_of(kind: type) -> dict[str, dataclasses.Field[Any]]:
    """Return the options of a dataclass by name: its fields that `option` made."""
    return {field.name: field for field in dataclasses.fields(kind) if "help" in field.metadata}


def names(module: str, registry: str) -> Callable[[], Iterable[str]]:
    """Return a function that reads the names of a registry. Users add names later, and its module imports torch."""
    return lambda: tuple(getattr(importlib.import_module(module), registry))


def takes_options(options: Options, line: str) -> Callable[[Function], Function]:
    """Show options in the signature and the docstring of a function that takes them as `**options`.

    line: of the docstring, without its indent; the options stand in its place.
    """

    def shown(function: Function) -> Function:
        signature = inspect.signature(function)
        *own, _ = signature.parameters.values()
        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
            for name, field in options.items()
        ]
        function.__signature__ = signature.replace(parameters=[*own, *added])  # pyright: ignore[reportFunctionMemberAccess]
        before, found, after = (function.__doc__ or "").partition(line)
        assert found, f"{function.__qualname__} has no line {line!r}"
        indent = "\n" + before.rpartition("\n")[2]
        lines = indent.join(f"{name}: {field.metadata['help']}." for name, field in options.items())
        function.__doc__ = before + lines + after
        return function

    return shown


def fill(options: Options, given: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return a value of each option: what is given, or the default; with `defaults`, None stands for these.

    Raises:
        TypeError: an unknown option.
    """
    if unknown := [name for name in given if name not in options]:
        raise TypeError(f"{unknown[0]}: got an unknown option, want one of {', '.join(options)}")
    values = {name: given.get(name, field.default) for name, field in options.items()}
    return {name: (defaults or {}).get(name) if value is None else value for name, value in values.items()}


def upstream_defaults(options: Options, follows: str) -> dict[str, Any]:
    """Return what None stands for in the options whose default depends on the code that is followed."""
    return {name: of[follows] for name, field in options.items() if (of := field.metadata["upstream"])}


def check(options: Options, values: Mapping[str, Any]) -> dict[str, Any]:
    """Check the value of each option, and return what is kept of it."""
    return {name: _checked(name, values[name], **options[name].metadata) for name in options}


def check_int(name: str, value: object, low: int, high: int | None = None) -> None:
    """Raise unless the value is an integer from `low` to `high`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        wanted = f"{low} or more" if high is None else f"{low} to {high}"
        raise ValueError(f"{name}: got {value!r:.60}, want an integer, {wanted}")


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise unless the value is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: got {value!r:.60}, want one of {', '.join(choices)}")


def _checked(
    name: str, value: Any, *, kind: type, choices: Any, low: Any, above: Any, high: Any, parse: Any, **_: Any
) -> Any:
    if parse is not None:
        return parse(value)
    if kind is bool and not isinstance(value, bool):
        raise ValueError(f"{name}: got {value!r:.60}, want True or False")
    if kind is str and choices is not None:
        known: Any = choices() if callable(choices) else choices
        check_choice(name, value, known)
    elif kind is int and low is not None:
        check_int(name, value, low, high)
    elif kind is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf
        if not number or not (low is None or low <= value) or not (above is None or above < value <= high):
            wanted = f"a finite number, {low} or more" if above is None else f"more than {above} and at most {high}"
            raise ValueError(f"{name}: got {value!r:.60}, want {wanted}")
        if high is not None and value > high:
            raise ValueError(f"{name}: got {value!r:.60}, want at most {high:g}")
    return value
