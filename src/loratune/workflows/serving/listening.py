"""Where a server listens, and who may ask it."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass

from loratune.run.errors import MachineError, RecipeError

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
DEFAULT_PORT = 8000
KEY_VARIABLE = "LORATUNE_API_KEY"


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """A running server.

    Attributes:
        url: The `base_url` of an OpenAI client.
        server: `vllm`, `transformers` or `loratune`.
        models: The names of the base and of the fine-tuned model, or several of them.
        needs_key: Whether requests need the API key.
    """

    url: str
    server: str
    models: tuple[str, ...]
    needs_key: bool

    @property
    def curl(self) -> str:
        """A request with curl."""
        key = f"-H 'Authorization: Bearer $'{KEY_VARIABLE} " if self.needs_key else ""
        body = {"model": self.models[1], "messages": [{"role": "user", "content": "Hello"}]}
        return f"curl {self.url}/chat/completions {key}-H 'Content-Type: application/json' -d '{json.dumps(body)}'"

    @property
    def python(self) -> str:
        """The same request with OpenAI's Python client."""
        key = f'os.environ["{KEY_VARIABLE}"]' if self.needs_key else '"none"'
        return (
            f'OpenAI(base_url="{self.url}", api_key={key}).chat.completions.create(model="{self.models[1]}", '
            'messages=[{"role": "user", "content": "Hello"}])'
        )


def service_at(host: str, port: int, *, server: str, models: tuple[str, ...], needs_key: bool) -> Service:
    """Return the service at an address; arguments as the attributes of `Service`."""
    address = f"[{host}]" if ":" in host else host
    return Service(url=f"http://{address}:{port}/v1", server=server, models=models, needs_key=needs_key)


def check_access(server: str, host: str, api_key: str | None) -> None:
    """Check that other machines cannot send requests without a key.

    Raises:
        RecipeError: They could, or the server does not support keys.
    """
    if server == "transformers" and (api_key is not None or host not in LOCAL_HOSTS):
        what = f"--host {host}" if host not in LOCAL_HOSTS else "--api-key"
        raise RecipeError(
            f"{what}: transformers serve does not support API keys, and loads any model that a request names",
            fix="keep 127.0.0.1, behind a proxy that checks a key (or `ssh -L`), or install vLLM",
        )
    if host not in LOCAL_HOSTS and not api_key:
        raise RecipeError(
            f"--host {host} lets other machines send requests, and there is no API key",
            fix=f"set {KEY_VARIABLE}, or use --api-key",
        )


def choose_port(host: str, wanted: int | None) -> int:
    """Return the wanted port if it is free; without one, 8000 or a free port.

    Raises:
        MachineError: The port is taken, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    candidates = (wanted,) if wanted is not None else (DEFAULT_PORT, 0)
    problem: OSError | None = None
    for candidate in candidates:
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, candidate))
                return int(probe.getsockname()[1])
        except OSError as error:
            problem = error
    raise MachineError(f"cannot listen on {host}:{candidates[0]}: {problem}", fix="choose another --port or --host")
