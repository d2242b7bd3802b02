"""Download a picture from an http or https address within a time and a size."""

from __future__ import annotations

import contextlib
import http.client
import socket
import string
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

_REDIRECTS = (301, 302, 303, 307, 308)


def download(url: str, *, timeout: float, max_bytes: int, max_redirects: int) -> bytes:
    """Fetch a URL within `timeout` seconds whatever the server does.

    A socket's own time-out starts anew with each byte, and a name look-up has none. So the work is done in a thread
    that the caller stops waiting for at the deadline; closing its sockets then ends it.
    """
    name = shown(url)
    deadline = time.monotonic() + timeout
    sockets: list[socket.socket] = []
    result: list[bytes | BaseException] = []

    def work() -> None:
        try:
            result.append(_fetch(url, deadline, sockets, max_bytes, max_redirects))
        except BaseException as error:  # handed to the caller, who raises it
            result.append(error)

    thread = threading.Thread(target=work, daemon=True, name="cogvid-download")
    thread.start()
    try:
        thread.join(timeout)
    finally:
        finished = bool(result)
        for sock in list(sockets):
            with contextlib.suppress(OSError):  # it was closed already
                sock.shutdown(socket.SHUT_RDWR)
    outcome = result[0] if finished else TimeoutError()
    reason = outcome.reason if isinstance(outcome, urllib.error.URLError) else outcome
    if isinstance(reason, bytes):
        return reason
    if isinstance(reason, TimeoutError):
        raise ValueError(f"image {name} was not received within {timeout:g} seconds")
    if isinstance(reason, _Refused):
        raise ValueError(f"image {name} {reason}")
    if isinstance(reason, (OSError, http.client.HTTPException, ValueError, str)):
        raise ValueError(f"cannot fetch image {name}: {one_line(reason)}")
    raise reason


class _Refused(Exception):
    """The server answered, but not with something that we accept. The message continues "image URL"."""


def _fetch(url: str, deadline: float, sockets: list[socket.socket], max_bytes: int, max_redirects: int) -> bytes:
    opener = _opener(deadline, sockets)
    for _ in range(max_redirects + 1):
        request = urllib.request.Request(_escaped(url), headers={"User-Agent": "cogvid", "Accept": "image/*"})
        with opener.open(request, timeout=max(deadline - time.monotonic(), 0.001)) as response:
            location = response.headers.get("Location")
            if response.status in _REDIRECTS and location:
                url = urllib.parse.urljoin(url, location)
                continue
            return _read_body(response, max_bytes)
    raise _Refused(f"redirects more than {max_redirects} times")


def _read_body(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    if response.status != 200:
        raise _Refused(f"was answered with status {response.status} {response.reason}, wanted 200".replace(" ,", ","))
    if response.headers.get_content_type() in ("text/html", "application/xhtml+xml"):
        raise _Refused("is an HTML page, wanted the address of the picture itself")
    announced = response.length  # None where the server does not say
    if announced is not None and announced > max_bytes:
        raise _Refused(f"has {announced} bytes, wanted at most {max_bytes}")
    body = bytearray()
    while chunk := response.read1(65536):
        body += chunk
        if len(body) > max_bytes:
            raise _Refused(f"has more than {max_bytes} bytes, wanted at most that many")
    if announced is not None and len(body) < announced:
        raise _Refused(f"broke off after {len(body)} of {announced} bytes")
    if not body:
        raise _Refused("is empty, wanted a picture")
    return bytes(body)


def _opener(deadline: float, sockets: list[socket.socket]) -> urllib.request.OpenerDirector:
    """Make an opener of http and https alone (proxies of the environment apply) that lists its sockets."""

    class Plain(http.client.HTTPConnection):
        def connect(self) -> None:
            super().connect()
            _register(self.sock)

    class Secure(http.client.HTTPSConnection):
        def connect(self) -> None:
            super().connect()
            _register(self.sock)

    def _register(sock: socket.socket) -> None:
        sockets.append(sock)
        if time.monotonic() > deadline:  # nobody waits any more
            raise TimeoutError

    class HTTP(urllib.request.HTTPHandler):
        def http_open(self, req: urllib.request.Request) -> Any:
            return self.do_open(Plain, req)

    class HTTPS(urllib.request.HTTPSHandler):
        def https_open(self, req: urllib.request.Request) -> Any:
            return self.do_open(Secure, req)

    opener = urllib.request.OpenerDirector()
    # Neither a redirect handler nor an error processor: `_fetch` sees every answer and checks every address itself.
    for handler in (urllib.request.ProxyHandler(), HTTP(), HTTPS()):
        opener.add_handler(handler)
    return opener


def _escaped(url: str) -> str:
    """Check the scheme, drop the fragment and encode what may not stand in a request line."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise _Refused(f"leads to the scheme {parts.scheme!r}, wanted http or https")
    host = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode("ascii")
    path, query = (urllib.parse.quote(part, safe=string.punctuation) for part in (parts.path, parts.query))
    return urllib.parse.urlunsplit((parts.scheme, host, path, query, ""))


def shown(name: str | bytes) -> str:
    """Quote a name for a message: on one line, and not longer than one."""
    text = repr(name)
    return text if len(text) <= 200 else text[:197] + "..."


def one_line(error: object) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
