"""An HTTP answer in bounded time and of bounded size, whatever stands at the other end."""

from __future__ import annotations

import time
from typing import Any

import httpx

from fedllm.core.aside import started

LARGEST = 64 << 20
"""Bytes of the longest answer."""
HERE = ("localhost", "127.0.0.1", "::1")


class TooLong(httpx.TransportError):
    """An answer of more bytes than anybody wants."""


def client_for(url: str, timeout: float) -> httpx.Client:
    """Connections to this address; a proxy of the environment is not for this machine itself."""
    return httpx.Client(timeout=timeout, trust_env=httpx.URL(url).host not in HERE)


def whole(http: httpx.Client, method: str, url: str, timeout: float, **more: Any) -> httpx.Response:
    """The whole answer within `timeout` seconds: the HTTP library's own timeouts are from one byte to the next, so that
    who sends one now and then would be waited for for ever.

    Raises httpx.RequestError: ReadTimeout, TooLong, and those of the library.
    """
    ends = time.monotonic() + timeout

    def read() -> httpx.Response:
        data = bytearray()
        with http.stream(method, url, **more) as answer:
            for piece in answer.iter_bytes():
                data += piece
                if len(data) > LARGEST:
                    raise TooLong(f"the answer is longer than {LARGEST >> 20} MiB")
                if time.monotonic() > ends:
                    raise httpx.ReadTimeout("it goes on and on")
        return httpx.Response(answer.status_code, content=bytes(data))

    try:
        return started(read).result(timeout)
    except TimeoutError:
        raise httpx.ReadTimeout(f"no answer within {timeout:g} s") from None
