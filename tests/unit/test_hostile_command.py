"""The command with hostile arguments and in odd surroundings: one line, and a status that says whose fault it is."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import cogvid
from cogvid import cli
from cogvid.media.video import read_metadata, read_video

ROOT = Path(__file__).parents[2]
QUICK = ["--height", "32", "--width", "32", "--num-frames", "1", "--num-inference-steps", "1", "--seed", "1"]


def test_an_error_that_nobody_expects_is_one_line(
    failed: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(_: object) -> None:
        raise TypeError("no\nsuch\nthing")

    monkeypatch.setattr(cli, "inspect", broken)
    line = failed("inspect", "x", status=1)
    assert line == "unexpected TypeError: no such thing (--traceback shows where it comes from)"
    for arguments in (["--traceback", "inspect", "x"], ["inspect", "x", "--traceback"]):
        assert cli.main(arguments) == 1
        said = capfd.readouterr().err
        assert said.startswith("Traceback (most recent call last):")
        assert "in broken" in said
        assert said.endswith(f"cogvid: error: {line}\n")


class OutOfMemoryError(RuntimeError):
    """As PyTorch's for a GPU is named."""


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OSError(errno.EFBIG, "File too large"), 1),
        (OSError(errno.EAGAIN, "Resource temporarily unavailable"), 1),
        (OSError(errno.ENOSPC, "No space left on device"), 1),
        (OSError(errno.EMFILE, "Too many open files"), 1),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1),
        (ImportError("libx.so: failed to map segment from shared object"), 1),
        (ImportError("libx.so: cannot open: Cannot allocate memory"), 1),
        (MemoryError(), 1),
        (OutOfMemoryError("CUDA out of memory"), 1),
        (RuntimeError("Storage size calculation overflowed with sizes=[9223372036854775807, 2]"), 1),
        (FloatingPointError("latents: got numbers that are not finite in torch.float16, want a wider dtype"), 1),
        (RecursionError("maximum recursion depth exceeded"), 1),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), 2),
        (PermissionError(errno.EACCES, "Permission denied"), 2),
        (ImportError("torch: got 1.0, want 2.11 or newer"), 2),
        (ValueError("a: got 1, want 2"), 2),
    ],
    ids=lambda value: f"{type(value).__name__}-{value}"[:40] if isinstance(value, Exception) else "",
)
def test_the_status_says_whose_fault_it_is(
    failed: Callable[..., str], monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    def broken(_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "inspect", broken)
    assert failed("inspect", "x", status=status)


def test_no_line_is_long_and_its_end_is_kept(failed: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    line = failed("generate", "x", "-o", "a" * 200_000 + "/x.mp4", *QUICK)
    assert line.startswith("output: got 'aaa")
    line = failed("x" * 200_000)
    assert 900 < len(line) <= 1000

    def broken(_: object) -> None:
        raise ValueError("name: got " + "x" * 100_000 + ", want less of https://me:S3CR3T@host/x?S3CR3T")

    monkeypatch.setattr(cli, "inspect", broken)
    line = failed("inspect", "x")
    assert line.endswith("xxx, want less of https://host/x")


@pytest.mark.parametrize(
    "argument", [f"the {chr(0xDCFF)} circle", f"the {chr(0xD800)} circle"], ids=["bytes", "surrogate"]
)
@pytest.mark.parametrize("option", ["prompt", "negative_prompt"])
def test_a_prompt_that_is_no_text_is_refused(
    tmp_path: Path, failed: Callable[..., str], option: str, argument: str
) -> None:
    prompts = [argument] if option == "prompt" else ["x", "--negative-prompt", argument]
    line = failed("generate", *prompts, "-o", tmp_path / "out.mp4", *QUICK)
    assert line == f"{option}: got {argument[4]!r} at 4, want text in UTF-8"
    with pytest.raises(ValueError, match=rf"^{option}: got .* at 4, want text in UTF-8$"):
        cogvid.load("tiny-t2v", device="cpu")(**{"prompt": "x", option: argument}, progress=False)


def test_words_that_the_locale_cannot_hold_are_read_as_utf_8(tmp_path: Path) -> None:
    """As Python gives arguments in the C locale: each byte beyond ASCII is a half of a surrogate pair."""
    words, arguments = ("réd → 円", "bleu é"), []
    for each in words:
        arguments.append(each.encode().decode("ascii", "surrogateescape"))
    options = ["--negative-prompt", arguments[1], "--guidance-scale", "2", *QUICK, "--model", "tiny-t2v"]
    assert cli.main(["generate", arguments[0], "-o", str(tmp_path / "out.mp4"), *options]) == 0
    assert cli.main(["batch", "--prompt", arguments[0], "-o", str(tmp_path / "many"), *options]) == 0
    for path in (tmp_path / "out.mp4", tmp_path / "many" / "0000-seed1.mp4"):
        record = read_metadata(path)
        assert (record["prompt"], record["negative_prompt"]) == ([words[0]], [words[1]])


@pytest.mark.parametrize("size", [9223372036854775808, 10**4000])
@pytest.mark.parametrize("option", ["height", "width", "num-frames", "num-inference-steps", "seed", "fps"])
def test_numbers_that_no_tensor_takes_are_refused(
    tmp_path: Path, failed: Callable[..., str], option: str, size: int
) -> None:
    line = failed("generate", "x", "-o", tmp_path / "out.mp4", *QUICK, f"--{option}", size)
    assert line.startswith(option.replace("-", "_") + ": got ")
    assert ", want " in line


def test_the_home_of_nobody_is_a_name_as_any_other(failed: Callable[..., str]) -> None:
    assert failed("inspect", "~no-such-user/x").startswith("model: got '~no-such-user/x', want a directory")


SHELL = {
    "ascii": ('PYTHONIOENCODING=ascii {command} -o "ü.mp4"', 0, ""),
    "full-stdout": ("{command} -o out.mp4 >/dev/full", 0, ""),
    "full-stderr": ("{command} -o out.mp4 2>/dev/full", 0, ""),
    "closed-pipe": ("set -o pipefail; {command} -o out.mp4 | true", 0, ""),
    "closed": ("{command} -o out.mp4 <&- >&- 2>&-", 0, ""),
    "c-locale": ("LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 {command} -o out.mp4", 0, ""),
    "inspect-full": ("{python} -m cogvid inspect tiny-t2v >/dev/full", 1, "No space left on device"),
    "no-directory": ("mkdir x; cd x; rmdir ../x; {command} -o /tmp/never.mp4", 2, "working directory: got one that"),
    "file-size": ("ulimit -f 1; {command} -o out.mp4", 1, "File too large"),
    "memory": ("ulimit -v 700000; OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 {command} -o out.mp4", 1, "out of memory"),
}


@pytest.mark.parametrize(
    "case",
    [case if case in ("closed", "no-directory") else pytest.param(case, marks=pytest.mark.slow) for case in SHELL],
)
def test_the_status_is_that_of_the_video(tmp_path: Path, case: str) -> None:
    script, status, words = SHELL[case]
    made = shutil.which("bash")
    assert made is not None
    command = " ".join([sys.executable, "-m", "cogvid", "generate", "'the réd circle'", *QUICK])
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [made, "-c", script.format(command=command, python=sys.executable)],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    videos = sorted(path.name for path in tmp_path.glob("*") if path.is_file())
    assert videos == ([] if status else ["ü.mp4" if case == "ascii" else "out.mp4"])
    if status:
        assert words in done.stderr.splitlines()[-1]
        return
    frames, _ = read_video(tmp_path / videos[0])  # nothing that was printed is in it
    assert frames.shape == (1, 32, 32, 3)
    assert read_metadata(tmp_path / videos[0])["prompt"] == ["the réd circle"]
