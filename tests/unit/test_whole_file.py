"""Files that appear whole or not at all: with and without unnamed files, and where the writer is killed."""

from __future__ import annotations

import errno
import os
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cogvid.media import whole_file as module
from cogvid.media.whole_file import sweep, whole_file, write_bytes

OPEN, LINK = os.open, os.link


@pytest.fixture(params=["unnamed", "not linked", "hidden"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the file system can: unnamed files, unnamed files that cannot be linked, or neither."""

    def no_unnamed(path: Any, flags: int, mode: int = 0o777, **options: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return OPEN(path, flags, mode, **options)

    def no_link(*_: object, **__: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    if request.param == "hidden":
        monkeypatch.setattr(os, "open", no_unnamed)
    if request.param == "not linked":
        monkeypatch.setattr(os, "link", no_link)
    return request.param


def test_a_file_appears_whole(tmp_path: Path, kind: str) -> None:
    for content in (b"first", b"second, which is longer", b"3rd"):
        before = sorted(path.name for path in tmp_path.iterdir())
        with whole_file(tmp_path / "a.txt") as path:
            Path(path).write_bytes(content)
            hidden = [name for name in os.listdir(tmp_path) if name.startswith(".cogvid-")]
            assert len(hidden) == (kind == "hidden")
            assert [name for name in sorted(os.listdir(tmp_path)) if name not in hidden] == before
        assert os.listdir(tmp_path) == ["a.txt"]
        assert (tmp_path / "a.txt").read_bytes() == content


def test_a_hidden_name_is_locked_until_it_is_replaced(
    tmp_path: Path,
    kind: str,  # noqa: ARG001 - sets the system up
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another writer sweeps the directory at the last moment."""
    replace = os.replace

    def sweep_first(source: str, target: str) -> None:
        sweep(str(tmp_path))
        replace(source, target)

    monkeypatch.setattr(os, "replace", sweep_first)
    for content in (b"first", b"second"):  # the second has something to replace
        write_bytes(tmp_path / "a.txt", content)
        assert (tmp_path / "a.txt").read_bytes() == content


def test_an_exception_leaves_what_was_there(tmp_path: Path, kind: str) -> None:  # noqa: ARG001 - sets the system up
    target = tmp_path / "a.txt"

    def fail() -> None:
        with whole_file(target) as path:
            Path(path).write_bytes(b"half")
            raise KeyboardInterrupt

    for there in ([], ["a.txt"]):
        with pytest.raises(KeyboardInterrupt):
            fail()
        assert os.listdir(tmp_path) == there
        target.write_bytes(b"kept")
    assert target.read_bytes() == b"kept"


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_mode_follows_the_umask(tmp_path: Path, kind: str, mask: int) -> None:  # noqa: ARG001 - sets the system up
    before = os.umask(mask)
    try:
        write_bytes(tmp_path / "a", b"new")
        write_bytes(tmp_path / "a", b"replaced")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~mask


def test_a_link_stays_one(tmp_path: Path, kind: str) -> None:  # noqa: ARG001 - sets the system up
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real/file")
    for content in (b"new", b"replaced"):
        write_bytes(tmp_path / "link", content)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "real" / "file").read_bytes() == content


def in_a_child(work: Callable[[], object]) -> int:
    """Run in a process of its own; return how it ended."""
    if (child := os.fork()) == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_a_file_that_is_replaced_keeps_its_mode(tmp_path: Path, kind: str, mask: int) -> None:  # noqa: ARG001
    target = tmp_path / "a"
    target.write_bytes(b"before")
    target.chmod(0o600)
    before = os.umask(mask)
    try:
        write_bytes(target, b"after")
    finally:
        os.umask(before)
    assert target.read_bytes() == b"after"
    assert stat.S_IMODE(target.stat().st_mode) == 0o600


@pytest.mark.parametrize("call", ["fsync", "link", "replace"])
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("existing", [False, True])
def test_killed_inside_of_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, call: str, moment: str, existing: bool
) -> None:
    """What is there is the old file or the new one; what is left beside it goes with the next save."""
    target = tmp_path / "a"
    if existing:
        target.write_bytes(b"old")
    real = getattr(os, call)

    def kill(*arguments: Any, **options: Any) -> None:
        if moment == "after":
            real(*arguments, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(os, call, kill)
    ended = in_a_child(lambda: write_bytes(target, b"new"))
    monkeypatch.setattr(os, call, real)
    killed = os.waitstatus_to_exitcode(ended) == -signal.SIGKILL
    if (
        call == "fsync"
        or (call, kind) == ("link", "unnamed")
        or (call == "replace" and (existing or kind != "unnamed"))
    ):
        assert killed
    content = target.read_bytes() if target.exists() else None
    assert content == b"new" or (killed and content == (b"old" if existing else None))
    hidden = [name for name in os.listdir(tmp_path) if name != "a"]
    if kind == "unnamed" and not existing:
        assert hidden == []
    write_bytes(tmp_path / "b", b"next")
    assert sorted(os.listdir(tmp_path)) == (["a", "b"] if content else ["b"])


def test_a_live_writer_is_not_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_open_unnamed", lambda _: None)
    others = [".cogvid-notes", ".cogvid-0123456789ab.txt.bak", ".hidden"]
    for name in others:
        (tmp_path / name).touch()
    (tmp_path / ".cogvid-0123456789ab").mkdir()
    (tmp_path / ".cogvid-0123456789ac.mp4").touch()
    with whole_file(tmp_path / "a") as path:
        Path(path).write_bytes(b"live")
        sweep(str(tmp_path))
        in_a_child(lambda: sweep(str(tmp_path)))
        assert Path(path).exists()
    left = sorted(os.listdir(tmp_path))
    assert left == sorted([*others, ".cogvid-0123456789ab", "a"])
    assert (tmp_path / "a").read_bytes() == b"live"


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path, kind: str) -> None:  # noqa: ARG001
    resource = pytest.importorskip("resource")
    (tmp_path / "a").write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_bytes(tmp_path / "a", bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"
