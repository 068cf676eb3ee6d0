"""Who may ask: whoever has the token, from this machine, from this page.  (no torch)

Against each attack one rule, all of them at every request:
    another machine          the server listens on loopback alone (command.py)
    another user here        a token of 256 bits, in the address that is printed and then in a cookie
    DNS rebinding            Host must name this machine (https://owasp.org/www-community/attacks/DNS_Rebinding)
    another site's forms     SameSite=Strict; Origin must be the page's own for all but GET and HEAD; requests that
                             another site or port makes are refused by Sec-Fetch-Site (https://www.w3.org/TR/fetch-metadata)
    text that holds HTML     templates escape; Content-Security-Policy allows no inline script and no inline style
"""

from __future__ import annotations

import hashlib
import hmac
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HOSTS = frozenset({"127.0.0.1", "localhost"})  # by any port, which ssh may have forwarded
SAFE = frozenset({"GET", "HEAD"})
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "media-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",  # with no-referrer a browser sends forms with an Origin of null
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
MOST_BODY_BYTES = 1_000_000  # of a form; the largest is a caption


class Guard:
    """Refuses what the module's rules refuse, and adds HEADERS to every answer."""

    def __init__(self, app: ASGIApp, token: str):
        self.app, self.token = app, token
        self.cookie = hmac.new(token.encode(), b"cookie", hashlib.sha256).hexdigest()  # does not give the token away
        self.cookie_name = f"reeltune_{self.cookie[:8]}"  # two servers on two ports have one jar of cookies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            answer = self._answer(scope) or _bounded(self.app)
            await answer(scope, receive, _with_headers(send))
        # a web socket is left unanswered, which ends it

    def _answer(self, scope: Scope) -> Response | None:
        """None for a request that may pass."""
        headers = Headers(scope=scope)
        if reason := _foreign(headers, scope["method"]):
            return PlainTextResponse(f"Refused: {reason}.\n", 403)
        pairs = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        tokens = [value for name, value in pairs if name == "token"]
        if tokens and scope["method"] in SAFE:
            if len(tokens) == 1 and _same(tokens[0], self.token):
                return self._welcome(scope, [pair for pair in pairs if pair[0] != "token"])
            return PlainTextResponse("Refused: this is not the token. reeltune serve prints it.\n", 403)
        if not any(_same(given, self.cookie) for given in _cookies(headers, self.cookie_name)):
            return PlainTextResponse("Open the address that reeltune serve has printed; it has the token.\n", 403)
        return None

    def _welcome(self, scope: Scope, others: list[tuple[str, str]]) -> Response:
        """Sends the browser to the same address without the token, so that no history and no screenshot has it."""
        path = "/" + scope["path"].lstrip("/\\")  # never //another.site
        response = RedirectResponse(path + ("?" + urlencode(others) if others else ""), 303)
        response.set_cookie(self.cookie_name, self.cookie, httponly=True, samesite="strict", path="/")
        response.headers["Cache-Control"] = "no-store"
        return response


def _same(given: str, wanted: str) -> bool:
    """Whether a token is right, in a time that does not tell how much of it is."""
    return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), wanted.encode())


def _cookies(headers: Headers, name: str) -> list[str]:
    found = []
    for header in headers.getlist("cookie"):
        try:
            jar = SimpleCookie(header)
        except CookieError:
            continue
        if name in jar:
            found.append(jar[name].value)
    return found


def _foreign(headers: Headers, method: str) -> str | None:
    """Why a request is not one of this page's own; None for one that is."""
    hosts = headers.getlist("host")
    try:
        host = urlsplit(f"//{hosts[0]}") if len(hosts) == 1 else None
        named = host is not None and host.netloc == hosts[0] and host.hostname in HOSTS and host.username is None
        _ = host and host.port  # which raises for what is no number
    except ValueError:
        named = False
    if not named:
        return "Host is not this machine"
    site, navigates = headers.get("sec-fetch-site"), headers.get("sec-fetch-mode") == "navigate"
    if site not in (None, "same-origin", "none") and not (method in SAFE and navigates):
        return "another site asks"
    origins = headers.getlist("origin")
    if method not in SAFE and origins != [f"http://{hosts[0]}"]:
        return "Origin is not this page"
    return None


def _bounded(app: ASGIApp) -> ASGIApp:
    async def act(scope: Scope, receive: Receive, send: Send) -> None:
        length = Headers(scope=scope).get("content-length", "0")
        if scope["method"] not in SAFE and not (length.isdecimal() and int(length) <= MOST_BODY_BYTES):
            return await PlainTextResponse("Refused: too much.\n", 413)(scope, receive, send)
        if scope["method"] not in SAFE and "transfer-encoding" in Headers(scope=scope):
            return await PlainTextResponse("Refused: no length.\n", 411)(scope, receive, send)
        await app(scope, receive, send)

    return act


def _with_headers(send: Send) -> Send:
    async def act(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers[name] = value
            headers.setdefault("Cache-Control", "no-cache")
        await send(message)

    return act
