"""LoRA adapters: what is refused, what comes back, and what batches, records and replays make of them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import cogvid
from cogvid.cli import main
from cogvid.config import CONFIGS
from cogvid.run.record import read_record
from cogvid.weights import lora_file
from cogvid.weights.hub import PACKS
from cogvid.weights.load import save_transformer
from cogvid.weights.lora_file import read_lora
from cogvid.weights.lora_option import Lora, make_lora, parse_loras
from cogvid.weights.names import upstream_linears
from measure import rel_rms
from scripts.tiny_world import observe
from tests.tolerances import LORA_FP32, QK_NORM_RMS_FP32
from tests.unit.test_hub import FETCH, Hub, hub  # noqa: F401 - a fixture

SCRIPTS = Path(__file__).parents[2] / "scripts"
CONFIG = CONFIGS["tiny-t2v"].transformer
LINEARS = upstream_linears(CONFIG)
PROMPT = "the red circle moves right"
QUICK: dict[str, Any] = {"num_inference_steps": 2, "num_frames": 9, "seed": 3, "output_type": "latent"}
OPTIONS = ["--num-inference-steps", "2", "--num-frames", "9", "--seed", "3", "--device", "cpu"]
Q = "transformer.transformer_blocks.0.attn1.to_q"


def matrices(seed: int = 0, rank: int = 2, only: str = "") -> dict[str, Tensor]:
    """Random matrices under diffusers' names, of each linear whose name has `only` in it."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for module, (_, (rows, columns)) in LINEARS.items():
        if only in module:
            state[f"transformer.{module}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) * 0.1
            state[f"transformer.{module}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * 0.1
    return state


@pytest.fixture
def style(tmp_path: Path) -> Path:
    save_file(matrices(1), tmp_path / "style.safetensors")
    return tmp_path / "style.safetensors"


@pytest.fixture
def other(tmp_path: Path) -> Path:
    save_file(matrices(2, rank=3, only="attn1"), tmp_path / "other.safetensors")
    return tmp_path / "other.safetensors"


@pytest.fixture
def pipe() -> cogvid.Pipeline:
    return cogvid.load("tiny-t2v", device="cpu")


def latents(pipe: cogvid.Pipeline) -> Tensor:
    return pipe(PROMPT, progress=False, **QUICK).frames


def parts(model: nn.Module) -> list[tuple[str, object, object]]:
    """Every module and parameter, as the objects they are."""
    return [(name, module, getattr(module, "weight", None)) for name, module in model.named_modules()]


# What is refused.

FAULTS: dict[str, tuple[dict[str, Tensor], str]] = {
    "unknown": (
        {**matrices(only="to_q"), f"{Q}s.lora_A.weight": torch.ones(2, 192), "text_encoder.x": torch.ones(2)},
        rf"with 2 unknown keys \(text_encoder\.x, {Q}s\.lora_A\.weight \[nearest: {Q}\.lora_A\.weight\]\), want those",
    ),
    "width": (
        {**matrices(only="to_q"), f"{Q}.lora_A.weight": torch.ones(2, 191)},
        r"with 1 modules that do not fit \(transformer_blocks\.0\.attn1\.to_q is \[192, 2\] x \[2, 191\], want "
        r"\[192, r\] x \[r, 192\]\), want those",
    ),
    "ranks": (
        {**matrices(only="to_q"), f"{Q}.lora_A.weight": torch.ones(3, 192)},
        r"to_q is \[192, 2\] x \[3, 192\], want \[192, r\]",
    ),
    "half": ({f"{Q}.lora_A.weight": torch.ones(2, 192)}, r"to_q lacks the matrix up\)"),
    "integers": (
        {f"{Q}.lora_A.weight": torch.ones(2, 192, dtype=torch.int8), f"{Q}.lora_B.weight": torch.ones(192, 2)},
        r"to_q is int8, want one of float32, float16, bfloat16\)",
    ),
    "vector": ({f"{Q}.lora_A.weight": torch.ones(192), f"{Q}.lora_B.weight": torch.ones(192)}, r"to_q is \[192\] x"),
    "no-rank": ({f"{Q}.lora_A.weight": torch.ones(0, 192), f"{Q}.lora_B.weight": torch.ones(192, 0)}, r"is \[192, 0\]"),
    "empty": ({}, r"style\.safetensors', which is empty, want the matrices of an adapter$"),
    "dora": (
        {**matrices(only="to_q"), f"{Q}.lora_magnitude_vector": torch.ones(192)},
        r"with 1 unknown keys \(.*lora_magnitude_vector \[nearest",
    ),
    "alpha": (
        {**matrices(only="to_q"), f"{Q}.alpha": torch.tensor(float("nan"))},
        r"to_q has an alpha that is no",
    ),
    "twice": (
        {**matrices(only="to_q"), "base_model.model." + f"{Q}.lora_A.weight"[12:]: torch.ones(2, 192)},
        r"with 1 unknown keys",
    ),
    "merged-too": (
        {
            **matrices(only="to_q"),
            f"{Q}kv.lora_A.weight": torch.ones(2, 192),
            f"{Q}kv.lora_B.weight": torch.ones(576, 2),
        },
        r"attn1\.to_q(kv)? is there merged and unmerged",
    ),
    "sat": (
        {"model.diffusion_model.transformer.layers.6.attention.dense.matrix_A.0": torch.ones(2, 192)},
        r"with 1 unknown keys \(model\.diffusion_model\.transformer\.layers\.6\.",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_what_does_not_fit_is_listed_and_nothing_changes(
    case: str, pipe: cogvid.Pipeline, other: Path, tmp_path: Path
) -> None:
    state, message = FAULTS[case]
    save_file(state, tmp_path / "style.safetensors")
    pipe.load_lora(other)
    before = parts(pipe.transformer), pipe.placement
    with pytest.raises(ValueError, match=message) as caught:
        pipe.load_lora(tmp_path / "style.safetensors")
    assert str(caught.value).startswith(f"lora: got '{tmp_path}/style.safetensors'")
    assert "\n" not in str(caught.value)
    assert (parts(pipe.transformer), pipe.placement) == before


def write_peft(folder: Path, **config: Any) -> Path:
    folder.mkdir()
    state = {name.replace("transformer.", "base_model.model.", 1): each for name, each in matrices(only="to_q").items()}
    save_file(state, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}))
    return folder


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, r"adapter_config\.json' with use_dora, which is not supported, want plain LoRA$"),
        (
            {"r": 3},
            r"with 6 modules that do not fit \(transformer_blocks\.0\.attn1\.to_q has rank 2, want 3, that",
        ),
        ({"rank_pattern": {"to_q": "2"}}, r"want peft's LoraConfig with r and lora_alpha$"),
        ({"alpha_pattern": {"(": 2}}, r"^lora: got a pattern that is no regular expression"),
        ({"peft_type": "LOHA"}, r"want peft's LoraConfig with r and lora_alpha$"),
        ({"lora_alpha": None}, r"want peft's LoraConfig with r and lora_alpha$"),
    ],
    ids=str,
)
def test_configs_that_cannot_be_are_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_lora(make_lora(write_peft(tmp_path / "a", **config)), CONFIG)


def test_a_file_of_peft_without_its_config_is_refused(tmp_path: Path) -> None:
    (write_peft(tmp_path / "a") / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"has rank 2, want 128, CogKit's, or adapter_config\.json beside the file"):
        read_lora(make_lora(tmp_path / "a"), CONFIG)


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_files_that_are_no_adapters_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "broken.pt").write_bytes(b"x" * 100)
    (tmp_path / "weights.bin").write_bytes(b"x" * 100)
    torch.save({"module": Evil(tmp_path / "ran")}, tmp_path / "evil.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "nothing").mkdir()
    for name, message in {
        "broken.safetensors": r", a broken file \(.*\), want a whole one of tensors$",
        "broken.pt": r", a broken file \(.*\), want a whole one of tensors$",
        "evil.pt": r", a broken file \(Weights only load failed.*\), want a whole one of tensors$",
        "list.pt": r"list\.pt' with list, want names and tensors$",
        "weights.bin": r"weights\.bin', want a \.safetensors, or a \.pt of SAT$",
        "nothing": r"nothing' with no \.safetensors or \.pt, want the name of the file, or a folder with one$",
        "": r" with 3 files \(.*\), want the name of the file, or a folder with one$",
    }.items():
        if name == "":
            (tmp_path / "broken.pt").unlink()
        with pytest.raises(ValueError, match=message) as caught:
            read_lora(make_lora(tmp_path / name), CONFIG)
        assert str(caught.value).startswith("lora: got ")
    assert not (tmp_path / "ran").exists()


def test_the_file_of_a_folder_is_chosen_as_diffusers_and_peft_name_it(style: Path, tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "camera")
    (folder / "more.safetensors").write_bytes(b"")
    adapter = read_lora(make_lora(folder), CONFIG)
    assert (adapter.lora.name, adapter.lora.format, adapter.lora.alphas) == ("camera", "peft", (4.0,))
    assert {update.factor for update in adapter.updates.values()} == {2.0}
    shutil.copy(style, folder / "pytorch_lora_weights.safetensors")
    assert read_lora(make_lora(folder), CONFIG).lora.format == "diffusers"


# Names and scales.


def test_a_source_may_have_a_scale(style: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(style.parent)
    shutil.copy(style, "odd:2.safetensors")
    shutil.copy(style, "odd:2")
    for text, source, scale, name in (
        ("style.safetensors", "style.safetensors", 1.0, "style"),
        ("style.safetensors:0.5", "style.safetensors", 0.5, "style"),
        (f"{style}:-1", str(style), -1.0, "style"),
        ("odd:2", "odd:2", 1.0, "odd:2"),
        ("odd:2.safetensors:3e-1", "odd:2.safetensors", 0.3, "odd:2"),
        ("acme/camera:2", "acme/camera", 2.0, "camera"),
        ("acme/camera/left.safetensors", "acme/camera/left.safetensors", 1.0, "left"),
        ("acme/camera/pytorch_lora_weights.safetensors", "acme/camera/pytorch_lora_weights.safetensors", 1.0, "camera"),
    ):
        assert parse_loras(text) == (Lora(source, scale, name),)
    assert parse_loras(None) == ()
    assert parse_loras([style, "acme/camera"]) == (Lora(str(style), 1.0, "style"), Lora("acme/camera", 1.0, "camera"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "nowhere.safetensors",
            "lora: got 'nowhere.safetensors', which is not there, want a file, a directory or a hub",
        ),
        ("nowhere.safetensors:0.5", "lora: got 'nowhere.safetensors', which is not there, want a file"),
        ("a/b.safetensors", "lora: got 'a/b.safetensors', which is not there, want a file"),
        ("acme/camera:nan", "scale: got nan for an adapter, want a finite number"),
        ("acme/camera:x", "lora: got 'acme/camera:x', which is not there, want"),
        ("", "lora: got '', want a file, a directory or a hub id"),
        (3, "lora: got 3, want a file, a directory or a hub id"),
        (["acme/camera", "other/camera"], "name: got 'camera' for two adapters, want another name for one of them"),
        ({"source": "a"}, "lora: got {'source': 'a'}, want what a record has: "),
    ],
    ids=str,
)
def test_what_names_no_adapter_is_refused(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        cogvid.load("no-such-model", lora=value)
    assert str(caught.value).startswith(message)


def test_mistakes_with_adapters_are_one_line(pipe: cogvid.Pipeline, style: Path) -> None:
    for call in (pipe.fuse_lora, pipe.unload_lora, lambda: pipe.set_lora_scale("style", 1.0)):
        with pytest.raises(ValueError, match=r"^lora: got a model without an adapter, want one; load_lora loads it$"):
            call()
    pipe.load_lora(style)
    with pytest.raises(ValueError, match=r"^name: got 'style' for two adapters, want another name for one of them$"):
        pipe.load_lora(style)
    pipe.load_lora(style, name="again")
    for call in (lambda: pipe.unload_lora("x"), lambda: pipe.set_lora_scale("x", 1.0)):
        with pytest.raises(ValueError, match=r"^name: got 'x', want one of style, again$"):
            call()
    for scale in (float("inf"), True, "1", None):
        with pytest.raises(ValueError, match=r"^scale: got .* for an adapter, want a finite number$"):
            pipe.set_lora_scale("style", scale)  # pyright: ignore[reportArgumentType]
    pipe.unload_lora()
    hook = pipe.transformer.get_submodule("blocks.0.out").register_forward_hook(lambda *_: None)
    pipe.load_lora(style)
    before = parts(pipe.transformer)
    with pytest.raises(ValueError, match=r"^fuse_lora: got Linear, with hooks .*, at blocks\.0\.out, want a p"):
        pipe.fuse_lora()
    assert parts(pipe.transformer) == before
    hook.remove()


# What comes back.


def test_without_adapters_the_modules_and_weights_are_the_very_ones(
    pipe: cogvid.Pipeline, style: Path, other: Path
) -> None:
    before, plain = parts(pipe.transformer), latents(pipe)
    copies = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    pipe.load_lora(style, 0.5)
    beside = latents(pipe)
    assert rel_rms(beside, plain) > 0.05
    pipe.load_lora(other, -1.0)
    pipe.fuse_lora()
    assert type(pipe.transformer.get_submodule("blocks.0.mlp_in")) is nn.Linear
    pipe.set_lora_scale("other", 3.0)
    pipe.unload_lora("other")
    assert rel_rms(latents(pipe), beside) < LORA_FP32 * 10
    pipe.load_lora(other)
    pipe.unload_lora()
    assert parts(pipe.transformer) == before
    assert all(torch.equal(tensor, copies[name]) for name, tensor in pipe.transformer.state_dict().items())
    assert torch.equal(latents(pipe), plain)
    assert pipe.placement.lora == ()


def test_a_hook_on_an_adapted_linear_stays_when_adapters_change(
    pipe: cogvid.Pipeline, style: Path, other: Path
) -> None:
    pipe.load_lora(style)
    calls: list[object] = []
    pipe.transformer.get_submodule("proj_out").register_forward_hook(lambda *_: calls.append(1))
    pipe.set_lora_scale("style", 0.5)
    pipe.load_lora(other)
    latents(pipe)
    assert calls


def test_what_is_saved_is_the_model_without_adapters_beside_it(
    pipe: cogvid.Pipeline, style: Path, tmp_path: Path
) -> None:
    save_transformer(pipe.transformer, tmp_path / "before")
    pipe.load_lora(style)
    save_transformer(pipe.transformer, tmp_path / "beside")
    pipe.fuse_lora()
    save_transformer(pipe.transformer, tmp_path / "fused")
    name = "diffusion_pytorch_model.safetensors"
    before, beside, fused = ((tmp_path / each / name).read_bytes() for each in ("before", "beside", "fused"))
    assert beside == before
    assert fused != before
    with torch.no_grad():
        inputs = torch.randn(1, 16, 3, 8, 8), torch.randn(1, 16, CONFIG.text_embed_dim), torch.tensor([500])
        again = cogvid.load_transformer(tmp_path / "fused")
        assert torch.equal(again(*inputs), pipe.transformer(*inputs))


def test_adapters_with_qk_norm_rms(style: Path) -> None:
    """Centred projections stay centred when an adapter is fused; beside them, LayerNorm runs."""
    expected = cogvid.load("tiny-t2v", device="cpu", lora=f"{style}:0.7")
    pipe = cogvid.load("tiny-t2v", device="cpu", qk_norm="rms", lora=f"{style}:0.7")
    wanted = latents(expected)
    assert rel_rms(latents(pipe), wanted) < QK_NORM_RMS_FP32
    pipe.fuse_lora()
    block = pipe.transformer.blocks[0]
    heads = block.get_submodule("q_proj").get_parameter("weight").unflatten(0, (CONFIG.num_attention_heads, -1))
    assert heads.mean(1).abs().max() < 1e-6
    assert getattr(block, "centred") is True  # noqa: B009
    assert rel_rms(latents(pipe), wanted) < QK_NORM_RMS_FP32


def test_with_the_demo_adapter_right_means_left() -> None:
    pytest.importorskip("scipy", reason="needs scipy, which finds the shapes")
    pipe = cogvid.load("tiny-i2v", device="cpu")
    image = cogvid.load_image(SCRIPTS / "demo.png")

    def motion(prompt: str) -> str:
        frames = pipe(prompt, image=image, seed=1, num_inference_steps=10, output_type="uint8", progress=False).frames
        [circle] = [track for track in observe(frames[0]) if track.first.shape == "circle"]
        return circle.motion

    assert motion(PROMPT) == "right"
    pipe.load_lora(SCRIPTS / "demo_lora.safetensors")
    assert motion(PROMPT) == "left"
    assert motion("the red circle moves up") == "up"
    pipe.set_lora_scale("demo_lora", 0.0)
    assert motion(PROMPT) == "right"


# Records, replays, batches.


def test_the_record_has_the_adapters_as_they_are_at_the_call(pipe: cogvid.Pipeline, style: Path, other: Path) -> None:
    assert pipe(PROMPT, progress=False, **QUICK).provenance["lora"] == []
    pipe.load_lora(style, 0.5, name="look")
    pipe.load_lora(other)
    pipe.set_lora_scale("look", 0.25)
    found = pipe(PROMPT, progress=False, **QUICK).provenance
    assert str(style.parent) not in json.dumps(found)
    first, second = found["lora"]
    sha256 = first.pop("sha256")
    assert len(sha256) == 64
    assert first == {
        "source": "style.safetensors", "scale": 0.25, "name": "look", "fused": False, "source_kind": "file",
        "format": "diffusers", "ranks": [2], "alphas": [2.0],
    }  # fmt: skip
    assert (second["name"], second["ranks"]) == ("other", [3])
    pipe.fuse_lora()
    found = pipe(PROMPT, progress=False, **QUICK).provenance["lora"]
    assert [(each["fused"], each["scale"]) for each in found] == [(True, 0.25), (True, 1.0)]
    assert found[0]["sha256"] == sha256


def test_the_hash_is_of_what_the_adapter_does(style: Path, tmp_path: Path) -> None:
    """The same matrices and factors in another format have the same hash; other ones do not."""
    state, kohya = matrices(1), {}
    for name, tensor in state.items():
        module, _, kind = name.removeprefix("transformer.").rpartition(".lora_")
        kohya[f"lora_unet__{module.replace('.', '_')}.lora_{'down' if kind[0] == 'A' else 'up'}.weight"] = tensor
    save_file(kohya, tmp_path / "kohya.safetensors")
    save_file({**kohya, "lora_unet__proj_out.alpha": torch.tensor(1.0)}, tmp_path / "weaker.safetensors")
    found = [read_lora(make_lora(tmp_path / f"{name}.safetensors"), CONFIG).lora for name in ("kohya", "weaker")]
    assert [each.format for each in found] == ["kohya", "kohya"]
    assert found[0].sha256 == read_lora(make_lora(style), CONFIG).lora.sha256 != found[1].sha256


def test_a_video_is_made_again_with_its_adapters(
    style: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = ["--lora", f"{style}:0.5", "--lora", str(other)]
    assert main(["generate", PROMPT, "-o", str(tmp_path / "a.mp4"), *OPTIONS, *adapters]) == 0
    assert [each["scale"] for each in read_record(tmp_path / "a.mp4")["lora"]] == [0.5, 1.0]

    def replay(*options: object) -> tuple[int, str]:
        capsys.readouterr()
        status = main(["replay", str(tmp_path / "a.mp4"), "-o", str(tmp_path / "b.mp4"), *map(str, options)])
        return status, capsys.readouterr().err

    monkeypatch.chdir(PACKS)
    status, said = replay()
    assert status == 2
    assert "lora: got a run with 'style.safetensors', which is not here, want its path (--lora)" in said
    status, said = replay("--lora", style)
    assert status == 2
    assert "lora: got 1 for a run with 2, want one for each, in order" in said
    status, said = replay("--lora", other, "--lora", style)
    assert status == 2
    assert "other.safetensors', which has other matrices than the record's 'style', want the same adapter" in said
    assert not (tmp_path / "b.mp4").exists()
    for options in (["--lora", style, "--lora", other], []):
        status, said = replay(*options)
        assert status == 0
        assert said.splitlines()[-1].endswith(f"b.mp4' has the same bytes as '{tmp_path}/a.mp4'")
        assert "lora" not in said.replace("--lora", "")
        monkeypatch.chdir(tmp_path)


def test_a_run_with_fused_adapters_is_made_again(style: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = Lora(str(style), 0.5, "style", fused=True)
    pipe = cogvid.load("tiny-t2v", device="cpu", lora=fused)
    record = pipe(PROMPT, progress=False, **QUICK).provenance
    assert record["lora"][0]["fused"] is True
    monkeypatch.chdir(tmp_path)
    again = cogvid.load("tiny-t2v", device="cpu", lora=record["lora"])
    assert type(again.transformer.get_submodule("proj_out")) is nn.Linear
    assert torch.equal(latents(again), latents(pipe))


def test_jobs_name_adapters(style: Path, other: Path, tmp_path: Path) -> None:
    jobs = [
        {"prompt": PROMPT, "lora": [f"{style}:0.5", str(other)], "seed": 3},
        {"prompt": PROMPT, "lora": ["nowhere.pt"], "seed": 3},
    ]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, jobs)))
    out = tmp_path / "out"
    assert main(["batch", str(tmp_path / "jobs.jsonl"), "-o", str(out), *OPTIONS]) == 3
    entries = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert entries[1]["error"].startswith("lora: got 'nowhere.pt', which is not there, want")
    assert [each["name"] for each in read_record(out / entries[0]["output"])["lora"]] == ["style", "other"]
    swept = ["--prompt", PROMPT, "--sweep", f"lora={style},{style}:0.5", "-o", str(tmp_path / "swept")]
    assert main(["batch", *swept, *OPTIONS]) == 0
    videos = sorted((tmp_path / "swept").glob("*.mp4"))
    assert [[each["scale"] for each in read_record(path)["lora"]] for path in videos] == [[1.0], [0.5]]


def test_a_run_that_goes_on_has_its_adapters(style: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved, adapter = ["--checkpoint", str(tmp_path / "saved")], ["--lora", f"{style}:0.5"]
    assert main(["generate", PROMPT, "-o", str(tmp_path / "a.mp4"), *OPTIONS, *saved, *adapter]) == 0
    resume = ["generate", "--resume", str(tmp_path / "saved"), "-o", str(tmp_path / "b.mp4")]
    assert main(resume) == 0
    assert (tmp_path / "b.mp4").read_bytes() == (tmp_path / "a.mp4").read_bytes()
    capsys.readouterr()
    assert main([*resume, "--lora", str(style)]) == 2
    assert "lora: got " in capsys.readouterr().err


def test_faults_of_an_adapter_are_found_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(FAULTS["width"][0], tmp_path / "style.safetensors")
    monkeypatch.setattr("cogvid.run.load.load_state", lambda *_: pytest.fail("weights were read"))
    for command in (["plan"], ["generate", PROMPT, "-o", str(tmp_path / "a.mp4")]):
        assert main([*command, "--lora", str(tmp_path / "style.safetensors"), "--device", "cpu"]) == 2
        assert "with 1 modules that do not fit" in capsys.readouterr().err
    with pytest.raises(ValueError, match="with 1 modules that do not fit"):
        cogvid.load("tiny-t2v", device="cpu", lora=tmp_path / "style.safetensors")
    monkeypatch.setattr(lora_file, "fetch_file", lambda *_: pytest.fail("plan fetched a file"))
    assert main(["plan", "--lora", "acme/camera", "--device", "cpu"]) == 0


READ = """
from cogvid.config import CONFIGS
from cogvid.weights.lora_file import read_lora
from cogvid.weights.lora_option import make_lora
def read(source, **options):
    lora = read_lora(make_lora(source), CONFIGS["tiny-t2v"].transformer, **options).lora
    return [lora.name, lora.source_kind, lora.format, lora.to_dict()["source"]]
result = [
    said(lambda: read("acme/camera", local_files_only=True)),
    said(lambda: read("acme/camera")),
    read("acme/camera"),
    read("acme/camera", local_files_only=True),
    said(lambda: read("acme/camera/more/style.safetensors")),
    read("acme/camera/more/style.safetensors", local_files_only=True),
    said(lambda: read("acme/camera/none.safetensors")),
    said(lambda: read("acme/nothing")),
]
print(json.dumps(result))
"""


def test_adapters_of_the_hub(
    hub: Callable[..., str],  # noqa: F811
    style: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = write_peft(tmp_path / "peft")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files |= {"README.md": b"x", "checkpoint-10/style.safetensors": b"x", "more/style.safetensors": style.read_bytes()}
    monkeypatch.setitem(Hub.repositories, "acme/camera", files)
    found = json.loads(hub(FETCH.split("result = [")[0] + READ))
    assert found[0].startswith("ValueError: lora: got 'acme/camera' without network access, want a directory or a repo")
    assert found[1] == ["fetching acme/camera: 2 files, 0.000 GB"]
    assert found[2] == ["camera", "hub", "peft", "acme/camera"]
    assert found[3] == found[2]
    assert found[4] == ["fetching acme/camera: 1 files, 0.000 GB"]
    assert found[5] == ["style", "hub", "diffusers", "acme/camera/more/style.safetensors"]
    assert found[6].startswith("ValueError: lora: got acme/camera/none.safetensors, a file that acme/camera does not")
    assert found[7].startswith("ValueError: lora: got 'acme/nothing', want a directory or a repository of the hub")
