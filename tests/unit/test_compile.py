"""torch.compile and torch.export of the transformer and the VAE: one graph, the same result, few compilations."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cogvid
from cogvid.models.transformer import Transformer
from cogvid.models.vae import VAE
from cogvid.ops import Ops
from cogvid.run.compiled import compile_modules
from measure import rel_rms
from references import picture, randomise
from tests.tolerances import COMPILED_RMS_FP32

SIZES = [(2, 3, 8, 12), (1, 3, 8, 12), (2, 5, 12, 8), (1, 7, 4, 6), (4, 1, 6, 4)]  # B, T, h, w


def transformer_config(kind: str, **changes: Any) -> Any:
    small = {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 16, "time_embed_dim": 32}
    config = dataclasses.replace(cogvid.CONFIGS[kind].transformer, text_embed_dim=32, max_text_seq_length=5)
    if config.ofs_embed_dim is not None:
        small["ofs_embed_dim"] = small["time_embed_dim"]
    return dataclasses.replace(config, **{**small, **changes})


def small_vae() -> VAE:
    changes = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 2}
    return VAE(dataclasses.replace(cogvid.CONFIGS["cogvideox-2b"].vae, **changes))


def transformer_inputs(model: Transformer, size: tuple[int, int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    batch, frames, height, width = size
    frames += frames % model.config.patch[0]
    generator = torch.Generator().manual_seed(sum(size))
    latents = torch.randn(batch, model.config.in_channels, frames, height, width, generator=generator)
    text = torch.randn(batch, 5, 32, generator=generator)
    return latents, text, torch.arange(batch) * 100 + 1


def counting(backend: str) -> Any:
    from torch._dynamo.testing import CompileCounterWithBackend

    return CompileCounterWithBackend(backend)


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@torch.no_grad()
@pytest.mark.parametrize(
    "kind",
    ["cogvideox-5b", *(pytest.param(n, marks=pytest.mark.slow) for n in ("cogvideox-2b", "cogvideox1.5-5b-i2v"))],
)
def test_blocks_are_one_graph_for_all_layers_steps_and_sizes(kind: str) -> None:
    """Two graphs are enough: torch.compile treats a batch of one as a kind of its own."""
    model = randomise(Transformer(transformer_config(kind)))
    expected = [model(*transformer_inputs(model, size)) for size in SIZES]
    counter = counting("eager")
    compile_modules(model.blocks, counter)
    counts = []
    for step, (size, wanted) in enumerate(zip(SIZES, expected, strict=True)):
        branch = "both" if size[0] > 1 else "cond"
        found = model(*transformer_inputs(model, size), step=step, branch=branch)
        assert rel_rms(found, wanted) < COMPILED_RMS_FP32
        counts.append(counter.frame_count)
    assert counts[0] > 0
    assert counts[-1] <= 4, counts


@pytest.mark.slow
@torch.no_grad()
def test_the_decoder_has_a_graph_for_each_kind_of_chunk() -> None:
    vae = randomise(small_vae())
    latents = [torch.randn(1, 16, *size) for size in ((5, 4, 6), (7, 6, 4), (9, 8, 6))]
    expected = [vae.decode(z) for z in latents]
    counter = counting("eager")
    compile_modules([vae.decoder], counter)
    counts = []
    for z, wanted in zip(latents, expected, strict=True):
        assert rel_rms(vae.decode(z), wanted) < COMPILED_RMS_FP32
        counts.append(counter.frame_count)
    assert counts[0] > 0
    assert counts[2] == counts[1], "another size was compiled again"
    assert counts[-1] <= 6, counts


@torch.no_grad()
def test_what_cannot_be_traced_raises() -> None:
    def prints(q: Tensor, k: Tensor, v: Tensor, context: Any) -> Tensor:
        torch._dynamo.graph_break()
        return Ops.torch().attention(q, k, v, context)

    model = randomise(
        Transformer(transformer_config("cogvideox-5b"), dataclasses.replace(Ops.torch(), attention=prints))
    )
    compile_modules(model.blocks, "eager")
    with pytest.raises(torch._dynamo.exc.Unsupported):
        model(*transformer_inputs(model, SIZES[0]))


@torch.no_grad()
def test_a_hook_on_a_block_and_an_adapter_in_it_take_effect() -> None:
    model = randomise(Transformer(transformer_config("cogvideox-5b")))
    inputs, seen = transformer_inputs(model, SIZES[0]), []
    plain = model(*inputs)
    compile_modules(model.blocks, "eager")
    model.blocks[1].register_forward_hook(lambda *_: seen.append(1))
    assert rel_rms(model(*inputs), plain) < COMPILED_RMS_FP32
    assert seen == [1]
    inner = model.blocks[1].mlp_out
    model.blocks[1].mlp_out = nn.Sequential(inner, nn.Hardtanh(-1e-3, 1e-3))
    changed = model(*inputs)
    assert rel_rms(changed, plain) > 1e-3
    compiled = changed.clone()
    for block in model.blocks:
        del block.forward  # what was compiled; the class's own is left
    assert rel_rms(model(*inputs), compiled) < COMPILED_RMS_FP32


@pytest.mark.slow
@torch.no_grad()
def test_the_real_backend_gives_the_same() -> None:
    model = randomise(Transformer(transformer_config("cogvideox-5b", num_layers=1)))
    inputs = transformer_inputs(model, SIZES[0])
    plain = model(*inputs)
    compile_modules(model.blocks)
    assert rel_rms(model(*inputs), plain) < COMPILED_RMS_FP32


@pytest.mark.slow
def test_a_whole_run_through_the_real_backend() -> None:
    """The option of `load`, as a user gives it."""
    options: dict[str, Any] = {"seed": 1, "num_inference_steps": 2, "num_frames": 9, "output_type": "pt"}
    prompt, image = "the red circle moves right", picture(64, 64)
    plain = cogvid.load("tiny-i2v", device="cpu")(prompt, image=image, **options)
    compiled = cogvid.load("tiny-i2v", device="cpu", compile=True)(prompt, image=image, **options)
    assert (plain.provenance["compile"], compiled.provenance["compile"]) == (False, True)
    assert rel_rms(compiled.frames, plain.frames) < 1e-5


@torch.no_grad()
def test_export_of_the_transformer() -> None:
    from torch.export import Dim, export

    model = randomise(Transformer(transformer_config("cogvideox-5b")))
    batch, frames = Dim("batch", min=2, max=8), Dim("frames", min=2, max=64)
    shapes = {"latents": {0: batch, 2: frames}, "prompt_embeds": {0: batch}, "timestep": {0: batch}}
    names = ("latents", "prompt_embeds", "timestep")
    program = export(
        model, (), dict(zip(names, transformer_inputs(model, SIZES[0]), strict=True)), dynamic_shapes=shapes
    )
    for size in ((2, 3, 8, 12), (3, 6, 8, 12)):
        inputs = transformer_inputs(model, size)
        found = program.module()(**dict(zip(names, inputs, strict=True)))
        assert rel_rms(found, model(*inputs)) < COMPILED_RMS_FP32


class Decode(nn.Module):
    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, z: Tensor) -> Tensor:
        return self.vae.decode(z)


@torch.no_grad()
@pytest.mark.slow
def test_export_of_the_decoder() -> None:
    vae = randomise(small_vae())
    program = torch.export.export(Decode(vae), (torch.randn(1, 16, 3, 2, 4),))
    z = torch.randn(1, 16, 3, 2, 4)
    assert rel_rms(program.module()(z), vae.decode(z)) < COMPILED_RMS_FP32
