"""Offloading, tiling and quantising: that each mode runs, what is in memory meanwhile, and that results stay."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import cogvid
from cogvid import cli
from cogvid.models.quantize import CastLinear, linears_to_quantize, quantized_linears
from cogvid.models.tiling import TiledVAE
from cogvid.ops import can_fuse
from cogvid.run.memory import Offload, Staging, Unit, memory_lines
from cogvid.weights.hub import PACKS
from cogvid.weights.pages import drop_pages, will_need

ROOT = Path(__file__).parents[2]
PROMPT = "the red circle moves right"
QUICK: dict[str, Any] = {"num_inference_steps": 2, "num_frames": 9, "seed": 1, "progress": False}
on_linux = pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="needs /proc/self/pagemap")


def load(source: str = "tiny-t2v", **options: Any) -> cogvid.Pipeline:
    return cogvid.load(source, **{"device": "cpu", "dtype": "float32", **options})


def made(pipe: cogvid.Pipeline, **options: Any) -> Tensor:
    return pipe(PROMPT, **{**QUICK, "output_type": "uint8", **options}).frames


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def plain(request: pytest.FixtureRequest) -> tuple[str, Tensor, Tensor]:
    """The dtype, and what a run makes without offloading. The weights are stored in float16, and cast at each use."""
    pipe = load(dtype=request.param)
    return request.param, made(pipe), made(pipe, output_type="latent")


@pytest.mark.parametrize("mode", ["model", "block", "staged"])
def test_offloading_changes_no_bit(plain: tuple[str, Tensor, Tensor], mode: str) -> None:
    """In "staged", blocks go through the buffers that CUDA has, which are filled at once on a CPU."""
    dtype, frames, latents = plain
    pipe = load(dtype=dtype, offload=None if mode == "staged" else mode)
    if mode == "staged":
        pipe.offload = Offload(pipe, "block", staged=True)
    assert torch.equal(made(pipe, output_type="latent"), latents)
    assert torch.equal(made(pipe), frames)


class Watch:
    """Note at each call of a leaf which blocks, and which parts, have their matrices in the run's dtype."""

    def __init__(self, pipe: cogvid.Pipeline) -> None:
        self.blocks, self.parts = 0, 0
        everything = {
            "text": pipe.text_encoder.t5, "encoder": pipe.vae.encoder, "decoder": pipe.vae.decoder,
            "transformer": pipe.transformer,
        }  # fmt: skip
        blocks = [*pipe.transformer.blocks, *pipe.text_encoder.t5.encoder.block]

        def look(*_: object) -> None:
            here = lambda module: any(p.ndim > 1 and p.dtype == pipe.dtype for p in module.parameters())  # noqa: E731
            self.blocks = max(self.blocks, sum(map(here, blocks)))
            self.parts = max(self.parts, sum(map(here, everything.values())))

        for part in everything.values():
            for module in part.modules():
                if isinstance(module, (nn.Linear, nn.Conv3d, nn.Conv2d)):
                    module.register_forward_pre_hook(look)


def test_one_block_and_one_part_are_there_at_a_time() -> None:
    """In bf16, where the file has fp16: what is in bf16 is there."""
    pipe = load(dtype="bfloat16", offload="block")
    watch = Watch(pipe)
    made(pipe)
    assert (watch.blocks, watch.parts) == (1, 1)
    pipe = load(dtype="bfloat16", offload="model")
    watch = Watch(pipe)
    made(pipe)
    assert (watch.blocks, watch.parts) == (6, 1)


def test_what_came_is_counted_and_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pipe = load(offload="block")
    made(pipe)
    assert pipe.offload is not None
    parts = {part.name: part for part in pipe.offload.parts}
    layers, texts = len(pipe.transformer.blocks), 2
    assert (parts["transformer"].brought, parts["transformer"].most) == (2 * layers, 1)
    assert parts["text encoder"].brought == texts * len(pipe.text_encoder.t5.encoder.block)
    assert (parts["VAE encoder"].brought, parts["VAE decoder"].brought) == (0, 1)
    # The file has fp16, which is cast to fp32.
    matrices = sum(2 * p.nbytes for p in pipe.transformer.blocks.parameters() if p.ndim > 1)
    rest = sum(2 * p.nbytes for p in pipe.transformer.parameters() if p.ndim > 1) - matrices
    assert parts["transformer"].nbytes == 2 * matrices + rest
    assert [line.split(", ")[0] for line in memory_lines(pipe)] == [
        "offload block: text encoder: 2 blocks",
        "offload block: VAE decoder: the whole part",
        f"offload block: transformer: {layers} blocks",
    ]
    output = str(tmp_path / "x.mp4")
    command = ["generate", PROMPT, "-o", output, "--num-inference-steps", "2", "--device", "cpu", "--verbose"]
    assert cli.main([*command, "--offload", "model", "--vae-tiling", "--quantize", "fp8-storage"]) == 0
    said = capsys.readouterr().err
    for line in ("offload model: transformer: the whole part", "vae_tiling: 0 tiles", "quantize fp8-storage: trans"):
        assert f"cogvid: {line}" in said
    record = cogvid.read_record(output)
    assert (record["offload"], record["vae_tiling"], record["quantize"]) == ("model", True, "fp8-storage")


def test_staging_begins_the_next_block_and_has_two_buffers() -> None:
    blocks = [nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 7, bias=False)) for _ in range(3)]
    units, staging = [Unit(block) for block in blocks], Staging(torch.device("cpu"))
    first = staging.bring(units[0], torch.float32)
    staging.used()
    staging.begin(units[1], torch.float32)
    assert staging.begun is units[1]
    second = staging.bring(units[1], torch.float32)
    for came, block in zip((first, second), blocks, strict=False):  # the first is still valid
        for tensor, linear in zip(came, reversed(block), strict=True):
            assert torch.equal(tensor, linear.weight)
            assert tensor.data_ptr() % 64 == 0
    third = staging.bring(units[2], torch.bfloat16)  # not the one that was begun, and cast
    assert {tensor.dtype for tensor in third} == {torch.bfloat16}
    assert third[0].untyped_storage().data_ptr() == first[0].untyped_storage().data_ptr()


def test_modules_that_are_added_later_come_too() -> None:
    """As an adapter: a wrapper in a block, with matrices of its own."""

    class Wrapper(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base
            generator = torch.Generator().manual_seed(0)
            self.down = nn.Parameter(torch.randn(2, base.in_features, generator=generator), requires_grad=False)
            self.up = nn.Parameter(torch.randn(base.out_features, 2, generator=generator), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            seen.append(self.down.dtype)
            return self.base(x) + x @ self.down.T.to(x.dtype) @ self.up.T.to(x.dtype)

    seen: list[torch.dtype] = []
    results = []
    for offload in (None, "block"):
        pipe = load(dtype="bfloat16", offload=offload)
        for block in pipe.transformer.blocks:
            block.q_proj = Wrapper(block.q_proj)
        results.append(made(pipe, output_type="latent"))
        assert seen[-1] == (torch.float32 if offload is None else torch.bfloat16)  # moved and cast like a weight
    assert not torch.equal(results[0], made(load(dtype="bfloat16"), output_type="latent"))
    torch.testing.assert_close(results[1], results[0], atol=0.1, rtol=0.1)


def test_what_is_changed_while_a_part_is_there_stays_changed() -> None:
    pipe = load(dtype="bfloat16", offload="model")
    made(pipe, output_type="latent")  # the transformer is still there
    linear, replaced = pipe.transformer.blocks[0].q_proj, pipe.transformer.blocks[1].q_proj
    with torch.no_grad():
        linear.weight.mul_(3)
    replaced.weight = nn.Parameter(torch.full_like(replaced.weight, 0.5), requires_grad=False)
    expected = linear.weight.clone()
    assert pipe.offload is not None
    pipe.offload.leave()
    assert torch.equal(linear.weight, expected)
    assert (replaced.weight == 0.5).all()
    assert pipe.transformer.blocks[2].q_proj.weight.dtype == torch.float16  # as it is stored


def test_a_failing_run_leaves_everything_in_its_place() -> None:
    pipe, expected = load(dtype="bfloat16", offload="block"), made(load(dtype="bfloat16"))

    def fail(*_: object) -> None:
        raise RuntimeError("no")

    handle = pipe.transformer.blocks[3].mlp_out.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="no"):
        made(pipe)
    handle.remove()
    assert not any(p.dtype == torch.bfloat16 for b in pipe.transformer.blocks for p in b.parameters() if p.ndim > 1)
    assert torch.equal(made(pipe), expected)


def mapped(path: Path, **tensors: Tensor) -> dict[str, Tensor]:
    save_file(tensors, path)
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


@on_linux
def test_pages_are_dropped_only_if_they_are_those_of_a_file(tmp_path: Path) -> None:
    state = mapped(tmp_path / "x.safetensors", a=torch.randn(2000, 2000), b=torch.randn(2000, 2000))
    own, sums = torch.randn(2000, 2000), [float(tensor.sum()) for tensor in state.values()]
    before = resident()
    assert drop_pages([state["a"]]) >= 0.99 * state["a"].nbytes
    assert before - resident() >= 0.9 * state["a"].nbytes
    will_need(state.values())
    assert [float(tensor.sum()) for tensor in state.values()] == sums
    state["b"].data[1000] += 1  # in place, behind the back of the version counter
    changed = state["b"].clone()
    kept = own.clone()
    assert drop_pages([state["b"], own, torch.empty(0)]) == 0
    assert torch.equal(state["b"], changed)
    assert torch.equal(own, kept)


@pytest.fixture(params=["fp8-storage", "int8", "int8-dynamic", "fp8"])
def method(request: pytest.FixtureRequest) -> str:
    if request.param != "fp8-storage":
        pytest.importorskip("torchao", reason="needs the extra quant")
    return request.param


# Relative RMS of the latents of the pack after two steps. Measured: 0.05, 0.02, 0.05, 0.04 after three.
def test_quantised_weights_are_held_in_8_bits_and_used(method: str) -> None:
    pipe, expected = load(quantize=method), made(load(), output_type="latent")
    for part in (pipe.transformer, pipe.text_encoder.t5):
        found = quantized_linears(part)
        assert found
        for narrow, wide in found.values():
            assert narrow < 0.3 * wide  # fp32, with a scale for each row
    blocks, layers = len(pipe.transformer.blocks), len(pipe.text_encoder.t5.encoder.block)
    assert len(quantized_linears(pipe.transformer)) == 6 * blocks
    assert len(quantized_linears(pipe.text_encoder.t5)) == 7 * layers
    assert f"quantize {method}: transformer: {6 * blocks} linears" in "\n".join(memory_lines(pipe))
    latents = made(pipe, output_type="latent")
    error = float((latents - expected).norm() / expected.norm())
    assert 1e-4 < error < 0.2
    again = load(quantize=method, offload="model")
    assert torch.equal(made(again, output_type="latent"), latents)


def test_no_operation_takes_an_8_bit_weight(method: str) -> None:
    block = load(quantize=method).transformer.blocks[0]
    for name in ("q_proj", "k_proj", "v_proj", "out", "mlp_in", "mlp_out"):
        assert not can_fuse(block.get_submodule(name), nn.Linear)
    assert can_fuse(block.modulation1, nn.Linear)


def test_what_is_quantised() -> None:
    pipe = load()
    names = linears_to_quantize(pipe.transformer)
    left = {n for n, m in pipe.transformer.named_modules() if isinstance(m, nn.Linear)} - set(names)
    outside = {"patch_proj", "text_proj", "time_embed.linear_in", "time_embed.linear_out", "modulation_out", "proj_out"}
    inside = {f"blocks.{i}.modulation{k}" for i in range(len(pipe.transformer.blocks)) for k in (1, 2)}
    assert left == outside | inside
    assert linears_to_quantize(pipe.vae) == []


def test_a_weight_that_float8_cannot_hold_is_refused() -> None:
    from cogvid.models.quantize import quantized

    linear = nn.Linear(2, 2)
    with torch.no_grad():
        linear.weight[0, 0] = 449
    with pytest.raises(ValueError, match=r"^quantize: got blocks\.0\.out with a weight of 449, want at most 448"):
        quantized(linear, "fp8-storage", "blocks.0.out")


def test_a_run_that_overflows_with_8_bit_weights_says_so() -> None:
    pipe = load(quantize="fp8-storage")
    assert isinstance(pipe.transformer.blocks[0].out, CastLinear)
    pipe.transformer.proj_out.register_forward_hook(lambda _m, _i, out: out * float("nan"))
    with pytest.raises(FloatingPointError, match="latents: got numbers that are not finite"):
        made(pipe)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offload": "layer"}, "offload: got 'layer', want one of model, block"),
        ({"quantize": "int4"}, "quantize: got 'int4', want one of int8, int8-dynamic, fp8, fp8-storage"),
        ({"vae_tiling": 1}, "vae_tiling: got 1, want True or False"),
        (
            {"quantize": "fp8-storage", "offload": "block"},
            "quantize: got 'fp8-storage' with offload='block' on cpu, want one of the two, offload='model', or on "
            "CUDA 'fp8-storage'",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_is_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        load(**options)
    assert str(error.value) == message


def test_without_torchao_its_methods_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ImportError, match=r"^quantize: got 'int8' and no usable torchao .*, want the extra 'quant'"):
        load(quantize="int8")


def test_tiles_are_made_in_a_run() -> None:
    pipe = load(vae_tiling=True)
    assert isinstance(pipe.vae, TiledVAE)
    made(pipe)
    assert pipe.vae.tiles == 0  # 64x64 pixels are one tile
    size = {"height": 256, "width": 32, "num_frames": 1, "num_inference_steps": 1}
    tiled, whole = made(pipe, **size), made(load(), **size)
    assert pipe.vae.tiles == 2
    assert tiled.shape == whole.shape
    assert not torch.equal(tiled, whole)


def test_the_vae_takes_the_videos_of_a_batch_one_by_one() -> None:
    """As diffusers does with `enable_slicing()`."""
    pipe, seen = load("tiny-i2v"), []
    for part in (pipe.vae.encoder, pipe.vae.decoder):
        part.register_forward_pre_hook(lambda _m, args: seen.append(len(args[0])))
    images = [cogvid.load_image(ROOT / "scripts" / "demo.png")] * 2
    pipe([PROMPT] * 2, image=images, **{**QUICK, "num_inference_steps": 1})
    assert seen == [1] * 4


def test_a_batch_keeps_its_prompts_while_the_encoder_leaves(tmp_path: Path) -> None:
    command = ["batch", "--prompt", PROMPT, "--sweep", "seed=1,2", "-o", str(tmp_path), "--offload", "block"]
    assert cli.main([*command, "--device", "cpu", "--num-inference-steps", "1", "--num-frames", "9"]) == 0
    assert len(list(tmp_path.glob("*.mp4"))) == 2


@pytest.mark.slow
def test_the_command_prints_nothing_of_torchao(tmp_path: Path) -> None:
    """transformers imports it where it is installed, and on a CPU it tells of libraries for GPUs."""
    pytest.importorskip("torchao", reason="needs the extra quant")
    command = ["generate", PROMPT, "-o", str(tmp_path / "x.mp4"), "--num-inference-steps", "1", "--num-frames", "1"]
    command = [sys.executable, "-m", "cogvid", *command, "--device", "cpu", "--quantize", "int8"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert [line for line in done.stderr.splitlines() if "torchao" in line or "Enum" in line] == []


PEAK = """
import sys
from pathlib import Path
import torch, cogvid
pipe = cogvid.load(sys.argv[1], device="cpu", dtype="float32", **eval(sys.argv[2]))
def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
before = status("RssFile")
most = [0]
for block in pipe.transformer.blocks:
    block.mlp_out.register_forward_hook(lambda *_: most.__setitem__(0, max(most[0], status("RssFile"))))
pipe("x", num_inference_steps=2, num_frames=1, height=32, width=32, seed=1, progress=False, output_type="latent")
print(most[0] - before)
"""


@on_linux
@pytest.mark.slow
def test_the_pages_of_one_block_are_resident(tmp_path: Path) -> None:
    """Of the pages of four mapped blocks of width 768, at most those of one block and the rest are resident."""
    from cogvid.models.transformer import Transformer
    from cogvid.weights.load import save_transformer

    folder = tmp_path / "wide"
    folder.mkdir()
    for part in ("scheduler", "text_encoder", "tokenizer", "vae", "model_index.json"):
        (folder / part).symlink_to((PACKS / "tiny-t2v" / part).resolve())
    config = dataclasses.replace(load().model.transformer, num_layers=4, num_attention_heads=12)
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    save_transformer(model, folder / "transformer")
    block = sum(p.nbytes for p in model.blocks[0].parameters())
    del model
    found = {}
    for options in ({}, {"offload": "block"}):
        command = [sys.executable, "-c", PEAK, str(folder), repr(options)]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        found["offload" in options] = int(done.stdout.split()[-1])
    assert found[False] > 3.9 * block
    assert found[True] < 1.5 * block
