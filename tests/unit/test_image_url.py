"""Pictures from http(s) URLs, from a server on this machine that misbehaves in many ways."""

import contextlib
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from cogvid.media.download import download, one_line
from cogvid.media.image import load_image

PICTURE = Image.new("RGB", (6, 4), (200, 30, 40))
LATE = 20  # seconds; a request without a deadline would never end, and a busy machine may be slow


def _png() -> bytes:
    buffer = io.BytesIO()
    PICTURE.save(buffer, "PNG")
    return buffer.getvalue()


class _Handler(BaseHTTPRequestHandler):
    """A server in which each path misbehaves in another way."""

    stop: threading.Event  # set when the test is over

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        with contextlib.suppress(
            BrokenPipeError, ConnectionResetError
        ):  # the client closed the connection, as it should
            getattr(self, path.strip("/").replace("-", "_").split(".")[0], self.missing)(query)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, status: int = 200, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            if value:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def ok(self, _: str) -> None:
        self.answer(body=_png(), Content_Type="image/png")

    def unlabelled(self, _: str) -> None:
        self.answer(body=_png(), Content_Length="")

    def chunked(self, _: str) -> None:
        self.protocol_version = "HTTP/1.1"
        half = len(_png()) // 2
        chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (_png()[:half], _png()[half:], b""))
        self.answer(body=chunks, Transfer_Encoding="chunked", Content_Length="")

    def chunked_cut(self, _: str) -> None:
        self.protocol_version = "HTTP/1.1"
        self.answer(body=b"ffff\r\n" + _png(), Transfer_Encoding="chunked", Connection="close", Content_Length="")
        self.close_connection = True

    def missing(self, _: str) -> None:
        self.answer(404, b"<html>nothing here</html>", Content_Type="text/html")

    def teapot(self, _: str) -> None:
        self.answer(500, _png(), Content_Type="image/png")

    def no_content(self, _: str) -> None:
        self.answer(204)

    def html(self, _: str) -> None:
        self.answer(body=b"<html>a page about a picture</html>", Content_Type="text/html; charset=utf-8")

    def text(self, _: str) -> None:
        self.answer(body=b"not a picture", Content_Type="image/png")

    def empty(self, _: str) -> None:
        self.answer(Content_Type="image/png")

    def cut(self, _: str) -> None:
        self.answer(body=_png(), Content_Length=str(len(_png()) + 10))

    def announced_huge(self, _: str) -> None:
        self.answer(Content_Length=str(10**12))

    def endless(self, _: str) -> None:
        self.answer(Content_Type="image/png", Content_Length="")
        while not self.stop.is_set():
            self.wfile.write(b"\0" * 65536)

    def stall(self, _: str) -> None:
        self.stop.wait(20)

    def stall_in_body(self, _: str) -> None:
        self.answer(body=_png()[:20], Content_Length=str(len(_png())))
        self.wfile.flush()
        self.stop.wait(20)

    def drip(self, _: str) -> None:
        self.answer(Content_Length="100000")
        while not self.stop.wait(0.05):
            self.wfile.write(b"\0")

    def drip_headers(self, _: str) -> None:
        self.wfile.write(b"HTTP/1.0 200 OK\r\nX-Slow: ")
        while not self.stop.wait(0.05):
            self.wfile.write(b"x")

    def garbage(self, _: str) -> None:
        self.wfile.write(b"\x00\x01 this is not HTTP\r\n\r\n")

    def to(self, query: str) -> None:
        self.answer(302, Location=query)

    def hops(self, query: str) -> None:
        left = int(query)
        self.answer(307, Location=f"/hops?{left - 1}" if left > 1 else "ok.png")

    def loop(self, _: str) -> None:
        self.answer(301, Location="/loop")

    def nowhere(self, _: str) -> None:
        self.answer(302)

    def fat_redirect(self, _: str) -> None:
        self.answer(302, Location="/ok.png", Content_Length="")
        while not self.stop.is_set():
            self.wfile.write(b"\0" * 65536)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):  # a proxy could not reach this machine
        monkeypatch.delenv(name, raising=False)
    handler = type("Handler", (_Handler,), {"stop": threading.Event()})
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    handler.stop.set()
    httpd.shutdown()
    httpd.server_close()


@pytest.mark.parametrize(
    "path",
    [
        "/ok.png",
        "/unlabelled",
        "/chunked",
        "/to?/ok.png",
        "/to?ok.png",
        "/hops?5",
        "/fat-redirect",
        "/ok.png?a b=ü#fragment",
    ],
)
def test_picture_arrives(server: str, path: str) -> None:
    image = load_image(server + path)
    assert image.mode == "RGB"
    assert image.tobytes() == PICTURE.tobytes()


def test_bytes_arrive_as_they_are(server: str) -> None:
    assert download(server + "/to?/ok.png", timeout=10, max_bytes=len(_png()), max_redirects=1) == _png()


def test_scheme_is_case_insensitive(server: str) -> None:
    assert load_image(server.replace("http", "HTTP") + "/ok.png").size == PICTURE.size


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/missing.png", "was answered with status 404 Not Found, want 200"),
        ("/teapot", "status 500"),
        ("/no-content", "status 204"),
        ("/nowhere", "status 302"),
        ("/html", "is an HTML page"),
        ("/text", "is not a picture, want"),
        ("/empty", "is empty"),
        ("/cut", "broke off after"),
        ("/chunked-cut", "broke off, want a whole picture"),
        ("/garbage", "not HTTP, want an http or https server"),
        ("/announced-huge", "has 1000000000000 bytes, want at most 1000000"),
        ("/endless", "has more than 1000000 bytes, want at most that many"),
        ("/loop", "redirects more than 5 times, want at most"),
        ("/hops?6", "redirects more than 5 times"),
        ("/to?file:///etc/passwd", "leads to the scheme 'file', want http or https"),
        ("/to?ftp://127.0.0.1/picture.png", "leads to the scheme 'ftp', want http or https"),
        ("/to?data:image/png;base64,AAAA", "leads to the scheme 'data', want http or https"),
        ("/to?gopher://127.0.0.1/", "leads to the scheme 'gopher', want http or https"),
        ("/to?/missing.png", "status 404"),
    ],
)
def test_bad_answers_raise_one_line(server: str, path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_image(server + path, max_bytes=1_000_000, timeout=10)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"image: got {(server + path).split('?')[0]!r}, which ")
    assert ", want " in str(caught.value)


def _download_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "cogvid-download"]


@pytest.mark.parametrize("path", ["/stall", "/stall-in-body", "/drip", "/drip-headers"])
def test_slow_servers_are_left_at_the_deadline(server: str, path: str) -> None:
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"was not received within 0\.4 seconds"):
        load_image(server + path, timeout=0.4)
    assert time.monotonic() - start < LATE
    for thread in _download_threads():
        thread.join(5)
    assert _download_threads() == []  # no thread is left


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "ftp://127.0.0.1/a.png", "data:image/png;base64,AAAA", "gopher://x/", "s3://bucket/a.png"],
)
def test_other_schemes_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"^image: got .*, which leads to the scheme .*, want http or https$"):
        load_image(url)


@pytest.mark.parametrize("url", ["http://", "http://[::1", "http://127.0.0.1:notaport/a.png", "http://a\r\nb/x.png"])
def test_malformed_urls_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="image") as caught:
        load_image(url, timeout=5)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "{server}/missing.png?token=SECRET#SECRET",
        "{server}/to?/missing.png%3Ftoken=SECRET",
        "{server}/text?a SECRET",
        "{server}/garbage?SECRET",
        "http://user:SECRET@127.0.0.1/a.png",
        "http://SECRET@127.0.0.1/a.png",
        "http://user:SECRET/a@127.0.0.1/a.png",
        "http://user:SECRET?@127.0.0.1/a.png",
        "http://user:12#SECRET@127.0.0.1/a.png",
        "http://user:SECRET@[::1/a.png",
        "http://user:SECRET@a\u2100b/a.png",
        "http://a b/x.png?SECRET",
        "s3://key:SECRET@bucket/a.png?SECRET",
        " http://user:SECRET@127.0.0.1/a.png?SECRET",
        "http:/user:SECRET@127.0.0.1/a.png?SECRET",
    ],
)
@pytest.mark.parametrize("proxy", [None, "server", "http:user:SECRET@proxy"], ids=["direct", "proxy", "bad-proxy"])
def test_secrets_of_urls_are_not_shown(
    server: str, monkeypatch: pytest.MonkeyPatch, url: str, proxy: str | None
) -> None:
    if proxy is not None:
        monkeypatch.setenv("http_proxy", server if proxy == "server" else proxy)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
    with pytest.raises(ValueError, match=r"^image: got .*, want ") as caught:
        load_image(url.format(server=server), timeout=5)
    assert "SECRET" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_path_that_was_made_of_a_url_shows_no_secrets() -> None:
    with pytest.raises(ValueError, match=r"^image: got 'https:/host/a\.png', which cannot be read") as caught:
        load_image(Path("https://user:SECRET@host/a.png?token=SECRET"))
    assert "SECRET" not in str(caught.value)


def test_secrets_in_the_words_of_a_library_are_not_shown() -> None:
    words = "403 for 'https://me:SECRET@hub/a?sig=SECRET'\nand http://b/c#SECRET (hf://d?SECRET)"
    assert one_line(words) == "403 for 'https://hub/a' and http://b/c (hf://d"
    assert one_line(OSError()) == "OSError"


def test_refused_connections_say_so() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, but nobody listens
        with pytest.raises(ValueError, match=r"^image: got .*, which cannot be fetched \(.*refused\), want"):
            load_image(f"http://127.0.0.1:{unused.getsockname()[1]}/a.png", timeout=5)


def test_silent_tls_server_is_left_at_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        with pytest.raises(ValueError, match=r"was not received within 0\.4 seconds"):
            load_image(f"https://127.0.0.1:{silent.getsockname()[1]}/a.png", timeout=0.4)
        assert time.monotonic() - start < LATE


def test_plain_server_is_not_taken_for_https(server: str) -> None:
    with pytest.raises(ValueError, match=r"^image: got 'https:.*, which cannot be fetched"):
        load_image(server.replace("http", "https") + "/ok.png", timeout=5)


def test_hosts_are_looked_up_within_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answer = threading.Event(), threading.Event()

    def never(*_: object, **__: object) -> Callable[[], None]:
        asked.set()
        answer.wait(60)
        raise socket.gaierror(socket.EAI_AGAIN, "no answer")

    monkeypatch.setattr(socket, "getaddrinfo", never)
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"was not received within 0\.3 seconds"):
        load_image("http://pictures.invalid/a.png", timeout=0.3)
    assert time.monotonic() - start < LATE
    assert asked.is_set()
    answer.set()


def test_proxies_of_the_environment_are_used(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with pytest.raises(ValueError, match="status 404"):  # as a proxy the server gets a full URL, which it does not know
        load_image("http://pictures.invalid/a.png", timeout=5)
