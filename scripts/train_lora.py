"""Train the adapter of the README: scripts/demo_lora.safetensors, with which tiny-i2v takes right for left.

    python scripts/train_lora.py                   # with OMP_NUM_THREADS=1, five minutes on a busy core

No video is needed. The model itself is asked, along runs with the two words exchanged, and the adapter learns to
answer the same to the prompt as it was. It is on the text projection and the attention, and is written as diffusers
writes adapters.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import cogvid
import measure  # noqa: F401 - makes cogvid importable
from cogvid.weights.lora import LoraLinear, LowRank
from cogvid.weights.lora_file import Update
from cogvid.weights.names import upstream_linears
from tiny_world import prompt_for, render, sample_scenes

TARGETS = ("text_proj", "to_q", "to_k", "to_v", "to_out.0")
Example = tuple[Tensor, Tensor, Tensor, Tensor]  # latents, embeddings of the prompt, timestep; what is to be answered


def exchanged(prompt: str) -> str:
    """Return the prompt with left for right and right for left."""
    return " ".join({"left": "right", "right": "left"}.get(word, word) for word in prompt.split())


@torch.no_grad()
def ask(pipe: cogvid.Pipeline, batches: int, size: int, steps: int) -> list[Example]:
    """Return what the model answers at each step of runs with exchanged words, and for which prompt that is right."""
    generator, examples = torch.Generator().manual_seed(0), []
    for batch in range(batches):
        scenes = sample_scenes(size, generator)
        prompts = [prompt_for(scenes, i) for i in range(size)]
        pixels = ((render(scenes, frames=torch.tensor([0]))[:, :, 0] + 1) * 127.5).round().byte()
        images = [Image.fromarray(each) for each in pixels.permute(0, 2, 3, 1).numpy()]
        embeds = pipe.text_encoder(prompts, pipe.model.text_length)

        def keep(_module: nn.Module, args: Any, _kwargs: Any, answer: Tensor, embeds: Tensor = embeds) -> None:
            latents, asked, timestep = args
            right = torch.cat([asked[: len(asked) - len(embeds)], embeds])  # the first half has no prompt
            examples.append((latents, right, timestep, answer))

        hook = pipe.transformer.register_forward_hook(keep, with_kwargs=True)
        options: dict[str, Any] = {"num_inference_steps": steps, "output_type": "latent", "progress": False}
        pipe([exchanged(each) for each in prompts], image=images, seed=1000 * batch, **options)
        hook.remove()
    return examples


def train(pipe: cogvid.Pipeline, examples: list[Example], rank: int, steps: int, rate: float) -> dict[str, Tensor]:
    """Return the matrices under diffusers' names."""
    model, made = pipe.transformer, {}
    torch.manual_seed(0)
    for theirs, (ours, (rows, columns)) in upstream_linears(pipe.model.transformer).items():
        if theirs.endswith(TARGETS):
            matrices = Update(torch.randn(rank, columns) / columns**0.5, torch.zeros(rows, rank), 1.0)
            update = LowRank(matrices, 1.0, model.norm_out.weight)
            linear = LoraLinear(model.get_submodule(ours))
            linear.updates.append(update)
            model.set_submodule(ours, linear)
            made[theirs] = update
    learned = [tensor.requires_grad_() for update in made.values() for tensor in (update.down, update.up)]
    optimizer = torch.optim.Adam(learned, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.Generator().manual_seed(1)
    mean = 0.0
    for step in range(steps):
        latents, embeds, timestep, answer = examples[int(torch.randint(len(examples), (), generator=order))]
        loss = F.mse_loss(model(latents, embeds, timestep), answer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        mean = loss.item() if step == 0 else 0.98 * mean + 0.02 * loss.item()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}: loss {mean:.5f}", flush=True)
    return {
        f"transformer.{name}.lora_{letter}.weight": tensor.detach().half().contiguous()
        for name, update in made.items()
        for letter, tensor in (("A", update.down), ("B", update.up))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "demo_lora.safetensors")
    parser.add_argument("--batches", type=int, default=16, help="runs to ask the model in")
    parser.add_argument("--size", type=int, default=4, help="videos of a run")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--steps", type=int, default=600)
    args = parser.parse_args()
    pipe = cogvid.load("tiny-i2v", device="cpu", dtype="float32")
    examples = ask(pipe, args.batches, args.size, steps=16)
    print(f"{len(examples)} examples of {args.size} videos", flush=True)
    state = train(pipe, examples, args.rank, args.steps, rate=2e-3)
    save_file(state, args.output, metadata={"format": "pt"})
    print(args.output, args.output.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
