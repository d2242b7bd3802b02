"""What a kernel module lists for the compile-only checks, which need no GPU.

Each module that holds kernels has `compile_cases(architecture) -> list[KernelCase]`; `scripts/compile_kernels.py` finds
them by that name, compiles each case for the architecture, and checks registers, shared memory, spills and SASS.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class MainLoops:
    """What the loops that hold both wgmma and exp2 must be in the machine code of a warp-specialised kernel.

    In each of them a wait must leave a wgmma running, no barrier may be one of the whole block, and no register of a
    running wgmma may be written.

    Attributes:
        count: how many there are, one of each consumer.
        hgmma: HGMMA instructions in each.
    """

    count: int
    hgmma: int


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
        loops: what its main loops must be; None does not look.
    """

    name: str
    kernel: Any
    arguments: dict[str, Any]
    sass: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    loops: MainLoops | None = None
