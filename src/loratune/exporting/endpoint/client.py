"""Requests to a server with an OpenAI-compatible API."""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from loratune.run.errors import MachineError, RecipeError, RunError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

TIMEOUT_SECONDS = 300.0
"""How long a server may take for one answer: it may have to load the model first."""
_ATTEMPTS = 3
_MOST_BYTES = 256 * 2**20
_BUSY = (429, 500, 502, 503, 504)
_PATHS = re.compile(r"(/v1)?(/chat)?(/completions|/models)?/*$")
_LOCAL = ("127.0.0.1", "localhost", "::1")


class RefusedRequestError(Exception):
    """A server does not know a path or a field of a request.

    Args:
        status: The HTTP status.
        text: What the server says, shortened.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"{status}: {text}")
        self.status, self.text = status, text


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Does not follow to another address, which the key is not for."""

    def redirect_request(self, *_: Any) -> None:
        return None


@dataclass(slots=True, kw_only=True)
class Endpoint:
    """A server, identified by the URL of its API.

    Attributes:
        root: The address without `/v1`.
        key: The API key; None for none.
        timeout: How long one answer may take, in seconds.
        model: The model to ask for; empty until it was chosen.
        program: What the server says it is; empty if it does not say.
        models: The names that it lists.
    """

    root: str
    key: str | None = None
    timeout: float = TIMEOUT_SECONDS
    model: str = ""
    program: str = ""
    models: tuple[str, ...] = ()
    _opener: urllib.request.OpenerDirector = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Read the address."""
        parts = urlsplit(self.root.strip())
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RecipeError(f"{self.root} is not the address of a server", fix="http://127.0.0.1:8000/v1")
        if parts.username or parts.password:
            raise RecipeError("the address contains a name or password", fix="set LORATUNE_API_KEY, or use --api-key")
        self.root = f"{parts.scheme}://{parts.netloc}{_PATHS.sub('', parts.path)}"
        proxies = [urllib.request.ProxyHandler({})] if parts.hostname in _LOCAL else []
        self._opener = urllib.request.build_opener(_NoRedirect, *proxies)

    @property
    def url(self) -> str:
        """The `base_url` of an OpenAI client."""
        return f"{self.root}/v1"

    def choose_model(self, wanted: str | None, usual: Sequence[str]) -> None:
        """Choose the model to ask for among those that the server lists.

        Args:
            wanted: Its name; None for one of the usual names, or the only one there is.
            usual: Names that the run's model may have.

        Raises:
            RecipeError: The server has no such model, or several and none of the usual names.
        """
        try:
            listed = self.get("/v1/models")
        except RefusedRequestError:
            listed = {}
        entries = [entry for entry in listed.get("data") or [] if isinstance(entry, dict) and entry.get("id")]
        self.models = tuple(str(entry["id"]) for entry in entries)
        self.program = str(entries[0].get("owned_by") or "") if entries else ""
        full = {name.removesuffix(":latest"): name for name in self.models} | {name: name for name in self.models}
        candidates = [wanted] if wanted else list(usual)
        found = next((full[name] for name in candidates if name in full), None)
        if found is None and not self.models:  # a server that lists nothing: the answer to a request will show it
            found = candidates[0]
        if found is None and wanted is None and len(self.models) == 1:
            found = self.models[0]
        if found is None:
            problem = f"no model {wanted!r}" if wanted else f"none of the names {', '.join(usual)}"
            raise RecipeError(
                f"{self.url} lists {problem}", fix=f"--model NAME, with one of {', '.join(sorted(self.models))}"
            )
        self.model = found

    def get(self, path: str) -> dict[str, Any]:
        """Return the answer to a GET request; errors are those of `post`."""
        return self._ask(urllib.request.Request(f"{self.root}{path}", headers=self._headers()))  # noqa: S310 - checked

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer to a POST request.

        Args:
            path: The path below the root, such as `/v1/completions`.
            body: The request.

        Raises:
            RefusedRequestError: The server does not know the path, or a field of the request.
            MachineError: It does not answer.
            RecipeError: It asks for a key, or it has no such model.
            RunError: It fails, or answers with something else than JSON.
        """
        headers = {**self._headers(), "Content-Type": "application/json"}
        return self._ask(
            urllib.request.Request(f"{self.root}{path}", json.dumps(body).encode(), headers)  # noqa: S310 - checked
        )

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def _ask(self, request: urllib.request.Request) -> dict[str, Any]:
        for attempt in range(_ATTEMPTS):
            try:
                with self._opener.open(request, timeout=self.timeout) as response:
                    return self._parse(response.read(_MOST_BYTES))
            except urllib.error.HTTPError as error:
                text = _message(error.read(4096))
                if _refuses_a_field(text):
                    raise RefusedRequestError(error.code, text) from None
                if error.code in _BUSY and attempt + 1 < _ATTEMPTS:
                    time.sleep(0.2 * 4**attempt)
                    continue
                raise self._explained(error.code, text, request.selector) from None
            except TimeoutError as error:
                raise self._silent(f"no answer within {self.timeout:,.4g} s") from error
            except (OSError, urllib.error.URLError) as error:
                reason = getattr(error, "reason", error)
                if isinstance(reason, TimeoutError):
                    raise self._silent(f"no answer within {self.timeout:,.4g} s") from error
                raise self._silent(str(reason)) from error
        raise AssertionError("the last attempt returns or raises")

    def _silent(self, reason: str) -> MachineError:
        return MachineError(f"{self.url}: {reason}", fix="start the server, and give the address that it prints")

    def _explained(self, status: int, text: str, path: str) -> Exception:
        if status in (401, 403):
            return RecipeError(f"{self.url} asks for a key: {text}", fix="set LORATUNE_API_KEY, or use --api-key")
        if 300 <= status < 400:
            return RecipeError(f"{self.url} redirects to another address", fix="give that address")
        if status == 404 and "/v1/" in path and self.model and "model" in text.lower():
            return RecipeError(
                f"{self.url} has no model {self.model!r}: {text}", fix=f"--model NAME{self._known_names()}"
            )
        if status in _BUSY:
            return RunError(f"{self.url} fails: {status} {text}", fix="see the server's own messages")
        return RefusedRequestError(status, text)

    def _known_names(self) -> str:
        return f", with one of {', '.join(sorted(self.models))}" if self.models else ""

    def _parse(self, content: bytes) -> dict[str, Any]:
        try:
            found = json.loads(content)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise RunError(
                f"{self.url} does not answer with a JSON object: {content[:80]!r}",
                fix="give the address of a server with an OpenAI-compatible API",
            )
        return found


def is_address(text: str) -> bool:
    """Return whether a text is the address of a server and not a path."""
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", text) is not None


def _refuses_a_field(text: str) -> bool:
    """Return whether an error is about the request's form, whatever its status: llama-cpp-python's server says 500."""
    return re.search(r"\bvalidation errors?\b", text) is not None


def _message(content: bytes) -> str:
    """Return what an error's body says, in one line."""
    text = content.decode("utf-8", "replace")
    try:
        found = json.loads(text)
    except ValueError:
        found = text
    for name in ("error", "detail", "message"):
        if isinstance(found, dict) and found.get(name):
            found = found[name]
    return " ".join(str(found).split())[:300]
