"""`cogvid ui`: checks its options, then serves the page until a signal ends it."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Callable

from cogvid.options import check_int
from cogvid.run.enhance import chat_address
from cogvid.weights.load_options import LOAD_OPTIONS

PASSWORD = "COGVID_UI_PASSWORD"  # of the environment
LOCAL = "127.0.0.1"
_QUIET = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_MCP_SERVER": "False",
    "GRADIO_SSR_MODE": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def ui(arguments: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Serve a page in which videos are made, looked at and compared, and print its address; Ctrl-C ends it."""
    check_int("port", arguments.port, 0, 65535)
    password = os.environ.get(PASSWORD) or None
    if arguments.share_on is not None and password is None:
        raise ValueError(f"share_on: got {arguments.share_on!r:.60} without a password, want one in {PASSWORD}")
    if arguments.enhance is not None:
        chat_address(arguments.enhance)
    elif arguments.llm is not None:
        raise ValueError(f"llm: got {arguments.llm!r:.60} without --enhance, want both or neither")
    directory = os.path.abspath(arguments.output_dir)
    os.environ.update(_QUIET)
    for name in ("GRADIO_TEMP_DIR", "MPLCONFIGDIR"):  # Gradio imports matplotlib; nothing is written elsewhere
        os.environ[name] = os.path.join(directory, ".gradio")
    with listen_on(arguments.share_on or LOCAL, arguments.port) as listening:
        _serve(arguments, directory, listening, password, say)


def _serve(
    arguments: argparse.Namespace,
    directory: str,
    listening: socket.socket,
    password: str | None,
    say: Callable[[str], None],
) -> None:
    from cogvid import versions

    versions.check()
    try:
        import gradio  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ImportError("gradio: got none, want it installed: pip install 'cogvid[ui]'") from None
    from cogvid.ui.engine import Engine
    from cogvid.ui.server import make_app, serve

    origin = {name: getattr(arguments, name) for name in ("defaults", "revision", "variant", "local_files_only")}
    load = {name: getattr(arguments, name) for name in LOAD_OPTIONS}
    models = arguments.model or ()
    engine = Engine(directory, models, origin=origin, load=load, url=arguments.enhance, llm=arguments.llm)
    try:
        host = arguments.share_on or LOCAL
        shared = arguments.share_on is not None
        app = make_app(engine, local=not shared, password=password if shared else None)
        name = f"[{host}]" if ":" in host else host
        serve(app, listening, lambda: say(f"http://{name}:{listening.getsockname()[1]}"))
    finally:
        engine.close()


def listen_on(host: str, port: int) -> socket.socket:
    """Return a socket that listens there; port 0 is any that is free.

    Raises:
        ValueError: the host is no address of this machine, or the port is taken or not allowed.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
    except (OSError, UnicodeError, OverflowError):
        raise ValueError(f"share_on: got {host!r:.60}, want a name or an address of this machine") from None
    made = socket.socket(family, kind)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(128)
    except OSError as error:
        made.close()
        reason = (error.strerror or "").lower()
        raise ValueError(f"port: got {port} on {host}, which cannot be used ({reason}), want another") from None
    return made
