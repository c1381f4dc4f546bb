"""Serve a model of ours over HTTP as OpenAI-compatible clients expect: `python -m fedllm.cli.serve_model --model DIR`.

`/v1/completions`, `/v1/chat/completions`, `/v1/models` and `/health`, on 127.0.0.1 unless told otherwise. One prompt
at a time; no streaming. It is meant for tests and for one's own machine, not for the open network.
"""

from __future__ import annotations

import argparse
import contextlib
import hmac
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from fedllm.core.errors import FedLLMError, RecipeError
from fedllm.local.text import LocalText
from fedllm.models.endpoint import Completion
from fedllm.models.load import load_model
from fedllm.spaces import make_space

log = logging.getLogger(__name__)

LARGEST_BODY = 4 << 20
DEFAULT_TOKENS = 16  # what the API says when `max_tokens` is not given


class Refusal(Exception):
    """A request that gets an error: HTTP status and one sentence."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status, self.why = status, why


class ModelServer(ThreadingHTTPServer):
    """An HTTP server that holds a model; requests wait for it in turn."""

    daemon_threads = True

    def __init__(self, text: LocalText, name: str, host: str, port: int, api_key_env: str | None) -> None:
        if api_key_env and not os.environ.get(api_key_env):
            raise RecipeError(f"the environment variable {api_key_env} is not set, so no key can be asked for")
        super().__init__((host, port), Handler)
        self.text, self.name, self.api_key_env, self.turn = text, name, api_key_env, threading.Lock()

    @property
    def base_url(self) -> str:
        """What clients are given."""
        return f"http://{self.server_address[0]!s}:{self.server_address[1]}/v1"

    def allows(self, authorization: str) -> bool:
        """Whether the request carries the key, where one is asked for."""
        if not self.api_key_env:
            return True
        return hmac.compare_digest(authorization.encode(), f"Bearer {os.environ.get(self.api_key_env, '')}".encode())

    def answer(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The API's answer to one POST; Refusal for what is not offered."""
        if path not in ("/v1/completions", "/v1/chat/completions"):
            raise Refusal(404, f"{path} is not served; /v1/completions and /v1/chat/completions are")
        if body.get("stream") or body.get("n", 1) != 1:
            raise Refusal(400, "'stream' and 'n' above 1 are not offered")
        chat = path.endswith("chat/completions")
        prompts = [self.text.chat_prompt(messages(body))] if chat else prompts_of(body)
        new = number(body, "max_tokens", DEFAULT_TOKENS, least=1)
        temperature, seed = number(body, "temperature", 0, kind=float), number(body, "seed", 0)
        with self.turn:  # the model is one, the threads are many
            said = self.text.complete(prompts, new, temperature, seed)
        return {"id": f"cmpl-{uuid.uuid4().hex}", "object": "chat.completion" if chat else "text_completion",
                "created": int(time.time()), "model": self.name,
                "choices": [choice(i, c, chat, new) for i, c in enumerate(said)],
                "usage": {"prompt_tokens": (read := sum(c.prompt_tokens for c in said)),
                          "completion_tokens": (wrote := sum(c.completion_tokens for c in said)),
                          "total_tokens": read + wrote}}


class Handler(BaseHTTPRequestHandler):
    """Reads a request, writes JSON."""

    server: ModelServer
    protocol_version = "HTTP/1.1"
    timeout = 60.0  # seconds that a connection may be silent, in a request or between two
    disable_nagle_algorithm = True  # headers and body are two writes: without this each answer waits 40 ms

    def do_GET(self) -> None:
        if self.path == "/health":
            self._send(200, {"status": "ok"})
        elif self.path == "/v1/models":
            self._send(200, {"object": "list", "data": [{"id": self.server.name, "object": "model"}]})
        else:
            self._refuse(Refusal(404, f"{self.path} is not served"))

    def do_POST(self) -> None:
        try:
            body = self._body()
            if not self.server.allows(self.headers.get("Authorization", "")):
                raise Refusal(401, "the API key is missing or wrong")
            self._send(200, self.server.answer(self.path, body))
        except Refusal as refusal:
            self._refuse(refusal)
        except FedLLMError as error:
            self._refuse(Refusal(400, str(error)))
        except Exception:
            log.exception("a completion failed")
            self._refuse(Refusal(500, "the model failed; the server's log says why"))

    def _body(self) -> Mapping[str, Any]:
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
        except ValueError:
            raise Refusal(400, "the body is not JSON") from None
        if not isinstance(body, dict):
            raise Refusal(400, "the body is not a JSON object")
        return body

    def _refuse(self, refusal: Refusal) -> None:
        self._send(refusal.status, {"error": {"message": refusal.why, "type": "invalid_request_error"}})

    def _send(self, status: int, doc: Mapping[str, Any]) -> None:
        data = json.dumps(doc).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("%s %s", self.command, self.path)  # never headers: they hold the key


def prompts_of(body: Mapping[str, Any]) -> list[str]:
    """The prompt or prompts of a completions request."""
    given = body.get("prompt")
    prompts = [given] if isinstance(given, str) else given
    if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) for p in prompts):
        raise Refusal(400, "'prompt' must be text or a list of texts")
    return prompts


def messages(body: Mapping[str, Any]) -> list[dict[str, str]]:
    """The messages of a chat request."""
    given = body.get("messages")
    good = isinstance(given, list) and given and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in given)
    if not good:
        raise Refusal(400, "'messages' must be a list of objects with 'role' and 'content' as text")
    return given  # type: ignore[return-value]


def number(body: Mapping[str, Any], key: str, default: Any, least: float = 0,
           kind: type[int] | type[float] = int) -> Any:
    """A number of the request; null counts as not given."""
    value: Any = default if body.get(key) is None else body[key]
    if isinstance(value, bool) or not isinstance(value, int | kind) or not value >= least:
        raise Refusal(400, f"'{key}' must be a number from {least} up")
    return value


def choice(index: int, said: Completion, chat: bool, limit: int) -> dict[str, Any]:
    """One answer in the API's shape; the log-probability stands in one piece, since only its sum is known."""
    end = "length" if said.completion_tokens >= limit else "stop"
    if chat:
        pieces: dict[str, Any] = {"content": [{"token": said.text, "logprob": said.logprob, "top_logprobs": []}]}
        return {"index": index, "finish_reason": end, "logprobs": pieces,
                "message": {"role": "assistant", "content": said.text}}
    whole = {"tokens": [said.text], "token_logprobs": [said.logprob]}
    return {"index": index, "finish_reason": end, "logprobs": whole, "text": said.text}


@contextlib.contextmanager
def serving(text: LocalText, name: str = "local", *, host: str = "127.0.0.1", port: int = 0,
            api_key_env: str | None = None) -> Iterator[ModelServer]:
    """A server in the background for as long as the block lasts; port 0 takes a free one."""
    server = ModelServer(text, name, host, port, api_key_env)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def main() -> None:
    """Read the command line and serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded", help="'embedded', a folder, or a Hub id")
    parser.add_argument("--name", help="the name that clients give; the model's by default")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--api-key-env", help="environment variable with a key that clients must send")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    text = LocalText(load_model(given.model, "generation", make_space("lora")))
    server = ModelServer(text, given.name or given.model, given.host, given.port, given.api_key_env)
    log.info("serving %s at %s", server.name, server.base_url)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
    server.server_close()


if __name__ == "__main__":
    main()
