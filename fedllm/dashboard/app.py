"""The dashboard's routes: the page, what it shows as JSON and as a stream of events, and two actions."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from functools import cache
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from fedllm.core.errors import RunError
from fedllm.dashboard.board import Board
from fedllm.dashboard.gate import Gate

HERE = Path(__file__).parent
SIDE_BY_SIDE, STREAMS = 12, 64
"""Most runs in one stream, and streams at a time."""
EVERY, ALIVE = 1.0, 15.0
"""Seconds between two looks of a stream, and after which an empty line says that it is still there."""
SCRIPT = "text/javascript"
FILES = {name: name for name in ("dashboard.js", "charts.js", "dashboard.css")} | {"report.css": "../report/report.css"}
LONG = {"Cache-Control": "max-age=86400"}


@cache
def plotly() -> bytes:
    """The library that draws the curves, as the installed package brings it."""
    import plotly.offline

    return plotly.offline.get_plotlyjs().encode()


class Pages:
    """What each route answers."""

    def __init__(self, board: Board, csrf: str) -> None:
        self.board, self.csrf, self.streams = board, csrf, 0
        self.closing = asyncio.Event()

    async def page(self, request: Request) -> Response:
        """The one page; all that it shows comes as JSON and is put in as text."""
        text = (HERE / "page.html").read_text(encoding="utf-8").replace("{csrf}", self.csrf)
        return Response(text, media_type="text/html")

    async def file(self, request: Request) -> Response:
        """One of the files that the page is made of."""
        name = request.path_params["name"]
        if name == "plotly.js":
            return Response(await run_in_threadpool(plotly), media_type=SCRIPT, headers=LONG)
        if name not in FILES:
            raise HTTPException(404, "there is no such file")
        return Response((HERE / FILES[name]).read_bytes(), media_type="text/css" if name.endswith(".css") else SCRIPT)

    async def runs(self, request: Request) -> Response:
        """The list."""
        await run_in_threadpool(self.board.look)
        return JSONResponse(await run_in_threadpool(self.board.list))

    async def run(self, request: Request) -> Response:
        """One run in full."""
        await run_in_threadpool(self.board.look)
        return JSONResponse(await run_in_threadpool(self.board.run, request.path_params["id"]))

    async def act(self, request: Request) -> Response:
        """Stop or resume."""
        act = {"stop": self.board.stop, "resume": self.board.resume}.get(request.path_params["act"])
        if act is None:
            raise HTTPException(404, "there are stop and resume")
        return JSONResponse({"says": await run_in_threadpool(act, request.path_params["id"])})

    async def stream(self, request: Request) -> Response:
        """Server-sent events: the list and the runs that are asked for, whenever they change."""
        ids = list(dict.fromkeys(request.query_params.getlist("run")))
        if len(ids) > SIDE_BY_SIDE:
            raise HTTPException(400, f"{len(ids)} runs: at most {SIDE_BY_SIDE} are shown side by side")
        if self.streams >= STREAMS:
            raise HTTPException(503, f"{STREAMS} pages are open already; close some")
        return StreamingResponse(self.events(request, ids), media_type="text/event-stream")

    async def events(self, request: Request, ids: list[str]) -> AsyncIterator[str]:
        """What a stream sends until its page is closed, or the dashboard is."""
        self.streams += 1
        seen, sent, quiet = -1, dict[str, Any](), 0.0
        try:
            while not self.closing.is_set() and not await request.is_disconnected():
                version = await run_in_threadpool(self.board.look)
                quiet += EVERY
                if version != seen:
                    seen, quiet = version, 0.0
                    yield told("runs", await run_in_threadpool(self.board.list))
                    now = self.board.versions(ids)
                    for id in ids:
                        if id not in now:
                            yield told("gone", {"id": id})
                        elif sent.get(id) != now[id]:
                            yield told("run", await run_in_threadpool(self.board.run, id))
                    sent = now
                elif quiet > ALIVE:
                    quiet = 0.0
                    yield ": still here\n\n"
                await asyncio.sleep(EVERY)
        finally:
            self.streams -= 1


def told(kind: str, value: Any) -> str:
    """One server-sent event."""
    return f"event: {kind}\ndata: {json.dumps(value, allow_nan=False)}\n\n"


async def refused(request: Request, error: Exception) -> Response:
    """What was asked in vain, as JSON."""
    status = error.status_code if isinstance(error, HTTPException) else 409
    return JSONResponse({"error": error.detail if isinstance(error, HTTPException) else str(error)}, status)


def make_app(board: Board, token: str | None = None) -> Starlette:
    """The whole application; `token` None: on loopback, without one."""
    csrf = secrets.token_urlsafe(32)
    pages = Pages(board, csrf)
    routes = [Route("/", pages.page), Route("/file/{name}", pages.file), Route("/api/runs", pages.runs),
              Route("/api/run/{id}", pages.run), Route("/api/stream", pages.stream),
              Route("/api/run/{id}/{act}", pages.act, methods=["POST"])]
    app = Starlette(routes=routes, middleware=[Middleware(Gate, token=token, csrf=csrf)],
                    exception_handlers={RunError: refused, HTTPException: refused})
    app.state.pages = pages
    return app
