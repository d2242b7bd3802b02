"""Functions of the user as providers: `--provider module:function`.

The function is called as a model calls it: with the arguments of `cogvid.ops` in their order, those after `*` by name.
Attention gets `(q, k, v, context)`, the context being a `cogvid.BlockContext`, and returns `[B, N, heads * head_dim]`.
So what is benchmarked can be put into a model as it is.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cogvid.ops import Ops
from cogvid_kernels.bench.cases import Inputs
from cogvid_kernels.bench.providers import Runner
from cogvid_kernels.bench.registry import Op


def own_provider(op: Op, name: str) -> Callable[[Inputs], Runner]:
    """Import `module:function`, from the working directory too, and return it as a provider of the op.

    Raises:
        ValueError: it cannot be imported, or does not take what a model passes.
    """
    if op.name not in vars(Ops.torch()):
        raise ValueError(f"provider: got --ops {op.name}, want one of {', '.join(vars(Ops.torch()))}")
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ValueError(f"provider: got {name!r:.80}, want MODULE:FUNCTION")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function: Any = importlib.import_module(module)
        for part in attribute.split("."):
            function = getattr(function, part)
    except Exception as error:  # a module of the user may raise anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
        raise ValueError(f"provider: got {name}, which cannot be imported ({reason}), want MODULE:FUNCTION") from error
    if not callable(function):
        raise ValueError(f"provider: got {name}, which is a {type(function).__name__}, want a function")
    positional, named = arguments_of(op)
    try:
        inspect.signature(function).bind(*positional, **dict.fromkeys(named))
    except TypeError as error:
        wanted = ", ".join([*positional, *(f"{each}=" for each in named)])
        raise ValueError(f"provider: got {name}, which says {error}, want one that takes ({wanted})") from error
    except ValueError:  # a builtin that does not tell its arguments
        pass
    return functools.partial(build, op, function)


def arguments_of(op: Op) -> tuple[list[str], list[str]]:
    """Return the names of what a model passes by place, and by name; not those that it leaves to their default."""
    positional, named = [], []
    for parameter in inspect.signature(op.reference).parameters.values():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            positional.append(parameter.name)
        elif parameter.default is inspect.Parameter.empty:
            named.append(parameter.name)
    return positional, named


def build(op: Op, function: Callable[..., Any], inputs: Inputs) -> Runner:
    positional, named = arguments_of(op)
    # Attention alone takes a context, which is no argument of the other providers.
    arguments = [inputs[name] if name in inputs else inputs[f"_{name}"] for name in positional]
    call = functools.partial(function, *arguments, **{name: inputs[name] for name in named})
    tensors = {name: x for name, x in zip(positional, arguments, strict=True) if isinstance(x, Tensor)}
    before = {name: x.clone() for name, x in tensors.items()}
    wanted = next((x.dtype, x.device) for x in tensors.values())

    def check(result: Any) -> Any:
        """Find what a relative error does not show."""
        written = [name for name, kept in before.items() if not torch.equal(tensors[name], kept)]
        for name in written:
            tensors[name].copy_(before[name])
        before.clear()
        if written:
            raise ValueError(f"{written[0]}: got an input that was written to, want it as it was")
        for x in [result] if isinstance(result, Tensor) else list(result):
            if (x.dtype, x.device) != wanted:
                raise ValueError(f"result: got {x.dtype} on {x.device}, want {wanted[0]} on {wanted[1]}")
        return result

    return call, check
