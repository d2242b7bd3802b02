"""`cogvid report`: one HTML file of batches, benchmarks of kernels, parity with diffusers, quality against speed.

The file has its style and its script in it and loads nothing else, but for linked videos. A policy in it allows no
other script, so nothing in a manifest or a record can run one, even if it were not escaped.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import cogvid
from cogvid.media.download import shown
from cogvid.media.video import check_output_path
from cogvid.media.whole_file import whole_file
from cogvid.ui import report_charts as charts
from cogvid.ui.report_sweep import megabytes, read_sweep

_TEMPLATES = Path(__file__).parent / "templates"
_MOST_BYTES = 2**26  # of a JSON file
_KINDS = "a directory of cogvid batch, or a file of the kernels' benchmark, parity_report.py or step_cache_curve.py"


def write_report(
    sources: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    link: bool = False,
    baseline: str | None = None,
) -> None:
    """Write a page with a section for each source, whole or not at all.

    Args:
        sources: directories of batches; files of `cogvid_kernels.bench --json` or `--history`, and of `--json` of
            scripts/parity_report.py and scripts/step_cache_curve.py. What a file is follows from what is in it.
        output: an `.html` file.
        link: refer to the videos where they are, relative to the page, instead of embedding them.
        baseline: NAME=VALUE of a setting of the batches, to compare with the videos that have it; "none" to compare
            none. If not given, any two videos that differ in one setting are compared.

    Raises:
        ValueError: a source that is none of these or is broken; videos that are too large or too many; a baseline that
            no batch has; an output that cannot be written.
    """
    target = Path(check_output_path(output, (".html", ".htm")))
    sections = [_section(Path(source), target, link, baseline) for source in sources]
    if baseline is not None and not any(each.kind == "sweep" for each in sections):
        raise ValueError(f"baseline: got {shown(baseline)} without a batch, want the directory of one")
    environment = _environment()
    script, style = (_inlined(environment, name) for name in ("report.js", "report.css"))
    page = environment.get_template("report.html").generate(
        sections=sections,
        script=script,
        style=style,
        policy=_policy(script, style, link),
        version=cogvid.__version__,
    )
    with whole_file(target) as path, open(path, "wb") as file:
        for part in page:  # an embedded video is read when it is written, so one is in memory at a time
            file.write(part.encode("utf-8", "replace"))  # JSON may have halves of surrogate pairs


def _section(source: Path, output: Path, link: bool, baseline: str | None) -> Any:
    """Find out what a source is, and read it."""
    if source.is_dir():
        return read_sweep(source, output, link, baseline)
    title = source.name
    found = _read(source)
    for is_kind, make in ((charts.is_parity, charts.parity), (charts.is_curves, charts.curves)):
        if len(found) == 1 and is_kind(found[0]):
            return make(title, found[0])
    if runs := [value for value in found if charts.is_run(value)]:
        return charts.kernels(title, runs)
    raise ValueError(f"source: got {shown(str(source))}, which is none of the known kinds, want {_KINDS}")


def _read(path: Path) -> list[Any]:
    """Read a file of one JSON value, or of one a line. In such a history, a line that was cut short is left out."""
    if not path.is_file():
        raise ValueError(f"source: got {shown(str(path))}, which is no file or directory, want {_KINDS}")
    with open(path, "rb") as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise ValueError(f"source: got {shown(str(path))} of more than {_MOST_BYTES} bytes, want a smaller file")
    text = data.decode("utf-8", "replace")
    found = []
    for part in ([text], text.split("\n")):
        for each in part:
            try:
                found.append(json.loads(each))
            except (ValueError, RecursionError):
                continue
        if found:
            break
    return found


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["megabytes"] = megabytes
    return environment


def _inlined(environment: jinja2.Environment, name: str) -> Markup:
    assert environment.loader is not None
    return Markup(environment.loader.get_source(environment, name)[0])


def _policy(script: str, style: str, link: bool) -> str:
    """Return the Content-Security-Policy: this script, this style, and these videos."""
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (script, style)]
    media = "file: 'self'" if link else "data:"
    return (
        f"default-src 'none'; script-src 'sha256-{hashes[0]}'; style-src 'sha256-{hashes[1]}'; media-src {media}; "
        "base-uri 'none'; form-action 'none'"
    )
