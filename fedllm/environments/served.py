"""Tools of an MCP server: a process of its own over stdio, by the official client, and no call without an end."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import functools
import json
import logging
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fedllm.core
from fedllm.core.errors import RecipeError, RunError
from fedllm.environments.toolbox import Told, Tool

BUILTIN = ("builtin",)
"""In the place of a command: the server that is `environments/serving.py`."""
START = 30.0
"""Seconds in which a server must have begun and told its tools."""
WAY = 1.0
"""Seconds beside those of a call: a server that bounds its own time has its say."""
END = 8.0
"""Seconds that servers are given to end with this process; the client kills what has not ended by itself in four."""
LAST = 4000
"""Bytes that are kept of what a server says on stderr."""
MOST = 1000
"""Tools of a server."""


def server_of(command: tuple[str, ...], seconds: float) -> Served:
    """The one server of this process with this command."""
    return _server_of(os.getpid(), command, seconds)  # a forked process has none of its parent's threads


@functools.lru_cache(maxsize=64)
def _server_of(pid: int, command: tuple[str, ...], seconds: float) -> Served:
    return Served(command, seconds)


class Served:
    """A server that is begun when it is first needed, and anew when it has ended or was ended for its silence.

    What it keeps must lie in files: a server that does not answer in time is killed.
    """

    def __init__(self, command: tuple[str, ...], seconds: float) -> None:
        self.command, self.seconds, self.line, self.lock = command, seconds, None, threading.Lock()

    def tools(self, places: Mapping[str, Any], only: Sequence[str] | None = None) -> list[Tool]:
        """Its tools (those named, and no others). What a tool does beside reading is what it says of itself, and by
        MCP's own defaults one that says nothing writes and reaches the network."""
        found = [t for t in self._line().tools if only is None or t.name in only]
        if odd := [t.name for t in found if t.name == "answer"]:
            raise RunError(f"data.environment.mcp = {list(self.command)}: its tool {odd[0]!r} is called as the line "
                           "that ends an episode; give it another name")
        return [self._tool(t, {k: str(v) for k, v in places.items()}) for t in found]

    def _tool(self, told: Any, places: Mapping[str, str]) -> Tool:
        hints = told.annotations
        writes = not (hints and hints.read_only_hint)
        reaches = not (hints and hints.open_world_hint is False)
        schema = told.input_schema
        return Tool(told.name, str(told.description or "")[:400],
                    lambda line: self.call(told.name, arguments(schema, line, places)),
                    ("write",) * writes + ("network",) * reaches, ends=True)

    def call(self, name: str, given: Mapping[str, Any]) -> str:
        """The tool's text. `Told` with what it says where it failed; TimeoutError where it says nothing in time, and
        the server is then ended; RunError where no server can be had."""
        line = self._line()
        work = asyncio.run_coroutine_threadsafe(line.client.call_tool(name, dict(given)), line.loop)
        try:
            got = work.result(self.seconds + WAY)
        except (TimeoutError, concurrent.futures.CancelledError):
            work.cancel()
            self.close()
            raise TimeoutError(f"the server did not answer within {self.seconds:g} s") from None
        except Exception as error:  # the line broke, or the server refuses the call
            if line.broke(error):
                self.close()
            raise Told(_first(error)) from None
        text = _text(got)
        if got.is_error:  # the SDK's servers put a beginning of their own before a tool's words
            raise Told(text.removeprefix(f"Error executing tool {name}: "))
        return text

    def close(self) -> None:
        """End the server; the next call begins another."""
        with self.lock:
            if self.line is not None:
                self.line.end()
            self.line = None

    def _line(self) -> Line:
        with self.lock:
            if self.line is None or self.line.done.done():
                self.line = Line(self.command, self.seconds)
            return self.line


class Line:
    """One process of a server, with the task that holds its streams."""

    def __init__(self, command: tuple[str, ...], seconds: float) -> None:
        self.loop, self.ready = _loop(os.getpid()), concurrent.futures.Future[None]()
        self.log = Murmur()
        self.client, self.over = None, threading.Event()
        self.done = asyncio.run_coroutine_threadsafe(self._live(command, seconds), self.loop)
        _lines.add(self)
        try:
            self.ready.result(START)
        except Exception as error:
            self.done.cancel()
            took = f"within {START:g} s" if isinstance(error, TimeoutError) else f"({_first(error)})"
            raise RunError(f"data.environment.mcp = {list(command)}: no MCP server began {took}"
                           f"{self._last_words()}") from None

    def end(self) -> None:
        """Have the process end; comes back at once."""
        self.over.set()
        self.loop.call_soon_threadsafe(lambda: self.stop.set())

    def broke(self, error: Exception) -> bool:
        """Whether this error is of the line, and not an answer of a server that lives."""
        from mcp_types import CONNECTION_CLOSED

        return self.over.is_set() or not isinstance(error, _mcp().MCPError) or error.code == CONNECTION_CLOSED

    async def _live(self, command: tuple[str, ...], seconds: float) -> None:
        self.stop = asyncio.Event()
        try:
            mcp = _mcp()
            line = mcp.stdio_client(_started(mcp, command, seconds), errlog=self.log.into)
            async with mcp.Client(line) as self.client:
                self.tools, cursor = [], None
                while len(self.tools) < MOST:
                    page = await self.client.list_tools(cursor=cursor)
                    self.tools += page.tools
                    if (cursor := page.next_cursor) is None:
                        break
                self.ready.set_result(None)
                await self.stop.wait()
        except BaseException as error:
            if not self.ready.done():
                self.ready.set_exception(RunError(_first(error)))
            elif not isinstance(error, Exception):
                raise
        finally:
            self.over.set()
            self.log.into.close()
            _lines.discard(self)

    def _last_words(self) -> str:
        lines = [line for line in self.log.last().splitlines() if line.strip()]
        return f"; its last words are {lines[-1].strip()[:200]!r}" if lines else ""


class Murmur:
    """What a process says on stderr: all is read, so that it never waits, and the last `LAST` bytes are kept."""

    def __init__(self) -> None:
        read, write = os.pipe()
        self.into, self.kept = os.fdopen(write, "w"), b""
        self.reader = threading.Thread(target=self._read, args=(read,), daemon=True)
        self.reader.start()

    def _read(self, read: int) -> None:
        with os.fdopen(read, "rb", buffering=0) as pipe:
            while said := pipe.read(1 << 16):
                self.kept = (self.kept + said)[-LAST:]

    def last(self) -> str:
        """The end of it, once the process has ended or two seconds have gone by."""
        self.into.close()
        self.reader.join(2.0)
        return self.kept.decode(errors="replace")


_lines: set[Line] = set()


@functools.cache
def _loop(pid: int) -> asyncio.AbstractEventLoop:
    """The loop in which this process talks to servers, in a thread of its own."""
    logging.getLogger("mcp").setLevel(logging.CRITICAL)  # what a server says beside the protocol is not ours to show
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="mcp", daemon=True).start()
    atexit.register(_end, pid)
    return loop


def _end(pid: int) -> None:
    mine = [line for line in _lines if pid == os.getpid()]
    for line in mine:
        line.end()
    concurrent.futures.wait([line.done for line in mine], END)


def _mcp() -> Any:
    try:
        import mcp
    except ImportError:
        raise RecipeError("data.environment.mcp needs the package mcp; pip install 'fedlm[mcp]'") from None
    return mcp


def _started(mcp: Any, command: tuple[str, ...], seconds: float) -> Any:
    """How the process begins: its environment is the few harmless variables that the client's default hands on."""
    if command != BUILTIN:
        return mcp.StdioServerParameters(command=command[0], args=list(command[1:]))
    house = str(Path(fedllm.core.__file__).parents[2])  # the fedllm that runs here, wherever it lies
    return mcp.StdioServerParameters(command=sys.executable, env={"PYTHONPATH": house}, args=[
        "-m", "fedllm.environments.serving", "--seconds", f"{seconds:g}"])


def _first(error: BaseException) -> str:
    """The first plain error of a group."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{error}".strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__


def _text(got: Any) -> str:
    said = [c.text if c.type == "text" else f"[{c.type}]" for c in got.content]
    if not said and got.structured_content is not None:
        return json.dumps(got.structured_content)
    return "\n".join(said)


def arguments(schema: Mapping[str, Any], line: str, places: Mapping[str, str]) -> dict[str, Any]:
    """A tool's arguments from the rest of a line: a JSON mapping, or words for the required properties in their order,
    of which the last takes all that is left. What is called as one of `places` is filled in, and by nobody else."""
    known = schema.get("properties") or {}
    given = {k: v for k, v in places.items() if k in known}
    if line.lstrip().startswith("{"):
        try:
            said = json.loads(line)
        except ValueError as error:
            raise Told(f"the arguments are no JSON ({error})") from None
        return {**said, **given}
    free = [p for p in known if p not in given]
    wanted = [p for p in free if p in (schema.get("required") or ())] or free[:1]
    words = line.split(None, len(wanted) - 1) if wanted and line.strip() else []
    words += [""] * (len(wanted) - len(words))
    return {**{p: _typed(known[p], w.strip()) for p, w in zip(wanted, words, strict=True)}, **given}


def _typed(schema: Any, word: str) -> Any:
    """A word as the type that the schema asks for; what is none stays a word, and the server says so."""
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    if kind in ("integer", "number", "boolean", "array", "object"):
        try:
            return json.loads(word)
        except ValueError:
            return word
    return word
