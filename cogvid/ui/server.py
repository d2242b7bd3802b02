"""Serve the page: Gradio's application and the files of the directory, behind the guard."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from gradio import mount_gradio_app, processing_utils

from cogvid.run.errors import judged, line_of
from cogvid.run.record import read_record
from cogvid.ui.engine import Engine
from cogvid.ui.guard import Guard
from cogvid.ui.page import HERE, Page, theme
from cogvid.ui.past import Gallery
from cogvid.ui.pictures import MAX_BYTES, Pictures, media_type

_LOCAL = ("127.0.0.1", "localhost", "::1")


async def _no_download(url: str) -> Any:  # noqa: ARG001 - Gradio's name of it
    raise ValueError("url: got one from the browser, want a picture's address in its field")


def make_app(engine: Engine, *, local: bool = True, password: str | None = None) -> Guard:
    """Return the ASGI application of the page.

    local: answer only what is asked under this machine's own names. password: see `Guard`.
    """
    # Gradio would fetch any public URL that a browser names as a file. Pictures come by `Pictures.fetch` alone.
    processing_utils.async_ssrf_protected_get = _no_download
    gallery, pictures = Gallery(engine.directory), Pictures()
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    _add_files(app, engine, gallery)
    _add_pictures(app, pictures)
    blocks = Page(engine, gallery, pictures).build()
    script = f"<script>{(HERE / 'page.js').read_text(encoding='utf-8')}</script>"
    mount_gradio_app(
        app, blocks, path="/", server_name="127.0.0.1", footer_links=[], run_history=False, show_error=True,
        allowed_paths=[], blocked_paths=["/"], max_file_size=1, ssr_mode=False, enable_monitoring=False, pwa=False,
        mcp_server=False, theme=theme(), css=(HERE / "page.css").read_text(encoding="utf-8"), head=script,
    )  # fmt: skip
    return Guard(app, _LOCAL if local else None, password, MAX_BYTES + 2**20)


def _add_files(app: FastAPI, engine: Engine, gallery: Gallery) -> None:
    def file(find: Callable[[str], Path], name: str, kind: str) -> Response:
        try:
            return FileResponse(find(name), media_type=kind)
        except ValueError as error:
            return PlainTextResponse(line_of(error), 404)

    @app.get("/videos/{name}")
    def video(name: str) -> Response:
        return file(engine.video, name, "video/mp4")

    @app.get("/posters/{name}")
    def poster(name: str) -> Response:
        try:
            return Response(gallery.poster(engine.video(name)), media_type="image/jpeg")
        except ValueError as error:
            return PlainTextResponse(line_of(error), 404)

    @app.get("/compared/{name}")
    def compared(name: str) -> Response:
        return file(gallery.picture, name, "image/png")

    @app.get("/records/{name}")
    def record(name: str) -> Response:
        try:
            return JSONResponse(read_record(engine.video(name)))
        except ValueError as error:
            return PlainTextResponse(line_of(error), 404)


def _add_pictures(app: FastAPI, pictures: Pictures) -> None:
    @app.post("/pictures")
    async def add(request: Request) -> Response:
        try:
            data = await request.body()
            return PlainTextResponse(await run_in_threadpool(pictures.add, data))
        except Exception as error:
            return PlainTextResponse(line_of(judged(error)[0]), 400)

    @app.get("/pictures/{name}")
    def get(name: str) -> Response:
        try:
            data = pictures.get(name)
            return Response(data, media_type=media_type(data))
        except ValueError as error:
            return PlainTextResponse(line_of(error), 404)


def serve(app: Guard, listening: socket.socket, ready: Callable[[], None]) -> None:
    """Answer requests until an exception, such as that of a signal, ends the main thread's waiting.

    ready: called once there are answers. The server has a thread of its own, so that it does not take the signals.
    """
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=1, lifespan="on",
                            server_header=False)  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="cogvid-page", daemon=True)
    thread.start()
    try:
        while thread.is_alive() and not server.started:
            time.sleep(0.02)
        if server.started:
            ready()
        while thread.is_alive():
            thread.join(0.2)
    finally:
        server.should_exit = True
        thread.join(5)
