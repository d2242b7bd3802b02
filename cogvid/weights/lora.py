"""Put LoRA adapters into a transformer, beside its weights or into them, and take them out again."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cogvid.models.transformer import Block, Transformer
from cogvid.ops import can_fuse
from cogvid.weights.load import centre_heads
from cogvid.weights.lora_file import Adapter, Update, read_lora
from cogvid.weights.lora_option import Lora, check_names, check_scale, make_lora
from cogvid.weights.placement import Placement


class LowRank(nn.Module):
    """One update of a linear: `factor * up(down(x))`. The matrices have the dtype and device of the model."""

    down: Tensor
    up: Tensor

    def __init__(self, update: Update, scale: float, like: Tensor) -> None:
        super().__init__()
        self.factor = scale * update.factor
        self.register_buffer("down", update.down.to(like.device, like.dtype), persistent=False)
        self.register_buffer("up", update.up.to(like.device, like.dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down), self.up) * self.factor

    def weight(self) -> Tensor:
        """Return what is added to the weight of the linear, `[out, in]`, in at least fp32."""
        wide = torch.promote_types(self.up.dtype, torch.float32)
        return self.up.to(wide) @ self.down.to(wide) * self.factor


class LoraLinear(nn.Module):
    """A linear with updates beside it, added in their order; equals peft's `lora.Linear`.

    Its state dict is that of the linear, without the updates. It goes, with any hooks on it, when the updates go.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.updates = nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        """Return `base(x)` with all updates: `[..., in]` to `[..., out]`."""
        y = self.base(x)
        for update in self.updates:
            y = y + update(x)
        return y

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the state dict of the linear."""
        return self.base.state_dict(*args, **kwargs)


class Loras:
    """The adapters of a transformer. Each method returns what all of them are now.

    An adapter is checked whole before the transformer changes. The modules and parameters that a change replaces are
    kept, and put back by the next one: nothing is ever subtracted.
    """

    def __init__(self, transformer: Transformer) -> None:
        self._transformer = transformer
        self._adapters: tuple[Adapter, ...] = ()
        self._originals: dict[str, tuple[nn.Module, Any]] = {}  # linear -> the module and its weight

    def add(self, adapters: Iterable[Adapter]) -> tuple[Lora, ...]:
        """Add adapters that were read for this transformer."""
        return self._set([*self._adapters, *adapters])

    def load(self, source: str | os.PathLike[str], scale: float, name: str | None) -> tuple[Lora, ...]:
        """Read an adapter and add it; see `Pipeline.load_lora`."""
        lora = make_lora(source, scale, name)
        check_names([*self._names(), lora.name])
        return self.add([read_lora(lora, self._transformer.config)])

    def scale(self, name: str, scale: float) -> tuple[Lora, ...]:
        """Give an adapter another scale."""
        check_scale(scale)
        self._check(name)
        return self._replace(lambda lora: {"scale": float(scale)} if lora.name == name else {})

    def fuse(self) -> tuple[Lora, ...]:
        """Put all adapters into the weights."""
        self._check(None)
        return self._replace(lambda _: {"fused": True})

    def unload(self, name: str | None) -> tuple[Lora, ...]:
        """Take one adapter out, or all of them."""
        self._check(name)
        return self._set([each for each in self._adapters if name not in (None, each.lora.name)])

    def _names(self) -> list[str]:
        return [each.lora.name for each in self._adapters]

    def _check(self, name: str | None) -> None:
        if not self._adapters:
            raise ValueError("lora: got a model without an adapter, want one; load_lora loads it")
        if name is not None and name not in self._names():
            raise ValueError(f"name: got {name!r:.60}, want one of {', '.join(self._names())}")

    def _replace(self, change: Callable[[Lora], dict[str, Any]]) -> tuple[Lora, ...]:
        return self._set(
            [dataclasses.replace(a, lora=dataclasses.replace(a.lora, **change(a.lora))) for a in self._adapters]
        )

    def _set(self, adapters: Sequence[Adapter]) -> tuple[Lora, ...]:
        """Make the transformer have exactly these adapters."""
        loras = tuple(each.lora for each in adapters)
        check_names([lora.name for lora in loras])
        originals, fused = dict(self._originals), {*_fused(self._adapters), *_fused(adapters)}
        made: dict[str, tuple[Any, list[LowRank]]] = {}
        for path in dict.fromkeys(path for adapter in adapters for path in adapter.updates):
            module = self._transformer.get_submodule(path)
            module, weight = originals.setdefault(path, (module, module._parameters.get("weight")))
            made[path] = self._adapted(path, module, weight, adapters)
        for path in fused:
            kind = type(originals[path][0]._parameters["weight"])
            if kind is not nn.Parameter:  # it was sharded since, and what is set here would be lost
                raise ValueError(f"lora: got a fused adapter and a {kind.__name__} at {path}, want it unfused")
        for path, (module, weight) in originals.items():
            new_weight, beside = made.get(path, (weight, []))
            if path in fused:
                module.weight = new_weight
            if beside:
                there = self._transformer.get_submodule(path)
                outer = there if isinstance(there, LoraLinear) else LoraLinear(module)
                outer.updates = nn.ModuleList(beside)
                module = outer
            self._transformer.set_submodule(path, module)
        self._originals = {path: originals[path] for path in made}
        self._adapters = tuple(adapters)
        return loras

    def _adapted(
        self, path: str, module: nn.Module, weight: Any, adapters: Sequence[Adapter]
    ) -> tuple[Any, list[LowRank]]:
        """Return the weight that a linear is to have, with the fused adapters in it, and what is to be beside it."""
        like = self._transformer.norm_out.weight  # of the dtype and device of the model
        updates = [(a.lora, LowRank(a.updates[path], a.lora.scale, like)) for a in adapters if path in a.updates]
        fused = [update.weight() for lora, update in updates if lora.fused]
        beside = [update for lora, update in updates if not lora.fused]
        if fused:
            if not can_fuse(module, nn.Linear):
                kind = f"{type(module).__name__}, with hooks or weights of its own,"
                raise ValueError(f"fuse_lora: got {kind} at {path}, want a plain linear")
            added = functools.reduce(torch.add, fused)
            block = self._transformer.get_submodule(path.rpartition(".")[0])
            if isinstance(block, Block) and block.centred and path.endswith(("q_proj", "k_proj")):
                added = centre_heads(added, block.num_heads)  # so that RMSNorm stays right
            # Offloading keeps weights elsewhere, as they are stored. Without it, they are in the run's dtype before.
            summed = (weight.to(like.dtype) + added.to(weight.device)).to(like.dtype)
            weight = nn.Parameter(summed, requires_grad=weight.requires_grad)
        return weight, beside


def _fused(adapters: Iterable[Adapter]) -> Iterator[str]:
    """Yield the linears whose weights hold an adapter."""
    for adapter in adapters:
        if adapter.lora.fused:
            yield from adapter.updates


class TakesLoras:
    """The methods of a pipeline that change its adapters; its placement tells of them."""

    placement: Placement

    def __init__(self, transformer: Transformer) -> None:
        self.loras = Loras(transformer)

    def load_lora(self, source: str | os.PathLike[str], scale: float = 1.0, name: str | None = None) -> None:
        """Add a LoRA adapter to the transformer; `weights.lora_file` has the formats.

        source: a file, a directory, or a hub id, with or without a file of it ("owner/name/style.safetensors").
        scale: what the adapter's own scale is multiplied by. name: for the methods below; the file's by default.
        """
        self._use_loras(self.loras.load(source, scale, name))

    def set_lora_scale(self, name: str, scale: float) -> None:
        """Give an adapter another scale, fused or not."""
        self._use_loras(self.loras.scale(name, scale))

    def fuse_lora(self) -> None:
        """Put all adapters into the weights: as fast as without, for a copy of the weights that they change."""
        self._use_loras(self.loras.fuse())

    def unload_lora(self, name: str | None = None) -> None:
        """Take one adapter out, or all of them; without any, the weights are the very tensors that were loaded."""
        self._use_loras(self.loras.unload(name))

    def _use_loras(self, loras: tuple[Lora, ...]) -> None:
        self.placement = dataclasses.replace(self.placement, lora=loras)
