"""Hostile and damaged input, one test for each finding; `scripts/attack.py` makes cases at random."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import cogvid
from attack import READERS, attack, outcome
from cogvid.config import ScheduleConfig, TransformerConfig, VAEConfig
from cogvid.json_config import JsonConfig
from cogvid.media import download, video
from cogvid.media.video import count_frames, read_metadata, read_video
from cogvid.weights.checkpoint import read_checkpoint
from cogvid.weights.files import read_json
from cogvid.weights.identity import weights_identity
from cogvid.weights.text_config import TextConfig, TokenizerConfig
from tests.unit.test_image_url import server  # noqa: F401 - a fixture

ROOT = Path(__file__).parents[2]
QUICK = ["--height", "32", "--width", "32", "--num-frames", "1", "--num-inference-steps", "1", "--seed", "1"]


# Configs.

NUMBERS = st.integers() | st.integers(-(2**70), 2**70) | st.floats() | st.sampled_from([10**400, 2**31, 2**62, 1e-320])
SCALARS = st.none() | st.booleans() | NUMBERS | st.text()
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5), max_leaves=8
)


@pytest.mark.parametrize("config", [TransformerConfig, VAEConfig, ScheduleConfig, TextConfig, TokenizerConfig])
@given(data=st.data())
def test_any_value_in_a_config_is_taken_or_refused_in_one_short_line(
    config: type[JsonConfig], data: st.DataObject
) -> None:
    names = st.sampled_from([field.name for field in dataclasses.fields(config)])
    values = data.draw(st.dictionaries(names, JSON, min_size=1, max_size=3))
    try:
        made = config.from_dict(values)
    except ValueError as error:
        line = str(error)
        assert ": got " in line
        assert ", want " in line
        assert "\n" not in line
        assert len(line) < 400
        return
    for name, value in values.items():
        assert value == getattr(made, name) or tuple(value) == getattr(made, name)


@pytest.mark.parametrize("config", [TransformerConfig, VAEConfig, ScheduleConfig, TextConfig, TokenizerConfig])
@pytest.mark.parametrize(
    "value", [10**400, -(10**400), 2**63, -(2**63), float("nan"), float("inf"), {}, [{}]], ids=lambda v: str(v)[:9]
)
def test_no_field_takes_a_number_that_is_none_or_far_too_large(config: type[JsonConfig], value: Any) -> None:
    for field in dataclasses.fields(config):
        with pytest.raises(ValueError, match=rf"^{field.name}: got .*, want "):
            config.from_dict({field.name: value})


@pytest.mark.parametrize(
    ("file", "values"),
    [("scheduler/scheduler_config.json", {"beta_start": -1}), ("vae/config.json", {"scaling_factor": 0})],
    ids=str,
)
def test_numbers_that_no_run_survives_are_refused(
    pack: Path, failed: Callable[..., str], file: str, values: dict[str, Any]
) -> None:
    _edit(pack / file, **values)
    line = failed("generate", "x", "-o", pack / "x.mp4", "--model", pack)
    assert f"{file}: {next(iter(values))}" in line
    assert ", want " in line
    assert not (pack / "x.mp4").exists()


BUILT_WITHOUT_END = [
    ("transformer/config.json", "num_layers", 2**31),
    ("vae/config.json", "layers_per_block", 2**62),
    ("text_encoder/config.json", "num_layers", 2**31),
    ("vae/config.json", "block_out_channels", [16] * 50),
]


@pytest.mark.parametrize(("file", "name", "value"), BUILT_WITHOUT_END)
def test_what_would_be_built_until_memory_ends_is_refused(
    pack: Path, failed: Callable[..., str], file: str, name: str, value: object
) -> None:
    _edit(pack / file, **{name: value})
    assert f"{file}: {name}: got " in failed("inspect", pack)


def test_a_size_that_no_tensor_has_is_refused(pack: Path, failed: Callable[..., str]) -> None:
    large = {"num_attention_heads": 2**20, "attention_head_dim": 2**20}
    _edit(pack / "transformer" / "config.json", **large)
    assert "got sizes beyond any memory" in failed("inspect", pack)


@pytest.mark.parametrize("value", [2**62, None, "x", [1]])
def test_sentinels_out_of_range_are_refused(pack: Path, value: object) -> None:
    _edit(pack / "tokenizer" / "tokenizer_config.json", extra_ids=value)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: extra_ids: got .*, want an integer, 0 to 10000$"):
        cogvid.load(pack, device="cpu")


def test_a_list_for_a_tokenizer_config_is_refused(pack: Path) -> None:
    (pack / "tokenizer" / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: got list, want a JSON object$"):
        cogvid.load(pack, device="cpu")


@pytest.mark.parametrize("value", [[0], {}, None, "x" * 100_000])
@pytest.mark.parametrize("file", ["model_index.json", "vae/config.json"])
def test_a_class_that_is_no_name_is_refused(pack: Path, failed: Callable[..., str], file: str, value: object) -> None:
    _edit(pack / file, _class_name=value)
    assert f"{file}: got class " in failed("inspect", pack)


@pytest.mark.parametrize("values", [{"dense_act_fn": None}, {"dtype": [1]}, {"return_dict": False}, {"num_heads": {}}])
def test_a_text_encoder_takes_only_what_it_needs(pack: Path, values: dict[str, Any]) -> None:
    """What it does not need, such as `dtype`, cannot do harm."""
    _edit(pack / "text_encoder" / "config.json", **values)
    name = next(iter(values))
    if name in ("dtype", "return_dict"):
        pipe = cogvid.load(pack, device="cpu")
        assert pipe("x", height=32, width=32, num_frames=1, num_inference_steps=1, progress=False).frames
        return
    with pytest.raises(ValueError, match=rf"text_encoder/config\.json: {name}: got "):
        cogvid.load(pack, device="cpu")


def _edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _make_odd(path: Path, kind: str) -> None:
    deep = 200_000
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "large":
        with open(path, "wb") as file:
            file.truncate(2**40)
    elif kind == "loop":
        path.symlink_to(path)
    else:
        texts = {"deep": '{"a":' + "[" * deep + "]" * deep + "}", "nested": '{"a":' + "[" * 40 + "]" * 40 + "}"}
        path.write_text({**texts, "digits": '{"a": ' + "1" * 5000 + "}", "bytes": "\ufeff{}"}[kind])


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "large", "deep", "nested", "digits", "bytes"])
def test_odd_json_files_are_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "config.json"
    _make_odd(path, kind)
    with pytest.raises(ValueError, match=r"config\.json: got .*, want a JSON file") as caught:
        read_json(path)
    assert len(str(caught.value)) < 400


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["tokenizer/tokenizer_config.json", "tokenizer/spiece.model"])
def test_a_file_that_is_far_too_large_is_refused_unread(pack: Path, name: str) -> None:
    (pack / name).unlink()
    _make_odd(pack / name, "large")
    with pytest.raises(ValueError, match=rf"{name}: got 1099511627776 bytes, want at most 100000000$"):
        weights_identity(pack, read_checkpoint(pack).variants)
    with pytest.raises(ValueError, match=rf"{name}: got .*, want "):
        cogvid.load(pack, device="cpu")


def test_a_header_that_is_far_too_long_is_refused_unread(pack: Path, failed: Callable[..., str]) -> None:
    path = pack / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes((2**39).to_bytes(8, "little"))
    os.truncate(path, 2**40)
    assert "vae/diffusion_pytorch_model.safetensors: got " in failed("inspect", pack)
    with pytest.raises(ValueError, match=r"model\.safetensors: got a header of 549755813896 bytes, want at most"):
        weights_identity(pack, read_checkpoint(pack).variants)


def test_a_file_that_may_not_be_read_is_not_called_missing(pack: Path) -> None:
    if os.geteuid() != 0:
        as_user: list[str] = []
    elif shutil.which("setpriv"):
        as_user = ["setpriv", "--reuid=65534", "--clear-groups"]
    else:
        pytest.skip("root can read everything, and setpriv, which gives up its rights, is not here")
    for path in [pack, *pack.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    for parent in pack.parents:
        if parent.owner() != "root" or parent.stat().st_mode & 0o005 != 0o005:
            parent.chmod(parent.stat().st_mode | 0o055)
    code = """
import sys
from pathlib import Path
from cogvid.weights.files import load_state, read_json
from cogvid.media.video import read_video
for call in (lambda p: read_json(p), lambda p: load_state(p.parent), lambda p: read_video(p)):
    try:
        call(Path(sys.argv.pop(1)))
    except ValueError as error:
        print(error)
"""
    files = [pack / "vae" / name for name in ("config.json", "diffusion_pytorch_model.safetensors", "clip.mp4")]
    files[2].write_bytes(b"x")
    for path in files:
        path.chmod(0)
    command = [*as_user, sys.executable, "-c", code, *map(str, files)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == 3
    for line in said:
        assert "may not be read" in line or "permission denied" in line.lower(), line
        assert "no such file" not in line
        assert "does not exist" not in line


# Pictures.


def test_a_picture_takes_no_memory_for_what_it_does_not_hold(tmp_path: Path) -> None:
    """A box of a JPEG 2000 that says it has 4 GiB."""
    file = io.BytesIO()
    Image.new("RGB", (17, 13)).save(file, "JPEG2000")
    data = bytearray(file.getvalue())
    at = data.index(b"jp2h")
    data[at - 4 : at] = b"\xff\xff\x00\x00"
    (tmp_path / "picture.jp2").write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"^image: got .*, which cannot be decoded .*, want a whole picture$"):
            cogvid.load_image(tmp_path / "picture.jp2")
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()


def test_a_picture_file_that_is_far_too_large_is_refused_unread(tmp_path: Path) -> None:
    _make_odd(tmp_path / "picture.webp", "large")
    with pytest.raises(ValueError, match=r"^image: got .*, which has 1099511627776 bytes, want at most 1073741824$"):
        cogvid.load_image(tmp_path / "picture.webp")


# Videos.


def _write(path: Path, sizes: list[tuple[int, int]], container: str = "mpegts", codec: str = "mpeg2video") -> None:
    """Write frames, each of its own (height, width), one stream of packets after the other."""
    with open(path, "wb") as file:
        for height, width in sizes:
            with av.open(file, "w", format=container) as output:
                stream = output.add_stream(codec, rate=25)
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
                frame = av.VideoFrame.from_ndarray(np.zeros((height, width, 3), np.uint8), format="rgb24")
                output.mux(stream.encode(frame))
                output.mux(stream.encode(None))


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mp4"
    cogvid.export_to_video(np.zeros((20, 64, 96, 3), np.uint8), path)
    return path


@pytest.mark.parametrize(
    ("limit", "value"), [("MAX_FRAMES", 19), ("MAX_BYTES", 19 * 64 * 96 * 3), ("MAX_PIXELS", 6143)]
)
def test_a_video_beyond_a_limit_is_refused_before_it_is_decoded(
    clip: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int
) -> None:
    assert read_video(clip)[0].shape == (20, 64, 96, 3)
    monkeypatch.setattr(video, limit, value)
    if limit != "MAX_PIXELS":
        assert read_video(clip, 19)[0].shape == (19, 64, 96, 3)  # what is not wanted does not count
    seen: list[object] = []
    to_rgb = video._to_rgb
    monkeypatch.setattr(video, "_to_rgb", lambda frame: (seen.append(frame), to_rgb(frame))[1])
    with pytest.raises(ValueError, match=rf"^video: got .*, want at most .*{value}"):
        read_video(clip)
    assert len(seen) <= 1  # the size of the first frame is that of all


def test_the_command_checks_a_video_before_it_decodes_it(
    tmp_path: Path, clip: Path, failed: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video, "_decoded", None)
    line = failed("generate", "x", "--video", clip, "-o", tmp_path / "out.mp4", "--model", "tiny-t2v")
    assert line == "num_frames: got 20, want 8N or 8N + 1; the nearest are 17 and 24"
    line = failed(
        "generate", "x", "--video", clip, "-o", tmp_path / "out.mp4", "--model", "tiny-t2v", "--num-frames", 25
    )
    assert line == "num_frames: got 25, want an integer, 1 to 20"


def test_a_short_file_of_many_large_frames_takes_no_memory(tmp_path: Path) -> None:
    """24 KB that are 5 GiB when decoded."""
    path = tmp_path / "long.mkv"
    height, width, count = 1024, 2048, 860
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=25, options={"preset": "ultrafast", "crf": "51"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((height, width, 3), np.uint8), format="rgb24")
        frame = frame.reformat(format="yuv420p")
        for i in range(count):
            frame.pts = i
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    assert path.stat().st_size < 3e6
    assert count_frames(path) == count
    start = time.monotonic()
    with pytest.raises(
        ValueError, match=rf"of which {count} frames of 2048x1024 pixels are wanted, want at most 10000"
    ):
        read_video(path)
    assert time.monotonic() - start < 20
    assert read_video(path, 3)[0].shape == (3, height, width, 3)


def test_frames_of_two_sizes_are_refused(tmp_path: Path) -> None:
    _write(tmp_path / "two.ts", [(32, 32), (64, 96)], codec="libx264")
    with pytest.raises(ValueError, match=r"^video: got .*, which has frames of .* pixels, want all of one size$"):
        read_video(tmp_path / "two.ts")


def test_a_count_that_is_too_low_loses_no_frames(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read_video(clip)[0]
    monkeypatch.setattr(video, "count_frames", lambda _: 3)
    frames = read_video(clip)[0]
    assert frames.shape == whole.shape
    assert (frames == whole).all()


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0)
        yield listening


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["list.m3u8", "list.mp4", "list.mkv"])
def test_a_playlist_opens_nothing_and_does_not_wait(tmp_path: Path, listener: socket.socket, name: str) -> None:
    _write(tmp_path / "other.ts", [(32, 32)])
    port = listener.getsockname()[1]
    start = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXT-X-MEDIA-SEQUENCE:0\n"
    for text in (
        f"{start}#EXTINF:1,\nother.ts\n",  # live: it has no end
        f"{start}#EXTINF:1,\nhttp://127.0.0.1:{port}/a.ts\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile other.ts\n",
    ):
        (tmp_path / name).write_text(text)
        for read in (read_video, read_metadata, count_frames):
            with pytest.raises(ValueError, match=r"^video: got .*, want (one of mov, mp4|a whole video)"):
                read(tmp_path / name)
    with pytest.raises(BlockingIOError):
        listener.accept()


@pytest.mark.timeout(60)
def test_a_pipe_and_a_device_are_no_videos(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    for path in (tmp_path / "pipe.mp4", "/dev/zero"):
        with pytest.raises(ValueError, match=r"which is not a regular file, want a video file$"):
            read_video(path)


def test_metadata_of_another_encoding_is_no_error(tmp_path: Path) -> None:
    cogvid.export_to_video(np.zeros((2, 32, 32, 3), np.uint8), tmp_path / "clip.mp4", metadata={"a": "text"})
    data = (tmp_path / "clip.mp4").read_bytes()
    (tmp_path / "clip.mp4").write_bytes(data.replace(b"text", b"t\xff\xfet"))
    assert read_video(tmp_path / "clip.mp4")[0].shape == (2, 32, 32, 3)
    assert read_metadata(tmp_path / "clip.mp4") == {"a": "t\ufffd\ufffdt"}


# Addresses of downloads.


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True), ("2606:4700::1111", True), ("127.0.0.1", False), ("10.1.2.3", False), ("0.0.0.0", False),
        ("169.254.169.254", False), ("192.168.0.1", False), ("100.64.0.1", False), ("224.0.0.1", False), ("::1", False),
        ("240.0.0.1", False), ("fe80::1%eth0", False), ("fd00::1", False), ("::ffff:127.0.0.1", False),
        ("64:ff9b::7f00:1", False), ("2002:7f00:1::", False),
        ("ff02::1", False), ("2001:0:7f00:1::", False),
    ],
)  # fmt: skip
def test_public_addresses_are_told_from_others(address: str, public: bool) -> None:
    assert download.is_public(address) == public


PRIVATE = r"^image: got .*, which leads to an address that is not public, want a public one$"


def test_private_addresses_are_refused_when_asked_for(server: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    assert cogvid.load_image(server + "/ok.png").size == (6, 4)
    port = server.rpartition(":")[2]
    for host in ("127.0.0.1", "localhost", "[::1]", "0", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]"):
        with pytest.raises(ValueError, match=PRIVATE):
            cogvid.load_image(f"http://{host}:{port}/ok.png", allow_private=False)
    monkeypatch.setenv("http_proxy", server)  # it would fetch what we may not
    with pytest.raises(ValueError, match=PRIVATE):
        cogvid.load_image(f"http://127.0.0.1:{port}/ok.png", allow_private=False)


def test_an_address_is_checked_after_each_redirect_and_each_look_up(
    server: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A public host (here a name that is looked up to this machine) redirects to a private one, or changes its mind."""
    port = int(server.rpartition(":")[2])
    look_up, told = socket.getaddrinfo, []

    def resolved(host: str, *rest: Any, **options: Any) -> Any:
        told.append(host)
        if host == "mixed.example":  # a public and a private address
            private = look_up("127.0.0.1", port, type=socket.SOCK_STREAM)
            return [(*private[0][:4], ("8.8.8.8", port)), *private]
        return look_up("127.0.0.1" if host.endswith(".example") else host, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    with pytest.raises(ValueError, match=PRIVATE):
        cogvid.load_image(f"http://mixed.example:{port}/ok.png", allow_private=False)
    asked: list[str] = []
    monkeypatch.setattr(download, "is_public", lambda address: asked.append(address) is None and len(asked) == 1)
    assert cogvid.load_image(f"http://public.example:{port}/ok.png", allow_private=False).size == (6, 4)
    asked.clear()
    with pytest.raises(ValueError, match=PRIVATE):
        cogvid.load_image(f"http://public.example:{port}/to?http://127.0.0.1:{port}/ok.png", allow_private=False)
    assert asked == ["127.0.0.1", "127.0.0.1"]  # both times what the name was looked up to


# Random cases.


@pytest.mark.slow
def test_a_few_random_cases_of_each_reader_hold() -> None:
    check_random_cases(5)


@pytest.mark.slow
def test_many_random_cases_of_each_reader_hold() -> None:
    check_random_cases(150)


def check_random_cases(count: int) -> None:
    results = list(attack(list(READERS), seed=1, start=0, cases=count, seconds=None))
    assert len(results) == count * len(READERS)
    assert [result for result in results if result[2] not in ("read", "refused")] == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("a: got 1, want 2"), "refused"),
        (ValueError("a:\ngot 1, want 2"), "no short line"),
        (ValueError("x" * 10_000 + ", want"), "no short line"),
        (ValueError("wrong"), "says not what is wanted"),
        (ValueError("a: got S3CR3T, want"), "shows a secret"),
        (TypeError("x"), "TypeError: x"),
        (MemoryError(), "MemoryError"),
        (None, "read"),
    ],
)
def test_what_does_not_hold_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None, said: str
) -> None:
    def reader(*_: object) -> None:
        if error is not None:
            raise error

    monkeypatch.setitem(READERS, "test", reader)
    assert outcome("test", 0, 0, tmp_path).startswith(said)
