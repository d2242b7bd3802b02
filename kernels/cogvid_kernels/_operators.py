"""Every public function is a registered operator, `torch.ops.cogvid_kernels.NAME`.

FakeTensor, torch.compile and torch.export use an operator's fake implementation and never trace the launch. Autograd
knows the operator too, so a backward pass gets a gradient or an error, never a wrong result.

This is `torch.library.custom_op` and not `triton_op`, which traces the launch and so cannot run in Triton's
interpreter. What an operator costs per call: `python -m cogvid_kernels.bench --overhead`, and kernels/RESULTS.md.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def register(
    run: Callable[..., Any],
    outputs: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register an operator under the name of `run`, less its leading underscore.

    Args:
        run: check everything and compute; its annotations are the operator's schema.
        outputs: check all but addresses and return the outputs unwritten: what the operator is to a FakeTensor.
        setup_context, backward: as of `torch.library.register_autograd`; without them a backward pass raises.
    """
    name = run.__name__.removeprefix("_")
    operator = torch.library.custom_op(f"cogvid_kernels::{name}", run, mutates_args=())
    operator.register_fake(outputs)

    def refuse(ctx: Any, *gradients: Tensor) -> None:  # noqa: ARG001 - the signature of every backward
        raise RuntimeError(f'{name}: got a backward pass, want forward only; train with ops="torch"')

    operator.register_autograd(backward or refuse, setup_context=setup_context)
    return operator


def want_tensors(**arguments: Any) -> None:
    """Raise ValueError unless all are tensors: the operator itself would name neither the argument nor the type."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name}: got {type(value).__name__}, want a tensor")
