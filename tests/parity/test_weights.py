"""Names, shapes and files: what diffusers has and writes is what cogvid has and reads, and the other way round."""

from __future__ import annotations

import logging
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from safetensors.torch import load_file
from torch import Tensor, nn

from cogvid.config import CONFIGS, TransformerConfig, VAEConfig
from cogvid.models.transformer import Transformer
from cogvid.models.vae import VAE
from cogvid.weights import placement
from cogvid.weights.load import load_transformer, load_vae, save_transformer, save_vae
from cogvid.weights.names import (
    TRANSFORMER_NAMES,
    VAE_NAMES,
    map_transformer_state_dict,
    map_vae_state_dict,
    unmap_state_dict,
)
from references import TRANSFORMER_VARIANTS, tiny_transformer, tiny_vae

# Tensors and millions of parameters of the official transformers; the learned table of 5B-I2V is counted as a tensor.
SIZES = {
    "cogvideox-2b": (736, 1694),
    "cogvideox-5b": (1024, 5570),
    "cogvideox-5b-i2v": (1025, 5570),
    "cogvideox1.5-5b": (1024, 5571),
    "cogvideox1.5-5b-i2v": (1028, 5572),
}
OFFICIAL = [name for name, model in CONFIGS.items() if model.repo]


@pytest.fixture
def fast_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep bfloat16 on every CPU; nothing is computed in it here."""
    monkeypatch.setattr(placement, "cpu_has_bfloat16", lambda: True)


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def assert_same_state(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def meta_transformers(name: str) -> tuple[CogVideoXTransformer3DModel, Transformer]:
    config = CONFIGS[name].transformer
    options = {k: v for k, v in config.to_dict().items() if k != "qk_norm_eps"}
    with torch.device("meta"):
        return CogVideoXTransformer3DModel(**options), Transformer(config)


@pytest.mark.parametrize("name", OFFICIAL)
def test_full_size_transformer_has_upstream_names_and_shapes(name: str) -> None:
    reference, ours = meta_transformers(name)
    assert shapes(unmap_state_dict(ours)) == shapes(reference.state_dict())
    mapped = map_transformer_state_dict(reference.state_dict(), ours.config)
    assert shapes(mapped) == shapes(ours.state_dict())
    assert parameters(ours) == parameters(reference)
    assert (len(reference.state_dict()), round(parameters(ours) / 1e6)) == SIZES[name]


@pytest.mark.parametrize("config", [m.vae for m in CONFIGS.values() if m.name in ("cogvideox-2b", "cogvideox1.5-5b")])
def test_full_size_vae_has_upstream_names_and_shapes(config: VAEConfig) -> None:
    with torch.device("meta"):
        reference, ours = AutoencoderKLCogVideoX(**config.to_dict()), VAE(config)
    assert shapes(unmap_state_dict(ours)) == shapes(reference.state_dict())
    assert shapes(map_vae_state_dict(reference.state_dict(), config)) == shapes(ours.state_dict())
    assert (parameters(ours), round(parameters(ours) / 1e5)) == (parameters(reference), 2156)


def test_every_row_of_the_tables_is_used() -> None:
    """Also: no key of upstream's fits two rows, and no two rows go to one of ours."""
    with torch.device("meta"):
        vae = AutoencoderKLCogVideoX()
    transformer_keys = {key for name in OFFICIAL for key in meta_transformers(name)[0].state_dict()}
    for names, keys in ((TRANSFORMER_NAMES, transformer_keys), (VAE_NAMES, set(vae.state_dict()))):
        rows = [re.escape(row).replace(r"\{\}", r"\d+") + r"(\.weight|\.bias)?" for row in names]
        assert all(any(re.fullmatch(row, key) for key in keys) for row in rows)
        assert all(sum(re.fullmatch(row, key) is not None for row in rows) == 1 for key in keys)
        assert len(set(names.values())) == len(names)


@pytest.mark.parametrize("variant", TRANSFORMER_VARIANTS)
def test_transformer_map_is_a_bijection(variant: str) -> None:
    reference = tiny_transformer(variant)
    # Every element is another number, so that a swap of any two parts would show.
    start, state = 0, {}
    for name, tensor in reference.state_dict().items():
        state[name] = torch.arange(start, start + tensor.numel(), dtype=torch.float64).view(tensor.shape)
        start += tensor.numel()
    config = TransformerConfig.from_dict(reference.config)
    mapped = map_transformer_state_dict(state, config)
    assert torch.cat([x.flatten() for x in mapped.values()]).unique().numel() == start
    # One to one, and each in the memory where it was.
    assert sorted(x.data_ptr() for x in mapped.values()) == sorted(x.data_ptr() for x in state.values())
    ours = Transformer(config).double()
    ours.load_state_dict(mapped, strict=True)
    assert_same_state(unmap_state_dict(ours), state)


def test_vae_map_is_a_bijection() -> None:
    reference = tiny_vae()
    config = VAEConfig.from_dict(reference.config)
    mapped = map_vae_state_dict(reference.state_dict(), config)
    assert len(mapped) == len(reference.state_dict())
    ours = VAE(config)
    ours.load_state_dict(mapped, strict=True)
    assert_same_state(unmap_state_dict(ours), reference.state_dict())


@pytest.mark.parametrize(
    "options", [*({"attention_head_dim": d} for d in range(2, 66, 2)), {"ofs_embed_dim": 8}], ids=str
)
@pytest.mark.parametrize("variant", ["2b", "5b"])
def test_what_is_refused_does_not_run_in_diffusers(variant: str, options: dict[str, int]) -> None:
    """Neither widths that the positions cannot be split into, nor an ofs that cannot be added to the time."""
    try:
        reference = tiny_transformer(variant, num_attention_heads=1, **options)
        head_dim, rotary = reference.config["attention_head_dim"], None
        if variant == "5b":
            rotary = get_3d_rotary_pos_embed(head_dim, ((0, 0), (4, 6)), (4, 6), 3)
        ofs = torch.ones(1) if "ofs_embed_dim" in options else None
        text = torch.randn(1, 10, 40)
        with torch.no_grad():
            reference(torch.randn(1, 3, 16, 8, 12), text, torch.tensor([7]), ofs=ofs, image_rotary_emb=rotary)
        runs = True
    except (ValueError, RuntimeError, AssertionError):
        runs = False
    values = {"num_attention_heads": 1, "time_embed_dim": 24, "use_rotary_positional_embeddings": variant == "5b"}
    try:
        TransformerConfig.from_dict({**values, **options})
        refused = False
    except ValueError:
        refused = True
    assert refused != runs


@pytest.mark.usefixtures("fast_bfloat16")
@pytest.mark.parametrize("shard", [None, "100KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("variant", ["2b", "5b-i2v", "1.5-5b-i2v"])
def test_transformer_loads_what_diffusers_saves(
    tmp_path: Path, variant: str, dtype: torch.dtype, shard: str | None
) -> None:
    reference = tiny_transformer(variant).to(dtype)
    options: dict[str, Any] = {} if shard is None else {"max_shard_size": shard}
    reference.save_pretrained(tmp_path / "transformer", **options)
    assert (len(list(tmp_path.glob("*/*.safetensors"))) > 1) == (shard is not None)
    for directory in (tmp_path, tmp_path / "transformer"):
        ours = load_transformer(directory)
        assert_same_state(unmap_state_dict(ours), reference.state_dict())
        assert not ours.training
        assert not any(p.requires_grad for p in ours.parameters())


@pytest.mark.usefixtures("fast_bfloat16")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_vae_loads_what_diffusers_saves(tmp_path: Path, dtype: torch.dtype) -> None:
    reference = tiny_vae().to(dtype)
    reference.save_pretrained(tmp_path / "vae", max_shard_size="50KB")
    assert_same_state(unmap_state_dict(load_vae(tmp_path)), reference.state_dict())


@pytest.mark.parametrize("shard", [None, "100KB"], ids=["single", "sharded"])
def test_transformer_and_vae_load_the_variants_that_diffusers_saves(tmp_path: Path, shard: str | None) -> None:
    options: dict[str, Any] = {"variant": "fp16"} if shard is None else {"variant": "fp16", "max_shard_size": shard}
    for part, reference, load in (
        ("transformer", tiny_transformer("5b"), load_transformer),
        ("vae", tiny_vae(), load_vae),
    ):
        reference.half().save_pretrained(tmp_path / part, **options)
        ours = load(tmp_path, dtype="float32", variant="fp16")
        assert_same_state(unmap_state_dict(ours), reference.float().state_dict())
        with pytest.raises(ValueError, match=rf"^variant: got None, want 'fp16': .*{part} has no other$"):
            load(tmp_path)


@pytest.mark.usefixtures("fast_bfloat16")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_position_table_that_diffusers_keeps_in_float64(tmp_path: Path, dtype: torch.dtype) -> None:
    """It writes the table so whatever the model was loaded as; no other tensor may be float64."""
    tiny_transformer("5b-i2v").to(dtype).save_pretrained(tmp_path / "first")
    again = CogVideoXTransformer3DModel.from_pretrained(tmp_path / "first", torch_dtype=dtype, low_cpu_mem_usage=False)
    again.save_pretrained(tmp_path / "second")
    name = "patch_embed.pos_embedding"
    assert load_file(tmp_path / "second" / "diffusion_pytorch_model.safetensors")[name].dtype == torch.float64
    ours = unmap_state_dict(load_transformer(tmp_path / "second"))
    assert_same_state(ours, {**again.state_dict(), name: again.state_dict()[name].to(dtype)})


@pytest.mark.parametrize("dtype", ["float32", torch.bfloat16], ids=str)
def test_loading_in_another_dtype_rounds_each_weight(tmp_path: Path, dtype: str | torch.dtype) -> None:
    reference = tiny_transformer("5b").half()
    reference.save_pretrained(tmp_path)
    ours = load_transformer(tmp_path, dtype=dtype)
    assert_same_state(unmap_state_dict(ours), reference.to(getattr(torch, str(dtype).split(".")[-1])).state_dict())


@pytest.fixture
def upstream_says_nothing() -> Any:
    """Fail on anything that diffusers logs at warning level or warns of."""
    records: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record.getMessage())

    handler = Handler(logging.WARNING)
    logger = logging.getLogger("diffusers")
    logger.addHandler(handler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    logger.removeHandler(handler)
    assert records == []


@pytest.mark.usefixtures("upstream_says_nothing")
@pytest.mark.parametrize("variant", TRANSFORMER_VARIANTS)
def test_diffusers_loads_what_save_transformer_writes(tmp_path: Path, variant: str) -> None:
    reference = tiny_transformer(variant)
    reference.save_pretrained(tmp_path / "theirs")
    save_transformer(load_transformer(tmp_path / "theirs"), tmp_path / "ours")
    again = CogVideoXTransformer3DModel.from_pretrained(tmp_path / "ours", low_cpu_mem_usage=False)
    # In float, because diffusers puts a learned position table into a float64 buffer, whatever the file holds.
    assert_same_state(again.float().state_dict(), reference.state_dict())
    assert_same_config(again.config, reference.config)
    assert str(tmp_path) not in (tmp_path / "ours" / "config.json").read_text()
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


@pytest.mark.usefixtures("upstream_says_nothing")
def test_diffusers_loads_what_save_vae_writes(tmp_path: Path) -> None:
    reference = tiny_vae(
        block_out_channels=(8, 16, 24),
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        scaling_factor=0.5,
        invert_scale_latents=True,
    )
    reference.save_pretrained(tmp_path / "theirs")
    save_vae(load_vae(tmp_path / "theirs"), tmp_path / "ours")
    again = AutoencoderKLCogVideoX.from_pretrained(tmp_path / "ours", low_cpu_mem_usage=False)
    assert_same_state(again.state_dict(), reference.state_dict())
    assert_same_config(again.config, reference.config)


def test_save_in_another_dtype(tmp_path: Path) -> None:
    reference = tiny_transformer("5b")
    ours = Transformer(TransformerConfig.from_dict(reference.config))
    ours.load_state_dict(map_transformer_state_dict(reference.state_dict(), ours.config))
    save_transformer(ours, tmp_path, dtype=torch.float16)
    again = CogVideoXTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.float16, low_cpu_mem_usage=False)
    assert_same_state(again.state_dict(), reference.half().state_dict())


def assert_same_config(actual: Any, expected: Any) -> None:
    """Compare all but what diffusers notes for itself; JSON has lists for tuples and no integer scale factors."""
    for name, value in expected.items():
        if not name.startswith("_") and name != "dropout":
            assert (tuple(actual[name]) if isinstance(value, tuple) else actual[name]) == value, name
