"""Pages of files that are mapped: read ahead, and dropped from memory once they were used.

Weights whose stored dtype is the run's are the mapping itself. A page that was dropped is read again from the file (or
the system's cache of it) at its next use. A page that was written to is the process's own and is never dropped.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Iterable

import numpy as np
from torch import Tensor, nn

_FILE, _SWAPPED, _PRESENT = 61, 62, 63  # bits of an entry of /proc/self/pagemap


def will_need(tensors: Iterable[Tensor]) -> None:
    """Have the system begin to read what is mapped and not in memory; it does not wait."""
    for tensor in tensors:
        _advise(tensor, "MADV_WILLNEED")


def drop_pages(tensors: Iterable[Tensor]) -> int:
    """Drop what is mapped from a file and unchanged, and return the bytes; other memory stays as it is."""
    return sum(
        _advise(tensor, "MADV_DONTNEED")
        for tensor in tensors
        if type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu" and _is_unchanged(tensor)
    )


def _whole_pages(tensor: Tensor) -> tuple[int, int]:
    """Return the first byte and the number of bytes of the pages that hold nothing else."""
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    return start, max((tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start, 0)


def _advise(tensor: Tensor, advice: str) -> int:
    start, size = _whole_pages(tensor)
    if size and hasattr(mmap, advice):
        call = ctypes.CDLL(None, use_errno=True).madvise
        call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        if call(start, size, getattr(mmap, advice)) == 0:
            return size
    return 0


def _is_unchanged(tensor: Tensor) -> bool:
    """Say whether all pages in memory are those of a file. Where the system does not tell, they stay."""
    start, size = _whole_pages(tensor)
    with contextlib.suppress(OSError), open("/proc/self/pagemap", "rb") as file:
        file.seek(start // mmap.PAGESIZE * 8)
        pages = np.frombuffer(file.read(size // mmap.PAGESIZE * 8), dtype=np.uint64)
        present, of_file, swapped = ((pages >> np.uint64(bit)) & np.uint64(1) for bit in (_PRESENT, _FILE, _SWAPPED))
        return len(pages) * mmap.PAGESIZE == size and not (swapped | (present & ~of_file & np.uint64(1))).any()
    return False
