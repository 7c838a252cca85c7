"""Addresses, and what a server says that is no answer."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from loratune.exporting.endpoint.client import Endpoint, RefusedRequestError, is_address
from loratune.run.errors import MachineError, RecipeError, RunError


@contextmanager
def answering(status: int, content: bytes, **headers: str) -> Iterator[Endpoint]:
    """A server that gives one answer to everything."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield Endpoint(root=f"http://127.0.0.1:{server.server_address[1]}", timeout=5)
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    "address",
    [
        *("http://here:80", "http://here:80/", "http://here:80/v1", "http://here:80/v1/"),
        *("http://here:80/v1/chat/completions", "http://here:80/v1/completions"),
    ],
)
def test_an_address_is_read_however_much_of_it_is_given(address: str) -> None:
    assert Endpoint(root=address).url == "http://here:80/v1"


def test_a_path_before_the_api_stays() -> None:
    assert Endpoint(root="https://here/llm/v1").url == "https://here/llm/v1"


@pytest.mark.parametrize(
    ("address", "words"),
    [("ftp://here", "not the address"), ("http://", "not the address"), ("http://me:word@here", "name or password")],
)
def test_what_is_no_address_of_a_server_is_refused(address: str, words: str) -> None:
    assert is_address(address)
    with pytest.raises(RecipeError, match=words):
        Endpoint(root=address)


def test_files_are_no_addresses() -> None:
    assert not any(map(is_address, ("merged", "/tmp/merged.gguf", "C:\\merged", "./http")))  # noqa: S108


def test_what_is_no_json_is_named() -> None:
    with answering(200, b"<html>hello") as endpoint, pytest.raises(RunError, match="<html>hello"):
        endpoint.get("/v1/models")
    with answering(200, b"[1, 2]") as endpoint, pytest.raises(RunError, match="does not answer with a JSON object"):
        endpoint.get("/v1/models")


def test_a_key_is_not_carried_to_another_address() -> None:
    with answering(302, b"", Location="http://127.0.0.1:9/v1/models") as endpoint:
        endpoint.key = "sesame-open"
        with pytest.raises(RecipeError, match="redirects to another address"):
            endpoint.get("/v1/models")


def test_a_request_whose_form_is_refused_as_the_servers_own_failure_is_not_repeated() -> None:
    said = b'{"error": {"message": "2 validation errors: prompt: Input should be a valid string"}}'
    with answering(500, said) as endpoint, pytest.raises(RefusedRequestError, match="valid string"):
        endpoint.get("/v1/models")


def test_an_unknown_path_is_refused_with_what_the_server_says() -> None:
    with answering(404, b'{"detail": "Not Found"}') as endpoint, pytest.raises(RefusedRequestError, match="Not Found"):
        endpoint.get("/v1/models")


def test_a_server_that_lists_nothing_is_asked_for_the_usual_name() -> None:
    with answering(404, b"") as endpoint:
        endpoint.choose_model(None, ["tiny", "other"])
        assert endpoint.model == "tiny"
    with answering(200, b'{"data": [{"id": "tiny:latest"}, {"id": "llama"}]}') as endpoint:
        endpoint.choose_model(None, ["tiny"])
        assert endpoint.model == "tiny:latest"  # Ollama's names
    with answering(200, b'{"data": [{"id": "model.gguf", "owned_by": "llamacpp"}]}') as endpoint:
        endpoint.choose_model(None, ["tiny"])
        assert (endpoint.model, endpoint.program) == ("model.gguf", "llamacpp")


def test_a_server_that_hangs_up_is_named_and_does_not_end_the_program() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            connection, _ = server.accept()
            connection.shutdown(socket.SHUT_WR)  # the kernel answers further sending with a broken pipe
            time.sleep(0.3)
            connection.close()

        threading.Thread(target=hang_up, daemon=True).start()
        endpoint = Endpoint(root=f"http://127.0.0.1:{server.getsockname()[1]}", timeout=5)
        with pytest.raises(MachineError, match="Broken pipe"):
            endpoint.post("/v1/completions", {"prompt": "x" * 30_000_000})
