"""Find the first step, and its first block of the transformer, whose output departs from that of diffusers.

    python scripts/trace_diffusers.py tiny-t2v
    python scripts/trace_diffusers.py /path/to/CogVideoX-5b --dtype bfloat16 --device cuda --num-frames 9

The transformer of diffusers runs at every step of a run from noise and random text embeddings, without guidance. Each
part of it (embedding, every block, output) is computed here again from diffusers' own input to that part, so that
errors do not add up, neither within a step nor from step to step. What rounding alone can do is measured with the
blocks of diffusers; `cogvid/run/trace.py` says how. It is the counterpart of `cogvid compare A B --trace`. One step is
held at a time. The sampler between the steps is cogvid's, which equals that of diffusers to the bit; text encoder and
VAE are not traced: `scripts/parity_report.py` and `scripts/verify_official.py` compare them.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from torch import Tensor

import measure  # noqa: F401 - makes cogvid importable
import references
from cogvid.models.transformer import Transformer
from cogvid.ops import BlockContext
from cogvid.run.trace import Call, Trace, distance
from cogvid.sampling.samplers import sample
from cogvid.sampling.schedule import Schedule, make_schedule
from cogvid.weights.checkpoint import read_checkpoint
from cogvid.weights.files import DTYPES
from cogvid.weights.load import load_transformer


class Probe:
    """A step cache that keeps what the blocks would get, and returns something else for what they would make."""

    def __init__(self, replacement: Tensor) -> None:
        self.state: dict[str, Any] = {}
        self.replacement = replacement

    def run(self, x: Tensor, context: BlockContext, _blocks: object) -> Tensor:
        self.x, self.context = x, context
        return self.replacement


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    """Print the trace; 0 if nothing departs, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a shipped pack, a directory or a hub id")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ops", default="auto", help="auto, torch or triton")
    for name in ("height", "width", "num-frames"):
        parser.add_argument(f"--{name}", type=int, help="pixels or pixel frames; the model's if not given")
    parser.add_argument("--steps", type=int, help="of the run; the model's if not given")
    args = parser.parse_args(argv)
    checkpoint = read_checkpoint(args.model)
    model, dtype = checkpoint.model, DTYPES[args.dtype]
    sizes = ((args.height, model.height), (args.width, model.width), (args.num_frames, model.num_frames))
    frames, height, width = model.latent_size(*(default if given is None else given for given, default in sizes))
    ours = load_transformer(checkpoint.directory, device=args.device, dtype=dtype, ops=args.ops)
    from diffusers import CogVideoXTransformer3DModel

    options: dict[str, Any] = {"subfolder": "transformer", "torch_dtype": dtype}
    theirs = CogVideoXTransformer3DModel.from_pretrained(checkpoint.directory, **options).to(args.device).eval()
    config, generator = model.transformer, torch.Generator().manual_seed(0)
    latents = torch.randn(1, config.in_channels, frames, height, width, generator=generator).to(args.device, dtype)
    text = torch.randn(1, model.text_length, config.text_embed_dim, generator=generator).to(args.device, dtype)
    schedule = make_schedule(model.schedule, args.steps or model.num_inference_steps)
    found = trace_run(ours, theirs, latents, text, schedule)
    print("\n".join(found.lines()))
    return 0 if found.first is None else 1


def trace_run(ours: Transformer, theirs: Any, latents: Tensor, text: Tensor, schedule: Schedule) -> Trace:
    """Trace every step of a run.

    latents: `[B, C, T, h, w]`, the noise and, on the channels after it, what the model is conditioned on; text:
    `[B, L, E]`; both in the dtype of the models.
    """
    found, channels = Trace(), ours.config.out_channels
    conditioning = latents[:, channels:]

    def network(x: Tensor, index: int, timestep: int, _branch: str) -> Tensor:
        output, calls = trace_transformer(ours, theirs, torch.cat([x, conditioning], dim=1), text, timestep, index)
        found.calls += calls
        return output

    sample(network, latents[:, :channels], schedule, generator=torch.Generator().manual_seed(0))
    return found


def trace_transformer(
    ours: Transformer, theirs: Any, latents: Tensor, text: Tensor, at: int, step: int
) -> tuple[Tensor, list[Call]]:
    """Trace the forward pass of one step, at timestep `at`; return what diffusers predicts, too."""
    timestep = torch.full((len(latents),), at, device=latents.device)
    kept: list[tuple[dict[str, Any], tuple[Tensor, Tensor]]] = []
    handles = [
        block.register_forward_hook(lambda _m, _args, kwargs, output: kept.append((kwargs, output)), with_kwargs=True)
        for block in theirs.transformer_blocks
    ]
    rotary = references.rotary_table(theirs, latents)
    expected = references.call_diffusers(theirs, latents, text, timestep, rotary)
    for handle in handles:
        handle.remove()

    unit = torch.finfo(latents.dtype).eps / 2
    generator = torch.Generator().manual_seed(0)

    def rounded(x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * (1 + 2 * unit * (2 * torch.rand(x.shape, generator=generator).to(x.device) - 1))).to(x.dtype)

    def whole(x: Tensor, y: Tensor) -> float:
        return distance(references.call_diffusers(theirs, x, y, timestep, rotary), expected)

    probe = Probe(_joint(kept[-1][1]))
    actual = ours(latents, text, timestep, step=step, step_cache=probe)
    first = kept[0][0]
    start = torch.cat([first["encoder_hidden_states"], first["hidden_states"]], dim=1)
    change = _embedding_change(theirs, latents, text, rounded)
    calls = [Call(step, "embedding", distance(start, probe.x), unit + change)]
    for layer, (given, output) in enumerate(kept):
        x = torch.cat([given["encoder_hidden_states"], given["hidden_states"]], dim=1)
        names = ("hidden_states", "encoder_hidden_states", "temb")
        changed = theirs.transformer_blocks[layer](**{**given, **{name: rounded(given[name]) for name in names}})
        joint = _joint(output)
        error = distance(joint, ours.blocks[layer](x, probe.context.at(layer)))
        calls.append(Call(step, f"blocks.{layer}", error, unit + distance(joint, _joint(changed))))
    calls.append(Call(step, "output", distance(expected, actual), unit + whole(rounded(latents), rounded(text))))
    return expected, calls


def _joint(output: tuple[Tensor, Tensor]) -> Tensor:
    """Put the text in front of the video, as our blocks have it."""
    video, text = output
    return torch.cat([text, video], dim=1)


def _embedding_change(theirs: Any, latents: Tensor, text: Tensor, rounded: Any) -> float:
    x = latents.transpose(1, 2)
    return distance(theirs.patch_embed(text, x), theirs.patch_embed(rounded(text), rounded(x)))


if __name__ == "__main__":
    sys.exit(main())
