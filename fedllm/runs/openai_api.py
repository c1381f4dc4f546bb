"""An HTTP server that speaks as OpenAI-compatible clients expect; what it answers, whoever holds it says."""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from fedllm.core.errors import FedLLMError, RecipeError

log = logging.getLogger(__name__)

LARGEST_BODY = 4 << 20


class Refusal(Exception):
    """A request that gets an error: HTTP status and one sentence."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status, self.why = status, why


class ApiServer(ThreadingHTTPServer):
    """Answers POSTs by `answer`, and says under `/v1/models` what it is called."""

    daemon_threads = True
    allow_reuse_address = True
    page = b""
    """What a browser is shown at `/`; nothing where it is empty."""

    def __init__(self, name: str, host: str, port: int, api_key_env: str | None) -> None:
        if api_key_env and not os.environ.get(api_key_env):
            raise RecipeError(f"the environment variable {api_key_env} is not set, so no key can be asked for")
        super().__init__((host, port), Handler)
        self.name, self.api_key_env, self.turn = name, api_key_env, threading.Lock()

    @property
    def base_url(self) -> str:
        """What clients are given."""
        return f"http://{self.server_address[0]!s}:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke is nobody's fault here, and no traceback on the terminal."""
        log.debug("the connection of %s broke", client_address, exc_info=True)

    def allows(self, authorization: str) -> bool:
        """Whether the request carries the key, where one is asked for."""
        if not self.api_key_env:
            return True
        return hmac.compare_digest(authorization.encode(), f"Bearer {os.environ.get(self.api_key_env, '')}".encode())

    def answer(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The API's answer to one POST; Refusal for what is not offered."""
        raise Refusal(404, f"{path} is not served")

    def guard(self, headers: Mapping[str, str]) -> None:
        """Raises Refusal for a request that is not read any further."""

    def health(self) -> dict[str, Any]:
        """What `/health` says."""
        return {"status": "ok"}


class Handler(BaseHTTPRequestHandler):
    """Reads a request, writes JSON."""

    server: ApiServer
    protocol_version = "HTTP/1.1"
    timeout = 60.0  # seconds that a connection may be silent, in a request or between two
    disable_nagle_algorithm = True  # headers and body are two writes: without this each answer waits 40 ms

    def do_GET(self) -> None:
        if self.path == "/health":
            self._send(200, self.server.health())
        elif self.path == "/v1/models":
            self._send(200, {"object": "list", "data": [{"id": self.server.name, "object": "model"}]})
        elif self.path == "/" and self.server.page:
            self._reply(200, "text/html; charset=utf-8", self.server.page)
        else:
            self._refuse(Refusal(404, f"{self.path} is not served"))

    def do_POST(self) -> None:
        try:
            body = self._body()
            self.server.guard(self.headers)  # type: ignore[arg-type]
            if not self.server.allows(self.headers.get("Authorization", "")):
                raise Refusal(401, "the API key is missing or wrong")
            doc = self.server.answer(self.path, body)
            if body.get("stream"):
                self._reply(200, "text/event-stream", streamed(doc))
            else:
                self._send(200, doc)
        except Refusal as refusal:
            self._refuse(refusal)
        except FedLLMError as error:
            self._refuse(Refusal(400, str(error)))
        except Exception:
            log.exception("a completion failed")
            self._refuse(Refusal(500, "the model failed; the server's log says why"))

    def _body(self) -> Mapping[str, Any]:
        if self.headers.get("Transfer-Encoding"):
            self.close_connection = True
            raise Refusal(411, "the body must come in one piece, with its Content-Length")
        said = self.headers.get("Content-Length") or "0"
        if not (said.isascii() and said.isdigit() and len(said) < 20):
            self.close_connection = True
            raise Refusal(400, "Content-Length is not a number of bytes")
        if (length := int(said)) > LARGEST_BODY:
            self.close_connection = True
            raise Refusal(413, f"the body is {length} bytes; {LARGEST_BODY} are allowed")
        try:
            body = json.loads(self.rfile.read(length))
        except TimeoutError:
            self.close_connection = True
            raise Refusal(408, f"the body of {length} bytes did not come in {self.timeout:.0f} s") from None
        except (ValueError, RecursionError):
            raise Refusal(400, "the body is not JSON") from None
        if not isinstance(body, dict):
            raise Refusal(400, "the body is not a JSON object")
        return body

    def _refuse(self, refusal: Refusal) -> None:
        self._send(refusal.status, {"error": {"message": refusal.why, "type": "invalid_request_error"}})

    def _send(self, status: int, doc: Mapping[str, Any]) -> None:
        self._reply(status, "application/json", json.dumps(doc).encode())

    def _reply(self, status: int, kind: str, data: bytes) -> None:
        try:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError as gone:  # who asked has hung up
            self.close_connection = True
            log.debug("%s %s: nobody takes the answer: %s", self.command, self.path, gone)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("%s %s", self.command, self.path)  # never headers: they hold the key


def streamed(doc: Mapping[str, Any]) -> bytes:
    """A chat's answer as the API streams it, in one piece, with what stands beside it."""
    [one] = doc["choices"]
    beside = {k: v for k, v in doc.items() if k not in ("choices", "object")} | {"object": "chat.completion.chunk"}
    pieces = [{**beside, "choices": [{"index": 0, "delta": one["message"], "finish_reason": None}]},
              {**beside, "choices": [{"index": 0, "delta": {}, "finish_reason": one["finish_reason"]}]}]
    return "".join(f"data: {json.dumps(p)}\n\n" for p in pieces).encode() + b"data: [DONE]\n\n"


def messages(body: Mapping[str, Any]) -> list[dict[str, str]]:
    """The messages of a chat request."""
    if odd := [name for name in ("tools", "functions") if body.get(name)]:
        raise Refusal(400, f"'{odd[0]}' is not offered: answers are text")
    given = body.get("messages")
    good = isinstance(given, list) and given and all(isinstance(m, dict) and isinstance(m.get("role"), str)
                                                     for m in given)
    told = [{"role": m["role"], "content": plain(m.get("content"))} for m in given] if good else []
    if not told or any(m["content"] is None for m in told):
        raise Refusal(400, "'messages' must be a list of objects with 'role' and 'content' as text")
    return told  # type: ignore[return-value]


def plain(content: Any) -> str | None:
    """What a message says, also where it comes as a list of parts that are text; None where it is anything else."""
    if isinstance(content, list) and content and all(
            isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content):
        return "\n".join(p["text"] for p in content)
    return content if isinstance(content, str) else None


def number(body: Mapping[str, Any], key: str, default: Any, least: float = 0,
           kind: type[int] | type[float] = int) -> Any:
    """A number of the request; null counts as not given."""
    value: Any = default if body.get(key) is None else body[key]
    if isinstance(value, bool) or not isinstance(value, int | kind) or not value >= least:
        raise Refusal(400, f"'{key}' must be a number from {least} up")
    return value


@contextlib.contextmanager
def running(server: ApiServer) -> Iterator[None]:
    """The server in the background for as long as the block lasts."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
