"""The steps of a call as a callback of diffusers sees and changes them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cogvid.run.pipeline import Pipeline
from cogvid.sampling.guidance import guide

if TYPE_CHECKING:
    from cogvid.compat.pipelines import BasePipeline


class Interrupted(Exception):
    """Ends the steps of a run. latents: `[B, T, C, h, w]`, where it ended."""

    def __init__(self, latents: Tensor) -> None:
        self.latents = latents


class Steps:
    """The steps of one call as a callback of diffusers sees and changes them, by hooks on the transformer.

    scales: guidance of each step; None without. callback: of the caller, with the names of the tensors that it gets.
    """

    def __init__(
        self,
        pipe: BasePipeline,
        scales: Sequence[float | None],
        callback: Callable[..., Any] | None,
        names: Sequence[str],
    ) -> None:
        self._pipe, self._scales, self._callback, self._names = pipe, scales, callback, names
        self._embeds = torch.empty(0)

    @contextlib.contextmanager
    def hooked(self, transformer: torch.nn.Module, *, dynamic: bool) -> Iterator[None]:
        """Let the hooks act. dynamic: each step has its own scale, whatever a callback sets."""

        def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
            latents, embeds, timestep = args
            self._embeds = self._embeds if self._embeds.numel() else embeds
            self._pipe._current_timestep = timestep[0]
            if dynamic and (scale := self._scales[kwargs["step"]]) is not None:
                self._pipe._guidance_scale = scale
            return (latents, self._embeds, timestep), kwargs

        def after(_: Any, args: Any, kwargs: dict[str, Any], output: Tensor) -> Tensor | None:  # noqa: ARG001
            scale = self._pipe._guidance_scale
            if kwargs["branch"] != "both" or scale == self._scales[kwargs["step"]]:
                return None
            uncond, cond = output.chunk(2)
            guided = guide(uncond, cond, scale)
            return torch.cat([guided, guided])  # guidance between two equal halves has no effect, at any scale

        hooks = [
            transformer.register_forward_pre_hook(before, with_kwargs=True),
            transformer.register_forward_hook(after, with_kwargs=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def __call__(self, core: Pipeline, index: int, timestep: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Call the caller's callback; what it does not change stays as it is, in full precision."""
        latents = tensors["latents"].to(core.dtype)
        replaced = self._call_back(index, timestep, latents) if self._callback is not None else None
        if self._pipe._interrupt and index + 1 < len(self._scales):
            raise Interrupted(latents if replaced is None else replaced)
        return {} if replaced is None else {"latents": replaced}

    def _call_back(self, index: int, timestep: int, latents: Tensor) -> Tensor | None:
        """Return the latents that replace the present ones, or None."""
        assert self._callback is not None
        embeds, version = self._embeds, _version(latents)
        negative = embeds.chunk(2)[0].clone() if self._scales[index] is not None else None
        given = {"latents": latents, "prompt_embeds": embeds, "negative_prompt_embeds": negative}
        moment = torch.tensor(timestep, device=latents.device)
        returned = self._callback(self._pipe, index, moment, {name: given[name] for name in self._names}) or {}
        if returned.get("negative_prompt_embeds", negative) is not negative:
            raise ValueError(
                "negative_prompt_embeds: got others from the callback, want them in the first half of prompt_embeds"
            )
        self._embeds = returned.get("prompt_embeds", embeds)
        if self._embeds.shape != embeds.shape:
            got, want = list(self._embeds.shape), list(embeds.shape)
            raise ValueError(f"prompt_embeds: got shape {got} from the callback, want {want}")
        replaced = returned.get("latents", latents)
        return None if replaced is latents and _version(latents) == version else replaced


def _version(tensor: Tensor) -> object:
    """Return what changes when the tensor is changed in place; always another thing where that is not known."""
    return object() if tensor.is_inference() else tensor._version
