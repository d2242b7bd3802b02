"""What a run would do and cost, before a weight is read: `cogvid plan`, and what `generate` checks first.

It reads the configs of a checkpoint and the headers of its safetensors. For an official model that is not on this
machine it reads nothing: its config is in `CONFIGS`, and `OFFICIAL` repeats its sizes from the table of weights.md.
Nothing is downloaded. costs.py has the arithmetic.
"""

from __future__ import annotations

import bisect
import dataclasses
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cogvid.config import CONFIGS, ModelConfig
from cogvid.models.vae import CONV_ELEMENTS
from cogvid.run import costs
from cogvid.run.costs import Kernels
from cogvid.run.machine import Machine
from cogvid.run.settings import Settings, outside_training, resolve_settings, schedule_of
from cogvid.sampling.cache import kept_units
from cogvid.weights import placement
from cogvid.weights.checkpoint import Checkpoint, read_checkpoint, with_sat_defaults
from cogvid.weights.files import DTYPES, load_state
from cogvid.weights.hub import WEIGHTS
from cogvid.weights.placement import Placement
from cogvid.weights.text_config import T5_XXL, TextConfig, read_text_config

GB = 10**9
PROCESS = 500 * 2**20  # Python, PyTorch for CPUs and the other libraries, resident in a run of tiny-t2v
# Of what activations take on a CPU: freed memory that the allocator keeps, and buffers of the libraries. Measured on
# models of 5B's width and on the whole VAE, it was 0 to 16 %.
SLACK = {"cpu": 1.1, "cuda": 1.0}
_VAE = {"vae_encoder": {"float32": 92_215_456}, "vae_decoder": {"float32": 123_368_451}}
_T5 = 4_762_310_656
OFFICIAL: dict[str, dict[str, dict[str, int]]] = {  # model -> part -> stored dtype -> parameters
    name: {"transformer": {dtype: count}, "text_encoder": {text: _T5}, **_VAE}
    for name, dtype, count, text in (
        ("cogvideox-2b", "float16", 1_693_783_872, "bfloat16"),
        ("cogvideox-5b", "bfloat16", 5_570_283_072, "bfloat16"),
        ("cogvideox-5b-i2v", "bfloat16", 5_625_087_552, "bfloat16"),
        ("cogvideox1.5-5b", "bfloat16", 5_570_676_352, "float32"),
        ("cogvideox1.5-5b-i2v", "bfloat16", 5_571_594_880, "float32"),
    )
}

Choice = tuple[str, int, int, int]  # dtype, height, width, frames


@dataclass(frozen=True)
class Subject:
    """What is planned for: a checkpoint that is here, or an official model that is not.

    weights: part -> stored dtype -> number of parameters; the VAE's are "vae_encoder" and "vae_decoder".
    checkpoint: None for a model that is not here.
    """

    model: ModelConfig
    t5: TextConfig
    weights: Mapping[str, Mapping[str, int]]
    checkpoint: Checkpoint | None

    @property
    def stored_bytes(self) -> int:
        return sum(_bytes(part) for part in self.weights.values())


@dataclass(frozen=True)
class Mode:
    """The options of a load that save memory; the defaults save none."""

    offload: str | None = None
    vae_tiling: bool = False
    quantize: str | None = None

    def __str__(self) -> str:
        chosen = [self.offload and f"offload {self.offload}", self.quantize and f"quantize {self.quantize}"]
        return ", ".join(each for each in (*chosen, self.vae_tiling and "vae tiling") if each) or "resident"


RESIDENT = Mode()


def mode_of(placement: Placement) -> Mode:
    return Mode(placement.offload, placement.vae_tiling, placement.quantize)


@dataclass(frozen=True)
class Memory:
    """The most bytes that a run has in memory at a time, on one kind of device.

    device: "cpu", where it is what is resident in the whole process, or "cuda", the memory of the GPU.
    mode: "resident", all weights stay where they run, or the options that save memory, such as "offload block".
    phases: the peak in each part of the run. `load` has the files that are converted beside the converted weights.
    peak: of all phases. needed: the peak without what the system can drop, the pages of files that are converted.
    pinned: weights that cannot be dropped, the least that a run of any size needs.
    measured: whether the formula was checked with measured peaks: on CPUs, in bf16 only where oneDNN has it.
    """

    device: str
    dtype: str
    mode: str
    phases: dict[str, int]
    peak: int
    needed: int
    pinned: int
    measured: bool


@dataclass(frozen=True)
class Plan:
    """What a legal run would do and cost.

    settings: all options of the run. size: `[frames, height, width]` of the latents, padding included.
    video_tokens, text_tokens: of one row of the batch. rows: 2 where guidance runs both branches, else 1.
    frames, fps, seconds: of the video. steps: that run; guided_steps: of these with both branches.
    flops: of each phase, of one guided and one plain step, and in all.
    memory: the run's own first, then the same run on other devices and in other dtypes.
    download: bytes of weights that are not here. machine: what there is to run on.
    fits: what would fit into free memory, as options to give; None if the run itself does.
    warnings: one line each.
    """

    model: str
    settings: Settings
    size: tuple[int, int, int]
    video_tokens: int
    text_tokens: int
    rows: int
    fps: float
    seconds: float
    steps: int
    guided_steps: int
    flops: dict[str, int]
    memory: tuple[Memory, ...]
    download: int
    machine: Machine
    fits: str | None
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the plan ready for JSON."""
        return {"legal": True, **dataclasses.asdict(self)}


def survey(source: str, *, fetch: bool = False, **origin: Any) -> Subject:
    """Say what is to be planned for; origin: as for `read_checkpoint`.

    fetch: download a checkpoint that is neither here nor official, instead of refusing it.

    Raises:
        ValueError: no such checkpoint here, and it is not official; or what is here is broken.
    """
    official = next((m for m in CONFIGS.values() if m.repo and m.repo.lower() == source.lower()), None)
    remote = official is not None or _looks_remote(source)
    try:
        here: dict[str, Any] = {**origin, "local_files_only": True} if remote else origin
        checkpoint = read_checkpoint(source, **here)
        return Subject(checkpoint.model, *_stored(checkpoint), checkpoint)
    except ValueError:
        if origin.get("variant") or origin.get("defaults") == "diffusers":
            official = None  # of other files, or of a file, that only the repository has
        if official is not None and origin.get("defaults") == "sat":
            official = with_sat_defaults(official)
        if official is not None and not origin.get("local_files_only"):
            return Subject(official, T5_XXL, OFFICIAL[official.name], None)
        if not (fetch and remote):
            raise
    checkpoint = read_checkpoint(source, **origin)
    return Subject(checkpoint.model, *_stored(checkpoint), checkpoint)


def make_plan(
    subject: Subject,
    *,
    task: str,
    machine: Machine,
    dtype: torch.dtype,
    ops: str = "torch",
    mode: Mode = RESIDENT,
    fps: float | None = None,
    notes: tuple[str, ...] = (),
    **options: Any,
) -> Plan:
    """Check the options of a run, and say what it would do and cost.

    Args:
        task: as for `resolve_settings`. machine: where it runs. dtype: that it runs in. ops: "torch" or "triton".
        mode: the options that save memory.
        fps: of the file; None is the model's. notes: warnings to begin with. options: the fields of `Settings`.

    Raises:
        ValueError: an option that cannot be.
    """
    model = subject.model
    fps = model.fps if fps is None else fps
    if not fps > 0:
        raise ValueError(f"fps: got {fps}, want more than 0")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        settings = resolve_settings(model, task=task, **options)
        schedule = schedule_of(model, settings)
    guided = sum(scale is not None for scale in settings.guidance(schedule))
    size = model.latent_size(settings.height, settings.width, settings.num_frames)
    name, rows = str(dtype).removeprefix("torch."), 2 if guided else 1
    own = estimate_memory(subject, settings, machine.device, name, ops, rows=rows, mode=mode)
    fits = None if own.needed <= machine.free else what_fits(subject, settings, machine, own, ops, mode)
    said = [*notes, *(str(warning.message) for warning in caught), *_remarks(subject, settings, own, machine, fits)]
    return Plan(
        model=model.name,
        settings=settings,
        size=size,
        video_tokens=costs.tokens(model.transformer, size),
        text_tokens=model.text_length,
        rows=2 if guided else 1,
        fps=fps,
        seconds=settings.num_frames / fps,
        steps=len(schedule),
        guided_steps=guided,
        flops=count_flops(subject, settings, size, len(schedule), guided, mode.vae_tiling),
        memory=(own, *_other_rows(subject, settings, own, ops, mode)),
        download=0 if subject.checkpoint else subject.stored_bytes,
        machine=machine,
        fits=fits,
        warnings=tuple(said),
    )


def _remarks(subject: Subject, settings: Settings, own: Memory, machine: Machine, fits: str | None) -> Iterator[str]:
    model = subject.model
    if reasons := outside_training(model, settings.height, settings.width, settings.num_frames):
        yield f"{model.name} was not trained for {' and '.join(reasons)}"
    if settings.step_cache is not None:
        yield f"step_cache: the FLOPs are those without {settings.step_cache}, which skips a part of them"
    if subject.checkpoint is None:
        yield f"{model.repo} is not here: its config and sizes are those that weights.md lists"
    if fits is not None:
        yield shortage(own, machine, fits)


def count_flops(
    subject: Subject, settings: Settings, size: tuple[int, int, int], steps: int, guided: int, tiling: bool
) -> dict[str, int]:
    """Return the floating-point operations of each phase, of one step with and without guidance, and in all."""
    model, length = subject.model, subject.model.text_length
    kernels = kernels_of("cpu", "float32", "torch")  # it does not change what is computed
    one, both = (costs.transformer_flops(model.transformer, rows, length, size) for rows in (1, 2))
    latents = size[0] - model.padding(settings.num_frames), *size[1:]
    encoded = _encoded_frames(model, settings)
    pixels = encoded, settings.height, settings.width
    found = {
        "text": costs.t5_flops(subject.t5, 2 if settings.guided else 1, length),
        "encode": costs.vae_encode(model.vae, pixels, 4, kernels, tiling=tiling).flops if encoded else 0,
        "denoise": guided * both + (steps - guided) * one,
        "decode": costs.vae_decode(model.vae, latents, 4, kernels, tiling=tiling).flops,
    }
    return {"step": one, "guided_step": both, **found, "total": sum(found.values())}


def estimate_memory(
    subject: Subject,
    settings: Settings,
    device: str,
    dtype: str,
    ops: str = "torch",
    rows: int = 2,
    mode: Mode = RESIDENT,
) -> Memory:
    """Estimate the peak of memory. rows: 2 if guidance runs both branches.

    A phase has weights and activations. On a CPU, weights whose stored dtype is the run's are mapped: they are in
    memory from the phase that reads them, or, where they leave, in that phase. The others are copied: at load, with the
    pages of their files beside them until all are loaded, or in their phase. The libraries are `PROCESS`, and what
    activations cost the allocator is `SLACK`.
    """
    on_cpu, itemsize = device == "cpu", DTYPES[dtype].itemsize
    weights = {part: _weights(subject, part, on_cpu, dtype, mode) for part in subject.weights}
    kept = activations(subject, settings, device, dtype, ops, rows, mode)
    if mode.quantize not in (None, "int8-dynamic"):  # one weight is cast at a time
        for phase, shape in (
            ("text", shape_of(subject, "text_encoder")),
            ("denoise", shape_of(subject, "transformer")),
        ):
            kept[phase] += shape.widest * itemsize
    encoded = _encoded_frames(subject.model, settings)
    clip = 3 * settings.height * settings.width * encoded * 5 if encoded > 1 else 0  # uint8, and fp32 until encoded
    read = {"text": "text_encoder", "encode": "vae_encoder", "denoise": "transformer", "decode": "vae_decoder"}
    files = sum(each.files for each in weights.values())
    held = sum(each.copied for each in weights.values()) + (PROCESS if on_cpu else 0)
    phases = {"load": held + files}
    for phase in ("encode", "text", "denoise", "decode"):  # in the order of a run
        if phase == "encode" and not encoded:
            continue
        held += weights[read[phase]].mapped
        phases[phase] = held + weights[read[phase]].comes + clip + int(SLACK[device] * kept[phase])
    needed = max(phases["load"] - files, *(phases[phase] for phase in phases if phase != "load"))
    pinned = sum(each.copied for each in weights.values()) + max(each.stays for each in weights.values())
    measured = on_cpu and (dtype == "float32" or placement.cpu_has_bfloat16())
    return Memory(device, dtype, str(mode), phases, max(phases.values()), needed, pinned, measured)


@dataclass(frozen=True)
class _Weights:
    """Bytes of a part's weights.

    copied: from the load on. files: pages that are read for it. mapped: from its phase on.
    comes: in its phase alone. stays: what of these the system cannot drop.
    """

    copied: int
    files: int = 0
    mapped: int = 0
    comes: int = 0
    stays: int = 0


def shape_of(subject: Subject, part: str) -> costs.Shape:
    total = sum(subject.weights[part].values())
    if part == "transformer":
        return costs.transformer_shape(subject.model.transformer, total)
    return costs.t5_shape(subject.t5, total) if part == "text_encoder" else costs.Shape(total, 0, 0, 0, 0)


def _weights(subject: Subject, part: str, on_cpu: bool, dtype: str, mode: Mode) -> _Weights:
    counts, shape, itemsize = subject.weights[part], shape_of(subject, part), DTYPES[dtype].itemsize
    small = shape.quantized if mode.quantize else 0  # in one byte each
    widened = 0
    if dtype == "float16" and part == "text_encoder" and not small:  # T5's `wo` stays in fp32
        widened = 2 * subject.t5.num_layers * subject.t5.d_ff * subject.t5.d_model
    stored = max(_bytes(counts) - small * _bytes(counts) // max(shape.total, 1), 0)  # of those that stay as they are
    whole = (shape.total - small) * itemsize + widened
    same = counts.get(dtype, 0) == shape.total and on_cpu  # mapped, not copied
    if mode.offload is None:
        if same:
            return _Weights(small, mapped=whole)
        return _Weights(small + whole, files=stored if on_cpu else 0)
    if mode.offload == "block" and shape.blocks:
        rest, at_once = shape.total - shape.blocks * shape.block, 1 if on_cpu else 2
        # Of T5's embedding only the rows of the prompt are read where it is mapped.
        rest = 0 if same and part == "text_encoder" else rest
        whole = int((rest + at_once * shape.block) * (whole / shape.total))
    resting = small if on_cpu else 0  # quantised weights rest in memory
    comes = whole + small - resting
    return _Weights(resting, comes=comes, stays=0 if same else comes)


def activations(
    subject: Subject, settings: Settings, device: str, dtype: str, ops: str, rows: int, mode: Mode
) -> dict[str, int]:
    """Return the most that each phase keeps beside weights."""
    model, itemsize, kernels = subject.model, DTYPES[dtype].itemsize, kernels_of(device, dtype, ops)
    size = model.latent_size(settings.height, settings.width, settings.num_frames)
    latents = size[0] - model.padding(settings.num_frames), *size[1:]
    encoded, tiling = _encoded_frames(model, settings), mode.vae_tiling
    pixels = encoded, settings.height, settings.width
    units = kept_units(settings.step_cache, model.transformer.num_layers)
    kept = units * rows * (model.text_length + costs.tokens(model.transformer, size)) * model.transformer.hidden_size
    denoise = costs.transformer_activations(model.transformer, rows, model.text_length, size, itemsize, kernels)
    return {
        "text": costs.t5_activations(subject.t5, 1, model.text_length, itemsize),
        "encode": costs.vae_encode(model.vae, pixels, itemsize, kernels, tiling=tiling).activations if encoded else 0,
        "denoise": denoise + kept * itemsize,
        "decode": costs.vae_decode(model.vae, latents, itemsize, kernels, tiling=tiling).activations,
    }


def what_fits(subject: Subject, settings: Settings, machine: Machine, own: Memory, ops: str, mode: Mode) -> str:
    """Return the smallest change that would fit into free memory, as options; say so if there is none.

    First what changes no result, offloading; then tiles, a narrower dtype, fewer frames and smaller ones, with all that
    saves memory. Quantising saves less than offload="block". What is named needs 15 % less than what is free, and less
    than the run itself.
    """
    room, dtype = min(machine.free, own.needed) / 1.15, own.dtype
    narrow = "bfloat16" if dtype == "float32" else dtype
    modes = list(_lighter_modes(mode, machine.device))

    def needed(choice: Choice, with_mode: Mode) -> int:
        name, height, width, frames = choice
        changed = dataclasses.replace(settings, height=height, width=width, num_frames=frames)
        return estimate_memory(subject, changed, machine.device, name, ops, mode=with_mode).needed

    for name in dict.fromkeys((dtype, narrow)):
        for each in modes:
            choice = (name, settings.height, settings.width, settings.num_frames)
            if needed(choice, each) <= room:
                return _as_options(settings, dtype, mode, choice, each)
    for count, choices in _smaller(subject.model, settings, dtype, narrow):
        fits = lambda index, choices=choices: needed(choices(index), modes[-1]) <= room  # noqa: E731
        index = bisect.bisect_left(range(count), True, key=fits)
        if index < count:
            return _as_options(settings, dtype, mode, choices(index), modes[-1])
    return "no smaller run of this model"


def _lighter_modes(mode: Mode, device: str) -> Iterator[Mode]:
    """Yield the mode itself, and those that need less memory, the least at last."""
    offloads = [None, "model", "block"]
    if mode.quantize is not None and (device == "cpu" or mode.quantize != "fp8-storage"):
        offloads.remove("block")  # it cannot be had with these
    for tiling in dict.fromkeys((mode.vae_tiling, True)):
        for offload in offloads[offloads.index(mode.offload) :]:
            yield Mode(offload, tiling, mode.quantize)


def _as_options(settings: Settings, dtype: str, mode: Mode, choice: Choice, with_mode: Mode) -> str:
    """Return what differs from the run as options of the command line."""
    name, height, width, frames = choice
    given: dict[str, tuple[Any, Any]] = {"offload": (mode.offload, with_mode.offload)}
    given |= {"dtype": (dtype, name), "height": (settings.height, height), "width": (settings.width, width)}
    given["num-frames"] = settings.num_frames, frames
    said = [f"--{option} {now}" for option, (before, now) in given.items() if before != now]
    return " ".join([*said, *(["--vae-tiling"] if with_mode.vae_tiling > mode.vae_tiling else [])])


def shortage(memory: Memory, machine: Machine, fits: str) -> str:
    """Say that a run needs more than is free, and what would fit."""
    return (
        f"memory: got {machine.free / GB:.1f} GB free of {machine.total / GB:.1f} GB on {machine.device}, want about "
        f"{memory.needed / GB:.1f} GB for this run in {memory.dtype}; what would fit: {fits}"
    )


def refuse_hopeless(plan: Plan) -> None:
    """Raise if not even the weights fit, whatever else the machine does.

    Only then: an estimate of activations may be wrong, mapped weights can be read again and again, and memory that is
    taken now may be free later.

    Raises:
        MemoryError: the weights that cannot be dropped are larger than the machine's memory and swap.
    """
    own, machine = plan.memory[0], plan.machine
    if own.pinned > machine.total:
        raise MemoryError(
            f"memory: got {machine.total / GB:.1f} GB on {machine.device}, want {own.pinned / GB:.1f} GB for the "
            f"weights alone in {own.dtype}; what would fit: {plan.fits}"
        )


def out_of_memory(plan: Plan, subject: Subject, where: Placement, error: BaseException) -> MemoryError:
    """Return the error of a run that ended for want of memory: the reason, the estimate, and what would fit."""
    own, machine = plan.memory[0], plan.machine
    fits = plan.fits or what_fits(subject, plan.settings, machine, own, where.ops_name, mode_of(where))
    said = " ".join(str(error).split()) or type(error).__name__
    return MemoryError(f"out of memory: {said:.200}; {shortage(own, machine, fits)}")


def _smaller(
    model: ModelConfig, settings: Settings, dtype: str, narrow: str
) -> Iterator[tuple[int, Callable[[int], Choice]]]:
    """Yield series of legal runs: with fewer frames, then smaller, in the dtype and in the narrower one.

    Each is a length and a function from an index to (dtype, height, width, frames); the largest run comes first.
    """
    height, width, own = settings.height, settings.width, settings.num_frames
    frames = [n for n in range(own - 1, 1, -1) if n % model.frame_multiple == 1]
    stride = model.vae.spatial_compression_ratio * model.transformer.patch_size
    rows, columns = height // stride, width // stride
    # The learned table of positions has one size.
    sizes = 0 if model.transformer.use_learned_positional_embeddings else rows - 1

    def size(index: int) -> tuple[int, int]:
        n = rows - 1 - index
        return n * stride, max(round(n * columns / rows), 1) * stride

    for name in dict.fromkeys((dtype, narrow)):
        yield len(frames), lambda index, name=name: (name, height, width, frames[index])
        yield sizes, lambda index, name=name: (name, *size(index), own)
    yield sizes, lambda index: (narrow, *size(index), frames[-1] if frames else own)


def _other_rows(subject: Subject, settings: Settings, own: Memory, ops: str, mode: Mode) -> Iterator[Memory]:
    """Yield the same run in other modes, then, with all weights resident, on the other device and in other dtypes."""
    count = 2 if settings.guided else 1
    tiled = Mode(vae_tiling=True), Mode("block", vae_tiling=True)
    for other in (RESIDENT, Mode("model"), Mode("block"), *tiled, Mode("model", quantize="int8")):
        if other != mode:
            yield estimate_memory(subject, settings, own.device, own.dtype, ops, rows=count, mode=other)
    rows = {("cpu", "float32"): "torch", ("cpu", "bfloat16"): "torch"}
    rows |= {("cuda", name): ops if own.device == "cuda" else "triton" for name in ("bfloat16", "float32")}
    if subject.model.dtype == "float16":
        rows["cuda", "float16"] = rows["cuda", "bfloat16"]
    for (device, dtype), kind in rows.items():
        if (device, dtype) != (own.device, own.dtype):
            yield estimate_memory(subject, settings, device, dtype, kind, rows=count)


def kernels_of(device: str, dtype: str, ops: str) -> Kernels:
    if device != "cpu":
        return Kernels(CONV_ELEMENTS["cuda"], fused_norms=ops == "triton", fused_gelu=ops == "triton")
    onednn = dtype == "bfloat16" and placement.cpu_has_bfloat16()
    unfold = costs.UNFOLD_FLOAT32 if dtype == "float32" else 0 if onednn else float("inf")
    return Kernels(CONV_ELEMENTS["cpu"], fused_norms=False, fused_gelu=onednn, unfold_below=unfold)


def _encoded_frames(model: ModelConfig, settings: Settings) -> int:
    """Return how many frames the VAE encodes before the run: none, an image, or a video, which counts once."""
    takes_video = any(condition.name != "image" for condition in model.conditions) and settings.task != "text-to-video"
    if settings.starts_from_video or takes_video:
        return settings.num_frames
    return 0 if settings.task == "text-to-video" else 1


def _stored(checkpoint: Checkpoint) -> tuple[TextConfig, dict[str, dict[str, int]]]:
    """Return the sizes of the text encoder and the weights of a checkpoint, from its headers."""
    directory = checkpoint.directory
    found: dict[str, Counter[str]] = {part: Counter() for part in ("transformer", "text_encoder", *_VAE)}
    for part, basename in WEIGHTS.items():
        for name, tensor in load_state(directory / part, basename, checkpoint.variants[part]).items():
            of_vae = "vae_encoder" if name.startswith("encoder.") else "vae_decoder"
            found[of_vae if part == "vae" else part][str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    return read_text_config(directory / "text_encoder"), {part: dict(counts) for part, counts in found.items()}


def _bytes(counts: Mapping[str, int]) -> int:
    return sum(count * getattr(torch, dtype).itemsize for dtype, count in counts.items())


def _looks_remote(source: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) is not None


def table(plan: Plan) -> list[tuple[str, str]]:
    """Return the plan as rows of (name, value) to print."""
    settings, flops = plan.settings, plan.flops
    frames, height, width = plan.size
    step = flops["guided_step" if plan.guided_steps else "step"]
    scale = "by a list" if settings.guidance_scale is None else f"{settings.guidance_scale:g}"
    guidance = f"guidance {scale} in {plan.guided_steps} of them" if plan.guided_steps else "no guidance"
    rows = [
        ("legal", f"yes: {plan.model}, {settings.task}"),
        (
            "video",
            f"{settings.num_frames} frames of {settings.height}x{settings.width} pixels, "
            f"{plan.seconds:.2f} s at {plan.fps:g} fps",
        ),
        ("latents", f"{frames} frames of {height}x{width}"),
        ("tokens", f"{plan.video_tokens:,} of video and {plan.text_tokens:,} of text, in a batch of {plan.rows}"),
        ("steps", f"{plan.steps} of {settings.scheduler}, {guidance}"),
        (
            "FLOPs",
            f"{si(step)} a step, {si(flops['denoise'])} in all steps",
        ),
        ("", ", ".join(f"{si(flops[part])} {part}" for part in ("text", "encode", "decode") if flops[part])),
        ("", f"{si(flops['total'])} in all"),
    ]
    for i, memory in enumerate(plan.memory):
        worst = max(memory.phases, key=lambda phase: memory.phases[phase])
        note = ("" if memory.measured else ", an estimate that was not measured") + ("; this run" if i == 0 else "")
        where = f"{memory.device}, {memory.dtype}, {memory.mode}"
        rows.append(("" if i else "memory", f"{memory.peak / GB:.2f} GB on {where} (in {worst}){note}"))
    rows.append(
        ("free here", f"{plan.machine.free / GB:.1f} GB of {plan.machine.total / GB:.1f} GB on {plan.machine.device}")
    )
    rows.append(("download", f"{plan.download / GB:.1f} GB" if plan.download else "nothing"))
    return [*rows, *(("warning", text) for text in plan.warnings)]


def si(flops: int) -> str:
    for unit, size in (("PFLOP", 10**15), ("TFLOP", 10**12), ("GFLOP", 10**9)):
        if flops >= size:
            return f"{flops / size:.3g} {unit}"
    return f"{flops / 10**6:.3g} MFLOP"
