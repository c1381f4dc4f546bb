"""Who may look and who may act: the host's name, the token, same origin, and what a page may load."""

from __future__ import annotations

import ipaddress
import secrets
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE, CSRF = "fedllm_dashboard", "x-fedllm-csrf"
POLICY = ("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
          "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
"""No script but the two files that come with the package, none in the page's text, nothing from anywhere else."""
HEADERS = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
           "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Resource-Policy": "same-origin",
           "X-Frame-Options": "DENY"}


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach this address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def same(given: str, right: str) -> bool:
    """Whether two secrets are the same, in a time that does not tell where they part."""
    return secrets.compare_digest(given.encode(errors="replace"), right.encode())


class Gate:
    """Stands before every request."""

    def __init__(self, app: ASGIApp, *, token: str | None, csrf: str) -> None:
        """`token` None: the page is on loopback, where the host's name is checked in its place."""
        self.app, self.token, self.csrf = app, token, csrf
        self.cookie = secrets.token_urlsafe(32)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, with headers on whatever is answered, or refuse it."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def headed(message: Message) -> None:
            if message["type"] == "http.response.start":
                have = {k.lower() for k, _ in message["headers"]}
                more = {"Cache-Control": "no-store", **HEADERS}
                message["headers"] = [*message["headers"], *((k.lower().encode(), v.encode()) for k, v in more.items()
                                                             if k.lower().encode() not in have)]
            await send(message)

        answer = self.refusal(HTTPConnection(scope), scope["method"]) or self.app
        await answer(scope, receive, headed)

    def refusal(self, asked: HTTPConnection, method: str) -> Response | None:
        """What a request gets that is not let in."""
        host = asked.headers.get("host", "")
        if self.token is None and not is_loopback(urlsplit(f"//{host}").hostname or ""):
            return PlainTextResponse("this page is served on this machine alone, under 127.0.0.1 or localhost\n", 421)
        if self.token is not None and not self.entered(asked):
            if same(asked.query_params.get("token", ""), self.token) and method == "GET":
                entered = RedirectResponse("/", 303)  # the token leaves the address bar
                entered.set_cookie(COOKIE, self.cookie, httponly=True, samesite="strict", path="/")
                return entered
            return PlainTextResponse("a token is needed: open the address that `fedllm dashboard` printed\n", 401,
                                     {"WWW-Authenticate": "Bearer"})
        if method not in ("GET", "HEAD") and (why := self.foreign(asked, host)):
            return PlainTextResponse(f"{why}\n", 403)
        return None

    def entered(self, asked: HTTPConnection) -> bool:
        """Whether the request shows the token, or the cookie that was given for it."""
        said = asked.headers.get("authorization", "").removeprefix("Bearer ")
        return same(said, self.token or "") or same(asked.cookies.get(COOKIE, ""), self.cookie)

    def foreign(self, asked: HTTPConnection, host: str) -> str:
        """Why an action is refused that another page may have asked for; empty for one of ours."""
        if asked.headers.get("origin", "") != f"{asked.url.scheme}://{host}":
            return "actions are taken from this page alone (the Origin header is another one's, or missing)"
        if asked.headers.get("sec-fetch-site", "same-origin") != "same-origin":
            return "actions are taken from this page alone (Sec-Fetch-Site)"
        if not same(asked.headers.get(CSRF, ""), self.csrf):
            return "the page is of another start of the dashboard: load it again"
        return ""
