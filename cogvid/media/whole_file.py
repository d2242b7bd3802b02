"""Write a file that appears under its name whole or not at all, even if the process is killed.

Where the file system can, the data go to a file without a name, which is linked when it is whole: a process that dies
leaves nothing. Elsewhere (NFS, overlayfs before Linux 6.3, other systems than Linux) they go to a hidden file beside
the target. Its writer holds a lock on it, so a hidden file without a lock was left by a dead process. The next writer
in the directory removes it.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator

_HIDDEN = re.compile(r"\.cogvid-[0-9a-f]{12}(\.\w+)?")
_mine: set[str] = set()  # the hidden files of this process


@contextlib.contextmanager
def whole_file(target: str | os.PathLike[str]) -> Iterator[str]:
    """Yield the path of an empty file to fill. It becomes `target` when the block ends without an exception.

    Until then a file that is there stays as it was. The data are on the disk when the name is. The mode is that of the
    file that is replaced, and follows the umask where there is none. What opens the path must write to it in place.
    """
    target = os.path.realpath(target)
    directory, suffix = os.path.dirname(target), os.path.splitext(target)[1]
    sweep(directory)
    descriptor, hidden = _open_unnamed(directory), None
    if descriptor is None:
        descriptor, hidden = _open_hidden(directory, suffix)
    try:
        _keep_mode(descriptor, target)
        yield hidden or f"/proc/self/fd/{descriptor}"
        os.fsync(descriptor)
        if hidden is None:
            hidden = _link(descriptor, target, suffix)
        if hidden is not None:
            os.replace(hidden, target)
        _sync_directory(directory)
    finally:
        if hidden is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(hidden)
            _mine.discard(hidden)
        os.close(descriptor)


def write_bytes(target: str | os.PathLike[str], data: bytes) -> None:
    """Write a whole file: see `whole_file`."""
    with whole_file(target) as path, open(path, "wb") as file:
        file.write(data)


def sweep(directory: str) -> None:
    """Remove the hidden files that dead processes left in a directory."""
    with contextlib.suppress(OSError):  # a directory that cannot be listed
        for name in os.listdir(directory):
            if _HIDDEN.fullmatch(name):
                with contextlib.suppress(OSError):  # another process was faster, or the file is not ours
                    _remove_if_left(os.path.join(directory, name))


def remove_hidden() -> None:
    """Remove the hidden files of this process, which ends at once."""
    for path in list(_mine):
        with contextlib.suppress(OSError):
            os.unlink(path)


def try_lock(descriptor: int, *, wait: bool = False) -> bool:
    """Lock an open file until it is closed or its process ends. False: another has the lock, or there are none here.

    wait: until the other gives it up.
    """
    try:
        import fcntl
    except ImportError:  # not POSIX
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _open_unnamed(directory: str) -> int | None:
    """Open a file without a name, or return None where there are none."""
    if not hasattr(os, "O_TMPFILE"):
        return None
    try:
        descriptor = os.open(directory, os.O_TMPFILE | os.O_RDWR, 0o666)
    except OSError:  # the file system's errors differ; one that is not about O_TMPFILE comes back with a named file
        return None
    if os.path.exists(f"/proc/self/fd/{descriptor}"):
        return descriptor
    os.close(descriptor)
    return None


def _open_hidden(directory: str, suffix: str) -> tuple[int, str]:
    """Make and lock a hidden file; return its descriptor and path."""
    while True:
        path = os.path.join(directory, f".cogvid-{secrets.token_hex(6)}{suffix}")
        # Not with `tempfile`, which makes the file private: its mode must follow the umask.
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        try_lock(descriptor)
        if os.path.exists(path):  # else another process swept it before it was locked
            _mine.add(path)
            return descriptor, path
        os.close(descriptor)


def _link(descriptor: int, target: str, suffix: str) -> str | None:
    """Give an unnamed file the target's name, or a hidden name, which is returned, where a file is to be replaced."""
    try_lock(descriptor)  # before there is a hidden name, which another process would sweep
    source = f"/proc/self/fd/{descriptor}"
    hidden = os.path.join(os.path.dirname(target), f".cogvid-{secrets.token_hex(6)}{suffix}")
    for name in (target, hidden):
        try:
            # Python follows the link in /proc only with a directory's descriptor, which an absolute path ignores.
            os.link(source, name, src_dir_fd=descriptor, follow_symlinks=True)
        except FileExistsError:
            continue
        except OSError:  # a file system that makes unnamed files and does not link them: copy
            break
        return None if name == target else name
    copy, hidden = _open_hidden(os.path.dirname(target), suffix)
    try:
        shutil.copyfile(source, hidden)
        _keep_mode(copy, target)
        os.fsync(copy)
        os.dup2(copy, descriptor)  # so that the copy's lock holds as long as the descriptor is open
    except BaseException:
        os.unlink(hidden)
        raise
    finally:
        os.close(copy)
    return hidden


def _keep_mode(descriptor: int, target: str) -> None:
    """Give an open file the mode of the file that it will replace, so that a private one stays private."""
    with contextlib.suppress(OSError):  # there is none, or the file system has no modes
        os.fchmod(descriptor, stat.S_IMODE(os.stat(target).st_mode))


def _remove_if_left(path: str) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if stat.S_ISREG(os.fstat(descriptor).st_mode) and try_lock(descriptor):
            os.unlink(path)
    finally:
        os.close(descriptor)


def _sync_directory(directory: str) -> None:
    """Put names on the disk too, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
