"""What stands before every request of the page: who may ask, for what, and how much he may send."""

from __future__ import annotations

import base64
import binascii
import secrets
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any
from urllib.parse import urlsplit

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# All that the page asks for. Gradio's own uploads, files and proxies are not among it: pictures come by /pictures, and
# what is served are videos of the directory by their names.
EXACT = (
    "/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/pictures", "/gradio_api/run/predict",
    "/gradio_api/startup-events", "/gradio_api/app_id", "/gradio_api/info",
)  # fmt: skip
PREFIXES = (
    "/assets/", "/static/", "/svelte/", "/videos/", "/posters/", "/records/", "/pictures/", "/compared/",
    "/gradio_api/heartbeat/",
)  # fmt: skip
HEADERS = {
    # The browser asks no other host. Gradio runs functions that it makes of text.
    "content-security-policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


class Guard:
    """An ASGI application before another one.

    hosts: what the header Host may name, so that no other site can be made to lead here; None is anything. password: of
    HTTP's basic authentication, with any user name; None asks for none. max_bytes: of the body of a request.
    """

    def __init__(self, app: App, hosts: Collection[str] | None, password: str | None, max_bytes: int) -> None:
        self._app, self._hosts, self._password, self._max_bytes = app, hosts, password, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        refused = self._refused(scope["path"], headers)
        if refused is not None:
            await _answer(send, *refused)
            return
        await self._app(scope, self._limited(receive), _with_headers(send))

    def _refused(self, path: str, headers: dict[str, str]) -> tuple[int, str] | None:
        """Return the status and the words of an answer to a request that is not accepted; else None."""
        host = headers.get("host", "")
        if self._hosts is not None and urlsplit(f"//{host}").hostname not in self._hosts:
            return 421, "host: got another one than that of the page, want its own address"
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return 403, "origin: got a request of another site, want one of the page"
        if self._password is not None and not _knows(headers.get("authorization", ""), self._password):
            return 401, "password: got none or another one, want that of COGVID_UI_PASSWORD"
        if path not in EXACT and not path.startswith(PREFIXES):
            return 404, "path: got one that the page does not have, want one of the page"
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self._max_bytes:
            return 413, f"body: got {length[:20]} bytes, want at most {self._max_bytes}"
        return None

    def _limited(self, receive: Receive) -> Receive:
        """Return a `receive` that ends a body which is longer than it may be, whatever its header says."""
        got = 0

        async def limited() -> MutableMapping[str, Any]:
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            return message if got <= self._max_bytes else {"type": "http.disconnect"}

        return limited


def _knows(authorization: str, password: str) -> bool:
    scheme, _, encoded = authorization.partition(" ")
    try:
        given = base64.b64decode(encoded, validate=True).partition(b":")[2]
    except (binascii.Error, ValueError):
        return False
    return scheme.lower() == "basic" and secrets.compare_digest(given, password.encode())


def _with_headers(send: Send) -> Send:
    async def with_headers(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            message = {**message, "headers": [*message["headers"], *added]}
        await send(message)

    return with_headers


async def _answer(send: Send, status: int, words: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    if status == 401:
        headers.append((b"www-authenticate", b'Basic realm="cogvid", charset="UTF-8"'))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": words.encode()})
