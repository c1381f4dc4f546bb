"""Serve a model of ours over HTTP as OpenAI-compatible clients expect: `python -m fedllm.cli.serve_model --model DIR`.

`/v1/completions`, `/v1/chat/completions`, `/v1/models` and `/health`, on 127.0.0.1 unless told otherwise. One prompt
at a time; no streaming. It is meant for tests and for one's own machine, not for the open network.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from fedllm.local.text import LocalText
from fedllm.models.endpoint import Completion
from fedllm.models.load import load_model
from fedllm.runs.openai_api import ApiServer, Handler, Refusal, messages, number, running
from fedllm.spaces import make_space

__all__ = ["Handler", "ModelServer", "serving"]
log = logging.getLogger(__name__)

DEFAULT_TOKENS = 16  # what the API says when `max_tokens` is not given


class ModelServer(ApiServer):
    """An HTTP server that holds a model; requests wait for it in turn."""

    def __init__(self, text: LocalText, name: str, host: str, port: int, api_key_env: str | None) -> None:
        super().__init__(name, host, port, api_key_env)
        self.text = text

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


def prompts_of(body: Mapping[str, Any]) -> list[str]:
    """The prompt or prompts of a completions request."""
    given = body.get("prompt")
    prompts = [given] if isinstance(given, str) else given
    if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) for p in prompts):
        raise Refusal(400, "'prompt' must be text or a list of texts")
    return prompts


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
    with running(server):
        yield server


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
