"""What is said of an error, in one line, and whose fault it is: for the command line and for a page. No torch here."""

from __future__ import annotations

import errno

from cogvid.media.download import one_line

USER_ERROR, MACHINE_ERROR = 2, 1  # exit statuses
MACHINE_ERRNOS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE,
    errno.EPIPE, errno.EBADF,
)  # fmt: skip
# What the loader says of a library that there is no memory for (an ImportError), and PyTorch of a tensor.
_NO_MEMORY = (
    "Cannot allocate memory", "failed to map segment", "cannot allocate", "DefaultCPUAllocator",
    "Storage size calculation overflowed", "integer multiplication overflow",
)  # fmt: skip
_LONGEST_LINE = 1000  # characters


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that there was no memory."""
    # torch's CPU allocator raises a plain RuntimeError, so its words are all there is to go by.
    no_memory = isinstance(error, (RuntimeError, ImportError)) and any(words in str(error) for words in _NO_MEMORY)
    return no_memory or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def judged(error: BaseException) -> tuple[BaseException | str, int]:
    """Return what to say of an error, and the exit status."""
    if is_out_of_memory(error):
        said = str(error).removeprefix("out of memory").removeprefix(": ")
        return f"out of memory: {said}" if said else "out of memory", MACHINE_ERROR
    if isinstance(error, FloatingPointError) or (isinstance(error, OSError) and error.errno in MACHINE_ERRNOS):
        return error, MACHINE_ERROR
    if isinstance(error, (ValueError, OSError, ImportError)):
        return error, USER_ERROR
    said = f"unexpected {type(error).__name__}: {error} (--traceback shows where it comes from)"
    return said, MACHINE_ERROR


def line_of(error: BaseException | str) -> str:
    """Return the words of an error as one line that is not too long, without the secrets of URLs in it."""
    text = error.strerror or "" if isinstance(error, OSError) and not error.filename else ""
    return as_line(text or error) or type(error).__name__


def as_line(text: object) -> str:
    """Return a message as one line that is not too long, without the secrets of URLs in it."""
    return one_line(text, _LONGEST_LINE) if str(text) else ""
