"""Put questions to a federation that answers them elsewhere: where `fedllm serve --ask` takes them."""

from __future__ import annotations

import os
import time
from typing import Any

import httpx

from fedllm.core.errors import EndpointError, RecipeError
from fedllm.models.bounded import client_for, whole
from fedllm.models.endpoint import UNFIT, carried, complaint, hidden
from fedllm.runs.asking import Answered, check_question


class FarSession:
    """The other end of `fedllm serve --ask`."""

    def __init__(self, url: str, timeout: float, key_env: str | None = None) -> None:
        """`key_env` is the NAME of an environment variable. RecipeError for one that is not set."""
        if not timeout > 0:
            raise RecipeError(f"timeout = {timeout!r} is not allowed; it must be > 0 (seconds)")
        self.key = "" if key_env is None else os.environ.get(key_env, "")
        if key_env is not None and not self.key:
            raise RecipeError(f"--key-env {key_env}: this environment variable is not set")
        if not carried(self.key):
            raise RecipeError(f"--key-env {key_env}: this environment variable {UNFIT}")
        self.url, self.timeout = f"{url.rstrip('/').removesuffix('/v1')}/v1/chat/completions", timeout
        try:
            self.http = client_for(self.url, timeout)
            if not self.http.build_request("POST", self.url).url.host:
                raise httpx.InvalidURL("it names no host")
        except (httpx.InvalidURL, ValueError) as error:
            raise RecipeError(f"{url!r} is no address: {error}") from None

    def ask(self, question: str) -> Answered:
        """Its answer; EndpointError when none comes within `timeout`, or one of another shape."""
        check_question(question)
        began = time.monotonic()
        try:
            said = whole(self.http, "POST", self.url, self.timeout,
                         json={"messages": [{"role": "user", "content": question}]},
                         headers={"Authorization": f"Bearer {self.key}"} if self.key else {})
        except httpx.ConnectError:
            raise EndpointError(f"{self.url}: nobody answers there (ConnectError); is `fedllm serve --ask` still "
                                "running?") from None
        except httpx.HTTPError as error:
            raise EndpointError(f"{self.url}: {type(error).__name__}: {hidden(str(error), self.key)}") from None
        if said.status_code != 200:
            raise EndpointError(f"{self.url}: HTTP {said.status_code}: {hidden(complaint(said), self.key)}")
        try:
            return _answered(question, said.json(), time.monotonic() - began)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise EndpointError(f"{self.url}: its answer is not that of `fedllm serve --ask` "
                                f"({type(error).__name__}: {error})") from None


def _answered(question: str, doc: dict[str, Any], seconds: float) -> Answered:
    sources, cost = doc["sources"], doc["fedllm"]
    passages = [{"id": str(s["id"]), "clients": list(map(str, s["sites"])), "text": str(s["text"])} for s in sources]
    said = {"passages": passages, "cited": [int(s["number"]) for s in sources if s["cited"]],
            "asked": list(cost["asked"]), "left_out": cost["left_out"]}
    text, spent = str(doc["choices"][0]["message"]["content"]), {"write": float(cost["writing_seconds"])}
    return Answered(question, text, tuple(map(str, cost["rests_on"])), dict(cost["missing"]), dict(cost["bytes"]),
                    seconds, said, spent)
