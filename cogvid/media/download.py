"""Download a picture from an http or https URL, or post to one, within a time limit and a size limit.

No message shows the secrets of a URL: `shown` and `one_line` leave out its userinfo, its query and its fragment.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import re
import socket
import string
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

_T = TypeVar("_T")
_REDIRECTS = (301, 302, 303, 307, 308)
_URL_START = re.compile(r"[^/?#@]*:/+")  # whatever may be meant for a scheme; `Path` makes "http:/" of "http://"
_HOST = re.compile(r"([^:@]*|\[[^\]]*\])(:\d*)?")
_URL_IN_TEXT = re.compile(r"(?<![A-Za-z0-9+.-])[A-Za-z0-9+.-]+://[^\s'\"<>]+")  # looks at each character once


class Refused(Exception):
    """What came is not accepted. The message continues "NAME: got URL, which"."""


def download(url: str, *, timeout: float, max_bytes: int, max_redirects: int, allow_private: bool = True) -> bytes:
    """Fetch a URL within `timeout` seconds, whatever the server does.

    Args:
        url: http or https, without user name and password. Proxies of the environment are used.
        timeout: seconds for the whole download: host name look-up, connection, redirects and body.
        max_bytes: largest body to accept.
        max_redirects: most redirects to follow; the rules for `url` hold for each target.
        allow_private: False: connect to public addresses alone, and to no proxy. Each address is checked that a
            connection is made to, after redirects and name look-ups.
    Raises:
        ValueError: no picture was received within these limits.
    """

    def fetch(deadline: float, sockets: list[socket.socket]) -> bytes:
        return _fetch(url, deadline, sockets, max_bytes, max_redirects, allow_private)

    return _in_time("image", "picture", url, timeout, fetch)


def post(
    name: str, url: str, body: bytes, headers: Mapping[str, str], *, timeout: float, max_bytes: int
) -> tuple[int, Mapping[str, str], bytes]:
    """Post to a URL within `timeout` seconds, whatever the server does; follow no redirect.

    So the headers reach the host of the URL alone, or the proxy that the environment names for it.

    Args:
        name: what messages call the URL.
        url, timeout, max_bytes: as for `download`.
    Returns:
        The status, the headers and the body of the reply; the body is empty where the status is not 200.
    Raises:
        ValueError: no reply was received within these limits.
    """

    def send(deadline: float, sockets: list[socket.socket]) -> tuple[int, Mapping[str, str], bytes]:
        request = urllib.request.Request(checked_url(url), body, {"User-Agent": "cogvid", **headers}, method="POST")
        opener = _opener(deadline, sockets, allow_private=True)
        with opener.open(request, timeout=max(deadline - time.monotonic(), 0.001)) as response:
            reply = _read_body(response, max_bytes, "reply") if response.status == 200 else b""
            return response.status, response.headers, reply

    return _in_time(name, "reply", url, timeout, send)


def _in_time(name: str, what: str, url: str, timeout: float, work: Callable[[float, list[socket.socket]], _T]) -> _T:
    """Return what `work` does by a deadline with sockets that it lists, or raise a ValueError. what: it should get."""
    # The timeout of a socket restarts with each byte, and a name look-up has no timeout. So a thread does the work, and
    # the caller stops waiting at the deadline. Closing the sockets then ends the thread.
    deadline = time.monotonic() + timeout
    sockets: list[socket.socket] = []
    done: list[_T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work(deadline, sockets))
        except BaseException as error:  # the caller raises it
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True, name="cogvid-download")
    thread.start()
    try:
        thread.join(timeout)
    finally:
        outcome = done[:] or failed[:] or [TimeoutError()]
        for sock in list(sockets):
            with contextlib.suppress(OSError):  # it was closed already
                sock.shutdown(socket.SHUT_RDWR)
    if isinstance(outcome[0], BaseException):
        raise ValueError(f"{name}: got {shown(url)}, which {_reason(outcome[0], timeout, what)}")
    return outcome[0]


def _reason(error: BaseException | str, timeout: float, what: str) -> str:
    """Say what went wrong, without the words of a library or a server that may repeat the URL."""
    if isinstance(error, urllib.error.URLError):
        error = error.reason
    if isinstance(error, TimeoutError):
        return f"was not received within {timeout:g} seconds, want a server that answers in time"
    if isinstance(error, Refused):
        return str(error)
    if isinstance(error, OSError):
        return f"cannot be fetched ({one_line(error)}), want a {what} that can be downloaded"
    if isinstance(error, (http.client.InvalidURL, ValueError, str)):
        return "is not a valid URL or has an invalid proxy set for it, want valid ones"
    if isinstance(error, http.client.IncompleteRead):
        return f"broke off, want a whole {what}"
    if isinstance(error, http.client.HTTPException):
        return "was answered with something that is not HTTP, want an http or https server"
    raise error


def _fetch(
    url: str, deadline: float, sockets: list[socket.socket], max_bytes: int, max_redirects: int, allow_private: bool
) -> bytes:
    opener = _opener(deadline, sockets, allow_private)
    for _ in range(max_redirects + 1):
        request = urllib.request.Request(checked_url(url), headers={"User-Agent": "cogvid", "Accept": "image/*"})
        with opener.open(request, timeout=max(deadline - time.monotonic(), 0.001)) as response:
            location = response.headers.get("Location")
            if response.status in _REDIRECTS and location:
                url = urllib.parse.urljoin(url, location)
                continue
            _check_is_picture(response)
            return _read_body(response, max_bytes, "picture")
    raise Refused(f"redirects more than {max_redirects} times, want at most that many redirects")


def status_line(status: int) -> str:
    """Return a status with the standard's words for it, not the server's."""
    return f"{status} {http.client.responses.get(status, '')}".strip()


def _check_is_picture(response: http.client.HTTPResponse) -> None:
    if response.status != 200:
        raise Refused(f"was answered with status {status_line(response.status)}, want 200")
    if response.headers.get_content_type() in ("text/html", "application/xhtml+xml"):
        raise Refused("is an HTML page, want the address of the picture itself")


def _read_body(response: http.client.HTTPResponse, max_bytes: int, what: str) -> bytes:
    announced = response.length  # None where the server does not say
    if announced is not None and announced > max_bytes:
        raise Refused(f"has {announced} bytes, want at most {max_bytes}")
    body = bytearray()
    while chunk := response.read1(65536):
        body += chunk
        if len(body) > max_bytes:
            raise Refused(f"has more than {max_bytes} bytes, want at most that many")
    if announced is not None and len(body) < announced:
        raise Refused(f"broke off after {len(body)} of {announced} bytes, want a whole {what}")
    if not body:
        raise Refused(f"is empty, want a {what}")
    return bytes(body)


def _opener(deadline: float, sockets: list[socket.socket], allow_private: bool) -> urllib.request.OpenerDirector:
    """Make an opener for http and https only. It lists its sockets.

    It uses the proxies of the environment, unless private addresses are forbidden: a proxy chooses the address itself.
    """

    class Plain(http.client.HTTPConnection):
        def connect(self) -> None:
            self._create_connection = socket.create_connection if allow_private else _connect_to_public
            super().connect()
            _register(self.sock)

    class Secure(http.client.HTTPSConnection):
        def connect(self) -> None:
            self._create_connection = socket.create_connection if allow_private else _connect_to_public
            super().connect()
            _register(self.sock)

    def _register(sock: socket.socket) -> None:
        sockets.append(sock)
        if time.monotonic() > deadline:  # the caller no longer waits
            raise TimeoutError

    class HTTP(urllib.request.HTTPHandler):
        def http_open(self, req: urllib.request.Request) -> Any:
            return self.do_open(Plain, req)

    class HTTPS(urllib.request.HTTPSHandler):
        def https_open(self, req: urllib.request.Request) -> Any:
            return self.do_open(Secure, req)

    opener = urllib.request.OpenerDirector()
    # No redirect handler and no error processor: `_fetch` sees every answer and checks every address itself.
    for handler in (urllib.request.ProxyHandler(None if allow_private else {}), HTTP(), HTTPS()):
        opener.add_handler(handler)
    return opener


def _connect_to_public(address: tuple[str, int], timeout: float, _source: object) -> socket.socket:
    """Connect as `socket.create_connection` does, to the very addresses that were checked."""
    found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
    for entry in found:
        if not is_public(str(entry[4][0])):
            raise Refused("leads to an address that is not public, want a public one")
    failure = OSError("no address")
    for family, kind, protocol, _name, place in found:
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(timeout)
            sock.connect(place)
            return sock
        except OSError as error:
            sock.close()
            failure = error
    raise failure


def is_public(address: str) -> bool:
    """Say whether an IP address is of the public internet, and so is each address that it stands for."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if not ip.is_global or ip.is_multicast or ip.is_reserved:
        return False
    if isinstance(ip, ipaddress.IPv4Address):
        return True
    return all(v4 is None or is_public(str(v4)) for v4 in (ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())))


def checked_url(url: str) -> str:
    """Check a URL, drop its fragment and encode the characters that a request line does not allow."""
    try:
        parts = urllib.parse.urlsplit(url)
        _ = parts.port  # raises unless it is a number
    except ValueError:
        raise Refused("is not a valid URL, want an http or https URL") from None
    if parts.scheme not in ("http", "https"):
        raise Refused(f"leads to the scheme {parts.scheme!r}, want http or https")
    if "@" in parts.netloc:  # it would be taken for a part of the host name
        raise Refused("has a user name or a password, want a URL without them")
    host = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode("ascii")
    path, query = (urllib.parse.quote(part, safe=string.punctuation) for part in (parts.path, parts.query))
    return urllib.parse.urlunsplit((parts.scheme, host, path, query, ""))


def shown(name: str | bytes) -> str:
    """Quote a path or a URL for a message: one short line, without the secrets of a URL."""
    if isinstance(name, str) and (start := _URL_START.match(name)):
        name = start[0] + _without_secrets(name[start.end() :])
    text = repr(name)
    return text if len(text) <= 200 else f"{text[:98]}...{text[-99:]}"  # the end of a path says most


def one_line(error: object, longest: int = 300) -> str:
    """Return the words of an error for a message: one short line, without the secrets of URLs in it."""
    text = without_secrets(" ".join(str(error).split()))
    if len(text) > longest:  # the end has what is wanted
        half = (longest - 5) // 2
        text = f"{text[:half]} ... {text[-half:]}"
    return text or type(error).__name__


def without_secrets(text: str) -> str:
    """Return a text without user names, passwords, queries and fragments of the URLs in it."""
    return _URL_IN_TEXT.sub(lambda url: "//".join(map(_without_secrets, url[0].split("//", 1))), text)


def _without_secrets(rest: str) -> str:
    """Cut what follows the `//` of a URL to its host and path, or to `...` where they cannot be told from secrets."""
    host, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    host = host.rpartition("@")[2]
    return host + slash + path if _HOST.fullmatch(host) and "@" not in path else "..."
