"""What the page shows, as HTML. Every text that is not written here is escaped."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from html import escape
from typing import Any

from cogvid.run.compare import Comparison
from cogvid.run.plan import GB, Plan, table
from cogvid.ui.engine import Run
from cogvid.ui.past import Past

_WORDS = {
    "loading": "Loading the model", "enhancing": "Waiting for the long prompt", "encoding": "Reading the prompt",
    "decoding": "Decoding and writing the video", "cancelled": "Cancelled", "failed": "Failed", "done": "Done",
}  # fmt: skip


def alert(line: str) -> str:
    """Show what was wrong; screen readers say it at once."""
    return f'<p class="alert" role="alert">{escape(line)}</p>' if line else ""


def plan(found: Plan) -> str:
    """Show what a run would cost: the most important first, and all of it folded."""
    own, settings = found.memory[0], found.settings
    video = f"{settings.num_frames} frames, {settings.height}x{settings.width}, {found.seconds:.2g} s"
    facts = [
        ("Video", video),
        ("Steps", f"{found.steps} of {settings.scheduler}"),
        ("Tokens", f"{found.video_tokens:,}"),
        ("Work", _flops(found.flops["total"])),
        ("Memory", f"{own.peak / GB:.2f} GB of {found.machine.free / GB:.1f} GB free, {own.device} {own.dtype}"),
        ("Download", f"{found.download / GB:.1f} GB" if found.download else "nothing"),
    ]
    warnings = "".join(f'<p class="note">{escape(line)}</p>' for line in found.warnings)
    rows = "".join(
        f"<tr><th scope='row'>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in table(found)
    )
    return (
        f'<section class="plan" aria-label="What it costs">{_facts(facts)}{warnings}'
        f"<details><summary>The whole plan</summary><table>{rows}</table></details></section>"
    )


def _flops(count: int) -> str:
    for unit, size in (("PFLOP", 10**15), ("TFLOP", 10**12)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 10**9:.3g} GFLOP"


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    inner = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in facts)
    return f'<dl class="facts">{inner}</dl>'


def progress(run: Run | None) -> str:
    """Show how far a run is; nothing where there is none, or where it is done."""
    if run is None or run.state == "done":
        return ""
    if not run.active:
        said = "" if run.state == "cancelled" else alert(" ".join(run.notes))
        return said or '<p class="status" role="status">Cancelled: nothing was written.</p>'
    words = _state(run)
    bar = "<div></div>"
    if run.steps:
        bar = f'<div style="width:{100 * run.step / run.steps:.1f}%"></div>'
    attributes = f'aria-valuemin="0" aria-valuemax="{max(run.steps, 1)}" aria-valuenow="{run.step}"'
    return (
        f'<div class="progress"><p>{escape(words)}</p><div class="bar" role="progressbar" aria-label="Progress" '
        f'{attributes} aria-valuetext="{escape(words)}">{bar}</div></div>'
    )


def _state(run: Run) -> str:
    if run.state == "waiting":
        return f"Waiting: {run.ahead} before it" if run.ahead else "Waiting"
    if run.state != "denoising":
        return _WORDS[run.state]
    left = run.seconds_left
    return f"Step {run.step} of {run.steps}" + ("" if left is None else f", {_duration(left)} left")


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def preview(run: Run | None) -> str:
    """Show the last preview of a run that is not done."""
    if run is None or run.preview is None or not run.active:
        return ""
    data = base64.b64encode(run.preview).decode()
    return (
        f'<figure class="preview"><img alt="Preview of the frame in the middle" src="data:image/jpeg;base64,{data}">'
        "<figcaption>Preview: the frame in the middle</figcaption></figure>"
    )


def result(past: Past | None, notes: Sequence[str] = ()) -> str:
    """Show a video with its facts and its record; where there is none, what will be here."""
    if past is None:
        return '<p class="empty">The video will be here.</p>'
    record, name = past.record, escape(past.name)
    lines = "".join(f'<p class="note">{escape(line)}</p>' for line in notes)
    whole = escape(json.dumps(record, indent=1, ensure_ascii=False))
    return (
        f'<article class="result"><video controls loop muted autoplay playsinline src="videos/{name}" '
        f'aria-label="{escape(past.prompt)}"></video><p class="prompt">{escape(past.prompt)}</p>'
        f"{_facts(_facts_of(past))}{lines}"
        f'<p class="links"><a href="videos/{name}" download="{name}">Download the video</a>'
        f'<a href="records/{name}" download="{name}.json">Download the record</a></p>'
        f'<details><summary>Record</summary><pre tabindex="0">{whole}</pre></details></article>'
    )


def _facts_of(past: Past) -> list[tuple[str, str]]:
    record = past.record
    size = f"{record.get('num_frames')} frames, {record.get('height')}x{record.get('width')}"
    steps = f"{record.get('num_inference_steps')} of {record.get('scheduler')}"
    return [("Seed", str(past.seed)), ("Model", past.model), ("Video", size), ("Steps", steps), ("File", past.name)]


def cards(runs: Sequence[Past], picked: Sequence[str], shown: int) -> str:
    """Show past runs; the buttons carry what they do and to which video.

    A video is not loaded before it is played: a browser has six connections to a server, and each may hold one.
    """
    if not runs:
        return '<p class="empty">No videos here yet, or none that the filter lets through.</p>'
    items = "".join(_card(past, past.name in picked) for past in runs[:shown])
    more = ""
    if len(runs) > shown:
        more = f'<p class="more"><button type="button" data-act="more">Show more of {len(runs)}</button></p>'
    return f'<ul class="cards">{items}</ul>{more}'


def _card(past: Past, is_picked: bool) -> str:
    name, prompt = escape(past.name), escape(past.prompt)
    about = f"{prompt}, seed {past.seed}"
    buttons = (
        f'<button type="button" data-act="open" data-name="{name}" aria-label="Open {about}">Open</button>'
        f'<button type="button" data-act="pick" data-name="{name}" aria-pressed="{str(is_picked).lower()}" '
        f'aria-label="Compare {about}">{"Picked" if is_picked else "Compare"}</button>'
    )
    return (
        f'<li class="card{" picked" if is_picked else ""}"><video controls loop muted playsinline preload="none" '
        f'poster="posters/{name}" src="videos/{name}" aria-label="{about}"></video><p class="prompt">{prompt}</p>'
        f'<p class="about">{escape(past.model)}, seed {past.seed}</p><p class="buttons">{buttons}</p></li>'
    )


def pair(first: Past, second: Past, found: Comparison, picture: str) -> str:
    """Show two videos that play in step, how far they are apart, and frames of both with their difference."""
    videos = "".join(
        f'<figure><video controls loop muted playsinline preload="auto" src="videos/{escape(past.name)}" '
        f'aria-label="{letter}: {escape(past.prompt)}"></video><figcaption>{letter}: {escape(past.prompt)} '
        f"({escape(past.model)}, seed {past.seed})</figcaption></figure>"
        for letter, past in (("A", first), ("B", second))
    )
    differs = "".join(f"<li>{escape(line)}</li>" for line in found.record)
    return (
        '<section class="pair" aria-label="Comparison"><h2>Comparison</h2>'
        f'<div class="step">{videos}</div><p class="hint">Both play, stop and seek together.</p>{_measures(found)}'
        f'<figure class="difference"><img src="compared/{picture}" alt="Frames of A, of B, and 8 times their '
        'difference"><figcaption>From top to bottom: A, B, and 8 times their difference.</figcaption></figure>'
        f"<details><summary>What differs in the records ({len(found.record)})</summary><ul>{differs}</ul></details>"
        "</section>"
    )


def _measures(found: Comparison) -> str:
    values = found.to_dict()
    names = {"psnr": "PSNR", "ssim": "SSIM", "max_abs": "Largest difference"}
    equal = "The videos are equal." if found.first is None else f"The first frame that differs is {found.first}."
    facts = [(f"{label}, mean", _number(values["mean"][name])) for name, label in names.items()]
    head = "".join(f'<th scope="col">{label}</th>' for label in ("Frame", *names.values()))
    rows = "".join(
        f'<tr><th scope="row">{index}</th>' + "".join(f"<td>{_number(row[name])}</td>" for name in names) + "</tr>"
        for index, row in enumerate(found.rows)
    )
    return (
        f"<p>{equal}</p>{_facts(facts)}<details><summary>Each frame</summary><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table></details>"
    )


def _number(value: Any) -> str:
    if value is None:
        return "∞"
    return str(value) if isinstance(value, int) else f"{value:.4g}"
