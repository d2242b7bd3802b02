"""The shell scripts, with stand-ins for what they install and call."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("arguments", [[], ["a video.mp4", "the blue square grows"]], ids=["none", "both"])
def test_the_demo_installs_the_base_and_passes_its_arguments_on(tmp_path: Path, arguments: list[str]) -> None:
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name in ("python", "cogvid"):
        program = tmp_path / ".venv" / "bin" / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > "{tmp_path}/{name}.log"\n')
        program.chmod(0o755)
    done = subprocess.run(
        ["bash", "scripts/demo.sh", *arguments],
        cwd=tmp_path,
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "python.log").read_text().splitlines()[-2:] == ["-e", "."]
    called = (tmp_path / "cogvid.log").read_text().splitlines()
    output, prompt = arguments or ["outputs/demo.mp4", "the red circle moves right"]
    assert called[:2] == ["generate", prompt]
    assert str(tmp_path / output) in called
