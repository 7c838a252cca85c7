"""Who may talk to the studio: a browser on this machine that was given the token, on the studio's own pages.

A page of another site can send requests to 127.0.0.1 from the user's browser, and can point its own host name there
(DNS rebinding). So every request is checked for the address that it names (`Host`), for the page that it comes from
(`Origin`, `Sec-Fetch-Site`), and for the token, which only the printed URL and then a cookie contain.
"""

from __future__ import annotations

import secrets
from http.cookies import CookieError, SimpleCookie
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import HTMLResponse, PlainTextResponse

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
"""Content-Security-Policy of all pages but the report, which brings a stricter one: no inline script or style."""
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # with `no-referrer`, forms would send `Origin: null`
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_READING = ("GET", "HEAD")
_ENTRY = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="0;url=/"><title>loratune studio</title>
</head><body><p><a href="/">Open the studio</a></p></body></html>
"""
"""Answers the printed URL. A redirect would not do: opened from a link, it would arrive without the strict cookie."""


class Guard:
    """Passes on the requests that may be answered, and adds the security headers to every answer.

    Args:
        app: What answers.
        token: The secret of the printed URL.
        port: The port that the studio listens on.
    """

    def __init__(self, app: ASGIApp, *, token: str, port: int) -> None:
        self._app, self._token = app, token
        self._cookie = f"loratune_studio_{port}"  # cookies are shared by all ports of a machine
        self._hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}
        self._origins = {f"http://{host}" for host in self._hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # nothing here speaks WebSocket

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.setdefault("Content-Security-Policy", POLICY)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        await self._answering(scope)(scope, receive, send_guarded)

    def _answering(self, scope: Scope) -> ASGIApp:
        headers = Headers(scope=scope)
        reason = self._refusal(scope["method"], headers)
        if reason:
            return PlainTextResponse(f"Refused: {reason}.\n", status_code=403)
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if given and scope["path"] == "/" and scope["method"] == "GET" and self._is_token(given):
            answer = HTMLResponse(_ENTRY)
            answer.set_cookie(self._cookie, self._token, httponly=True, samesite="strict")
            return answer
        if not self._is_token(self._cookie_of(headers)):
            text = "Refused: open the URL that `loratune studio` printed; it contains the token.\n"
            return PlainTextResponse(text, status_code=401)
        return self._app

    def _refusal(self, method: str, headers: Headers) -> str:
        """Return why a request is refused whatever its token; empty if it is not."""
        if headers.get("host") not in self._hosts:
            return f"this is not the address of the studio: {headers.get('host')}"
        origin = headers.get("origin")
        if origin is not None and origin not in self._origins:
            return f"the request comes from another site: {origin}"
        if origin is None and method not in _READING:
            return "a request that changes something must name its Origin"
        # A link on another site may lead here (a navigation), but no other site may load a part of the studio.
        if headers.get("sec-fetch-site") == "cross-site" and headers.get("sec-fetch-mode") != "navigate":
            return "the request comes from another site"
        return ""

    def _cookie_of(self, headers: Headers) -> str:
        try:
            found = SimpleCookie(headers.get("cookie", "")).get(self._cookie)
        except CookieError:
            return ""
        return "" if found is None else found.value

    def _is_token(self, text: str) -> bool:
        return secrets.compare_digest(text.encode(), self._token.encode())
