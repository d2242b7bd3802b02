"""Compare every module with diffusers and print the table: `python scripts/parity_report.py [--markdown FILE]`.

`--json FILE` writes the errors with their tolerances, for `cogvid report FILE -o report.html`.

Both sides hold the same random weights (tiny configurations of the five official architectures, every parameter
perturbed) and see the same inputs, on the CPU. In fp32 the error is ours against diffusers'. In bf16 both are compared
with diffusers run in fp64. A ratio of at most 1 means that this implementation is at least as accurate.

Errors are relative RMS: rms(a - b) / rms(b).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import measure
import references
from cogvid.config import ScheduleConfig, TransformerConfig, VAEConfig
from cogvid.models.transformer import Transformer
from cogvid.models.vae import VAE
from cogvid.run.load import load
from cogvid.sampling.samplers import SAMPLERS
from cogvid.weights.names import map_transformer_state_dict, map_vae_state_dict
from references import TRANSFORMER_VARIANTS, picture, save_pipeline, tiny_pipeline, tiny_transformer, tiny_vae

# What tests/unit/test_parity_report.py asks for: the error in fp32, and that in bf16 over diffusers' own.
TOLERANCE, RATIO = 1e-5, 1.05

Run = Callable[[torch.dtype], Tensor]  # the output of one side, computed in a dtype


@dataclass(frozen=True)
class Row:
    """One line: errors in fp32 and, where a module has a dtype, those in bf16 of ours and of diffusers."""

    module: str
    variant: str
    rms: float
    max_abs: float
    ours_bf16: float | None = None
    theirs_bf16: float | None = None

    def cells(self) -> list[str]:
        low = ["", "", ""]
        if self.ours_bf16 is not None and self.theirs_bf16 is not None:
            low = [f"{self.ours_bf16:.2e}", f"{self.theirs_bf16:.2e}", f"{self.ours_bf16 / self.theirs_bf16:.2f}"]
        return [self.module, self.variant, f"{self.rms:.1e}", f"{self.max_abs:.1e}", *low]

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return an error and its tolerance for each dtype."""
        common = {"module": self.module, "variant": self.variant}
        rows = [{**common, "dtype": "fp32", "error": self.rms, "tolerance": TOLERANCE}]
        if self.ours_bf16 is not None and self.theirs_bf16 is not None:
            rows.append({**common, "dtype": "bf16", "error": self.ours_bf16, "tolerance": RATIO * self.theirs_bf16})
        return rows


HEADER = ["module", "variant", "fp32 error", "fp32 max abs", "bf16 error", "diffusers' bf16 error", "ratio"]


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table to this file too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the errors to this file, for `cogvid report`")
    args = parser.parse_args(argv)
    header = measure.header(torch.device("cpu"), "python scripts/parity_report.py")
    caption = f"`{header['command']}`, {measure.caption(header)}."
    lines = [caption, "", measure.markdown_row(HEADER), "|" + "---|" * 2 + "--:|" * 5]
    print("\n".join(lines))
    found: list[dict[str, Any]] = []
    for row in rows():
        lines.append(measure.markdown_row(row.cells()))
        found += row.to_dicts()
        print(lines[-1], flush=True)
    if args.markdown:
        args.markdown.write_text("\n".join(lines) + "\n")
    if args.json:
        args.json.write_text(json.dumps({"kind": "parity", "header": header, "rows": found}) + "\n")


def rows() -> Iterator[Row]:
    for variant in TRANSFORMER_VARIANTS:
        yield compare("transformer", variant, *transformer_runs(variant))
    for frames in (1, 9, 16):
        yield compare("VAE encode", f"{frames} frames", *vae_runs("encode", frames))
    for frames in (1, 3, 4):
        yield compare("VAE decode", f"{frames} latent frames", *vae_runs("decode", frames))
    with tempfile.TemporaryDirectory() as directory:
        yield compare("text encoder", "T5", *text_runs(Path(directory)))
    for name in SAMPLERS:
        for shift in (3.0, 1.0):
            config = ScheduleConfig(snr_shift_scale=shift)
            ours, theirs = references.run_samplers(name, config, references.schedulers()[name](**config.to_dict()))
            yield fp32_row("sampler " + name, f"SNR shift {shift:g}", ours, theirs)
    for variant in TRANSFORMER_VARIANTS:
        for name in SAMPLERS:
            with tempfile.TemporaryDirectory() as directory:
                ours, theirs = pipeline_runs(variant, name, Path(directory))
            yield fp32_row("pipeline, " + name, variant, ours, theirs)


def compare(module: str, variant: str, ours: Run, theirs: Run) -> Row:
    truth = theirs(torch.float64)
    row = fp32_row(module, variant, ours(torch.float32), theirs(torch.float32))
    low = {
        "ours_bf16": measure.rel_rms(ours(torch.bfloat16), truth),
        "theirs_bf16": measure.rel_rms(theirs(torch.bfloat16), truth),
    }
    return Row(row.module, row.variant, row.rms, row.max_abs, **low)


def fp32_row(module: str, variant: str, ours: Tensor, theirs: Tensor) -> Row:
    return Row(module, variant, measure.rel_rms(ours, theirs), (ours - theirs).abs().max().item())


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def transformer_runs(variant: str) -> tuple[Run, Run]:
    reference: Any = tiny_transformer(variant)
    config = TransformerConfig.from_dict(reference.config)
    model = Transformer(config)
    model.load_state_dict(map_transformer_state_dict(reference.state_dict(), config))
    latents = randn(2, config.in_channels, 4, 8, 12, seed=1)
    text = randn(2, config.max_text_seq_length, config.text_embed_dim, seed=2)
    timestep = torch.tensor([999, 321])
    rope = references.rotary_table(reference, latents)

    def ours(dtype: torch.dtype) -> Tensor:
        return model.to(dtype)(latents.to(dtype), text.to(dtype), timestep)

    def theirs(dtype: torch.dtype) -> Tensor:
        return references.call_diffusers(reference.to(dtype), latents.to(dtype), text.to(dtype), timestep, rope)

    return ours, theirs


def vae_runs(direction: str, frames: int) -> tuple[Run, Run]:
    reference: Any = tiny_vae()
    config = VAEConfig.from_dict(reference.config)
    vae = VAE(config)
    vae.load_state_dict(map_vae_state_dict(reference.state_dict(), config))
    if direction == "encode":
        x = randn(2, 3, frames, 64, 96, seed=3).tanh()
        return lambda d: vae.to(d).encode(x.to(d)).mean, lambda d: reference.to(d).encode(x.to(d)).latent_dist.mean
    z = randn(2, config.latent_channels, frames, 8, 12, seed=4)
    return lambda d: vae.to(d).decode(z.to(d)), lambda d: reference.to(d).decode(z.to(d)).sample


def text_runs(directory: Path) -> tuple[Run, Run]:
    from cogvid.weights.load import load_text_encoder

    pipe, spiece = tiny_pipeline("2b")
    save_pipeline(pipe, spiece, directory)
    encoder: Any = load_text_encoder(directory, device="cpu", dtype=torch.float32)
    prompts = ["a cat", "two"]

    def ours(dtype: torch.dtype) -> Tensor:
        encoder.t5.to(dtype)
        return encoder(prompts, 10)

    def theirs(dtype: torch.dtype) -> Tensor:
        pipe.text_encoder.to(dtype)
        return pipe.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=10, dtype=dtype)[0]

    return ours, theirs


def pipeline_runs(variant: str, sampler: str, directory: Path, steps: int = 4) -> tuple[Tensor, Tensor]:
    """Run whole pipelines with dynamic guidance, 9 frames, and return the final latents."""
    pipe, spiece = tiny_pipeline(variant)
    save_pipeline(pipe, spiece, directory)
    pipe.scheduler = references.schedulers()[sampler].from_config(pipe.scheduler.config)
    options: dict[str, Any] = {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": steps}
    options |= {"guidance_scale": 6.0, "use_dynamic_cfg": True, "output_type": "latent"}
    if variant.endswith("i2v"):
        options["image"] = picture(64, 96)
    text_len = pipe.transformer.config.max_text_seq_length
    generator = torch.Generator().manual_seed(7)
    theirs = pipe(prompt="a cat", generator=generator, max_sequence_length=text_len, **options).frames
    own = load(directory, device="cpu", dtype="float32")
    ours = own("a cat", seed=7, scheduler=sampler, progress=False, **options).frames
    return ours, theirs


if __name__ == "__main__":
    main()
