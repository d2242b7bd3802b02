"""A language model's server on this machine, which misbehaves in many ways."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LONG = "A red circle lies on a black ground. It moves to the right, slowly and evenly, in soft light."


@dataclass
class LLMServer:
    """What a server was asked. url: of its root; the first folder of the path says how it answers, "ok" is well."""

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)

    def base(self, kind: str = "ok") -> str:
        return f"{self.url}/{kind}/v1"


@contextlib.contextmanager
def serve_llm(text: object = LONG) -> Iterator[LLMServer]:
    """Answer each request with a text."""
    stop = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.paths.append(self.path)
            asked.headers.append(dict(self.headers))
            asked.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            kind = self.path.split("/")[1]
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client went away, as it should
                getattr(self, kind)()

        def log_message(self, format: str, *args: object) -> None:
            pass

        def reply(self, body: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content_Length": str(len(body)), **headers}.items():
                if value:
                    self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def ok(self, said: object = text, **choice: object) -> None:
            choices = [{"index": 0, "message": {"role": "assistant", "content": said}, **choice}]
            self.reply(json.dumps({"object": "chat.completion", "choices": choices}).encode())

        def cut(self) -> None:
            self.ok(finish_reason="length")

        def echo(self) -> None:
            self.ok(f"You sent {self.headers['Authorization']} to {self.path}")

        def refused(self) -> None:
            self.reply(f"bad key {self.headers['Authorization']}".encode(), 401)

        def missing(self) -> None:
            self.reply(b"", 404)

        def busy_once(self) -> None:
            self.reply(b"", 429, Retry_After="0") if len(asked.paths) == 1 else self.ok()

        def busy_long(self) -> None:
            self.reply(b"", 429, Retry_After="3600")

        def broken(self) -> None:
            self.reply(self.headers["Authorization"].encode(), 500)

        def elsewhere(self) -> None:
            self.reply(b"", 307, Location=str(text))

        def garbage(self) -> None:
            self.reply(b'{"choices": [')

        def nested(self) -> None:
            self.reply(b"[" * 100_000)

        def other(self) -> None:
            self.reply(b'{"choices": []}')

        def number(self) -> None:
            self.ok(5)

        def nothing(self) -> None:
            self.ok(None, finish_reason="length")

        def blank(self) -> None:
            self.ok(" \n ")

        def escape(self) -> None:
            self.ok("a \x1b[31mred circle")

        def surrogate(self) -> None:
            self.ok("a \ud800 circle")

        def huge(self) -> None:
            self.ok("circle " * 1000)

        def empty(self) -> None:
            self.reply(b"")

        def endless(self) -> None:
            self.reply(b'{"choices": "', Content_Length="")
            while not stop.is_set():
                self.wfile.write(b"x" * 65536)

        def stall(self) -> None:
            stop.wait(60)

        def drip(self) -> None:
            self.reply(b"", Content_Length="100000")
            while not stop.wait(0.05):
                self.wfile.write(b" ")

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    asked = LLMServer(f"http://127.0.0.1:{httpd.server_port}")
    threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield asked
    finally:
        stop.set()
        httpd.shutdown()
        httpd.server_close()
