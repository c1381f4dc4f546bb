"""Text in, text out: a model of our own or an OpenAI-compatible endpoint behind one protocol, with a usage ledger."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

import httpx

from fedllm.core.errors import EndpointError, RecipeError
from fedllm.core.knobs import Knobs, knob
from fedllm.models.bounded import TooLong, client_for, whole

SEEDS = 2**63
LONGEST_PAUSE = 30.0  # seconds between two attempts
AGAIN = (408, 425, 429, 500, 502, 503, 504)
"""HTTP statuses after which the same question may be asked once more."""
WORDY = 200
"""Characters of a token, at most (and a thousand more for all): who says more was not stopped by `max_tokens`."""


@dataclass(frozen=True)
class Completion:
    """What a model said: the text, its summed token log-probability (nats, None: not known), and what it cost."""

    text: str
    logprob: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass
class Usage:
    """The ledger of a text model: how many prompts it was asked, tokens read and tokens said."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def book(self, said: Sequence[Completion]) -> None:
        """Add what these completions cost."""
        self.calls += len(said)
        self.prompt_tokens += sum(c.prompt_tokens for c in said)
        self.completion_tokens += sum(c.completion_tokens for c in said)


class TextModel(Protocol):
    """Anything that continues text."""

    @property
    def usage(self) -> Usage:
        """What was asked of it since it was made."""
        ...

    def complete(self, prompts: Sequence[str], max_new_tokens: int, temperature: float = 0.0,
                 seed: int = 0) -> list[Completion]:
        """Continue each prompt; greedy at temperature 0, else prompt i samples with seed + i."""
        ...


@dataclass(frozen=True)
class Endpoint(Knobs):
    """A model behind an OpenAI-compatible HTTP API (vLLM, llama.cpp, a cloud, or `fedllm.cli.serve_model`).

    The API key is read from the environment each time it is needed; it is never an attribute, and no error shows it.
    Raises EndpointError when no usable answer came within the retries.
    """

    base_url: str = knob("http://127.0.0.1:8000/v1", "address up to and with the version, without a trailing slash")
    model: str = knob("local", "the model's name at the endpoint")
    api: Literal["completions", "chat"] = knob("completions", "which of the two interfaces is called",
                                               options=("completions", "chat"))
    api_key_env: str | None = knob(None, "NAME of the environment variable that holds the API key; None: no key")
    timeout: float = knob(60.0, "seconds until an attempt is given up", gt=0)
    retries: int = knob(2, "attempts after the first, for timeouts, lost connections and overload", ge=0, le=10)
    backoff: float = knob(0.5, "seconds before the first retry; doubles each time, 30 at most", ge=0)
    parallel: int = knob(4, "prompts under way at once", ge=1, le=256)
    logprobs: bool = knob(True, "ask for token log-probabilities; some endpoints refuse the question")

    def __post_init__(self) -> None:
        super().__post_init__()
        at = urlsplit(self.base_url)
        if at.scheme not in ("http", "https") or not at.hostname:
            raise RecipeError("Endpoint.base_url must start with http:// or https:// and name a host")
        if at.username or at.password or at.query:
            raise RecipeError("Endpoint.base_url must not hold a user, a password or a query; name the environment "
                              "variable of the key in api_key_env instead")
        if self.api_key_env is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", self.api_key_env):
            # The value stays out of the message: whoever mistakes the knob puts the key itself here.
            object.__setattr__(self, "api_key_env", None)
            raise RecipeError("Endpoint.api_key_env must be the NAME of an environment variable, in capitals, "
                              "never the key itself")

    @cached_property
    def usage(self) -> Usage:
        """What was asked of it since it was made."""
        return Usage()

    @cached_property
    def _http(self) -> httpx.Client:
        return client_for(self.base_url, self.timeout)

    @property
    def url(self) -> str:
        """Where the questions go."""
        return f"{self.base_url.rstrip('/')}/{'chat/completions' if self.api == 'chat' else 'completions'}"

    def reach(self) -> None:
        """Find out whether anybody is there, without a question that costs; EndpointError when nobody is, or when the
        key is refused."""
        key, why = self._key(), ""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(self.backoff * 2 ** (attempt - 1), LONGEST_PAUSE))
            try:
                answer = whole(self._http, "GET", f"{self.base_url.rstrip('/')}/models", self.timeout, headers=headers)
            except TooLong:
                return  # somebody is there, and has many models
            except httpx.RequestError as error:
                why = f"{type(error).__name__}: {hidden(str(error), key)}"
                continue
            if answer.status_code in (401, 403):
                raise EndpointError(f"{self._who}: HTTP {answer.status_code}: {hidden(complaint(answer), key)}")
            return  # some have no list of models: any answer will do
        raise EndpointError(f"{self._who}: {why} ({self.retries + 1} attempts)")

    def complete(self, prompts: Sequence[str], max_new_tokens: int, temperature: float = 0.0,
                 seed: int = 0) -> list[Completion]:
        """Continue each prompt, one HTTP request each, `parallel` at once."""
        bodies = [{"model": self.model, "max_tokens": max_new_tokens, "temperature": temperature,
                   "seed": (seed + i) % SEEDS, **self._question(p)} for i, p in enumerate(prompts)]
        with ThreadPoolExecutor(self.parallel, "endpoint") as pool:
            out = list(pool.map(self._ask, bodies))
        self.usage.book(out)
        return out

    def _question(self, prompt: str) -> dict[str, Any]:
        if self.api == "chat":
            return {"messages": [{"role": "user", "content": prompt}], **({"logprobs": True} if self.logprobs else {})}
        return {"prompt": prompt, **({"logprobs": 1} if self.logprobs else {})}

    def _key(self) -> str:
        if not self.api_key_env:
            return ""
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            raise EndpointError(f"{self._who}: the environment variable {self.api_key_env} is not set")
        if not carried(key):
            raise EndpointError(f"{self._who}: the environment variable {self.api_key_env} {UNFIT}")
        return key

    @property
    def _who(self) -> str:
        return f"endpoint {self.url}, model {self.model!r}"

    def _ask(self, body: Mapping[str, Any]) -> Completion:
        """One question, asked again while there is hope."""
        key, why = self._key(), ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(self.backoff * 2 ** (attempt - 1), LONGEST_PAUSE))
            try:
                answer = whole(self._http, "POST", self.url, self.timeout, json=body,
                               headers={"Authorization": f"Bearer {key}"} if key else {})
            except TooLong as error:
                raise EndpointError(f"{self._who}: {error}") from None
            except httpx.TimeoutException:
                why = f"no answer within {self.timeout} s"
                continue
            except httpx.RequestError as error:
                why = f"{type(error).__name__}: {hidden(str(error), key)}"
                continue
            if answer.status_code == 200:
                return self._completion(answer, key, 1000 + WORDY * int(body["max_tokens"]))
            why = f"HTTP {answer.status_code}: {hidden(complaint(answer), key)}"
            if answer.status_code not in AGAIN:
                raise EndpointError(f"{self._who}: {why}")
        raise EndpointError(f"{self._who}: {why} ({self.retries + 1} attempts)")

    def _completion(self, answer: httpx.Response, key: str, most: int) -> Completion:
        """The first choice of an answer; EndpointError for anything of another shape, or of more characters."""
        try:
            doc = answer.json()
            choice, used = doc["choices"][0], doc.get("usage") or {}
            text = choice["message"]["content"] if self.api == "chat" else choice["text"]
            if not isinstance(text, str):
                raise TypeError(f"its text is {type(text).__name__}")
            if len(text) > most:
                raise ValueError(f"its text has {len(text):,} characters, and max_tokens was asked for")
            logprob = total_logprob(choice.get("logprobs"))
            if logprob is not None and not math.isfinite(logprob):
                raise ValueError("its log-probability is no number")
            return Completion(characters(text), logprob, counted(used, "prompt_tokens"),
                              counted(used, "completion_tokens"))
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            start = hidden(answer.text[:200], key)
            raise EndpointError(f"{self._who}: its answer is not what the API promises "
                                f"({type(error).__name__}: {hidden(str(error), key)}): {start!r}") from None


UNFIT = "holds characters that no HTTP header can carry"


def carried(key: str) -> bool:
    """Whether a header can hold it; the HTTP library would repeat it in its complaint, escaped."""
    return key.isascii() and key.isprintable()


def characters(text: str) -> str:
    """The text as whole characters: halves of one (JSON's \\ud83d alone) are U+FFFD, which every encoding can hold."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def counted(used: Mapping[str, Any], name: str) -> int:
    """A count of tokens; null is 0. ValueError for what is none."""
    if (count := int(used.get(name) or 0)) < 0:
        raise ValueError(f"{name} = {count}")
    return count


def total_logprob(given: Mapping[str, Any] | None) -> float | None:
    """Sum of the token log-probabilities in either interface's shape; None where the endpoint gives none."""
    if not given:
        return None
    if given.get("content") is not None:
        return float(sum(token["logprob"] for token in given["content"]))
    values = given.get("token_logprobs")
    return None if values is None else float(sum(v for v in values if v is not None))


def complaint(answer: httpx.Response) -> str:
    """What an endpoint says went wrong, in at most 200 characters."""
    try:
        return str(answer.json()["error"]["message"])[:200]
    except (ValueError, KeyError, TypeError):
        return answer.text[:200]


def hidden(text: str, key: str) -> str:
    """`text` without the key, for endpoints that repeat it in their complaints."""
    return text.replace(key, "***") if key else text
