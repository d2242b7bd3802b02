"""A package that is too old or missing is refused in one line before any work."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest
from av.codec.codec import UnknownCodecError

import cogvid
from cogvid import versions
from cogvid.cli import main
from cogvid.media.video import read_metadata

OLD = {
    "torch": "2.10.9+cu128",
    "triton": "3.5.1",
    "einops": "0.7.2",
    "safetensors": "0.4.2",
    "transformers": "4.57.6",
    "sentencepiece": "0.1.99",
    "huggingface_hub": "1.2.4",
    "numpy": "1.25.2",
    "pillow": "10.2.0",
    "av": "17.1.0",
    "tqdm": "4.65.2",
    "jinja2": "3.0.3",
}
Install = Callable[[str, str | None], None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Pretend that a package is installed in some version, or not at all."""

    def pretend(name: str, pretended: str | None) -> None:
        def get(asked: str) -> str:
            if asked != name:
                return version(asked)
            if pretended is None:
                raise PackageNotFoundError(name)
            return pretended

        monkeypatch.setattr("cogvid.versions.version", get)

    return pretend


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a checkpoint is looked for, which comes before all work."""

    def work(*_: object, **__: object) -> NoReturn:
        raise AssertionError("work began")

    monkeypatch.setattr("cogvid.weights.checkpoint.find", work)


def test_what_is_installed_here_passes() -> None:
    versions.check()
    versions.check(*versions.LOWEST)


@pytest.mark.parametrize("name", versions.LOWEST)
def test_old_and_missing_packages_are_named(install: Install, name: str) -> None:
    lowest = versions.LOWEST[name]
    install(name, OLD[name])
    with pytest.raises(ImportError, match=rf"^{name}: got {re.escape(OLD[name])}, want {lowest} or newer$"):
        versions.check(name)
    install(name, None)
    with pytest.raises(ImportError, match=rf"^{name}: got none, want {lowest} or newer$"):
        versions.check(name)


@pytest.mark.parametrize("new", ["18.0", "18.0.0", "18", "18.0.0rc1", "18.0.1+local", "18.10.0", "20"])
def test_the_lowest_and_what_comes_after_it_pass(install: Install, new: str) -> None:
    install("av", new)
    versions.check("av")


@pytest.mark.parametrize("name", [name for name in OLD if name != "triton"])
@pytest.mark.usefixtures("no_work")
def test_a_pipeline_is_not_begun_with_an_old_package(
    install: Install, capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    install(name, OLD[name])
    with pytest.raises(ImportError, match=f"^{name}: got"):
        cogvid.load("tiny-t2v")
    assert main(["generate", "x", "-o", str(tmp_path / "out.mp4")]) == 2
    line = f"cogvid: error: {name}: got {OLD[name]}, want {versions.LOWEST[name]} or newer\n"
    assert capsys.readouterr() == ("", line)
    assert not list(tmp_path.iterdir())


def test_videos_are_not_begun_with_an_old_pyav(install: Install, tmp_path: Path) -> None:
    install("av", OLD["av"])
    for use in (
        lambda: cogvid.VideoWriter(tmp_path / "out.mp4", 32, 32),
        lambda: read_metadata(__file__),
        lambda: cogvid.read_video(__file__),
    ):
        with pytest.raises(ImportError, match=r"^av: got 17\.1\.0, want 18\.0 or newer$"):
            use()


def test_videos_are_not_begun_without_their_encoder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def codec(name: str, mode: str) -> NoReturn:
        raise UnknownCodecError(f"{name} {mode}")

    monkeypatch.setattr("av.codec.Codec", codec)
    with pytest.raises(ImportError, match=r"^av: got a PyAV without the encoder libx264, want one with it$"):
        cogvid.VideoWriter(tmp_path / "out.mp4", 32, 32)


@pytest.mark.parametrize("got", ["3.5.1", "2.2.0+git1", None])
@pytest.mark.usefixtures("no_work")
def test_an_old_or_missing_triton_is_refused_where_kernels_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, got: str | None
) -> None:
    triton = None  # what makes an import fail as if it were not installed
    if got is not None:
        triton = ModuleType("triton")
        monkeypatch.setattr(triton, "__version__", got, raising=False)
    monkeypatch.setitem(sys.modules, "triton", triton)
    with pytest.raises(ImportError, match=rf"^triton: got {re.escape(got or 'none')}, want 3\.6 or newer$"):
        cogvid.load("tiny-t2v", ops="triton")


@pytest.mark.parametrize(("triton", "numpy", "interpreted", "fits"), [
    ("3.6.0", "2.4.0", "1", False), ("3.6.0", "2.3.5", "1", True),
    ("3.6.0", "2.4.0", "0", True), ("3.7.0", "2.4.0", "1", True),
])  # fmt: skip
def test_the_interpreter_of_triton_3_6_wants_an_older_numpy(
    install: Install, monkeypatch: pytest.MonkeyPatch, triton: str, numpy: str, interpreted: str, fits: bool
) -> None:
    module = ModuleType("triton")
    monkeypatch.setattr(module, "__version__", triton, raising=False)
    monkeypatch.setitem(sys.modules, "triton", module)
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    install("numpy", numpy)
    if fits:
        versions.check_triton()
    else:
        with pytest.raises(
            ImportError, match=r"^numpy: got 2\.4\.0, want older than 2\.4 in the interpreter of triton 3\.6\.0$"
        ):
            versions.check_triton()
