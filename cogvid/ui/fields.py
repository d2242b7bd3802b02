"""The options of a run as fields of a form: which there are, in which groups, and what is read from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cogvid.config import ModelConfig
from cogvid.run.settings import OPTIONS, resolve_settings

_NAMED = {
    "Size and length": ("height", "width", "num_frames"),
    "Steps and guidance": (
        "num_inference_steps", "scheduler", "guidance_scale", "use_dynamic_cfg", "guidance_interval",
    ),
}  # fmt: skip
UPSTREAM, OTHERS = "Where upstream differs", "More"


def groups() -> dict[str, list[str]]:
    """Return the names of all options by group; an option that no group names is in the last one or the last but one.

    The last but one has those whose default depends on the code that is followed.
    """
    found = {title: [name for name in names if name in OPTIONS] for title, names in _NAMED.items()}
    named = {name for names in found.values() for name in names}
    left = [name for name in OPTIONS if name not in named]
    follows = [name for name in left if OPTIONS[name].metadata["upstream"]]
    return {**found, OTHERS: [name for name in left if name not in follows], UPSTREAM: follows}


def label(name: str) -> str:
    """Return what a field is called."""
    return name.replace("_", " ").capitalize()


def choices(name: str) -> list[str] | None:
    """Return what an option may be; None where it is a number or a text."""
    known: Any = OPTIONS[name].metadata["choices"]
    listed: Any = known() if callable(known) else known
    return None if listed is None else list(listed)


def read(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that were filled in, as the command line would have them; an empty field is not given.

    Raises:
        ValueError: a text that is no number in a field of numbers.
    """
    given: dict[str, Any] = {}
    for name, value in values.items():
        kind, text = OPTIONS[name].metadata["kind"], value.strip() if isinstance(value, str) else value
        if text is None or text == "":
            continue
        given[name] = whole(name, text) if kind is int else _number(name, text) if kind is float else text
    return given


def whole(name: str, text: str | None) -> int | None:
    """Return the whole number in a field; None where it is empty."""
    if not text or not text.strip():
        return None
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name}: got {text!r:.60}, want a whole number") from None


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name}: got {text!r:.60}, want a number") from None


def recommended(model: ModelConfig, task: str) -> dict[str, str]:
    """Return what an empty field stands for, as text.

    Raises:
        ValueError: the model cannot do the task.
    """
    values = resolve_settings(model, task=task).to_dict()
    return {name: _text(values[name]) for name in OPTIONS}


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, list):
        return "-".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
