"""What the README shows runs as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import cogvid
from cogvid.cli import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_python_examples_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    registries = [(registry, dict(registry)) for registry in (cogvid.SAMPLERS, cogvid.GUIDANCE)]
    try:
        for block in blocks("python"):
            exec(block.replace("scripts/demo.png", str(ROOT / "scripts" / "demo.png")), namespace)
    finally:
        for registry, before in registries:  # examples add to them
            registry.clear()
            registry.update(before)
    frames, fps = cogvid.read_video(tmp_path / "out.mp4")
    assert frames.shape == (17, 64, 64, 3)
    assert fps == cogvid.CONFIGS["tiny-i2v"].fps


@pytest.mark.parametrize(
    "line", [line.split("#")[0] for line in "\n".join(blocks("bash")).splitlines() if line.startswith("cogvid ")]
)
def test_the_commands_are_understood(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    arguments = [str(tmp_path / a) if a.endswith(".mp4") else a for a in shlex.split(line)[1:]]
    if any("/CogVideoX" in a for a in arguments):  # official weights: refused before a byte is fetched, but parsed
        assert main([*arguments, "--local-files-only", "--guidance-scale", "nan"]) == 2
    else:
        assert main(arguments) == 0


def test_the_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_the_file_table_is_complete() -> None:
    table = README[README.index("## What is where") : README.index("## Status")]
    for path in (ROOT / "cogvid").rglob("[!_]*.py"):
        assert path.name in table, path
