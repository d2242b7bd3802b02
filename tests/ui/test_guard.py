"""Who may ask the page, for what and how much; what visitors may give; what `cogvid ui` refuses before it serves."""

from __future__ import annotations

import asyncio
import base64
import io
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cogvid import cli
from cogvid.run.settings import OPTIONS
from cogvid.ui import fields
from cogvid.ui.guard import Guard
from cogvid.ui.past import Gallery
from cogvid.ui.pictures import MAX_BYTES, Pictures, media_type
from cogvid.weights.checkpoint import read_checkpoint
from cogvid.weights.hub import packs

ROOT = Path(__file__).parents[2]


def ask(guard: Guard, path: str = "/", body: bytes = b"", **headers: str) -> tuple[int, dict[str, str]]:
    """Ask for a path; return the status and the headers of the answer."""
    given = {"host": "127.0.0.1:7860", "content-length": str(len(body)), **headers}
    listed = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in given.items()]
    scope = {"type": "http", "method": "POST", "path": path, "headers": listed}
    sent: list[Any] = []
    chunks = [body[i : i + 40] for i in range(0, len(body), 40)] or [b""]
    left = iter({"type": "http.request", "body": each, "more_body": True} for each in chunks)

    async def receive() -> Any:
        return next(left, {"type": "http.disconnect"})

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(guard(scope, receive, send))
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], headers


async def echo(_scope: Any, receive: Any, send: Any) -> None:
    """Read all, and say 200, or 400 if the visitor was cut off."""
    got = 0
    while (message := await receive())["type"] == "http.request" and message["body"]:
        got += len(message["body"])
    await send({"type": "http.response.start", "status": 200 if got <= 100 else 400, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def basic(password: str) -> str:
    return "Basic " + base64.b64encode(f"me:{password}".encode()).decode()


def test_only_what_the_page_has_is_answered() -> None:
    guard = Guard(echo, ("127.0.0.1", "localhost", "::1"), None, 100)
    for path in ("/", "/config", "/videos/x.mp4", "/gradio_api/run/predict", "/assets/index.js"):
        status, headers = ask(guard, path)
        assert status == 200, path
        assert "default-src 'self'" in headers["content-security-policy"]
    for path in (
        "/gradio_api/file=/etc/passwd", "/gradio_api/upload", "/gradio_api/proxy=http://10.0.0.1/", "/monitoring",
        "/gradio_api/component_server", "/gradio_api/file=http://10.0.0.1/", "/docs", "/login", "/gradio_api/call/x",
    ):  # fmt: skip
        assert ask(guard, path)[0] == 404, path


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "localhost"}, 200),
        ({"host": "[::1]:7860"}, 200),
        ({"host": "evil.example:7860"}, 421),
        ({"host": "127.0.0.1.evil.example"}, 421),
        ({"host": ""}, 421),
        ({"origin": "http://127.0.0.1:7860"}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
    ],
)
def test_other_sites_cannot_ask(headers: dict[str, str], status: int) -> None:
    assert ask(Guard(echo, ("127.0.0.1", "localhost", "::1"), None, 100), **headers)[0] == status


def test_the_password_is_asked_for_everything() -> None:
    guard = Guard(echo, None, "sëcret", 100)
    assert ask(guard, host="page.example", authorization=basic("sëcret"))[0] == 200
    for given in ("", "Basic", "Basic !!", "Bearer sëcret", basic(""), basic("sëcre"), basic("sëcret1")):
        for path in ("/", "/videos/x.mp4", "/assets/index.js", "/nothing"):
            status, headers = ask(guard, path, authorization=given)
            assert status == 401, given
            assert headers["www-authenticate"].startswith("Basic")


def test_a_body_is_limited_whatever_its_header_says() -> None:
    guard = Guard(echo, None, None, 100)
    assert ask(guard, "/pictures", b"x" * 100)[0] == 200
    assert ask(guard, "/pictures", b"x" * 101)[0] == 413
    for header in ("-1", "1e9", "9" * 30, "x"):
        assert ask(guard, "/pictures", b"x", content_length=header)[0] == 413
    seen: list[int] = []

    async def count(_scope: Any, receive: Any, send: Any) -> None:
        while (message := await receive())["type"] == "http.request":
            seen.append(len(message["body"]))
        await echo(_scope, receive, send)

    ask(Guard(count, None, None, 100), "/pictures", b"x" * 1000, content_length="10")
    assert sum(seen) <= 100


def encoded(kind: str, size: tuple[int, int] = (8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (200, 30, 40)).save(file, kind)
    return file.getvalue()


def test_pictures_are_checked_and_few_are_kept() -> None:
    pictures = Pictures()
    data = encoded("PNG")
    first = pictures.add(data)
    assert pictures.get(first) == data
    assert media_type(data) == "image/png"
    for bad in (b"", b"no picture", b"<svg xmlns='http://www.w3.org/2000/svg'/>", encoded("TIFF"), encoded("PDF")):
        with pytest.raises(ValueError, match="image: got a file of another type, want one of PNG"):
            pictures.add(bad)
    with pytest.raises(ValueError, match="image: got a bytes object, which cannot be decoded"):
        pictures.add(encoded("PNG", (64, 64))[:90])
    with pytest.raises(ValueError, match=rf"want at most {MAX_BYTES}"):
        pictures.add(data + b"\0" * MAX_BYTES)
    with pytest.raises(ValueError, match="pixels, want at most"):
        pictures.add(encoded("PNG", (5000, 4000)))
    names = [pictures.add(encoded("BMP")) for _ in range(32)]
    assert len({first, *names}) == 33
    with pytest.raises(ValueError, match="image: got one that is not kept any more"):
        pictures.get(first)


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1/x", "http://[::1]/x", "http://localhost/x", "http://169.254.169.254/x", "http://10.0.0.1/x"],
)
def test_private_addresses_are_not_fetched(url: str) -> None:
    with pytest.raises(ValueError, match="leads to an address that is not public"):
        Pictures().fetch(url)


@pytest.mark.parametrize("url", ["/etc/passwd", "file:///etc/passwd", "data:image/png;base64,AA", "", "ftp://a/b"])
def test_nothing_but_http_is_fetched(url: str) -> None:
    with pytest.raises(ValueError, match="want an http or https URL"):
        Pictures().fetch(url)


def test_every_option_has_a_field() -> None:
    groups = fields.groups()
    assert sorted(name for names in groups.values() for name in names) == sorted(OPTIONS)
    assert all(OPTIONS[name].metadata["upstream"] for name in groups[fields.UPSTREAM])
    for pack in packs():
        model = read_checkpoint(pack).model
        assert fields.recommended(model, model.tasks[0]).keys() == OPTIONS.keys()
    assert fields.recommended(model, "text-to-video")["num_frames"] == "17"


def test_a_new_option_gets_a_field(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIONS, "brightness", OPTIONS["strength"])
    assert "brightness" in fields.groups()[fields.OTHERS]


def test_fields_are_read_as_the_command_line_reads_them() -> None:
    given = {"num_frames": " 9 ", "guidance_scale": "6", "scheduler": "", "guidance_interval": None, "step_cache": "x"}
    assert fields.read(given) == {"num_frames": 9, "guidance_scale": 6.0, "step_cache": "x"}
    assert type(fields.read(given)["guidance_scale"]) is float
    with pytest.raises(ValueError, match=r"num_frames: got '9\.5', want a whole number"):
        fields.read({"num_frames": "9.5"})
    with pytest.raises(ValueError, match="guidance_scale: got 'x', want a number"):
        fields.read({"guidance_scale": "x"})


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Path]:
    for seed in (1, 2):
        out = tmp_path / f"{seed}.mp4"
        command = ["generate", "a red circle moves right", f"--seed={seed}", "--num-frames=9"]
        assert cli.main([*command, "--num-inference-steps=1", "-o", str(out)]) == 0
    return tmp_path


@pytest.mark.slow
def test_the_gallery_finds_compares_and_bounds(two: Path) -> None:
    (two / "other.mp4").write_bytes(b"no video")
    (two / ".hidden.mp4").write_bytes((two / "1.mp4").read_bytes())
    gallery = Gallery(two)
    assert {past.seed for past in gallery.runs()} == {1, 2}
    assert [past.name for past in gallery.runs("RED circle", "tiny-t2v", 2)] == ["2.mp4"]
    assert gallery.runs("blue") == gallery.runs(model="tiny-i2v") == gallery.runs(seed=3) == []
    assert gallery.models() == ["tiny-t2v"]
    found, name = gallery.compare(two / "1.mp4", two / "2.mp4")
    assert len(found.rows) == 9
    assert found.first == 0
    assert Image.open(gallery.picture(name)).height == 3 * 64
    assert Image.open(io.BytesIO(gallery.poster(two / "1.mp4"))).size == (64, 64)
    for wrong in ("../1.mp4", "x.png", "/etc/passwd", ""):
        with pytest.raises(ValueError, match="picture: got"):
            gallery.picture(wrong)


def failed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["ui", *arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    return line.removeprefix("cogvid: error: ")


def test_what_cannot_be_served_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COGVID_UI_PASSWORD", raising=False)
    said: Callable[..., str] = lambda *options: failed(capsys, f"--output-dir={tmp_path / 'out'}", *options)  # noqa: E731
    assert said("--share-on", "0.0.0.0") == (
        "share_on: got '0.0.0.0' without a password, want one in COGVID_UI_PASSWORD"
    )
    assert said("--port=70000") == "port: got 70000, want an integer, 0 to 65535"
    assert said("--llm=x") == "llm: got 'x' without --enhance, want both or neither"
    assert said("--enhance=ftp://x").startswith("enhance: got 'ftp://x', which leads to the scheme 'ftp'")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert said(f"--port={port}") == (
            f"port: got {port} on 127.0.0.1, which cannot be used (address already in use), want another"
        )
    monkeypatch.setenv("COGVID_UI_PASSWORD", "x")
    assert said("--share-on", "no.such.host.invalid").startswith("share_on: got 'no.such.host.invalid', want a name")
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert said("--port=0") == "gradio: got none, want it installed: pip install 'cogvid[ui]'"
    assert not (tmp_path / "out").exists()


SERVED = """
import base64, json, os, signal, subprocess, sys, time, urllib.request, urllib.error
directory = sys.argv[1]
environment = {**os.environ, "COGVID_UI_PASSWORD": "secret", "HOME": directory}
command = [sys.executable, "-m", "cogvid", "ui", "--port=0", "--share-on=127.0.0.1", f"--output-dir={directory}/out"]
server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=directory)
url = server.stdout.readline().strip()
def get(path, **headers):
    try:
        with urllib.request.urlopen(urllib.request.Request(url + path, headers=headers)) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
known = {"Authorization": "Basic " + base64.b64encode(b"me:secret").decode()}
found = [get("/"), get("/", **known), get("/gradio_api/file=/etc/passwd", **known), get("/videos/x.mp4", **known)]
server.send_signal(getattr(signal, sys.argv[2]))
print(json.dumps([found, server.wait(30), sorted(os.listdir(directory))]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_shared_page_asks_for_the_password_and_ends_in_order(tmp_path: Path, name: str, status: int) -> None:
    pytest.importorskip("gradio", reason="needs the extra ui")
    command = [sys.executable, "-c", SERVED, str(tmp_path), name]
    said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=120).stdout
    assert said.strip() == f'[[401, 200, 404, 404], {status}, ["out"]]'
