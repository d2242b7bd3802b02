"""What a kernel module lists for the compile-only checks, which need no GPU.

Each module that holds kernels has `compile_cases(architecture) -> list[KernelCase]`; `scripts/compile_kernels.py` finds
them by that name, compiles each case for the architecture, and checks registers, shared memory, spills and SASS.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class KernelCase:
    """One specialisation of one kernel.

    Attributes:
        name: unique within an architecture, for example `attention/tma/bf16-hd64`.
        kernel: the function decorated with `triton.jit`.
        arguments: everything that the launch passes by name, built by the launcher's own code from tensors on the meta
            device, so that what is compiled here is what runs; launch options (num_warps, ...) are among them.
        sass: opcode prefixes that the machine code must contain, for example `("HGMMA", "UTMALDG")`.
        absent: opcode prefixes that it must not contain.
    """

    name: str
    kernel: Any
    arguments: dict[str, Any]
    sass: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
