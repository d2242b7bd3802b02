"""Make the golden tensors of the authors' own code (SAT) that the tests compare with.

    python scripts/sat_golden.py UPSTREAM [--out tests/golden/sat.safetensors]

UPSTREAM is a clone of https://github.com/zai-org/CogVideo. Each model runs at the commit that it was published with,
in a process of its own, on the CPU in float32, tiny and with weights from `numbers`, so that none are stored. The
interpreter needs torch, transformers, einops, scipy, SwissArmyTransformer and omegaconf; other packages that upstream
only imports get a stand-in. Nothing of upstream's code is in this file.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.abc
import importlib.machinery
import json
import subprocess
import sys
import tarfile
import tempfile
import types
import typing
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

OLD, NEW = "db498073d08b1f1bfe1df46cc2f9be64d8d41120", "7a1af7154511e0ce4e4be8d62faa8c5e5a3532d2"
KINDS = {  # the commit of each model and its config
    "2b": (OLD, "cogvideox_2b"),
    "5b": (OLD, "cogvideox_5b"),
    "5b-i2v": (OLD, "cogvideox_5b_i2v"),
    "1.5-5b": (NEW, "cogvideox1.5_5b"),
    "1.5-5b-i2v": (NEW, "cogvideox1.5_5b_i2v"),
}
FRAMES, HEIGHT, WIDTH, CHANNELS, TEXT_LEN, TEXT_WIDTH = 3, 6, 8, 4, 10, 40  # of the tiny models' latents and text
NETWORK = {  # what a tiny model has in place of the sizes of upstream's config
    "time_embed_dim": 24, "num_frames": 9, "latent_width": WIDTH, "latent_height": HEIGHT, "num_layers": 2,
    "out_channels": CHANNELS, "hidden_size": 96, "num_attention_heads": 3,
}  # fmt: skip
VAE = {"ch": 32, "ch_mult": [1, 2, 2, 4], "num_res_blocks": 1, "z_channels": CHANNELS, "resolution": 32}
CUT = (FRAMES, 4, 6)  # another size than the trained one
STEPS, SEED, SCALE = 10, 5, 6.0
COUNTS = (50, 28)  # steps of the schedules that are stored
VIDEO = (9, 8 * HEIGHT, 8 * WIDTH)


def numbers(name: str, shape: Iterable[int]) -> Tensor:
    """Return float32 numbers that depend on the name alone; weights and norms get a scale that keeps layers sane."""
    shape = tuple(shape)
    drawn = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if name.endswith("weight"):
        drawn = drawn / np.float32(np.prod(shape[1:])) ** np.float32(0.5) if len(shape) > 1 else 1 + drawn / 8
    elif name.endswith("bias"):
        drawn = drawn / 8
    return torch.from_numpy(drawn)


def state_of(shapes: Mapping[str, Iterable[int]], kind: str) -> dict[str, Tensor]:
    """Return the weights of a tiny model. kind: of `KINDS`, or "vae"; shapes: of its names."""
    return {name: numbers(f"{kind} {name}", shape) for name, shape in shapes.items()}


def fingerprint(shapes: Mapping[str, Iterable[int]]) -> str:
    """Return a hash of names and shapes."""
    lines = sorted(f"{name} {list(shape)}" for name, shape in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def inputs_of(kind: str, frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH) -> dict[str, Tensor]:
    """Return the inputs of a tiny model: latents `[B, T, C, h, w]`, text, image latents and timesteps."""
    size = (2, frames, CHANNELS, height, width)
    return {
        "x": numbers(f"{kind} x", size),
        "text": numbers(f"{kind} text", (2, TEXT_LEN, TEXT_WIDTH)),
        "image": numbers(f"{kind} image", size),
        "timestep": torch.tensor([999.0, 41.0]),
    }


def frames_of(kind: str) -> int:
    """Return the latent frames of a tiny clip: 1.5 takes an even number of them."""
    return FRAMES + FRAMES % 2 if kind.startswith("1.5") else FRAMES


def pixels_of(frames: int) -> Tensor:
    """Return a clip `[1, 3, F, 32, 32]` in [-1, 1]."""
    return numbers("pixels", (1, 3, frames, 32, 32)).clamp(-1, 1)


def picture() -> np.ndarray:
    """Return a picture `[H, W, 3]` uint8 of the size of the tiny models."""
    _, height, width = VIDEO
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("upstream", type=Path, help="a clone of zai-org/CogVideo")
    parser.add_argument("--out", type=Path, default=Path("tests/golden/sat.safetensors"))
    parser.add_argument("--commit", help=argparse.SUPPRESS)  # upstream is then the files of this commit
    args = parser.parse_args()
    if args.commit:
        tensors, facts = golden(args.upstream, args.commit)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, args.out)
        args.out.with_suffix(".json").write_text(json.dumps(facts))
        return
    tensors, facts = {}, {}
    for commit in (OLD, NEW):
        with tempfile.TemporaryDirectory() as folder:
            archive, part = Path(folder, "a.tar"), Path(folder, "part.safetensors")
            subprocess.run(["git", "-C", args.upstream, "archive", "-o", archive, commit, "sat"], check=True)
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")
            own = [sys.executable, __file__, folder, "--commit", commit, "--out", part]
            subprocess.run(own, check=True, stdout=subprocess.DEVNULL)
            tensors |= load_file(part)
            for name, value in json.loads(part.with_suffix(".json").read_text()).items():
                facts[name] = {**facts.get(name, {}), **value}
    versions = {"torch": torch.__version__, "numpy": np.__version__}
    facts |= {"upstream": "zai-org/CogVideo", "commits": [OLD, NEW], "versions": versions}
    facts["command"] = "python scripts/sat_golden.py UPSTREAM"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, args.out, metadata={"facts": json.dumps(facts)})
    print(f"{args.out}: {len(tensors)} tensors, {args.out.stat().st_size} bytes")


@torch.no_grad()
def golden(root: Path, commit: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Run upstream's files at one commit: tensors by name, and the names and shapes of its weights."""
    prepare_imports(root)
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {"shapes": {}, "full": {}}
    for kind, (its_commit, config) in KINDS.items():
        if its_commit != commit:
            continue
        full = shapes_of(full_network(root, config))
        facts["full"][kind] = fingerprint({n: shape for n, shape in full.items() if not _unused(n, kind)})
        engine, shapes = tiny_engine(root, kind, config)
        facts["shapes"][kind] = shapes
        network, given = engine.model.diffusion_model, inputs_of(kind, frames_of(kind))
        tensors[f"{kind}.forward"] = forward(network, kind, given)
        for sampler in ("dpm", "ddim"):
            tensors[f"{kind}.{sampler}"] = trajectory(root, kind, config, sampler, STEPS)
        if kind == "2b":
            tensors["2b.dpm.7"] = trajectory(root, kind, config, "dpm", 7)
        if kind == "5b-i2v":
            tensors["5b-i2v.short"] = forward(network, kind, inputs_of(kind, 2))
        for count in COUNTS:
            root_levels, steps = engine.sampler.discretization(
                count, device="cpu", return_idx=True, do_append_zero=False
            )
            tensors[f"{kind}.levels.{count}"] = root_levels
            tensors[f"{kind}.timesteps.{count}"] = torch.tensor(list(steps)).flip(0)
    if commit == NEW:
        for kind in ("2b", "5b"):  # the newer code runs 1.0 too, and at any size
            engine, _ = tiny_engine(root, kind, KINDS[kind][1], patch=[1, 2, 2])
            tensors[f"{kind}.cut"] = forward(engine.model.diffusion_model, kind, inputs_of(kind, *CUT))
        tensors["1.5-5b-i2v.video"] = image_to_video(root)
    else:
        vae, shapes = tiny_vae(root, KINDS["2b"][1])
        facts["shapes"]["vae"] = shapes
        facts["full"]["vae"] = fingerprint(shapes_of(first_stage(read_config(root, KINDS["2b"][1]))))
        for frames in (1, 9, 17):
            tensors[f"vae.encode.{frames}"] = vae.encoder(pixels_of(frames))
        z = numbers("z", (1, CHANNELS, 5, 2, 2))
        decoded = [vae.decode(z[:, :, a:b], clear_fake_cp_cache=b == 5) for a, b in ((0, 3), (3, 5))]
        tensors["vae.decode.5"] = torch.cat(decoded, dim=2)
    return tensors, facts


def forward(network: nn.Module, kind: str, given: dict[str, Tensor]) -> Tensor:
    x = torch.cat([given["x"], given["image"]], dim=2) if kind.endswith("i2v") else given["x"]
    more = {"ofs": torch.tensor([2.0])} if kind == "1.5-5b-i2v" else {}
    return network(x, timesteps=given["timestep"], context=given["text"], **more)


def trajectory(root: Path, kind: str, config: str, sampler: str, steps: int) -> Tensor:
    """Sample one video from `SEED`, with zeros for the unconditional text."""
    engine, _ = tiny_engine(root, kind, config, sampler=sampler, steps=steps)
    given = inputs_of(kind, frames_of(kind))
    return sample(engine, kind, given["text"][:1], given["image"][:1])


def sample(engine: Any, kind: str, text: Tensor, image: Tensor, seed: int | None = SEED) -> Tensor:
    cond, uncond = {"crossattn": text}, {"crossattn": torch.zeros_like(text)}
    if kind.endswith("i2v"):
        cond["concat"] = uncond["concat"] = image
    if seed is not None:
        torch.manual_seed(seed)
    more = {"ofs": torch.tensor([2.0])} if kind == "1.5-5b-i2v" else {}
    return engine.sample(cond, uc=uncond, batch_size=1, shape=(frames_of(kind), CHANNELS, HEIGHT, WIDTH), **more)


def image_to_video(root: Path) -> Tensor:
    """Make the latents of a video from a picture, in the order of upstream's script: encode, unscale, pad, sample."""
    kind = "1.5-5b-i2v"
    engine, _ = tiny_engine(root, kind, KINDS[kind][1])
    engine.first_stage_model, _ = tiny_vae(root, KINDS[kind][1])
    torch.manual_seed(SEED)
    pixels = torch.from_numpy(picture()).permute(2, 0, 1).float()[None, :, None] / 255 * 2 - 1
    image = engine.encode_first_stage(pixels, None) / engine.scale_factor
    image = image.permute(0, 2, 1, 3, 4)
    image = torch.cat([image, torch.zeros(1, frames_of(kind) - 1, CHANNELS, HEIGHT, WIDTH)], dim=1)
    return sample(engine, kind, inputs_of(kind)["text"][:1], image, seed=None)[:, 1:]


def read_config(root: Path, config: str) -> Any:
    return importlib.import_module("omegaconf").OmegaConf.load(root / "sat" / "configs" / f"{config}.yaml").model


def full_network(root: Path, config: str) -> nn.Module:
    """Build a network at its full width, with one layer: the others have the same names."""
    network = read_config(root, config).network_config
    network.params.num_layers = 1
    return importlib.import_module("sgm.util").instantiate_from_config(network)


def first_stage(model: Any) -> nn.Module:
    config = model.first_stage_config
    config.params.pop("ckpt_path")
    return importlib.import_module("sgm.util").instantiate_from_config(config)


def tiny_vae(root: Path, config: str) -> tuple[Any, dict[str, list[int]]]:
    model = read_config(root, config)
    for part in ("encoder_config", "decoder_config"):
        model.first_stage_config.params[part].params.update(VAE)
    vae = first_stage(model).eval()
    return vae, fill(vae, "vae")


def tiny_engine(
    root: Path,
    kind: str,
    config: str,
    *,
    sampler: str = "dpm",
    steps: int = STEPS,
    patch: list[int] | None = None,
) -> tuple[Any, dict[str, list[int]]]:
    """Build upstream's engine of its own config, tiny, without text encoder and VAE; and its weights' shapes."""
    model = read_config(root, config)
    network = model.network_config.params
    network.update({**NETWORK, "in_channels": CHANNELS * (2 if kind.endswith("i2v") else 1)})
    if patch is not None:  # the newer code on a config of 1.0, whose form it no longer takes
        network.patch_size = patch
        for name in ("height_interpolation", "width_interpolation"):
            network[name] = network.modules.pos_embed_config.params.pop(name, 1.0)
    network.transformer_args.checkpoint_activations = False
    network.modules.pos_embed_config.params.text_length = TEXT_LEN
    network.modules.patch_embed_config.params.text_hidden_size = TEXT_WIDTH
    if "hidden_size_head" in network.modules.pos_embed_config.params:
        network.modules.pos_embed_config.params.hidden_size_head = 32
    if kind == "1.5-5b-i2v":
        network.ofs_embed_dim = 24
    sampling = model.sampler_config
    sampling.params.update({"num_steps": steps, "verbose": False, "device": "cpu"})
    sampling.params.guider_config.params.update({"scale": SCALE, "num_steps": steps})
    if sampler == "ddim":
        modules = "sgm.modules.diffusionmodules"
        sampling.target = f"{modules}.sampling.VideoDDIMSampler"
        guider = {"target": f"{modules}.guiders.VanillaCFG", "params": {"scale": SCALE}}
        sampling.params.guider_config = guider
    model.pop("conditioner_config")
    model.pop("loss_fn_config")
    model.first_stage_config = {"target": "torch.nn.Identity"}
    args = types.SimpleNamespace(model_config=model, fp16=False, bf16=False, device="cpu")
    engine = importlib.import_module("diffusion_video").SATVideoDiffusionEngine(args).eval()
    return engine, fill(engine.model.diffusion_model, kind)


def fill(module: nn.Module, kind: str) -> dict[str, list[int]]:
    """Give a module the weights of its names; the table of 2B, which is computed, keeps its values."""
    state = module.state_dict()
    shapes = shapes_of(module)
    own = {**state_of(shapes, kind), **{name: state[name] for name in state if _computed(name, kind)}}
    module.load_state_dict(own, strict=True)
    return shapes


def shapes_of(module: nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


def _unused(name: str, kind: str) -> bool:
    """Say whether a tensor is no weight of the model: a table that is computed, or embeddings that nothing reads."""
    return _computed(name, kind) or name.endswith("_embeddings.weight")


def _computed(name: str, kind: str) -> bool:
    return name.endswith(("freqs_sin", "freqs_cos")) or (kind == "2b" and name.endswith("pos_embedding"))


# Imported by upstream and not used on the way to a sample.
_ABSENT = ("pytorch_lightning", "kornia", "wandb", "decord", "torchvision", "fsspec", "beartype",
           "webdataset", "imageio", "tensorboardX", "datasets", "boto3", "modules")  # fmt: skip


class _StandIn(types.ModuleType):
    __path__: typing.ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        plain = {"LightningModule": nn.Module, "beartype": lambda function: function}
        return plain.get(name) or getattr(typing, name, type(name, (), {}))


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:  # noqa: ARG002
        if fullname.split(".")[0] in _ABSENT or fullname.startswith("sat.data_utils"):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def prepare_imports(root: Path) -> None:
    """Make upstream importable in this process, on a CPU and as a single process."""
    transformers = importlib.import_module("transformers")  # before the stand-ins, whose absence it looks for
    _ = transformers.T5EncoderModel, transformers.T5Tokenizer
    sys.meta_path.insert(0, _Finder())
    sys.path.insert(0, str(root / "sat"))
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    importlib.import_module("sat.mpu").initialize_model_parallel(1)
    for util in ("sgm.util", "vae_modules.utils"):
        importlib.import_module(util).initialize_context_parallel(1)


if __name__ == "__main__":
    main()
