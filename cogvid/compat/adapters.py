"""LoRA adapters by diffusers' names."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cogvid.compat.parts import Weights
from cogvid.options import check_choice


class Adapters:
    """The methods of a pipeline for its adapters. Their scales are kept with the weights, which pipelines may share."""

    _weights: Weights

    def load_lora_weights(
        self,
        source: str | os.PathLike[str],
        adapter_name: str | None = None,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
    ) -> None:
        """Load an adapter, as `Pipeline.load_lora` does; it alone is active then, see `set_adapters`."""
        if not isinstance(source, (str, os.PathLike)):
            raise ValueError(f"lora: got {type(source).__name__}, want a file, a directory or a hub id")
        path, scales = os.path.join(os.fspath(source), *filter(None, (subfolder, weight_name))), self._weights.scales
        name = adapter_name or f"default_{len(scales)}"
        self._weights.get().load_lora(path, 1.0, name)
        scales[name] = 1.0
        self._activate([name])

    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: Any = None) -> None:
        """Make these adapters active, each with its weight, or one for all, or 1."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        one = not isinstance(adapter_weights, (list, tuple))
        weights = [adapter_weights] * len(names) if one else list(adapter_weights)
        if len(weights) != len(names):
            raise ValueError(f"adapter_weights: got {len(weights)}, want one for each of {len(names)} adapters")
        for name in names:
            check_choice("adapter_names", name, list(self._weights.scales))
        self._weights.scales.update({n: 1.0 if w is None else w for n, w in zip(names, weights, strict=True)})
        self._activate(names)

    def disable_lora(self) -> None:
        self._activate(self._weights.active, factor=0.0)

    def enable_lora(self) -> None:
        self._activate(self._weights.active)

    def get_active_adapters(self) -> list[str]:
        return list(self._weights.active)

    def get_list_adapters(self) -> dict[str, list[str]]:
        return {"transformer": list(self._weights.scales)} if self._weights.scales else {}

    def fuse_lora(self, components: Sequence[str] = ("transformer",), lora_scale: float = 1.0) -> None:
        """Put the active adapters into the weights, with their weights times `lora_scale`."""
        if list(components) != ["transformer"]:
            raise ValueError(f"components: got {list(components)}, want ['transformer'], which alone has adapters")
        scales = self._weights.scales
        scales.update({name: scales[name] * lora_scale for name in self._weights.active})
        self._activate(self._weights.active)
        self._weights.get().fuse_lora()

    def unfuse_lora(self, components: Sequence[str] = ("transformer",)) -> None:  # noqa: ARG002 - as in diffusers
        """Take the adapters out of the weights and put them beside them."""
        core = self._weights.get()
        adapters = core.placement.lora
        core.unload_lora()
        for each in adapters:
            core.load_lora(each.source, each.scale, each.name)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self._weights.get().unload_lora(name)
            del self._weights.scales[name]
        self._weights.active = [name for name in self._weights.active if name in self._weights.scales]

    def unload_lora_weights(self) -> None:
        """Take all adapters out; the weights are the very tensors that were loaded."""
        self.delete_adapters(list(self._weights.scales))

    def _activate(self, names: Sequence[str], factor: float = 1.0) -> None:
        """Give each adapter the scale that it has if only these are active."""
        self._weights.active = list(names)
        for name, scale in self._weights.scales.items():
            self._weights.get().set_lora_scale(name, scale * factor if name in names else 0.0)

    @contextlib.contextmanager
    def _scaled_adapters(self, attention_kwargs: Mapping[str, Any] | None) -> Iterator[None]:
        """Multiply the scales of the active adapters by `attention_kwargs["scale"]` for a while."""
        others = [name for name in attention_kwargs or {} if name != "scale"]
        if others:
            raise ValueError(f"attention_kwargs: got {others[0]!r}, want only 'scale', of the adapters")
        scale = (attention_kwargs or {}).get("scale", 1.0)
        if scale == 1:
            yield
            return
        if not self._weights.active or any(each.fused for each in self._weights.get().placement.lora):
            what = "fused adapters" if self._weights.active else "no adapter"
            raise ValueError(f"attention_kwargs: got scale {scale} with {what}, want adapters beside the weights")
        self._activate(self._weights.active, factor=scale)
        try:
            yield
        finally:
            self._activate(self._weights.active)
