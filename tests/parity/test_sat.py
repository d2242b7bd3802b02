"""The authors' own code (SAT) as a judge: its weights, its networks, its choices. See tests/golden/README.md."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

import cogvid
import convert_sat
import sat_golden as sat
from cogvid.cli import main
from cogvid.config import CONFIGS, ModelConfig, TransformerConfig, VAEConfig
from cogvid.models.transformer import Transformer
from cogvid.models.vae import VAE
from cogvid.run.latents import initial_latents
from cogvid.run.pipeline import denoise
from cogvid.run.record import read_record
from cogvid.run.settings import resolve_settings, schedule_of
from cogvid.sampling.sat_schedule import make_sat_schedule
from cogvid.sampling.schedule import make_schedule
from cogvid.weights.checkpoint import with_sat_defaults
from cogvid.weights.files import load_state
from cogvid.weights.load import config_json, make_transformer, make_vae
from cogvid.weights.names import on_meta
from cogvid.weights.placement import resolve_placement
from cogvid.weights.sat_names import (
    POSITIONS,
    TRANSFORMER_PREFIX,
    transformer_from_sat,
    transformer_to_sat,
    vae_from_sat,
    vae_to_sat,
)
from tests.tiny_text import save_text_parts

GOLDEN = Path(__file__).parents[1] / "golden" / "sat.safetensors"
OFFICIAL = {
    "2b": "cogvideox-2b",
    "5b": "cogvideox-5b",
    "5b-i2v": "cogvideox-5b-i2v",
    "1.5-5b": "cogvideox1.5-5b",
    "1.5-5b-i2v": "cogvideox1.5-5b-i2v",
}
# Relative RMS in float32. Both sides compute the same, in another order: forwards agree to 3e-7 here, and a trajectory
# adds that up over its steps. The smallest choice, eps, is 4e-6 in one forward.
FORWARD, TRAJECTORY = 1.5e-6, 1e-5


def rms(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return ((a - b).pow(2).mean() / b.pow(2).mean()).sqrt().item()


@cache
def golden(name: str) -> Tensor:
    with safe_open(GOLDEN, framework="pt") as file:
        return file.get_tensor(name)


@cache
def facts() -> dict[str, Any]:
    with safe_open(GOLDEN, framework="pt") as file:
        return json.loads(file.metadata()["facts"])


@cache
def tiny(kind: str) -> ModelConfig:
    """The model that `sat_golden` ran."""
    known, channels = CONFIGS[OFFICIAL[kind]], sat.CHANNELS
    transformer = dataclasses.replace(
        known.transformer,
        num_attention_heads=3,
        attention_head_dim=32,
        num_layers=2,
        in_channels=channels * (2 if kind.endswith("i2v") else 1),
        out_channels=channels,
        text_embed_dim=sat.TEXT_WIDTH,
        time_embed_dim=24,
        ofs_embed_dim=24 if kind == "1.5-5b-i2v" else None,
        max_text_seq_length=sat.TEXT_LEN,
        sample_frames=9,
        sample_height=sat.HEIGHT,
        sample_width=sat.WIDTH,
    )
    vae = dataclasses.replace(
        known.vae, block_out_channels=(32, 64, 64, 128), layers_per_block=1, latent_channels=channels
    )
    frames, height, width = sat.VIDEO
    return dataclasses.replace(
        known, transformer=transformer, vae=vae, num_frames=frames, height=height, width=width, dtype="float32"
    )


@cache
def weights(kind: str) -> dict[str, Tensor]:
    """SAT's weights of a tiny model, under the names of its own module. Not to be changed."""
    state = sat.state_of(facts()["shapes"][kind], kind)
    if kind == "2b":  # computed, not drawn
        with torch.device("cpu"):
            state[POSITIONS] = Transformer(tiny("2b").transformer).initial_pos_embedding()
    return state


def converted(kind: str) -> dict[str, Tensor]:
    state = transformer_from_sat(weights(kind), tiny(kind).transformer, "SAT")
    return {name: make() for name, make in state.items()}


def load(kind: str, **options: str) -> Transformer:
    place = resolve_placement(device="cpu", **options)("float32")
    return make_transformer(tiny(kind).transformer, converted(kind), place, "SAT")


def load_vae() -> VAE:
    config = tiny("2b").vae
    state = {name: make() for name, make in vae_from_sat(weights("vae"), config, "SAT").items()}
    return make_vae(config, state, resolve_placement(device="cpu")("float32"), "SAT")


@torch.no_grad()
def forward(model: Transformer, kind: str, given: dict[str, Tensor], **options: str) -> Tensor:
    x = torch.cat([given["x"], given["image"]], dim=2) if kind.endswith("i2v") else given["x"]
    return model(x.transpose(1, 2), given["text"], given["timestep"], **options).transpose(1, 2)


@torch.no_grad()
def trajectory(kind: str, steps: int = sat.STEPS, **options: Any) -> Tensor:
    """Sample with SAT's defaults, but for `options`; latents `[1, T, C, h, w]`."""
    model, given = with_sat_defaults(tiny(kind)), sat.inputs_of(kind, sat.frames_of(kind))
    task = "image-to-video" if kind.endswith("i2v") else "text-to-video"
    settings = resolve_settings(model, task=task, num_inference_steps=steps, **options)
    schedule = schedule_of(model, settings)
    generator = torch.Generator().manual_seed(sat.SEED)
    size = (1, sat.frames_of(kind), sat.CHANNELS, sat.HEIGHT, sat.WIDTH)
    x = initial_latents(size, generator, torch.device("cpu"), torch.float32)
    text = given["text"][:1]
    image = given["image"][:1].transpose(1, 2) if kind.endswith("i2v") else None
    network = load(kind, last_norm_eps="sat")
    x = denoise(network, x, torch.cat([text * 0, text]), schedule, settings, conditioning=image, generator=generator)
    return x.transpose(1, 2)


def test_the_golden_tensors_say_where_they_are_from() -> None:
    assert facts()["upstream"] == "zai-org/CogVideo"
    assert facts()["commits"] == [sat.OLD, sat.NEW]
    assert facts()["command"] in (GOLDEN.parents[2] / "tests/parity/DIFFERENCES.md").read_text()
    assert GOLDEN.stat().st_size < 300_000


@pytest.mark.parametrize("kind", OFFICIAL)
def test_a_converted_network_equals_sats_own(kind: str) -> None:
    given, expected = sat.inputs_of(kind, sat.frames_of(kind)), golden(f"{kind}.forward")
    assert rms(forward(load(kind, last_norm_eps="sat"), kind, given), expected) < FORWARD
    # The eps of the last norm is all that is left between the two: 4e-6.
    assert 2e-6 < rms(forward(load(kind), kind, given), expected) < 2e-5


@pytest.mark.parametrize("kind", OFFICIAL)
@pytest.mark.parametrize("sampler", ["dpm", "ddim"])
def test_a_trajectory_with_sats_choices_equals_sats_own(kind: str, sampler: str) -> None:
    expected = golden(f"{kind}.{sampler}")
    ours = trajectory(kind, scheduler=sampler)
    assert rms(ours, expected) < TRAJECTORY
    assert rms(trajectory(kind, scheduler=sampler, zero_snr="diffusers"), expected) > 3e-4


def test_steps_that_do_not_divide_1000_land_on_the_next_as_in_sat() -> None:
    expected = golden("2b.dpm.7")
    assert rms(trajectory("2b", 7), expected) < TRAJECTORY
    with pytest.raises(ValueError, match=r"^previous_timestep: got 'diffusers', which with 7 steps .*, want 'next'$"):
        trajectory("2b", 7, previous_timestep="diffusers")
    with pytest.warns(UserWarning, match="beside the next timestep"):
        other = trajectory("2b", 7, previous_timestep="diffusers", zero_snr="diffusers")
    assert rms(other, expected) > 0.01
    assert torch.equal(trajectory("2b", previous_timestep="diffusers"), trajectory("2b"))


@pytest.mark.parametrize("kind", ["2b", "5b"])  # the two SNR shifts
@pytest.mark.parametrize("count", sat.COUNTS)
def test_steps_and_levels_are_sats(kind: str, count: int) -> None:
    schedule = make_sat_schedule(CONFIGS[OFFICIAL[kind]].schedule, count)
    assert list(schedule.timesteps) == golden(f"{kind}.timesteps.{count}").tolist()
    levels = torch.stack([schedule.alpha(t) for t in schedule.timesteps]).sqrt().float()
    # SAT rounds to float32 first; the noisiest levels are differences of numbers that are larger.
    torch.testing.assert_close(levels, golden(f"{kind}.levels.{count}"), rtol=0, atol=3e-7)
    other = make_schedule(CONFIGS[OFFICIAL[kind]].schedule, count, previous="next")
    off = torch.stack([other.alpha(t) for t in other.timesteps]).sqrt().float() - levels
    assert 3e-4 < off.abs().max() < (2e-3 if count == 50 else 5e-3)
    assert schedule.alpha(999) == 0
    assert ((schedule.alphas_cumprod >= 0) & (schedule.alphas_cumprod <= 1)).all()


def test_learned_positions_are_cut_to_fewer_frames() -> None:
    given, expected = sat.inputs_of("5b-i2v", 2), golden("5b-i2v.short")
    model = load("5b-i2v", last_norm_eps="sat")
    assert rms(forward(model, "5b-i2v", given, learned_positions="slice"), expected) < FORWARD
    assert rms(forward(model, "5b-i2v", given), expected) > 0.05


@pytest.mark.parametrize("kind", ["2b", "5b"])
def test_position_tables_are_cut_at_other_sizes(kind: str) -> None:
    given, expected = sat.inputs_of(kind, *sat.CUT), golden(f"{kind}.cut")
    cut = load(kind, last_norm_eps="sat", position_tables="sat")
    assert rms(forward(cut, kind, given), expected) < FORWARD
    assert rms(forward(load(kind, last_norm_eps="sat"), kind, given), expected) > 1e-3
    whole = sat.inputs_of(kind)
    assert torch.equal(forward(cut, kind, whole), forward(load(kind, last_norm_eps="sat"), kind, whole))
    with pytest.raises(ValueError, match=r"latents: got 3x4x4 patches, want at most 3x3x4 with position_tables='sat'"):
        forward(cut, kind, sat.inputs_of(kind, 3, 8, 8))


@torch.no_grad()
def test_the_vae_is_sats_and_encodes_a_whole_clip() -> None:
    vae = load_vae()
    for frames in (1, 9, 17):
        expected = golden(f"vae.encode.{frames}")
        posterior = vae.encode(sat.pixels_of(frames), whole=True)
        assert rms(torch.cat([posterior.mean, posterior.logvar], dim=1), expected) < 5e-6
    posterior = vae.encode(sat.pixels_of(17))
    assert rms(torch.cat([posterior.mean, posterior.logvar], dim=1), expected) > 0.05
    z = sat.numbers("z", (1, sat.CHANNELS, 5, 2, 2))
    assert rms(vae.decode(z), golden("vae.decode.5")) < 5e-6


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1.5-5B-I2V, tiny, as the command converts it, with a text encoder."""
    root, kind = tmp_path_factory.mktemp("sat"), "1.5-5b-i2v"
    configs = write_configs(root / "configs", kind)
    module = {TRANSFORMER_PREFIX + name: x for name, x in weights(kind).items()}
    torch.save({"module": module, "iteration": 1}, root / "transformer.pt")
    torch.save({"state_dict": weights("vae")}, root / "vae.pt")
    save_text_parts(root / "out")
    files = ["--transformer", str(root / "transformer.pt"), "--vae", str(root / "vae.pt")]
    convert_sat.main(["from-sat", "--model", str(configs), *files, "-o", str(root / "out")])
    return root / "out"


def write_configs(folder: Path, kind: str) -> Path:
    for part, config in {"transformer": tiny(kind).transformer, "vae": tiny(kind).vae}.items():
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(config_json(part, config))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(config_json("scheduler", tiny(kind).schedule))
    return folder


def animate(pipe: cogvid.Pipeline, **options: Any) -> cogvid.Output:
    frames, height, width = sat.VIDEO
    return pipe(
        prompt_embeds=sat.inputs_of("1.5-5b-i2v")["text"][:1],
        image=Image.fromarray(sat.picture()),
        height=height,
        width=width,
        num_frames=frames,
        num_inference_steps=sat.STEPS,
        generator=torch.Generator().manual_seed(sat.SEED),
        output_type="latent",
        progress=False,
        **options,
    )


def test_defaults_sat_makes_a_video_from_a_picture_as_sat_does(checkpoint: Path) -> None:
    pipe = cogvid.load(checkpoint, device="cpu", dtype="float32", defaults="sat")
    out, expected = animate(pipe), golden("1.5-5b-i2v.video")
    # The picture goes through the VAE first, whose error is that of `test_the_vae_is_sats_and_encodes_a_whole_clip`.
    assert rms(out.frames[:, 1:], expected) < 2 * TRAJECTORY  # SAT drops the padding before it decodes
    for off, least in (
        ({"zero_snr": "diffusers"}, 3e-4),
        ({"unconditional_text": "encode"}, 1e-2),
        ({"image_latent_scale": "diffusers"}, 1e-3),
        ({"use_dynamic_cfg": "constant"}, 1e-2),
    ):
        assert rms(animate(pipe, **off).frames[:, 1:], expected) > least, off
    wanted = {
        "defaults": "sat", "zero_snr": "sat", "unconditional_text": "zeros", "image_latent_scale": "none",
        "previous_timestep": "next", "learned_positions": "slice", "vae_encode": "whole", "last_norm_eps": "sat",
        "position_tables": "sat", "scheduler": "dpm", "use_dynamic_cfg": "diffusers", "guidance_scale": 6.0,
        "max_sequence_length": 224, "resize": "stretch",
    }  # fmt: skip
    assert {name: out.provenance[name] for name in wanted} == wanted
    assert pipe.transformer.norm_out.eps == 1e-6


def test_a_choice_that_is_named_wins_over_defaults_sat(checkpoint: Path) -> None:
    options = {"last_norm_eps": "diffusers", "position_tables": "diffusers"}
    pipe = cogvid.load(checkpoint, device="cpu", dtype="float32", defaults="sat", **options)
    assert pipe.transformer.norm_out.eps == 1e-5
    assert {name: getattr(pipe.placement, name) for name in options} == options
    plain = cogvid.load(checkpoint, device="cpu", dtype="float32")
    assert {name: getattr(plain.placement, name) for name in options} == options
    for task in ("image-to-video",):
        assert resolve_settings(plain.model, task=task).unconditional_text == "encode"
        assert resolve_settings(pipe.model, task=task, zero_snr="diffusers").zero_snr == "diffusers"


def test_what_cannot_apply_is_said_in_one_line(checkpoint: Path) -> None:
    pipe = cogvid.load(checkpoint, device="cpu", dtype="float32", defaults="sat")
    with pytest.raises(ValueError, match=r"^negative_prompt: got one with unconditional_text='zeros', want none$"):
        animate(pipe, negative_prompt="dark")
    with pytest.raises(ValueError, match=r"^negative_prompt_embeds: got one with unconditional_text='zeros'"):
        animate(pipe, negative_prompt_embeds=torch.zeros(1, sat.TEXT_LEN, sat.TEXT_WIDTH))
    with pytest.raises(ValueError, match=r"^num_inference_steps: got 1, want 2 or more with zero_snr='sat'$"):
        pipe("a", image=sat.picture(), num_inference_steps=1)
    plain = dataclasses.replace(tiny("5b").schedule, rescale_betas_zero_snr=False)
    with pytest.raises(ValueError, match=r"^zero_snr: got 'sat' for a schedule without a .*, want 'diffusers'$"):
        make_sat_schedule(plain, 10)
    with pytest.raises(ValueError, match=r"^zero_snr: got 'mine', want one of diffusers, sat$"):
        animate(pipe, zero_snr="mine")
    with pytest.raises(ValueError, match=r"^last_norm_eps: got 'mine', want one of diffusers, sat$"):
        cogvid.load(checkpoint, last_norm_eps="mine")


@pytest.mark.parametrize("kind", OFFICIAL)
def test_names_and_shapes_of_the_official_sizes_are_upstreams(kind: str) -> None:
    config = dataclasses.replace(CONFIGS[OFFICIAL[kind]].transformer, num_layers=1)  # as `sat_golden` ran it
    assert sat.fingerprint(sat_shapes(Transformer, config, transformer_to_sat)) == facts()["full"][kind]


def test_names_and_shapes_of_the_official_vae_are_upstreams() -> None:
    assert sat.fingerprint(sat_shapes(VAE, CONFIGS["cogvideox-2b"].vae, vae_to_sat)) == facts()["full"]["vae"]


def sat_shapes(
    kind: type[Transformer] | type[VAE], config: TransformerConfig | VAEConfig, change: Callable[..., dict[str, Tensor]]
) -> dict[str, list[int]]:
    from cogvid.weights.names import unmap_state_dict

    with on_meta("test"):
        state = change(unmap_state_dict(kind(config)), config, "test")  # pyright: ignore[reportArgumentType]
    return {name.removeprefix(TRANSFORMER_PREFIX): list(x.shape) for name, x in state.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", OFFICIAL)
@pytest.mark.every(3)
def test_there_and_back_keeps_every_bit(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    configs = write_configs(tmp_path / "configs", kind)
    module = {TRANSFORMER_PREFIX + name: x.to(dtype) for name, x in weights(kind).items()}
    # The same file may have the VAE and the conditioner too.
    vae = {f"first_stage_model.{name}": x for name, x in weights("vae").items()}
    torch.save({"module": {**module, **vae, "conditioner.x": torch.ones(1)}}, tmp_path / "sat.pt")
    file = tmp_path / "sat.pt"
    convert_sat.from_sat(str(configs), {"transformer": file, "vae": file}, tmp_path / "here", max_shard=100_000)
    assert (tmp_path / "here" / "transformer" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    convert_sat.main(["to-sat", str(tmp_path / "here"), "-o", str(tmp_path / "sat")])
    back = convert_sat.read_pt(tmp_path / "sat" / "transformer" / "1" / "mp_rank_00_model_states.pt")
    unused = ("freqs_sin", "freqs_cos", "_embeddings.weight") + (("pos_embedding",) if kind == "2b" else ())
    assert set(back) == {name for name in module if not name.endswith(unused)}
    assert all(torch.equal(back[name], module[name]) and back[name].dtype == dtype for name in back)
    assert (tmp_path / "sat" / "transformer" / "latest").read_text() == "1"
    back = convert_sat.read_pt(tmp_path / "sat" / "vae" / "3d-vae.pt")
    assert back.keys() == weights("vae").keys()
    assert all(torch.equal(x, weights("vae")[name]) for name, x in back.items())
    # And from upstream's layout: SAT's files made again give the same safetensors.
    files = {name: tmp_path / "sat" / path for name, path in convert_sat.SAT_FILES.items()}
    convert_sat.from_sat(str(tmp_path / "here"), files, tmp_path / "again")
    for part in files:
        here, again = load_state(tmp_path / "here" / part), load_state(tmp_path / "again" / part)
        assert here.keys() == again.keys()
        assert all(torch.equal(here[name], again[name]) for name in here)


def test_files_that_cannot_be_converted_are_refused_in_one_line(tmp_path: Path) -> None:
    configs, file = write_configs(tmp_path / "configs", "5b"), tmp_path / "sat.pt"
    state, row = weights("5b"), "transformer.layers.0.attention.query_key_value.weight"

    def refused(values: Any, message: str, model: str = str(configs)) -> None:
        torch.save(values, file)
        with pytest.raises(SystemExit, match=message) as error:
            convert_sat.main(["from-sat", "--model", model, "--transformer", str(file), "-o", str(tmp_path / "out")])
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()

    refused({"module": {**state, "x.y": torch.ones(1)}}, r"1 unexpected \(x\.y")
    refused({"module": {name: x for name, x in state.items() if name != row}}, r"1 missing \(transformer\.layers\.0")
    refused({"module": {**state, row: torch.ones(3, 3)}}, r"of another shape \(.*is \[3, 3\], want \[288, 96\]")
    refused({"module": Path("x")}, "got a file with other objects than tensors")
    refused({"module": {}}, "got no state dict")
    refused({"module": state}, "model: got 'cogvideox-6b', want one of cogvideox-2b", model="cogvideox-6b")
    refused({"module": state}, "of the config", model="cogvideox-5b")
    configs = write_configs(tmp_path / "2b", "2b")
    other = {**weights("2b"), POSITIONS: torch.ones(1, sat.TEXT_LEN + 36, 96)}
    refused({"module": other}, "got another table, want the sin-cos table of the config", model=str(configs))
    file.write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"sat\.pt: got a"):
        convert_sat.read_pt(file)


class _Command:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("pwned"),)


def test_an_object_in_a_file_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"module": {"x": _Command()}}, tmp_path / "sat.pt")
    with pytest.raises(ValueError, match="other objects than tensors"):
        convert_sat.read_pt(tmp_path / "sat.pt")
    assert not (tmp_path / "pwned").exists()


def test_the_newer_codes_matrix_of_patches_is_taken_for_1_0() -> None:
    state, config, name = weights("5b"), tiny("5b").transformer, "mixins.patch_embed.proj.weight"
    made = transformer_from_sat({**state, name: state[name].flatten(1)}, config, "SAT")["patch_embed.proj.weight"]()
    assert torch.equal(made, state[name])


def test_the_command_line_takes_defaults_sat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, again = str(tmp_path / "out.mp4"), str(tmp_path / "again.mp4")
    few = ["--num-inference-steps", "3", "--num-frames", "9", "--seed", "1"]
    assert main(["generate", "a red circle", "--defaults", "sat", *few, "-o", out]) == 0
    record = read_record(out)
    assert (record["zero_snr"], record["unconditional_text"], record["last_norm_eps"]) == ("sat", "zeros", "sat")
    assert main(["replay", out, "-o", again]) == 0
    assert Path(out).read_bytes() == Path(again).read_bytes()
    assert main(["plan", "--model", "zai-org/CogVideoX1.5-5B", "--defaults", "sat", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["text_tokens"] == 224
