"""Find a checkpoint, and download it from a hub on this machine."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import Mock
from urllib.parse import urlsplit

import pytest
from huggingface_hub.errors import BadRequestError, HfHubHTTPError, LocalEntryNotFoundError

import cogvid
from cogvid import cli
from cogvid.run.record import read_record
from cogvid.weights.checkpoint import describe, read_checkpoint
from cogvid.weights.hub import PACKS, find, stored_variants
from tests.checkpoints import digest

# Finding.


@pytest.mark.parametrize("name", ["no-such-model", "./nothing", "/nothing/here", "a/b/c", "", "a b/c"])
def test_what_is_nowhere_is_refused_with_what_there_is(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"^model: got .*, want a directory, a shipped pack \(.*\) or a hub id such as"
    ):
        find(name)


def test_the_short_name_of_an_official_model_says_its_hub_id() -> None:
    with pytest.raises(ValueError, match=r"got 'cogvideox-5b', whose weights are zai-org/CogVideoX-5b, want a dir"):
        find("cogvideox-5b")


def test_secrets_of_a_url_are_not_shown() -> None:
    with pytest.raises(ValueError, match=r"^model: got 'https://huggingface\.co/a/b', want a directory") as caught:
        find("https://user:SECRET@huggingface.co/a/b?token=SECRET")
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (
            HfHubHTTPError("500 for url\n'https://cdn/x?sig=SECRET'", response=Mock()),
            r"^model: got 'a/b' at 'v1', which could not be fetched whole \(500 for url 'https://cdn/x'\), want",
        ),
        (
            BadRequestError("400 for url\n'https://cdn/x?sig=SECRET'", response=Mock()),
            r"^model: got 'a/b' at 'v1', which could not be fetched whole \(400 for url 'https://cdn/x'\), want",
        ),
        (RuntimeError("broke"), r"^model: got 'a/b' at 'v1', which could not be fetched whole \(broke\), want another"),
        (LocalEntryNotFoundError("x"), r"^model: got 'a/b' at 'v1' and no connection to the hub, want a directory or"),
        (OSError(errno.ENOSPC, "No space left on device"), r"^\[Errno 28\] No space left on device$"),
    ],
    ids=["http", "bad-request", "other", "offline", "disk"],
)
def test_failures_of_a_download_are_one_line(monkeypatch: pytest.MonkeyPatch, raised: Exception, expected: str) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", Mock(side_effect=raised))
    with pytest.raises(OSError, match=expected) as caught:
        find("a/b", revision="v1")
    assert "SECRET" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_is_not_a_checkpoint(pristine: Path) -> None:
    with pytest.raises(ValueError, match=r"model_index\.json', which is a file, want the directory of a checkpoint$"):
        find(pristine / "model_index.json")


def test_shipped_packs_are_found_by_name(pristine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("cogvid.weights.hub.PACKS", pristine.parent)
    monkeypatch.chdir(tmp_path)
    (tmp_path / pristine.name).mkdir()
    assert find(pristine.name) == pristine
    assert find(f"./{pristine.name}") == Path(pristine.name)


# Downloads from a hub on this machine.

FETCHED = {
    "model_index.json": b'{"m16": 1}',
    "scheduler/scheduler_config.json": b'{"s31": 1}',
    "tokenizer/spiece.model": b"spiece",
    "tokenizer/tokenizer_config.json": b'{"k2": 1}',
    "text_encoder/config.json": b'{"t24": 1}',
    "text_encoder/model.safetensors.index.json": b'{"t41": 1}',
    "text_encoder/model-00001-of-00002.safetensors": b"1" * 30_000,
    "text_encoder/model-00002-of-00002.safetensors": b"2" * 20_000,
    "transformer/config.json": b'{"t23": 1}',
    "transformer/diffusion_pytorch_model.safetensors": b"3" * 40_000,
    "vae/config.json": b'{"v15": 1}',
    "vae/diffusion_pytorch_model.safetensors": b"4" * 10_000_000,
}
HALF = {  # the files of a variant: the transformer in shards, the text encoder in one file
    "text_encoder/model.fp16.safetensors": b"5" * 25_000,
    "transformer/diffusion_pytorch_model.safetensors.index.fp16.json": b'{"t44": 1}',
    "transformer/diffusion_pytorch_model.fp16-00001-of-00002.safetensors": b"6" * 10_000,
    "transformer/diffusion_pytorch_model.fp16-00002-of-00002.safetensors": b"7" * 10_000,
}
NOT_FETCHED = ("README.md", "tokenizer/tokenizer.json", "transformer/diffusion_pytorch_model.bin", "x.bin")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's protocol that a download needs."""

    commit = COMMIT
    files = FETCHED | HALF | dict.fromkeys(NOT_FETCHED, b"not wanted")
    repositories: ClassVar[dict[str, dict[str, bytes]]] = {
        "acme/tiny": files,
        "acme/half": {name: body for name, body in files.items() if name in HALF or "safetensors" not in name},
    }

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.wfile.write(self.answer())

    def answer(self) -> bytes:
        path = urlsplit(self.path).path
        if path == "/push":  # not of the hub's protocol: another version of acme/pack
            type(self).commit = COMMIT[::-1]
            self.repositories["acme/pack"] = self.repositories["acme/next"]
            path = "/api/models/acme/pack"
        body = None
        repo = next((name for name in self.repositories if f"/{name}" in path), "")
        files = self.repositories.get(repo, {})
        if refused := re.search(r"/refuses-with/(\d+)", path):
            self.send_response(int(refused[1]))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return b""
        if not repo:
            pass
        elif path.startswith((f"/api/models/{repo}/tree/{self.commit}", f"/api/models/{repo}/tree/main")):
            entries = [{"type": "file", "path": n, "size": len(b), "oid": digest(b)} for n, b in files.items()]
            body = json.dumps(entries).encode()
        elif path in (f"/api/models/{repo}", f"/api/models/{repo}/revision/main"):
            body = json.dumps({"id": repo, "sha": self.commit, "siblings": []}).encode()
        elif path.startswith(f"/{repo}/resolve/{self.commit}/"):
            body = files.get(path.removeprefix(f"/{repo}/resolve/{self.commit}/"))
        self.send_response(404 if body is None else 200)
        if body is None:
            known = bool(repo) and path.startswith(f"/api/models/{repo}/")
            self.send_header("X-Error-Code", "RevisionNotFound" if known else "RepoNotFound")
            body = b""
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("ETag", f'"{digest(body)}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        return body

    def log_message(self, format: str, *args: Any) -> None:
        del format, args


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Run Python code against the hub, in a process of its own (the hub's address is read at import)."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    environment = {
        **{k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and not k.startswith("HF_")},
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hub"),
    }

    def run(code: str, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    yield run
    server.shutdown()
    server.server_close()
    thread.join()


FETCH = """
import contextlib, io, json, sys
from cogvid.weights.hub import find
def files(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
def said(call):
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            call()
        except (ValueError, OSError) as error:
            return f"{type(error).__name__}: {error}"
    return [line for line in stderr.getvalue().splitlines() if line.startswith("fetching")]
result = [
    said(lambda: find("acme/tiny", local_files_only=True)),
    said(lambda: find("acme/tiny", components=["vae"])),
    files(find("acme/tiny", components=["vae"])),
    said(lambda: find("acme/tiny")),
    files(find("acme/tiny")),
    said(lambda: find("acme/tiny")),
    files(find("acme/tiny", local_files_only=True)),
    said(lambda: find("acme/other")),
    said(lambda: find("acme/tiny", revision="v9")),
    said(lambda: find("acme/a--b")),
]
print(json.dumps(result))
"""


STATUSES = """
from cogvid.weights.hub import find
for status in (401, 403, 404, 429, 500, 503):
    try:
        find(f"refuses-with/{status}")
    except (ValueError, OSError) as error:
        print(type(error).__name__, error)
"""


def test_each_refusal_of_the_hub_says_what_it_is(hub: Callable[..., str]) -> None:
    lines = hub(STATUSES).splitlines()
    expected = [
        r"ValueError model: got 'refuses-with/401', .*want ",
        r"ValueError model: got '.*/403', which the hub does not let you read \(status 403\), want .*: log in, ",
        r"ValueError model: got '.*/404', .*want ",
        r"OSError model: got '.*/429', which the hub answers with status 429, too many requests, want another try",
        r"OSError model: got '.*/500', which the hub answers with status 500, a fault of its own, want another try",
        r"OSError model: got '.*/503', which the hub answers with status 503, a fault of its own, want another try",
    ]
    assert len(lines) == len(expected), lines
    for line, pattern in zip(lines, expected, strict=True):
        assert re.match(pattern, line), line
    assert not [line for line in lines if "no connection" in line]


def test_fetching_takes_the_files_that_are_needed_and_says_how_large_they_are(hub: Callable[..., str]) -> None:
    result = json.loads(hub(FETCH))
    assert result[0] == (
        "ValueError: model: got 'acme/tiny' without network access, want a directory or a repository that is complete "
        "in the hub's local cache"
    )
    assert result[1] == ["fetching acme/tiny: 3 files, 0.010 GB"]
    assert result[2] == [name for name in sorted(FETCHED) if name.startswith(("model_index", "vae"))]
    assert result[3] == ["fetching acme/tiny: 9 files, 0.000 GB"]  # without the three that are there
    assert result[4] == sorted(FETCHED)
    assert result[5] == []
    assert result[6] == sorted(FETCHED)
    assert (
        result[7]
        == "ValueError: model: got 'acme/other', want a directory or a repository of the hub that you can read"
    )
    assert result[8] == "ValueError: revision: got 'v9', want a branch, tag or commit of acme/tiny"
    assert result[9].startswith("ValueError: model: got 'acme/a--b', want a valid hub id (Cannot have -- or ..")


FETCH_VARIANTS = """
result = [
    said(lambda: find("acme/tiny", variant="bf16")),
    said(lambda: find("acme/tiny", components=["vae"], variant="fp16")),
    said(lambda: find("acme/tiny", components=["tokenizer"], variant="fp16")),
    files(find("acme/tiny", variant="fp16")),
    files(find("acme/tiny", variant="fp16", local_files_only=True)),
    said(lambda: find("acme/tiny", variant="bf16", local_files_only=True)),
    said(lambda: find("acme/half")),
    files(find("acme/half", components=["transformer"], variant="fp16")),
]
print(json.dumps(result))
"""


def test_fetching_takes_the_files_of_a_variant_and_plain_ones_where_it_is_lacking(hub: Callable[..., str]) -> None:
    result = json.loads(hub(FETCH.split("result = [")[0] + FETCH_VARIANTS))
    assert result[0] == "ValueError: variant: got 'bf16', want None or 'fp16': acme/tiny has no other"
    assert result[1] == "ValueError: variant: got 'fp16', want None: acme/tiny has no other"
    assert result[2] == ["fetching acme/tiny: 3 files, 0.000 GB"]
    plain = [name for name in FETCHED if "safetensors" not in name or name.startswith("vae")]
    assert result[3] == sorted([*plain, *HALF])
    assert result[4] == result[3]
    assert result[5].startswith("ValueError: variant: got 'bf16', want None or 'fp16': the local cache of acme/tiny ")
    assert result[6] == "ValueError: variant: got None, want 'fp16': transformer of acme/half has no other"
    assert result[7] == sorted(["model_index.json", "transformer/config.json", *(n for n in HALF if n[:2] == "tr")])


@pytest.mark.parametrize(
    ("names", "variants"),
    [
        (["model.safetensors", "model.safetensors.index.json", "other.fp16.safetensors", "model.fp16.bin"], [None]),
        (["model-00001-of-00002.safetensors", "model.safetensors.index.json"], [None]),
        (["model.non_ema.safetensors", "model.fp16-00001-of-00009.safetensors"], ["fp16", "non_ema"]),
        (["model.safetensors.index.bf16.json", "config.json"], ["bf16"]),
        ([], []),
    ],
)
def test_variants_are_told_from_the_names(names: list[str], variants: list[str | None]) -> None:
    assert stored_variants(names, "model") == variants


class Opened:
    """List the files under a directory that anything in this process opens: Python, Rust and C++ alike."""

    OPEN, IS_DIRECTORY = 0x20, 0x40000000  # of inotify

    def __init__(self, root: Path) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.fd = self.libc.inotify_init1(os.O_NONBLOCK)
        folders = [root, *(path for path in root.rglob("*") if path.is_dir())]
        self.folders = {self.libc.inotify_add_watch(self.fd, bytes(path), self.OPEN): path for path in folders}
        self.root = root

    def files(self) -> list[str]:
        found, data = set(), b""
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self.fd, 2**16):
                data += chunk
        os.close(self.fd)
        while data:
            watch, mask, _, length = struct.unpack_from("iIII", data)
            if not mask & self.IS_DIRECTORY:
                name = data[16 : 16 + length].rstrip(b"\0").decode()
                found.add(str((self.folders[watch] / name).relative_to(self.root)))
            data = data[16 + length :]
        return sorted(found)


@pytest.mark.skipif(sys.platform != "linux", reason="asks inotify")
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_what_is_fetched_is_what_is_opened(
    hub: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variant: str | None
) -> None:
    checkpoint = shutil.copytree(PACKS / "tiny-t2v", tmp_path / "checkpoint")
    for path in list(checkpoint.glob("*/*.safetensors")):
        shutil.copy(path, path.with_suffix(".fp16.safetensors"))
    for name in ("README.md", "tokenizer/added_tokens.json", "tokenizer/special_tokens_map.json", "vae/x.bin"):
        (checkpoint / name).write_text("{}")
    whole = {str(p.relative_to(checkpoint)): p.read_bytes() for p in checkpoint.rglob("*") if p.is_file()}
    monkeypatch.setitem(Hub.repositories, "acme/pack", whole)
    code = FETCH.split("result = [")[0] + f"print(json.dumps(files(find('acme/pack', variant={variant!r}))))"
    fetched = json.loads(hub(code))

    watch = Opened(checkpoint)
    assert cogvid.load(checkpoint, device="cpu", variant=variant).checkpoint.variant == variant
    describe(read_checkpoint(checkpoint, variant=variant))
    assert watch.files() == fetched
    assert len(fetched) == 10


GENERATE = """
import os, sys, urllib.request
from cogvid.cli import main
def generate(output, *options):
    sizes = "--height 32 --width 32 --num-frames 9 --num-inference-steps 3 --seed 1 --device cpu".split()
    assert main(["generate", "x", "--model", "acme/pack", "-o", sys.argv[1] + "/" + output, *sizes, *options]) == 0
generate("first.mp4")
generate("again.mp4")
urllib.request.urlopen(urllib.request.Request(os.environ["HF_ENDPOINT"] + "/push", method="HEAD"))
generate("here.mp4", "--local-files-only")
generate("next.mp4")
"""


@pytest.mark.slow
def test_generate_asks_the_hub_for_a_newer_version_of_what_is_here(
    hub: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The newer version has other timesteps."""
    old = {str(p.relative_to(PACKS / "tiny-t2v")): p for p in (PACKS / "tiny-t2v").rglob("*") if p.is_file()}
    whole = {name: path.read_bytes() for name, path in old.items()}
    scheduler = json.loads(whole["scheduler/scheduler_config.json"])
    changed = json.dumps(scheduler | {"timestep_spacing": "leading"}).encode()
    assert scheduler["timestep_spacing"] == "trailing"
    monkeypatch.setitem(Hub.repositories, "acme/pack", whole)
    monkeypatch.setitem(Hub.repositories, "acme/next", whole | {"scheduler/scheduler_config.json": changed})
    monkeypatch.setattr(Hub, "commit", COMMIT)
    hub(GENERATE, str(tmp_path))
    records = {name: read_record(tmp_path / f"{name}.mp4") for name in ("first", "again", "here", "next")}
    assert records["again"] == records["first"]
    assert records["here"]["weights"] == records["first"]["weights"]
    assert records["first"]["weights"]["commit"] == COMMIT
    assert records["next"]["weights"]["commit"] == COMMIT[::-1]
    assert records["first"]["timesteps"] == records["here"]["timesteps"] != records["next"]["timesteps"]


def test_the_command_line_takes_a_variant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = shutil.copytree(PACKS / "tiny-t2v", tmp_path / "checkpoint")
    for path in list(checkpoint.glob("*/*.safetensors")):
        path.rename(path.with_suffix(".fp16.safetensors"))
    assert cli.main(["inspect", str(checkpoint)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("cogvid: error: variant: got None, want 'fp16': ")
    assert said.count("\n") == 1
    assert cli.main(["inspect", str(checkpoint), "--variant", "fp16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["weights"]["vae"]["dtype"] == "float16"
    output, quick = str(tmp_path / "x.mp4"), ["--num-inference-steps", "1", "--num-frames", "1", "--variant", "fp16"]
    command = ["generate", "the red circle moves right", "-o", output, "--model", str(checkpoint), *quick]
    assert cli.main(command) == 0
    assert capsys.readouterr().out == f"{output}\n"
