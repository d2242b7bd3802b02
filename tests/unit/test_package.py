"""What is built from the repository: the sdist, the wheel, their metadata, and the versions they ask for."""

from __future__ import annotations

import email
import filecmp
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from cogvid import versions
from cogvid.weights.hub import PACKS, packs

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# What git ignores, git itself, and what only an sdist has.
IGNORED = [line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if not line.startswith("#")]
NO_SOURCE = [*filter(None, IGNORED), ".git", "PKG-INFO", "setup.cfg"]


@dataclass
class Built:
    """source: the files of a copy of the repository. sdist, wheel: unpacked."""

    source: Path
    sdist: Path
    wheel: Path
    archive: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Build an sdist from a copy of the repository, and a wheel from the sdist, with the setuptools that is here."""
    root = tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, root / "source", ignore=shutil.ignore_patterns(*NO_SOURCE), symlinks=True)
    shutil.copytree(root / "source", root / "tree", symlinks=True)

    def build(kind: str, tree: Path) -> Path:
        code = f"from setuptools import build_meta; build_meta.build_{kind}({str(root)!r})"
        subprocess.run([sys.executable, "-c", code], cwd=tree, check=True, capture_output=True)
        return next(root.glob("*.whl" if kind == "wheel" else "*.tar.gz"))

    archive = build("sdist", root / "tree")
    with tarfile.open(archive) as file:
        file.extractall(root / "unpacked", filter="data")
    sdist = next((root / "unpacked").iterdir())
    with zipfile.ZipFile(build("wheel", sdist)) as file:
        file.extractall(root / "wheel")
    return Built(root / "source", sdist, root / "wheel", archive)


def files(directory: Path) -> set[str]:
    return {str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()}


def test_the_sdist_holds_the_whole_repository(built: Built) -> None:
    missing = {name for name in files(built.source) if not (built.sdist / name).is_file()}
    assert not missing
    assert {"scripts/demo.png", "scripts/constraints.txt", "weights.md", ".ci/run", "tests/tolerances.py"} <= files(
        built.sdist
    )
    for name in ("README.md", "weights.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", (built.sdist / name).read_text()):
            assert (built.sdist / target).exists(), f"{name}: {target}"


def test_the_wheel_holds_both_packages_and_the_packs_and_no_more(built: Built) -> None:
    expected = {f"cogvid/{name}" for name in files(built.source / "cogvid")}
    expected |= {f"cogvid_kernels/{name}" for name in files(built.source / "kernels" / "cogvid_kernels")}
    assert {name for name in files(built.wheel) if ".dist-info/" not in name} == expected
    assert "cogvid/py.typed" in expected
    assert "cogvid/packs/tiny-t2v/vae/diffusion_pytorch_model.safetensors" in expected


def test_the_wheel_says_what_it_is(built: Built) -> None:
    info = next(built.wheel.glob("*.dist-info"))
    meta = email.message_from_string((info / "METADATA").read_text())
    assert (meta["Name"], meta["Version"], meta["License-Expression"]) == ("cogvid", PROJECT["version"], "Apache-2.0")
    assert meta["Requires-Python"] == PROJECT["requires-python"]
    assert "Typing :: Typed" in meta.get_all("Classifier", [])
    assert {url.split(",")[0] for url in meta.get_all("Project-URL", [])} == set(PROJECT["urls"])
    assert "cogvid = cogvid.cli:main" in (info / "entry_points.txt").read_text()
    assert (info / "licenses" / "LICENSE").is_file()


def test_the_wheel_runs_away_from_the_repository(built: Built, tmp_path: Path) -> None:
    run = "import cogvid, sys; from cogvid.cli import main; print(cogvid.__file__); sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-P", "-c", run, "inspect", "tiny-t2v"]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(built.wheel)}, check=True, capture_output=True, text=True
    )
    assert done.stdout.startswith(str(built.wheel))
    assert "text-to-video" in done.stdout


def test_the_benchmark_of_the_wheel_runs_a_function_of_the_working_directory(built: Built, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from cogvid.ops import attention\n")
    command = [sys.executable, "-P", "-m", "cogvid_kernels.bench", "--device", "cpu", "--runs", "1"]
    command += ["--ops", "attention", "--providers", "SDPA MATH", "--provider", "mine:attention", "--json", "out.json"]
    environment = {"PYTHONPATH": str(built.wheel), "PATH": "/usr/bin:/bin"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    found = json.loads((tmp_path / "out.json").read_text())
    assert [row["provider"] for row in found["rows"] if row["median_ms"] > 0] == ["SDPA MATH", "mine:attention"]
    assert found["header"]["commit"] == "unknown"  # a wheel has none, whatever repository its environment lies in


@pytest.mark.parametrize("where", ["source", "sdist", "wheel"])
@pytest.mark.parametrize(
    ("name", "pipeline"), [("tiny-i2v", "CogVideoXImageToVideoPipeline"), ("tiny-t2v", "CogVideoXPipeline")]
)
def test_packs_are_whole_for_diffusers_wherever_they_lie(built: Built, where: str, name: str, pipeline: str) -> None:
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
    directory = getattr(built, where) / "cogvid" / "packs" / name
    pipe = diffusers.DiffusionPipeline.from_pretrained(directory, torch_dtype=torch.float32)
    assert isinstance(pipe, getattr(diffusers, pipeline))
    assert sum(p.numel() for p in pipe.vae.parameters()) > 1.9e6


def test_packs_share_one_vae() -> None:
    first, *others = (PACKS / name / "vae" for name in packs())
    assert others
    for other in others:
        names = sorted(p.name for p in first.iterdir())
        assert filecmp.cmpfiles(first, other, names, shallow=False) == (names, [], [])


def bounds(requirements: list[str]) -> dict[str, str]:
    matches = [re.match(r"([\w-]+)>=([\d.]+)(;.*)?$", requirement) for requirement in requirements]
    return {match[1]: match[2] for match in matches if match is not None}


def test_every_dependency_has_a_lower_bound_and_the_code_knows_it() -> None:
    found = bounds(PROJECT["dependencies"])
    assert len(found) == len(PROJECT["dependencies"])
    assert found == versions.LOWEST


def test_the_lowest_versions_that_are_tested_are_those_of_the_project() -> None:
    if "{}.{}".format(*sys.version_info) != PROJECT["requires-python"].removeprefix(">="):
        pytest.skip("the script wants the lowest Python")
    done = subprocess.run(
        ["bash", "scripts/test_lowest.sh", "--list"],
        cwd=ROOT, env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    listed: dict[str, dict[str, str]] = {"base": {}, "test": {}}
    for line in done.stdout.splitlines():
        which, name, version = re.split(" |==", line)
        listed[which][name] = version
    base, test = bounds(PROJECT["dependencies"]), bounds(PROJECT["optional-dependencies"]["test"])
    for found, tested in ((listed["base"], test | base), (listed["test"], base | test)):
        assert found["torch"] != tested.pop("torch")
        assert tested.items() <= found.items()
    assert set(listed["test"]) - set(listed["base"]) == {"diffusers"}
    assert done.stderr.startswith("torch 2.11: not run; ")


@pytest.mark.slow
def test_pip_builds_and_installs_the_sdist(built: Built, tmp_path: Path) -> None:
    """With build isolation, for which pip asks a package index for setuptools."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "site")]
    subprocess.run([*pip, str(built.archive)], cwd=tmp_path, check=True)
    assert files(tmp_path / "site" / "cogvid" / "packs") == files(PACKS)
