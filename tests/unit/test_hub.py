"""Finding a checkpoint, and fetching it from a hub of one repository on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from cogvid.hub import find
from tests.checkpoints import digest

# Finding.


@pytest.mark.parametrize("name", ["no-such-model", "./nothing", "/nothing/here", "a/b/c", "", "a b/c"])
def test_what_is_nowhere_is_refused_with_what_there_is(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"^model: got .*wanted a directory, a shipped pack \(.*\) or a hub id such as"
    ):
        find(name)


def test_the_short_name_of_an_official_model_says_its_hub_id() -> None:
    with pytest.raises(ValueError, match=r"got 'cogvideox-5b'; its weights are zai-org/CogVideoX-5b; wanted"):
        find("cogvideox-5b")


def test_a_file_is_not_a_checkpoint(pristine: Path) -> None:
    with pytest.raises(ValueError, match=r"model_index\.json is a file, wanted the directory of a checkpoint$"):
        find(pristine / "model_index.json")


def test_shipped_packs_are_found_by_name(pristine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("cogvid.hub.PACKS", pristine.parent)
    monkeypatch.chdir(tmp_path)
    (tmp_path / pristine.name).mkdir()
    assert find(pristine.name) == pristine
    assert find(f"./{pristine.name}") == Path(pristine.name)


# Fetching, from a hub of one repository on this machine.

FETCHED = {
    "model_index.json": b'{"m16": 1}',
    "scheduler/scheduler_config.json": b'{"s31": 1}',
    "tokenizer/spiece.model": b"spiece",
    "text_encoder/config.json": b'{"t24": 1}',
    "text_encoder/model.safetensors.index.json": b'{"t41": 1}',
    "text_encoder/model-00001-of-00002.safetensors": b"1" * 30_000,
    "text_encoder/model-00002-of-00002.safetensors": b"2" * 20_000,
    "transformer/config.json": b'{"t23": 1}',
    "transformer/diffusion_pytorch_model.safetensors": b"3" * 40_000,
    "vae/config.json": b'{"v15": 1}',
    "vae/diffusion_pytorch_model.safetensors": b"4" * 10_000_000,
}
NOT_FETCHED = ("README.md", "tokenizer/tokenizer.json", "transformer/diffusion_pytorch_model.fp16.safetensors", "x.bin")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as a download takes."""

    files = FETCHED | dict.fromkeys(NOT_FETCHED, b"not wanted")

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.wfile.write(self.answer())

    def answer(self) -> bytes:
        path = urlsplit(self.path).path
        body = None
        if path.startswith(f"/api/models/acme/tiny/tree/{COMMIT}"):
            entries = [{"type": "file", "path": n, "size": len(b), "oid": digest(b)} for n, b in self.files.items()]
            body = json.dumps(entries).encode()
        elif path in ("/api/models/acme/tiny", "/api/models/acme/tiny/revision/main"):
            body = json.dumps({"id": "acme/tiny", "sha": COMMIT, "siblings": []}).encode()
        elif path.startswith(f"/acme/tiny/resolve/{COMMIT}/"):
            body = self.files.get(path.removeprefix(f"/acme/tiny/resolve/{COMMIT}/"))
        self.send_response(404 if body is None else 200)
        if body is None:
            known = path.startswith("/api/models/acme/tiny/")
            self.send_header("X-Error-Code", "RevisionNotFound" if known else "RepoNotFound")
            body = b""
        self.send_header("X-Repo-Commit", COMMIT)
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

    def run(code: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    yield run
    server.shutdown()
    server.server_close()
    thread.join()


FETCH = """
import contextlib, io, json, sys
from cogvid.hub import find
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
]
print(json.dumps(result))
"""


def test_fetching_takes_the_files_that_are_needed_and_says_how_large_they_are(hub: Callable[..., str]) -> None:
    result = json.loads(hub(FETCH))
    assert result[0].startswith("ValueError: model: acme/tiny is no directory here and not whole in the hub's local")
    assert result[1] == ["fetching acme/tiny: 3 files, 0.010 GB"]
    assert result[2] == [name for name in sorted(FETCHED) if name.startswith(("model_index", "vae"))]
    assert result[3] == ["fetching acme/tiny: 8 files, 0.000 GB"]  # without the three that are there
    assert result[4] == sorted(FETCHED)
    assert result[5] == []
    assert result[6] == sorted(FETCHED)
    assert (
        result[7] == "ValueError: model: acme/other is no directory here and no repository of the hub that you can read"
    )
    assert result[8] == "ValueError: model: the hub has no revision 'v9' of acme/tiny"
