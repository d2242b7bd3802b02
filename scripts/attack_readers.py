"""The readers that `attack.py` attacks: each function makes a case in an empty folder, and reads it."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import random
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cogvid

ROOT = Path(__file__).parents[1]
PACK = ROOT / "cogvid" / "packs" / "tiny-t2v"
SECRET = "S3CR3T"
SMALL: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 1, "num_inference_steps": 1}
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 16, 2**31, 2**62, 2**63, 2**64, 10**400, -(10**400), 1e308, -1e308, 1e-320,
    0.5, 1000, 10_000, 2**20, float("nan"), float("inf"), "", "x", "a" * 100_000, "\ud800", "\0", [], [0], [1], [None],
    [[1]], ["x"] * 3, {}, {"a": 1}, [1] * 10_000, "gated-gelu", "relu", "float16", "T5EncoderModel",
]  # fmt: skip

TOO_LONG_OR_SLOW = (10**400, -(10**400), 2**31, 1000, 10_000, 2**20)  # to be printed, and to be a size
Case = Callable[[random.Random, Path], Any]


def attack_config(rng: random.Random, folder: Path) -> None:
    """A JSON file of a checkpoint: values of other types and sizes, missing keys, broken text, odd files."""
    root = _copy_of_pack(folder)
    files = sorted(path for path in root.rglob("*.json") if path.name != "tokenizer.json")
    damage_json(rng, rng.choice(files))
    _use(root)


def damage_json(rng: random.Random, path: Path) -> None:
    kind = rng.choice(["value", "value", "value", "values", "delete", "text", "whole", "file"])
    values = json.loads(path.read_text())
    if kind in ("value", "values"):
        for name in rng.sample(sorted(values), 1 if kind == "value" else min(3, len(values))):
            values[name] = rng.choice(VALUES)
        path.write_text(json.dumps(values))
    elif kind == "delete":
        del values[rng.choice(sorted(values))]
        path.write_text(json.dumps(values))
    elif kind == "text":
        path.write_bytes(damage_bytes(rng, path.read_bytes()))
    elif kind == "whole":
        deep = rng.choice([50, 900, 5000, 200_000])
        texts = [
            "[" * deep + "]" * deep,
            '{"a":' * deep + "1" + "}" * deep,
            "1" * 5000,
            "null",
            "",
            "[]",
            '"x"',
            "\ufeff{}",
        ]
        path.write_text(rng.choice(texts))
    else:
        path.unlink()
        odd = rng.choice(["fifo", "zero", "folder", "loop", "huge"])
        if odd == "fifo":
            os.mkfifo(path)
        elif odd == "zero":
            path.symlink_to("/dev/zero")
        elif odd == "folder":
            path.mkdir()
        elif odd == "loop":
            path.symlink_to(path.name)
        else:
            with open(path, "wb") as file:
                file.truncate(8 * 2**30)


def attack_safetensors(rng: random.Random, folder: Path) -> None:
    """The weights of a part: a header with other types, shapes and offsets, or damaged bytes."""
    root = _copy_of_pack(folder)
    path = rng.choice(sorted(root.rglob("*.safetensors")))
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    kind = rng.choice(["entry", "entry", "entry", "bytes", "length", "name"])
    if kind == "entry":
        name = rng.choice(sorted(n for n in header if n != "__metadata__"))
        entry = header[name]
        field = rng.choice(sorted(entry))
        numbers = [0, -1, 1, 2**31, 2**62, 2**63, 2**64, 10**30, None, "1", 0.5]
        choices = {
            "dtype": ["F64", "I64", "U8", "BOOL", "F8_E4M3", "BF16", "F32", "X", None, 1, ""],
            "shape": [[], [rng.choice(numbers)], [rng.choice(numbers)] * 2, [1] * 1000, None, "x"],
            "data_offsets": [
                [rng.choice(numbers), rng.choice(numbers)],
                [0],
                [],
                None,
                [0, len(body)],
                [len(body)] * 2,
            ],
        }
        entry[field] = rng.choice(choices[field])
    elif kind == "name":
        name = rng.choice(sorted(header))
        header[rng.choice(["", "a" * 10_000, "\0", "\u202e", name + ".x"])] = header.pop(name)
    text = json.dumps(header).encode()
    damaged = struct.pack("<Q", len(text)) + text + body
    if kind == "bytes":
        damaged = damage_bytes(rng, data[: 8 + size]) + (
            body if rng.random() < 0.5 else body[: rng.randrange(len(body))]
        )
    elif kind == "length":
        damaged = struct.pack("<Q", rng.choice([0, 1, size - 1, size + 1, 2**31, 2**62, 2**64 - 1])) + data[8:]
    path.unlink()
    path.write_bytes(damaged)
    _use(root)


def attack_index(rng: random.Random, folder: Path) -> None:
    """The index of weights in shards."""
    root = _copy_of_pack(folder)
    part, base = rng.choice(
        [("transformer", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model")]
    )
    [whole] = (root / part).glob("*.safetensors")
    header = whole.read_bytes()
    names = [n for n in json.loads(header[8 : 8 + struct.unpack("<Q", header[:8])[0]]) if n != "__metadata__"]
    shard = f"{base}-00001-of-00001.safetensors"
    whole.rename(root / part / shard)
    index: dict[str, Any] = {"metadata": {}, "weight_map": dict.fromkeys(names, shard)}
    kind = rng.choice(["none", "value", "shard", "map", "text", "whole"])
    others = [*VALUES, "../x.safetensors", "/etc/passwd", "config.json", ".", "..", shard + "/"]
    if kind == "shard":
        index["weight_map"][rng.choice(names)] = rng.choice(others)
    elif kind == "map":
        index["weight_map"] = rng.choice(VALUES)
    path = root / part / f"{base}.safetensors.index.json"
    path.write_text(json.dumps(index))
    if kind == "value":
        damage_json(rng, path)
    elif kind == "text":
        path.write_bytes(damage_bytes(rng, path.read_bytes()))
    elif kind == "whole":
        path.write_text(rng.choice(["[]", "null", "[" * 100_000, "{}"]))
    _use(root)


def attack_spiece(rng: random.Random, folder: Path) -> None:
    """The tokenizer's model, and hostile text for the whole one."""
    from cogvid.media.tokenizer import Tokenizer

    path, text = PACK / "tokenizer" / "spiece.model", "the red circle moves right"
    if rng.random() < 0.7:
        damaged = folder / "spiece.model"
        damaged.write_bytes(damage_bytes(rng, path.read_bytes()))
        path = damaged
    else:
        parts = [
            "\ud800",
            "\0",
            "\u2581",
            "e\u0301",
            "<extra_id_0>",
            "</s>",
            "\U0001f600",
            " ",
            "\n",
            "a" * 5000,
            "\u202e",
        ]
        text = "".join(rng.choices(parts, k=rng.randrange(12)))
    Tokenizer(path, extra_ids=rng.choice([0, 100])).encode([text], 16)


def attack_image(rng: random.Random, folder: Path) -> None:
    """A picture of any format, damaged."""
    from PIL import Image

    name = rng.choice(
        ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "ICO", "TGA", "PCX", "SGI", "DDS", "JPEG2000"]
    )
    mode = rng.choice(["RGB", "L", "1", "P", "RGBA", "I;16"])
    data = io.BytesIO()
    try:
        Image.frombytes("L", (17, 13), rng.randbytes(221)).convert(mode).save(data, name)
    except (OSError, ValueError):  # a mode that this format does not have
        data = io.BytesIO()
        Image.frombytes("L", (17, 13), rng.randbytes(221)).convert("RGB").save(data, "PNG")
    damaged = damage_bytes(rng, data.getvalue())
    if rng.random() < 0.5:
        cogvid.load_image(damaged)
    else:
        (folder / "picture").write_bytes(damaged)
        cogvid.load_image(folder / "picture")


def attack_video(rng: random.Random, folder: Path) -> None:
    """A video, damaged; and files that name other files."""
    from cogvid.media.video import read_metadata

    path = folder / rng.choice(["clip.mp4", "clip", "a:b%03d.mp4", "-i.mp4", "x\udcff.mp4"])
    if rng.random() < 0.8:
        path.write_bytes(damage_bytes(rng, _clip(rng.choice(["mp4", "matroska", "avi", "mpegts", "gif", "nut"]))))
    else:
        path.write_text(rng.choice(PLAYLISTS))
    for read in (cogvid.read_video, read_metadata):
        with contextlib.suppress(ValueError) if read is read_metadata else contextlib.nullcontext():
            frames = read(path)
    del frames


PLAYLISTS = [
    "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n/etc/passwd\n",
    "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n",
    "ffconcat version 1.0\nfile /etc/passwd\n",
    "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    "<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011' type='dynamic'></MPD>",
    "[Playlist]\nFile1=/etc/passwd\n",
    "words",
]


def attack_url(rng: random.Random, folder: Path) -> None:  # noqa: ARG001 - the signature of all
    """URLs that are none, and hosts that do not answer; none of them may show what is secret in it."""
    scheme = rng.choice(
        ["http", "https", "HTTP", "ftp", "file", "s3", "data", "gopher", "http:/", " http", "ht\ntp", "javascript"]
    )
    user = rng.choice(["", f"{SECRET}@", f"user:{SECRET}@", f":{SECRET}@@", f"u%40:{SECRET}/@", f"u\\:{SECRET}@"])
    host = rng.choice(
        ["127.0.0.1:9", "[::1]:9", "[::1", "", "0:9", "127.1:9", "a b", "x" * 300, "\u2100", "127.0.0.1:99999", "::"]
    )
    path = rng.choice(["", "/", "/a.png", "/\0", "/a b", "/%zz", "/\ud800", "/" + "a" * 5000, "\\..\\x"])
    tail = rng.choice(["", f"?{SECRET}", f"?a={SECRET}#x", f"#{SECRET}", f"?{SECRET}?{SECRET}"])
    cogvid.load_image(f"{scheme}://{user}{host}{path}{tail}", timeout=1)


def attack_options(rng: random.Random, folder: Path) -> None:
    """The command line."""
    values = [str(value) for value in VALUES if not isinstance(value, float) and value not in TOO_LONG_OR_SLOW]
    values += [
        "nan", "inf", "1e400", "-0", "--", "~nobody/x", "~nobody/x.mp4", "/dev/null", "/dev/zero", "/dev/stdin", ".",
        "/", "\udcff", "16", "64", "True", "cosine", "cpu", "9" * 5000, "a" * 300,
        f"http://u:{SECRET}@127.0.0.1:9/x?{SECRET}",
    ]  # fmt: skip
    names = [
        "height", "width", "num-frames", "num-inference-steps", "guidance-scale", "use-dynamic-cfg", "scheduler",
        "strength", "resize", "seed", "fps", "device", "dtype", "ops", "model", "image", "video", "negative-prompt",
        "output", "revision", "variant", "defaults", "no-such-option", "traceback",
    ]  # fmt: skip
    out = folder / "out.mp4"
    argv = [
        "generate",
        rng.choice(["the red circle", "", "\udce9", "\ud800", "x" * 100_000, "ü", "a\0b"]),
        "-o",
        str(out),
    ]
    argv += ["--height", "32", "--width", "32", "--num-frames", "1", "--num-inference-steps", "1"]
    argv += ["--local-files-only", "--device", "cpu"]
    for name in rng.sample(names, rng.randrange(1, 3)):
        argv += ["--" + name, rng.choice(values)]
    if rng.random() < 0.2:
        argv = rng.choice([[], ["inspect"], ["inspect", rng.choice(values)], [rng.choice(values)], ["generate"]])
    from cogvid.cli import main

    said, shown = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(shown):
        try:
            status = main(argv)
        except SystemExit as error:
            status = error.code
    errors = [line for line in said.getvalue().splitlines() if line.startswith("cogvid: error:")]
    if status == 0:
        assert not errors, errors
        return
    assert status in (1, 2), status
    assert len(errors) == 1, said.getvalue()[:2000]
    assert SECRET not in said.getvalue(), said.getvalue()
    assert "unexpected" not in errors[0], errors[0]
    assert not [path for path in folder.iterdir() if path != out], "something was left"
    assert not out.exists()
    raise ValueError(errors[0])


def attack_jobs(rng: random.Random, folder: Path) -> None:
    """A list of jobs, a sweep over them, and the manifest of a batch."""
    from cogvid.run import jobs
    from cogvid.run.manifest import Manifest

    job = {"prompt": "the red circle", "seed": 1, "height": 32, "guidance_scale": 2.5, "image": "x.png"}
    entry = {"place": 0, "output": "a.mp4", "status": "failed", "seed": 1, "ended": 1.5, "job": job, "job_sha256": "00"}
    for name, values in (("jobs.jsonl", job), ("manifest.jsonl", entry)):
        lines = [json.dumps(_damaged(rng, values) if rng.random() < 0.5 else values) + "\n" for _ in range(3)]
        text = "".join(lines).encode()
        (folder / name).write_bytes(damage_bytes(rng, text) if rng.random() < 0.3 else text)
    sweep = rng.choice(["seed=1..3", "height=16,32", "sed=1", "seed=9..1", "fps=", "=", "seed=1.5", "seed=1..9" * 9])
    made = jobs.make_jobs(jobs.read_jobs(str(folder / "jobs.jsonl")), [sweep] if rng.random() < 0.3 else [], {})
    manifest = Manifest(folder)
    for each in made:
        manifest.is_done(each)
        manifest.failed_since(each, 0.0)
        json.dumps([each.name, each.shown, each.shape])


def attack_record(rng: random.Random, folder: Path) -> None:
    """The record of a video, up to the moment that a replay of it would load the weights."""
    from unittest import mock

    import numpy as np

    from cogvid.run import replay

    record = _recorded()
    if rng.random() < 0.5:
        two = {"prompt": ["a", "b"], "negative_prompt": ["", ""], "seeds": [1, 2], "batch_size": 2, "batch_index": 0}
        record = record | two | {"seed": 1}
    with cogvid.VideoWriter(folder / "clip.mp4", 32, 32, metadata=_damaged(rng, record)) as writer:
        writer.write(np.zeros((1, 32, 32, 3), np.uint8))
    with mock.patch.object(replay, "load_checkpoint", side_effect=_Enough), contextlib.suppress(_Enough):
        replay.replay(folder / "clip.mp4", folder / "out.mp4", local_files_only=True, say=lambda _: None)
    assert sorted(path.name for path in folder.iterdir()) == ["clip.mp4"]


def attack_saved(rng: random.Random, folder: Path) -> None:
    """What a run has saved of itself, and files of noise and of trajectories."""
    import torch

    from cogvid.run.noise import load_noise, save_noise
    from cogvid.run.saved_run import SavedRun
    from cogvid.run.trajectory import Trajectory, load_trajectory

    latents = torch.zeros(1, 1, 16, 4, 4)
    if (kind := rng.choice(["saved", "noise", "trajectory"])) == "saved":
        with SavedRun(folder) as saved:
            saved.save_inputs({"prompt": "x", "image": latents, "seed": 1})
    elif kind == "noise":
        save_noise(folder / "noise.safetensors", {"initial": latents, "step.0.0": latents.clone()})
    else:
        Trajectory([latents], [latents], [999], {"prompt": ["x"]}).save(folder / "trajectory.safetensors")
    [path] = folder.glob("*.safetensors")
    path.write_bytes(damage_bytes(rng, path.read_bytes()))
    if kind == "saved":
        with SavedRun(folder) as saved:
            saved.inputs()
    else:
        (load_noise if kind == "noise" else load_trajectory)(path)


READERS: dict[str, Case] = {
    name.removeprefix("attack_"): function for name, function in list(globals().items()) if name.startswith("attack_")
}


# What the readers share.


def damage_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flip, cut, repeat, insert or overwrite some bytes, most often near the start, where headers are."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        if not changed:
            break
        at = min(int(rng.random() ** rng.choice([1, 3]) * len(changed)), len(changed) - 1)
        kind = rng.randrange(6)
        if kind == 0:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[at] = rng.choice([0, 255, 127, 128])
        elif kind == 2:
            del changed[at : at + rng.choice([1, 4, 100])]
        elif kind == 3:
            changed[at:at] = changed[at : at + rng.choice([1, 4, 100])]
        elif kind == 4:
            changed[at : at + 4] = rng.choice(
                [b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f"]
            )
        elif rng.random() < 0.2:
            del changed[at:]
    return bytes(changed)


def _damaged(rng: random.Random, values: dict[str, Any]) -> dict[str, Any]:
    """Put other values in place of some, or leave some out."""
    changed = dict(values)
    for name in rng.sample(sorted(values), rng.choice([1, 1, 1, 3])):
        if rng.random() < 0.2:
            del changed[name]
        else:  # JSON has no other floats
            changed[name] = rng.choice([each for each in VALUES if not isinstance(each, float) or abs(each) < 1e309])
    return changed


class _Enough(Exception):
    """All that is read was read."""


@functools.cache
def _recorded() -> dict[str, Any]:
    """The record of a video of the shipped pack."""
    from cogvid.run.generate import prepare, run

    pipe = cogvid.load("tiny-t2v", device="cpu", dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        return run(pipe, prepare(pipe.model, "the red circle", f"{folder}/a.mp4", seed=1, **SMALL)).provenance


def _copy_of_pack(folder: Path) -> Path:
    """Link the shipped pack's weights and copy the rest."""
    return shutil.copytree(PACK, folder / "pack", copy_function=_link_or_copy)


def _link_or_copy(source: str, target: str) -> str:
    if source.endswith(".safetensors"):
        os.symlink(source, target)
        return target
    return shutil.copy(source, target)


def _use(root: Path) -> None:
    """Look at a checkpoint, load it, and run one step at its smallest size."""
    from cogvid.weights.checkpoint import describe, read_checkpoint

    json.dumps(describe(read_checkpoint(root)))
    pipe = cogvid.load(root, device="cpu", dtype="float32")
    pipe("the red circle", seed=1, output_type="pt", progress=False, **SMALL)


_CLIPS: dict[str, bytes] = {}


def _clip(container: str) -> bytes:
    if container not in _CLIPS:
        import av
        import numpy as np

        data = io.BytesIO()
        with av.open(data, "w", format=container) as file:
            codec, pixels = {"gif": ("gif", "rgb8"), "avi": ("mjpeg", "yuvj420p")}.get(
                container, ("libx264", "yuv420p")
            )
            stream: Any = file.add_stream(codec, rate=8)
            stream.width, stream.height, stream.pix_fmt = 32, 32, pixels
            for i in range(5):
                frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 40 * i, np.uint8), format="rgb24")
                file.mux(stream.encode(frame.reformat(format=pixels)))
            file.mux(stream.encode(None))
        _CLIPS[container] = data.getvalue()
    return _CLIPS[container]
