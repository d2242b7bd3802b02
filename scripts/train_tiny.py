"""Train the shipped packs from scratch: a VAE, then transformers with a T5, for image- and text-to-video.

    python scripts/train_tiny.py                            # every stage in order; the packs are written under --out
    python scripts/train_tiny.py --stage vae --minutes 40

The stages:

- vae: single images, then crops of videos, then whole videos;
- latents: encode videos and single images once, for all that follows;
- i2v: a transformer and its T5, on scenes of one shape and of two, many of one colour;
- t2v: goes on from i2v's weights without image latents, on scenes of one shape, the only ones that words describe;
  first on single images, which show outlines as well as videos do and take a third of the time;
- export: both packs in the official layout.

Everything is cogvid's own modules on the world of `tiny_world.py`, drawn on the fly; no data set is needed. A stage
writes its checkpoint under `--out` every two minutes and goes on from it when started again. Learning rates follow
the share of the stage that is done: steps over the stage's steps, or, with `--minutes`, time over that time.

On a CPU, one thread per training and allocations that are kept (MALLOC_MMAP_THRESHOLD_=4294967296
MALLOC_TRIM_THRESHOLD_=8589934592) are fastest.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from cogvid.config import CONFIGS, TransformerConfig
from cogvid.models.text import Tokenizer
from cogvid.models.transformer import Transformer
from cogvid.models.vae import VAE
from cogvid.ops import BlockContext, Ops
from cogvid.sampling.schedule import add_noise, make_schedule, velocity
from cogvid.weights.hub import BASENAME
from cogvid.weights.load import save_transformer, save_vae
from tiny_world import SHAPES, Scenes, corpus, positions, prompt_for, render, sample_scenes

MODEL = CONFIGS["tiny-i2v"]
SIZE, FRAMES, TEXT_LEN = MODEL.height, MODEL.num_frames, MODEL.transformer.max_text_seq_length
SAVE_SECONDS = 120

VAE_PHASES = ((0.2, "images"), (0.6, "crops"), (1.0, "videos"))  # until which share of the stage
VAE_BATCH = {"images": 32, "crops": 16, "videos": 4}
KL_WEIGHT = 2e-3
VAE_ADAM_ONLY = ("conv_in", "encoder.conv_out", "decoder.conv_out", "scale", "shift")
LATENT_NOISE = 0.1  # of the latents' size: the decoder must tolerate a transformer's errors

T5_CONFIG = {
    "d_model": MODEL.transformer.text_embed_dim,
    "d_kv": 16,
    "num_heads": 4,
    "num_layers": 2,
    "d_ff": 128,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
    "is_encoder_decoder": False,
    "use_cache": False,
}
LATENT_SETS: dict[str, tuple[int, int, int, dict[str, Any]]] = {  # how many, seed, frames, kind of scenes
    "singles": (10000, 2, FRAMES, {"two": 0.0}),
    "pairs": (16000, 5, FRAMES, {"two": 1.0, "alike": 0.5}),
    "images": (47600, 6, 1, {"two": 0.0}),
}
TASK_SETS = {"i2v": ("singles", "pairs"), "t2v": ("singles",)}
STEPS = {"vae": 2400, "i2v": 16000, "t2v": 6000}
DIFFUSERS_VERSION = {"_diffusers_version": "0.42.1"}
BATCH = 32
TEXT_DROP = 0.1
IMAGE_BATCH = 128
AUX_WEIGHT = 6.0
IMAGES_ONLY = 0.25  # until this share of t2v it learns single images, three times as many in the same time

Model = TypeVar("Model", bound=nn.Module)


class Trainer:
    """Two optimizers, a warm-up and cosine schedule, an average of the weights, and checkpoints, for one stage."""

    def __init__(
        self,
        name: str,
        model: nn.Module,
        args: argparse.Namespace,
        *,
        steps: int,
        muon_lr: float,
        adam_lr: float,
        adam_only: tuple[str, ...],
    ) -> None:
        self.model, self.args, self.steps, self.name = model, args, steps, name
        self.path = args.out / f"{name}.pt"
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        is_matrix = lambda n, p: p.ndim >= 2 and not any(part in n for part in adam_only)  # noqa: E731
        self.matrices = [p for n, p in named if is_matrix(n, p)]
        others = [p for n, p in named if not is_matrix(n, p)]
        # Muon takes matrices only. These are the same memory; a convolution counts as [out, in * kernel].
        self.flat = [nn.Parameter(p.detach().view(len(p), -1)) for p in self.matrices]
        self.optimizers = [
            torch.optim.Muon(self.flat, lr=muon_lr, momentum=0.95, nesterov=True, weight_decay=0.0),
            torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
        ]
        self.base_lrs = [muon_lr, adam_lr]
        self.params = [p for _, p in named]
        self.average = [p.detach().clone() for p in self.params]
        self.step_count, self.seconds, self.losses = 0, 0.0, {}
        if self.path.exists():
            state = torch.load(self.path, map_location=args.device)
            model.load_state_dict(state["model"])
            self.average = state["average"]
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.step_count, self.seconds = state["step"], state["seconds"]

    @property
    def progress(self) -> float:
        if self.args.minutes is not None:
            return self.seconds / (60 * self.args.minutes)
        return self.step_count / self.steps

    def run(self) -> Iterator[float]:
        """Yield the progress of each step; the caller gives its loss to `backward`."""
        bar = tqdm(initial=self.step_count, unit="step", desc=self.name, mininterval=10)
        saved = time.monotonic()
        while self.progress < 1:
            began = time.monotonic()
            yield self.progress
            self.seconds += time.monotonic() - began
            self.step_count += 1
            bar.update()
            if self.step_count % 25 == 0:
                bar.set_postfix_str(f"{self.progress:.0%} " + " ".join(f"{k} {v:.4f}" for k, v in self.losses.items()))
            if time.monotonic() - saved > SAVE_SECONDS:
                self.save()
                saved = time.monotonic()
        self.save()
        bar.close()

    def backward(self, loss: Tensor, **report: float) -> None:
        done = min(self.progress, 1.0)
        scale = min(1.0, (self.step_count + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * done)) + 1e-3
        loss.backward()
        nn.utils.clip_grad_norm_(self.params, 1.0)
        for flat, p in zip(self.flat, self.matrices, strict=True):
            flat.grad = None if p.grad is None else p.grad.reshape_as(flat)
        for optimizer, lr in zip(self.optimizers, self.base_lrs, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * scale
            optimizer.step()
        self.model.zero_grad()
        decay = min(0.998, 1 - 1 / (1 + self.step_count * 0.1))
        for average, p in zip(self.average, self.params, strict=True):
            average.lerp_(p.detach(), 1 - decay)
        for name, value in {"loss": loss.item(), **report}.items():
            self.losses[name] = value + 0.98 * (self.losses.get(name, value) - value)

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizers": [o.state_dict() for o in self.optimizers],
            "step": self.step_count,
            "seconds": self.seconds,
            "losses": self.losses,
        }
        temporary = self.path.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self.path)


def load_average(name: str, model: Model, args: argparse.Namespace) -> Model:
    """Fill `model` with the averaged weights that stage `name` left."""
    state = torch.load(args.out / f"{name}.pt", map_location=args.device)
    model.load_state_dict(state["model"])
    with torch.no_grad():
        for p, average in zip([p for p in model.parameters() if p.requires_grad], state["average"], strict=True):
            p.copy_(average)
    return model


def reconstruction_loss(out: Tensor, target: Tensor) -> Tensor:
    """L1 and squared error, with a higher weight at edges: they are few pixels but matter most to the eye."""
    target = target.float()
    edge = F.pad((target[..., 1:] - target[..., :-1]).abs(), (0, 1)) + F.pad(
        (target[..., 1:, :] - target[..., :-1, :]).abs(), (0, 0, 0, 1)
    )
    edge = F.max_pool2d(edge.amax(1), 3, stride=1, padding=1).clamp(max=1)[:, None]
    error = out.float() - target
    return ((1 + 4 * edge) * (error.abs() + 4 * error.square())).mean()


def draw_for_vae(kind: str, generator: torch.Generator) -> Tensor:
    """Draw `[B, 3, F, H, W]`: single frames, 9-frame crops of 32 pixels around the moving shape, or whole videos."""
    scenes = sample_scenes(VAE_BATCH[kind], generator)
    if kind == "images":
        frame = torch.randint(FRAMES, (1,), generator=generator)
        return render(scenes, FRAMES, SIZE, frame)
    if kind == "videos":
        return render(scenes, FRAMES, SIZE)
    start, half = torch.randint(9, (1,), generator=generator), SIZE // 2
    videos = render(scenes, FRAMES, SIZE, start + torch.arange(9))
    corner = scenes.centre[:, 0] * SIZE - half / 2 + (torch.rand(len(scenes), 2, generator=generator) - 0.5) * half
    corner = corner.round().long().clamp(0, SIZE - half)
    crops = [v[..., y : y + half, x : x + half] for v, (x, y) in zip(videos, corner.tolist(), strict=True)]
    return torch.stack(crops)


def train_vae(args: argparse.Namespace) -> None:
    """Train the VAE on single images, then crops of videos, then whole videos."""
    torch.manual_seed(0)
    vae = VAE(MODEL.vae).to(args.device)
    trainer = Trainer("vae", vae, args, steps=STEPS["vae"], muon_lr=0.02, adam_lr=3e-3, adam_only=VAE_ADAM_ONLY)
    generator = torch.Generator().manual_seed(1 + trainer.step_count)
    for progress in trainer.run():
        kind = next(kind for until, kind in VAE_PHASES if progress < until)
        video = draw_for_vae(kind, generator).to(args.device, torch.bfloat16)
        with torch.autocast(args.device, dtype=torch.bfloat16):
            posterior = vae.encode(video)
            mean, std = posterior.mean.float(), posterior.std.float()
            size = mean.detach().std()
            z = mean + std.clamp(min=LATENT_NOISE * size) * torch.randn_like(mean)
            out = vae.decode(z.bfloat16())
        kl = 0.5 * (mean.square() + std.square() - 1 - posterior.logvar.float()).mean()
        loss = reconstruction_loss(out, video)
        mse = F.mse_loss(out.float(), video.float()).item() / 4
        trainer.backward(
            loss + KL_WEIGHT * kl, psnr=-10 * math.log10(mse), kl=kl.item(), std=std.mean().item(), size=size.item()
        )


def tokenizer_for(args: argparse.Namespace) -> Tokenizer:
    """Return the tokenizer; train its sentencepiece model, with one piece for each word, unless it is there."""
    path = args.out / "spiece.model"
    if not path.exists():
        from sentencepiece import SentencePieceTrainer

        words = sorted({word for sentence in corpus() for word in sentence.split()} | {"a"})
        words += [word.capitalize() for word in words] + [word + "." for word in words]
        letters = [chr(c) for c in range(33, 127)]
        SentencePieceTrainer.train(
            sentence_iterator=iter([w for w in words for _ in range(50)] + letters),
            model_prefix=str(path.with_suffix("")),
            vocab_size=1000,
            hard_vocab_limit=False,
            normalization_rule_name="identity",  # 3 KB against 243 KB
            character_coverage=1.0,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
        path.with_suffix(".vocab").unlink()
    return Tokenizer(path, extra_ids=0)


def attention(q: Tensor, k: Tensor, v: Tensor, _context: BlockContext) -> Tensor:
    """Compute `AttentionOp` in two products; with 96 tokens this trains five times as fast as the fused one."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1)
    return (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)


def layer_norm_modulate(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, scale: Tensor, *, text_len: int, eps: float
) -> Tensor:
    """Compute `LayerNormModulateOp` for the whole batch at once; the reference goes through it sample by sample."""
    normed = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    text = torch.addcmul(shift[:, :1], normed[:, :text_len], 1 + scale[:, :1])
    video = torch.addcmul(shift[:, 1:], normed[:, text_len:], 1 + scale[:, 1:])
    return torch.cat([text, video], dim=1)


def gate_residual_norm_modulate(
    x: Tensor, y: Tensor, gate: Tensor, *args: Tensor, text_len: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Compute `GateResidualNormModulateOp` with the norm above."""
    x = Ops.torch().gate_residual(x, y, gate, text_len=text_len)
    return x, layer_norm_modulate(x, *args, text_len=text_len, eps=eps)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute `LinearGeluOp` with the exact GELU, which is faster on a CPU; the two differ by less than 5e-4."""
    return F.gelu(F.linear(x, weight, bias))


TRAINING_OPS = dataclasses.replace(
    Ops.torch(),
    attention=attention,
    linear_gelu=linear_gelu,
    layer_norm_modulate=layer_norm_modulate,
    gate_residual_norm_modulate=gate_residual_norm_modulate,
)


class Denoiser(nn.Module):
    """A transformer, the T5 that is trained with it, and an auxiliary head that only training uses.

    The head reads the video tokens after the middle block. For each token it predicts which outlines the token touches,
    and whether it touches the shape that the prompt names. Outlines change few pixels, so that the velocity's error
    alone teaches their words last.
    """

    def __init__(self, config: TransformerConfig, vocab_size: int) -> None:
        from transformers import T5Config, T5EncoderModel

        super().__init__()
        self.transformer = Transformer(config, TRAINING_OPS)
        self.text_encoder = T5EncoderModel(T5Config(vocab_size=vocab_size, **T5_CONFIG))
        self.aux_head = nn.Linear(config.hidden_size, len(SHAPES) + 1)
        for name, parameter in self.transformer.named_parameters():
            if "modulation" in name or "proj_out" in name:
                nn.init.zeros_(parameter)

    def forward(self, latents: Tensor, ids: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Predict the velocity `[B, 16, T, h, w]`, and logits `[B, tokens, 4]` of `aux_targets`."""
        text = self.text_encoder(ids).last_hidden_state.to(latents.dtype)
        kept: list[Tensor] = []
        middle = self.transformer.blocks[len(self.transformer.blocks) // 2 - 1]
        hook = middle.register_forward_hook(lambda *called: kept.append(called[2]))
        v = self.transformer(latents, text, timestep)
        hook.remove()
        return v.float(), self.aux_head(kept[0][:, text.shape[1] :]).float()


@dataclasses.dataclass
class LatentSet:
    """Encoded videos: what they show, and their latents in units of their deviation."""

    scenes: Scenes
    video: Tensor  # [n, 16, T, h, w] fp16, posterior means
    image_mean: Tensor  # [n, 16, 1, h, w] fp16, of the first frame encoded alone, as the pipeline does
    image_std: Tensor
    scaling_factor: float

    def prompts(self, index: Tensor, rng: random.Random) -> list[str]:
        """Return a prompt for each video: a random paraphrase, or with probability `TEXT_DROP` the empty prompt."""
        return ["" if rng.random() < TEXT_DROP else prompt_for(self.scenes, i, rng) for i in index.tolist()]


@torch.no_grad()
def encode_latents(args: argparse.Namespace) -> None:
    """Draw and encode the videos and single images that the transformers are trained on, unless they are there."""
    vae = load_average("vae", VAE(MODEL.vae), args).to(args.device).bfloat16().eval()
    for name, (count, seed, frames, kinds) in LATENT_SETS.items():
        path = args.out / f"{name}.pt"
        if path.exists():
            continue
        generator = torch.Generator().manual_seed(seed)
        parts: list[tuple[Scenes, Tensor, Tensor, Tensor]] = []
        batch = min(count, 680 // frames)
        for _ in tqdm(range(count // batch), unit_scale=batch, unit="video", desc=name, mininterval=10):
            scenes = sample_scenes(batch, generator, **kinds)
            pixels = render(scenes, FRAMES, SIZE, torch.arange(frames)).to(args.device, torch.bfloat16)
            image = vae.encode(pixels[:, :, :1])
            video = vae.encode(pixels).mean if frames > 1 else image.mean
            parts.append((scenes, video.cpu(), image.mean.cpu(), image.std.cpu()))
        scenes, *latents = zip(*parts, strict=True)
        video, image_mean, image_std = (torch.cat(part).half() for part in latents)
        factor = 1 / video.float().std().item()
        deviation = image_std.float().mean().item() * factor
        print(f"{name}: {len(video)}, scaling factor {factor:.4f}, posterior deviation {deviation:.4f} of the latents'")
        saved = {"video": video, "image_mean": image_mean, "image_std": image_std, "factor": factor}
        torch.save({"scenes": vars(Scenes.cat(list(scenes))), **saved}, path)


def load_latents(args: argparse.Namespace, *names: str) -> LatentSet:
    """Read sets of latents as one, in units of the deviation of the single shapes'."""
    factor = torch.load(args.out / "singles.pt", mmap=True)["factor"]
    sets = [torch.load(args.out / f"{name}.pt") for name in names]
    scaled = [torch.cat([s[key] for s in sets]) * factor for key in ("video", "image_mean", "image_std")]
    return LatentSet(Scenes.cat([Scenes(**s["scenes"]) for s in sets]), *scaled, scaling_factor=factor)


def image_channels(data: LatentSet, index: Tensor, generator: torch.Generator) -> Tensor:
    """Return the image latents `[B, 16, T, h, w]` as the pipeline does: sampled, and zeros after the first frame."""
    mean, std = data.image_mean[index].float(), data.image_std[index].float()
    image = mean + std * torch.randn(mean.shape, generator=generator)
    return F.pad(image, (0, 0, 0, 0, 0, data.video.shape[2] - 1))


def touched(scenes: Scenes, count: int, side: int) -> Tensor:
    """Return which cells of a grid each shape's bounding box meets: `[B, count, 2, side, side]` of 0, 1."""
    centre, radius = positions(scenes, torch.linspace(0, 1, count))
    cells = (torch.arange(side) + 0.5) / side
    dx, dy = ((centre[..., i, None, None] - grid).abs() for i, grid in enumerate((cells, cells[:, None])))
    near = torch.maximum(dx, dy) < radius[..., None, None] + 0.5 / side
    near[:, :, 1] &= scenes.two[:, None, None, None]
    return near.float()


def aux_targets(scenes: Scenes, count: int, side: int) -> Tensor:
    """Return what each token touches, `[B, tokens, 4]` of 0 and 1: circle, square, triangle, the named shape."""
    near = touched(scenes, count, side)
    outlines = torch.einsum("btshw,bsc->bthwc", near, F.one_hot(scenes.shape, len(SHAPES)).float()).clamp(max=1)
    return torch.cat([outlines, near[:, :, 0, ..., None]], -1).flatten(1, 3)


def draw_times(count: int, generator: torch.Generator, *, middle: bool) -> Tensor:
    """Draw `[count]` times in random order, evenly spread or, with `middle`, logit-normal.

    Outlines are decided at middle times, where text-to-video has most to learn.
    """
    t = (torch.randperm(count, generator=generator) + torch.rand(1, generator=generator)) / count
    return ((torch.special.ndtri(t).sigmoid() if middle else t) * 1000).long().clamp(max=999)


def train_denoiser(args: argparse.Namespace, task: str) -> None:
    """Train transformer and T5 to predict velocities from words and an image ("i2v") or words alone ("t2v")."""
    torch.manual_seed(0)
    tokenizer = tokenizer_for(args)
    videos = load_latents(args, *TASK_SETS[task])
    images = load_latents(args, "images") if task == "t2v" else None
    model = Denoiser(CONFIGS[f"tiny-{task}"].transformer, tokenizer.vocab_size)
    if task == "t2v":
        state = load_average("i2v", Denoiser(MODEL.transformer, tokenizer.vocab_size), args).state_dict()
        name, width = "transformer.patch_proj.weight", model.transformer.patch_proj.in_features
        model.load_state_dict(state | {name: state[name][:, :width]})  # without the columns that see image latents
    trainer = Trainer(
        task,
        model.to(args.device),
        args,
        steps=STEPS[task],
        muon_lr=0.02,
        adam_lr=1.5e-3,
        adam_only=("text_encoder", "modulation", "patch_proj", "text_proj", "time_embed", "proj_out", "aux_head"),
    )
    generator = torch.Generator().manual_seed(3 + trainer.step_count)
    rng = random.Random(3 + trainer.step_count)
    schedule = make_schedule(MODEL.schedule, 50)
    usual = torch.ones(20)  # running mean of the error in twenty ranges of time
    for progress in trainer.run():
        data, count = videos, BATCH
        if images is not None and (progress < IMAGES_ONLY or trainer.step_count % 4 == 0):
            data, count = images, IMAGE_BATCH
        index = torch.randint(len(data.video), (count,), generator=generator)
        x0 = data.video[index].float()
        noise = torch.randn(x0.shape, generator=generator)
        t = draw_times(count, generator, middle=task == "t2v")
        latents = add_noise(x0, noise, t, schedule)
        if task == "i2v":
            latents = torch.cat([latents, image_channels(data, index, generator)], dim=1)
        ids = tokenizer.encode(data.prompts(index, rng), TEXT_LEN)
        with torch.autocast(args.device, dtype=torch.bfloat16):
            v, aux_logits = model(latents.to(args.device), ids.to(args.device), t.to(args.device))
        target = velocity(x0, noise, t, schedule).to(args.device)
        scenes, frames, side = data.scenes[index], x0.shape[2], x0.shape[3]
        error = (v - target).square()
        if task == "i2v":
            # Shapes count more than the background. Not in t2v: there the input does not say where the shapes are, and
            # a weight that depends on it would bias the prediction.
            error = error * (1 + 2 * touched(scenes, frames, side).amax(2)[:, None].to(args.device))
        error = error.mean((1, 2, 3, 4))
        # Each range of times has the same weight, whatever its usual error (https://arxiv.org/abs/2312.02696)
        bins = t * len(usual) // 1000
        total, hits = (torch.bincount(bins, w, len(usual)) for w in (error.detach().cpu(), None))
        usual = torch.where(hits > 0, usual.lerp(total / hits, 0.05), usual)
        targets = aux_targets(scenes, frames, side // MODEL.transformer.patch_size).to(args.device)
        weight = 0.1 + targets[..., :3].amax(-1, keepdim=True)  # most tokens touch nothing, which is learned soon
        aux_loss = F.binary_cross_entropy_with_logits(aux_logits, targets, weight=weight)
        loss = (error / usual[bins].to(args.device)).mean() + AUX_WEIGHT * aux_loss
        trainer.backward(loss, error=error.mean().item(), aux_loss=aux_loss.item())


def export(args: argparse.Namespace) -> None:
    """Write tiny-i2v and tiny-t2v in the official layout."""
    tokenizer, data = tokenizer_for(args), load_latents(args, "singles")
    vae = load_average("vae", VAE(dataclasses.replace(MODEL.vae, scaling_factor=data.scaling_factor)), args)
    for task in ("i2v", "t2v"):
        config = CONFIGS[f"tiny-{task}"].transformer
        model = load_average(task, Denoiser(config, tokenizer.vocab_size), args)
        pack = args.out / f"tiny-{task}"
        shutil.rmtree(pack, ignore_errors=True)
        save_transformer(model.transformer, pack / "transformer", torch.float16)
        save_vae(vae, pack / "vae", torch.float16)
        if task == "t2v":  # a link to the same weights: diffusers takes none by a name in another folder
            weights = pack / "vae" / f"{BASENAME}.safetensors"
            weights.unlink()
            weights.symlink_to(Path("../../tiny-i2v/vae") / weights.name)
        save_text_encoder(model.text_encoder, pack / "text_encoder")
        save_tokenizer(args.out / "spiece.model", pack / "tokenizer")
        scheduler = {"_class_name": "CogVideoXDPMScheduler", **DIFFUSERS_VERSION, **MODEL.schedule.to_dict()}
        write_json(pack / "scheduler" / "scheduler_config.json", scheduler)
        index: dict[str, Any] = {
            "_class_name": "CogVideoXImageToVideoPipeline" if task == "i2v" else "CogVideoXPipeline",
            **DIFFUSERS_VERSION,
            "scheduler": ["diffusers", "CogVideoXDPMScheduler"],
            "text_encoder": ["transformers", "T5EncoderModel"],
            "tokenizer": ["transformers", "T5Tokenizer"],
            "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
            "vae": ["diffusers", "AutoencoderKLCogVideoX"],
        }
        write_json(pack / "model_index.json", index)
        size = sum(f.stat().st_size for f in pack.rglob("*") if f.is_file())
        print(f"{pack}: {size / 1e6:.2f} MB")


def save_text_encoder(model: Any, directory: Path) -> None:
    model.half().save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    config.pop("_name_or_path", None)
    write_json(directory / "config.json", config)


def save_tokenizer(spiece: Path, directory: Path) -> None:
    """Write what transformers reads, with the pieces given one by one, and `spiece.model` itself beside it."""
    from sentencepiece import SentencePieceProcessor
    from transformers import T5Tokenizer

    pieces = SentencePieceProcessor(model_file=str(spiece))
    vocab = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.get_piece_size())]
    T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=TEXT_LEN).save_pretrained(directory)
    shutil.copy(spiece, directory / "spiece.model")


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n")


STAGES = {
    "vae": train_vae,
    "latents": encode_latents,
    "i2v": lambda args: train_denoiser(args, "i2v"),
    "t2v": lambda args: train_denoiser(args, "t2v"),
    "export": export,
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=[*STAGES, "all"], default="all")
    parser.add_argument("--minutes", type=float, help="length of the stage; by default its number of steps")
    parser.add_argument("--out", type=Path, default=Path("runs/tiny"), help="where checkpoints and logs go")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args(argv)
    if args.minutes is not None and not args.minutes > 0:
        parser.error(f"minutes: got {args.minutes:g}, want more than 0")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in STAGES if args.stage == "all" else [args.stage]:
        STAGES[name](args)


if __name__ == "__main__":
    main()
