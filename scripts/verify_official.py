"""Load an official checkpoint here and in diffusers, and compare every module and a short run.

    python scripts/verify_official.py zai-org/CogVideoX-5b          # fetches it once; then --local-files-only will do
    python scripts/verify_official.py ./CogVideoX-5b --parts vae    # a directory: nothing touches the network
    python scripts/verify_official.py tiny-i2v                      # a shipped pack: everything in a minute

Parts: `text` (token ids; T5), `scheduler` (timesteps, noise levels, and 20 steps of both samplers on a made-up
velocity), `vae` (encode and decode), `transformer` (one step), `run` (a short run with guidance: latents and pixels).

fp32 is compared with diffusers in fp32. In bf16 and fp16 both are compared with diffusers in fp32, and the ratio of our
error to theirs is judged: at most 1 means that nothing is lost. Errors are relative RMS, rms(a - b) / rms(b). On a GPU
all is done with both bundles of operations, torch and triton.

Each module is loaded, run and dropped before the next, and T5 is not in memory during the run, so that the peak is one
transformer (22 GB for 5B in fp32), or one T5 (19 GB), beside the pages of its mapped file. The peak that is printed
counts these pages: resident memory on a CPU, allocated GPU memory on a GPU.

By default the size is the model's own up to 256x256 and 17 frames. A model with learned positions (5B-I2V) takes one
size: its transformer is compared at all of its 49 frames, where the table is used, its run at 9.

The last line on stdout is a row for the table of tests/parity/README.md. Exit status: 0; 1 if a bound was exceeded; 2
if nothing could be compared, with one line on stderr.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast

import torch
from torch import Tensor

import measure
import references
from cogvid.config import ModelConfig
from cogvid.options import check_int
from cogvid.run.pipeline import Pipeline
from cogvid.run.settings import check_frames, check_size
from cogvid.sampling.schedule import make_schedule
from cogvid.weights.checkpoint import Checkpoint, load_schedule_config, read_checkpoint
from cogvid.weights.load import load_text_encoder, load_transformer, load_vae
from cogvid.weights.placement import Placement, resolve_device, resolve_ops

PARTS = ("text", "scheduler", "vae", "transformer", "run")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PROMPT = "A panda, dressed in a small red jacket, plays a miniature guitar in a bamboo forest."
PROMPTS = (
    PROMPT,
    "",
    "two\nlines,\ttabs,  spaces and 12,345.6 numbers!",
    "café naïve über straße garçon 中文 ★ 🐼",
    "</s> and <extra_id_0> are tokens",
    "the red circle moves right " * 60,  # too long: cut
)

# Share of token ids that differ, and relative RMS in fp32. Rounding grows with depth (4e-7 after two layers, 2e-6 after
# eight steps of a shipped pack); a wrong constant gives 1e-3 or more. Schedules are computed alike and differ by single
# roundings at most.
MAX_ERROR = {"tokenizer": 0.0, "scheduler": 5e-7, "text": 2e-5, "vae": 2e-5, "transformer": 2e-5, "run": 2e-4}
# Our error over that of diffusers where the arithmetic rounds. One tensor's error scatters by some percent; a run
# amplifies what its first step rounded, in another direction on either side.
MAX_RATIO = {"text": 1.2, "vae": 1.2, "transformer": 1.2, "run": 1.5}

COLUMNS = ("tokenizer", "scheduler", "T5", "VAE encode", "VAE decode", "transformer", "run, latents", "run, pixels")
TABLE_HEAD = (
    measure.markdown_row(["checkpoint", *COLUMNS, "within bounds", "size", "date, machine, versions"]),
    "|---|" + "--:|" * len(COLUMNS) + "---|" * 3,
)
Outputs = dict[str, Tensor]  # by column
Side = Callable[[torch.dtype, str], Outputs]  # (dtype, ops) -> what one library makes of the inputs


@dataclass(frozen=True)
class Finding:
    """One comparison.

    error: ours against diffusers' fp32. theirs: that of diffusers in the same dtype; None in fp32. seconds, gib: of
    ours and of diffusers' load and call.
    """

    part: str
    column: str
    dtype: str
    ops: str
    error: float
    max_abs: float
    theirs: float | None = None
    seconds: tuple[float, float] | None = None
    gib: tuple[float, float] | None = None

    @property
    def ratio(self) -> float | None:
        if self.theirs is None:
            return None
        return self.error / self.theirs if self.theirs else math.inf if self.error else 0.0

    @property
    def bound(self) -> float:
        return (MAX_ERROR if self.theirs is None else MAX_RATIO)[self.part]

    @property
    def passed(self) -> bool:
        judged = self.error if self.ratio is None else self.ratio
        return judged <= self.bound  # False for NaN

    def line(self) -> str:
        low = f"{self.theirs:12.2e}{self.ratio:8.2f}" if self.theirs is not None else " " * 20
        cost = "".join(f"{value:9.1f}" for value in (*(self.seconds or ()), *(self.gib or ())))
        start = f"{self.column:<16}{self.dtype:<6}{self.ops:<8}{self.error:10.2e}{self.max_abs:10.2e}"
        return f"{start}{low}{self.bound:10.1e}  {'ok' if self.passed else 'EXCEEDED':<9}{cost}"


REPORT_HEAD = (
    f"{'what':<16}{'dtype':<6}{'ops':<8}{'error':>10}{'max abs':>10}{'diffusers':>12}{'ratio':>8}{'bound':>10}  "
    f"{'':<9}{'s ours':>9}{'theirs':>9}{'GiB ours':>9}{'theirs':>9}"
)


@dataclass(frozen=True)
class Job:
    """What is compared. height, width, num_frames: of VAE and run; step_frames: of the transformer's one step."""

    command: str
    checkpoint: Checkpoint
    device: torch.device
    dtypes: tuple[str, ...]
    ops: tuple[str, ...]
    steps: int
    size: tuple[int, int]
    run_size: tuple[int, int]
    num_frames: int
    run_frames: int
    step_frames: int

    @property
    def directory(self) -> Path:
        return self.checkpoint.directory

    @property
    def model(self) -> ModelConfig:
        return self.checkpoint.model

    def randn(self, *shape: int, seed: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def latent_shape(self, frames: int, size: tuple[int, int]) -> tuple[int, int, int]:
        """T, h, w of the latents of a video, padding of the 1.5 models included."""
        return self.model.latent_size(*size, frames)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        args = _parse(argv)
        job = _job(args)
        findings = verify(job, args.parts)
    except (ValueError, OSError, ImportError) as error:
        print(f"verify_official: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    passed = all(finding.passed for finding in findings)
    if args.json:
        values = {
            **provenance(job),
            "passed": passed,
            "findings": [
                {**dataclasses.asdict(f), "ratio": f.ratio, "bound": f.bound, "passed": f.passed} for f in findings
            ],
        }
        args.json.write_text(json.dumps(values, indent=2) + "\n")
    print("\n".join(["", *TABLE_HEAD, table_row(job, findings)]))
    return 0 if passed else 1


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="verify_official.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="HUB_ID|DIR", help="a hub id, a directory, or a shipped pack")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--local-files-only", action="store_true", help="take a hub id from the local cache")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=list(DTYPES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps of the run (default: 4)")
    parser.add_argument("--height", type=int, help="pixels")
    parser.add_argument("--width", type=int, help="pixels")
    parser.add_argument("--num-frames", type=int, help="pixel frames: 8N or 8N + 1")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all findings to this file")
    args = parser.parse_args(argv)
    args.command = " ".join(["python scripts/verify_official.py", *(sys.argv[1:] if argv is None else argv)])
    if args.json and not args.json.absolute().parent.is_dir():
        raise ValueError(f"json: got {args.json}, want a file in a directory that exists")
    return args


def _job(args: argparse.Namespace) -> Job:
    """Find the checkpoint and choose the sizes; illegal ones are refused before a weight is read."""
    device = resolve_device(args.device)
    if device.type == "cpu" and "fp16" in args.dtypes:
        raise ValueError("dtypes: got fp16 on a CPU, want fp32 or bf16")
    checkpoint = read_checkpoint(args.model, revision=args.revision, local_files_only=args.local_files_only)
    model = checkpoint.model
    learned = model.transformer.use_learned_positional_embeddings
    stride = model.vae.spatial_compression_ratio
    own = model.transformer.sample_height * stride, model.transformer.sample_width * stride
    size = args.height or min(model.height, 256), args.width or min(model.width, 256)
    run_size = (args.height or own[0], args.width or own[1]) if learned else size
    frames = args.num_frames or (min(model.num_frames, 17) - 1) // 8 * 8 + 1
    check_size(model, *run_size)
    check_frames(model.vae, frames)
    check_int("steps", args.steps, 1, model.schedule.num_train_timesteps)
    return Job(
        args.command,
        checkpoint,
        device,
        dtypes=tuple(dict.fromkeys(args.dtypes)),
        ops=("torch", "triton") if device.type == "cuda" else ("torch",),
        steps=args.steps,
        size=size,
        run_size=run_size,
        num_frames=frames,
        run_frames=args.num_frames or (9 if learned else frames),
        step_frames=args.num_frames or (model.transformer.sample_frames if learned else frames),
    )


@torch.no_grad()
def verify(job: Job, parts: Sequence[str]) -> list[Finding]:
    """Compare the parts; print each finding at once."""
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="prompt .* the last .* not used")  # some are too long on purpose
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    print("\n".join(f"{name}: {value}" for name, value in provenance(job).items()))
    print("\n" + REPORT_HEAD, flush=True)
    findings: list[Finding] = []

    def found(more: list[Finding]) -> None:
        findings.extend(more)
        print("\n".join(finding.line() for finding in more), flush=True)

    embeds = TextInputs(job)
    if "text" in parts:
        found(compare(job, "text", embeds.ours, embeds.theirs))
    if "scheduler" in parts:
        found(compare_schedulers(job))
    if "vae" in parts:
        found(compare(job, "vae", *vae_sides(job)))
    if "transformer" in parts:
        found(compare(job, "transformer", *transformer_sides(job, embeds)))
    if "run" in parts:
        found(compare(job, "run", *run_sides(job, embeds)))
    return findings


class Made(NamedTuple):
    """The outputs of one library, fp32 on the CPU, with time and peak memory."""

    values: Outputs
    seconds: float
    gib: float


def make(job: Job, side: Side, dtype: str, ops: str = "") -> Made:
    gc.collect()
    if job.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(job.device)
    measure.reset_peak()
    start = time.perf_counter()
    values = {name: x.cpu() if name == "tokenizer" else x.float().cpu() for name, x in side(DTYPES[dtype], ops).items()}
    seconds = time.perf_counter() - start
    if job.device.type == "cuda":
        return Made(values, seconds, torch.cuda.max_memory_allocated(job.device) / 2**30)
    return Made(values, seconds, (measure.status_mib("VmHWM") or math.nan) / 1024)


def compare(job: Job, part: str, ours: Side, theirs: Side) -> list[Finding]:
    """Run diffusers in fp32, then both sides in every dtype, one at a time."""
    truth = make(job, theirs, "fp32")
    findings = []
    for dtype in job.dtypes:
        other = truth if dtype == "fp32" else make(job, theirs, dtype)
        for ops in job.ops:
            own = make(job, ours, dtype, ops)
            for column, expected in truth.values.items():
                value = own.values[column]
                if column == "tokenizer":  # the same in every dtype
                    if not findings:
                        wrong = (value != expected).double().mean().item()
                        findings.append(Finding(column, column, "", "", wrong, wrong))
                    continue
                findings.append(
                    Finding(
                        part,
                        column,
                        dtype,
                        ops,
                        measure.rel_rms(value, expected),
                        (value - expected).abs().max().item(),
                        None if other is truth else measure.rel_rms(other.values[column], expected),
                        seconds=(own.seconds, other.seconds),
                        gib=(own.gib, other.gib),
                    )
                )
    return findings


class TextInputs:
    """Both text sides; their embeddings are kept as inputs of transformer and run."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.length = job.model.transformer.max_text_seq_length
        self.made: dict[tuple[str, torch.dtype], Tensor] = {}

    def ours(self, dtype: torch.dtype, ops: str) -> Outputs:
        encoder = load_text_encoder(self.job.directory, device=self.job.device, dtype=dtype, ops=ops)
        embeds = encoder([PROMPT, ""], self.length)
        self.made["ours", dtype] = embeds.float().cpu()
        return {"tokenizer": encoder.tokenizer.encode(list(PROMPTS), self.length), "T5": embeds}

    def theirs(self, dtype: torch.dtype, _: str) -> Outputs:
        from diffusers import CogVideoXPipeline
        from transformers import T5EncoderModel, T5Tokenizer

        tokenizer = T5Tokenizer.from_pretrained(self.job.directory / "tokenizer", local_files_only=True)
        encoder: Any = T5EncoderModel.from_pretrained(
            self.job.directory / "text_encoder", dtype=dtype, local_files_only=True
        )
        absent = cast(Any, None)
        pipe = CogVideoXPipeline(
            tokenizer, encoder.to(self.job.device), vae=absent, transformer=absent, scheduler=absent
        )
        embeds: Any = pipe.encode_prompt(
            [PROMPT, ""], do_classifier_free_guidance=False, max_sequence_length=self.length, dtype=dtype
        )[0]
        ids = tokenizer(
            list(PROMPTS), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        ).input_ids
        self.made["theirs", dtype] = embeds.float().cpu()
        return {"tokenizer": ids, "T5": embeds}

    def embeds(self, side: str, dtype: torch.dtype) -> Tensor:
        """Return `[2, L, E]` of the prompt and of the empty one; random where T5 was not run in that dtype."""
        random = 0.2 * self.job.randn(2, self.length, self.job.model.transformer.text_embed_dim, seed=2)
        made = self.made.get((side, dtype))
        return (random if made is None else made).to(self.job.device, dtype)


def compare_schedulers(job: Job) -> list[Finding]:
    config = load_schedule_config(job.directory)
    findings = []
    for name, kind in references.schedulers().items():
        scheduler: Any = _scheduler(job, kind)
        count = job.model.num_inference_steps
        schedule = make_schedule(config, count)
        scheduler.set_timesteps(count)
        wrong = sum(a != int(b) for a, b in zip(schedule.timesteps, scheduler.timesteps, strict=True)) / count
        levels = schedule.alphas_cumprod, scheduler.alphas_cumprod
        ours, theirs = references.run_samplers(name, config, scheduler)
        for a, b in (levels, (ours, theirs)):
            error, largest = measure.rel_rms(a, b), (a - b).abs().max().item()
            findings.append(Finding("scheduler", "scheduler", "", name, max(error, wrong), largest))
    return findings


def _scheduler(job: Job, kind: Any) -> Any:
    return kind.from_config(kind.load_config(job.directory, subfolder="scheduler", local_files_only=True))


def _theirs(job: Job, kind: Any, component: str, dtype: torch.dtype) -> Any:
    module = kind.from_pretrained(job.directory, subfolder=component, torch_dtype=dtype, local_files_only=True)
    return module.to(job.device).eval()


def vae_sides(job: Job) -> tuple[Side, Side]:
    video = job.randn(1, 3, job.num_frames, *job.size, seed=3).tanh().to(job.device)
    frames, height, width = job.latent_shape(job.num_frames, job.size)
    z = job.randn(1, job.model.vae.latent_channels, frames, height, width, seed=4).to(job.device)

    def ours(dtype: torch.dtype, ops: str) -> Outputs:
        vae = load_vae(job.directory, device=job.device, dtype=dtype, ops=ops)
        posterior = vae.encode(video.to(dtype))
        return {"VAE encode": torch.cat([posterior.mean, posterior.logvar]), "VAE decode": vae.decode(z.to(dtype))}

    def theirs(dtype: torch.dtype, _: str) -> Outputs:
        from diffusers import AutoencoderKLCogVideoX

        vae = _theirs(job, AutoencoderKLCogVideoX, "vae", dtype)
        posterior = vae.encode(video.to(dtype)).latent_dist
        return {
            "VAE encode": torch.cat([posterior.mean, posterior.logvar]),
            "VAE decode": vae.decode(z.to(dtype)).sample,
        }

    return ours, theirs


def transformer_sides(job: Job, text: TextInputs) -> tuple[Side, Side]:
    config = job.model.transformer
    shape = job.latent_shape(job.step_frames, job.run_size)
    latents = job.randn(1, config.in_channels, *shape, seed=1).to(job.device)
    timestep = torch.tensor([500], device=job.device)

    def prompt(dtype: torch.dtype) -> Tensor:  # both sides are given the same
        return text.embeds("theirs", torch.float32)[:1].to(dtype)

    def ours(dtype: torch.dtype, ops: str) -> Outputs:
        model = load_transformer(job.directory, device=job.device, dtype=dtype, ops=ops)
        return {"transformer": model(latents.to(dtype), prompt(dtype), timestep)}

    def theirs(dtype: torch.dtype, _: str) -> Outputs:
        from diffusers import CogVideoXTransformer3DModel

        model = _theirs(job, CogVideoXTransformer3DModel, "transformer", dtype)
        rotary = references.rotary_table(model, latents)
        return {"transformer": references.call_diffusers(model, latents.to(dtype), prompt(dtype), timestep, rotary)}

    return ours, theirs


def run_sides(job: Job, text: TextInputs) -> tuple[Side, Side]:
    """Sides that run a pipeline, each with the embeddings of its own T5, and keep the last latents and the pixels."""
    absent = cast(Any, None)  # of the text parts: their embeddings are given

    def ours(dtype: torch.dtype, ops: str) -> Outputs:
        pipe = Pipeline(
            job.checkpoint,
            Placement(job.device, dtype, *resolve_ops(ops, job.device)),
            transformer=load_transformer(job.directory, device=job.device, dtype=dtype, ops=ops),
            vae=load_vae(job.directory, device=job.device, dtype=dtype, ops=ops),
            text_encoder=absent,
        )
        return run_pipeline(job, pipe, text.embeds("ours", dtype), scheduler="dpm", progress=False)

    def theirs(dtype: torch.dtype, _: str) -> Outputs:
        import diffusers

        image = bool(job.model.conditions)
        kind = diffusers.CogVideoXImageToVideoPipeline if image else diffusers.CogVideoXPipeline
        pipe = kind(
            tokenizer=absent,
            text_encoder=absent,
            vae=_theirs(job, diffusers.AutoencoderKLCogVideoX, "vae", dtype),
            transformer=_theirs(job, diffusers.CogVideoXTransformer3DModel, "transformer", dtype),
            scheduler=_scheduler(job, diffusers.CogVideoXDPMScheduler),
        )
        pipe.set_progress_bar_config(disable=True)
        return run_pipeline(job, pipe, text.embeds("theirs", dtype))

    return ours, theirs


def run_pipeline(job: Job, pipe: Any, embeds: Tensor, **options: Any) -> Outputs:
    """Run a pipeline of either side with the embeddings of the prompt and of the empty one."""
    height, width = job.run_size
    if job.model.conditions:
        options["image"] = references.picture(height, width)
    kept: Outputs = {}

    def keep(_pipe: Any, _i: int, _t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        kept["run, latents"] = tensors["latents"]
        return {}

    kept["run, pixels"] = pipe(
        prompt_embeds=embeds[:1],
        negative_prompt_embeds=embeds[1:],
        height=height,
        width=width,
        num_frames=job.run_frames,
        num_inference_steps=job.steps,
        guidance_scale=6.0,
        use_dynamic_cfg=True,
        generator=torch.Generator().manual_seed(7),
        callback_on_step_end=keep,
        output_type="pt",
        **options,
    ).frames
    return kept


def provenance(job: Job) -> dict[str, Any]:
    return {
        "checkpoint": job.checkpoint.source,
        "model": job.model.name,
        "revision": commit_of(job.directory) or "unknown",
        "size": f"{job.run_frames} frames {job.run_size[0]}x{job.run_size[1]}, {job.steps} steps",
        **measure.header(job.device, job.command),
    }


def commit_of(directory: Path) -> str | None:
    """Return the commit of the hub's repository that a directory holds, where the hub's client noted it."""
    if directory.parent.name == "snapshots":  # of the local cache
        return directory.name
    note = (
        directory / ".cache" / "huggingface" / "download" / "model_index.json.metadata"
    )  # of `hf download --local-dir`
    return note.read_text().split("\n")[0] if note.is_file() else None


def table_row(job: Job, findings: list[Finding]) -> str:
    """Return a checkpoint's row: of each column the largest error in fp32, then the largest ratio in other dtypes."""

    def cell(column: str) -> str:
        own = [f for f in findings if f.column == column]
        errors = [f"{max(f.error for f in own if f.ratio is None):.1e}"] if any(f.ratio is None for f in own) else []
        ratios = [f.ratio for f in own if f.ratio is not None]
        return "; ".join([*errors, *([f"{max(ratios):.2f}"] if ratios else [])])

    values = provenance(job)
    known = [job.model.name, *([f"commit {values['revision'][:12]}"] if values["revision"] != "unknown" else [])]
    exceeded = [f"{f.column} {f.dtype} {f.ops}".strip() for f in findings if not f.passed]
    peak = max((max(f.gib) for f in findings if f.gib), default=None)
    return measure.markdown_row(
        [
            f"{job.checkpoint.source} ({', '.join(known)})",
            *map(cell, COLUMNS),
            "yes" if not exceeded else f"no: {', '.join(exceeded)}",
            values["size"] + (f"; peak {peak:.1f} GiB" if peak is not None else ""),
            f"{measure.caption(values)}",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
