"""A server with an OpenAI-compatible API in a thread, which serves a model that transformers loaded."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch


class RefusedError(Exception):
    """A status other than 200."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass(kw_only=True)
class Served:
    """A model, and what its server does and does not do.

    Attributes:
        model: A causal model of transformers, in evaluation mode.
        tokenizer: Its tokenizer, with a template.
        stops: Tokens that end an answer.
        style: Whose answers it writes: `vllm`, `llama.cpp`, `openai` (texts, prompts as text), or `greedy`.
        chat: Whether it has chats.
        shifted: Whether what it says about tokens of a prompt is about the next one, as llama-cpp-python 0.3 does.
        strict: Whether it refuses fields that OpenAI's API has not, and more than 5 tokens, as OpenAI does.
        names: The models that it lists.
        key: The key that it wants.
        failures: Statuses of the next answers, which are no answers.
        counts: Whether it counts the tokens of prompts.
    """

    model: Any
    tokenizer: Any
    stops: tuple[int, ...]
    style: str = "vllm"
    chat: bool = True
    shifted: bool = False
    strict: bool = False
    names: tuple[str, ...] = ("tiny",)
    key: str | None = None
    failures: list[int] = field(default_factory=list)
    counts: bool = True
    requests: list[str] = field(default_factory=list)

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        self.requests.append(path)
        if path == "/v1/models":
            return {"data": [{"id": name, "owned_by": self.style} for name in self.names]}
        if body.get("model") not in self.names and self.style != "llama.cpp":
            raise RefusedError(404, f"The model `{body.get('model')}` does not exist.")
        if path == "/v1/completions":
            return self._complete(body)
        if path == "/v1/chat/completions" and self.chat:
            return self._chat(body)
        if path == "/tokenize" and self.style == "vllm" and self.chat:
            return {"tokens": self._prompt(body["messages"])}
        if path == "/apply-template" and self.style == "llama.cpp":
            return {"prompt": self._text(body["messages"])}
        if path == "/tokenize" and self.style == "llama.cpp" and "content" in body:
            return {"tokens": self._ids(body["content"])}
        raise RefusedError(404, "Not Found")

    def _text(self, messages: list[dict[str, Any]]) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        return self._ids(self._text(messages))

    @torch.no_grad()
    def _logprobs(self, ids: list[int]) -> torch.Tensor:
        return self.model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)

    def _usage(self, ids: list[int]) -> dict[str, Any]:
        return {"usage": {"prompt_tokens": len(ids)}} if self.counts else {}

    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt = body["prompt"]
        if self.style in ("openai", "greedy") and not isinstance(prompt, str):
            raise RefusedError(422, "prompt must be a string")
        if self.style == "greedy" and set(body) - {"model", "prompt", "max_tokens", "temperature", "seed"}:
            raise RefusedError(422, "Unexpected keys in the request")
        known = {"model", "prompt", "max_tokens", "temperature", "seed", "logprobs", "echo"}
        if self.strict and (set(body) - known or body.get("logprobs", 0) > 5):
            raise RefusedError(400, "Unrecognized request argument supplied")
        ids = self._ids(prompt) if isinstance(prompt, str) else prompt
        logprobs = self._logprobs(ids)
        choice: dict[str, Any] = {"text": self.tokenizer.decode([int(logprobs[-1].argmax())])}
        if "prompt_logprobs" in body and self.style == "vllm":
            places = [self._top(row, body["prompt_logprobs"]) for row in logprobs[:-1]]
            choice["prompt_logprobs"] = [
                None,
                *({str(token): {"logprob": value} for token, value in place.items()} for place in places),
            ]
        if "logprobs" in body and self.style != "greedy":
            rows = (
                [*logprobs[: -1 if not self.shifted else None]]
                if body.get("echo") and self.style != "llama.cpp"
                else []
            )
            rows += [] if self.shifted and rows else [logprobs[-1]]
            choice["logprobs"] = self._written([self._top(row, body["logprobs"]) for row in rows], len(rows) > 1)
        return {"choices": [choice], **self._usage(ids)}

    def _top(self, logprobs: torch.Tensor, count: int) -> dict[int, float]:
        top = logprobs.topk(count)
        return dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))

    def _written(self, tops: list[dict[int, float]], whole: bool) -> dict[str, Any]:
        if self.style == "llama.cpp":
            entries = [{"id": token, "token": "?", "logprob": value} for token, value in tops[0].items()]
            return {"content": [{**entries[0], "top_logprobs": entries}]}
        name = self.tokenizer.decode if self.style == "openai" else "token_id:{}".format
        places: list[Any] = [{name(token): value for token, value in top.items()} for top in tops]
        return {"top_logprobs": [None, *places] if whole and not self.shifted else places}

    def _chat(self, body: dict[str, Any]) -> dict[str, Any]:
        if self.style == "greedy" and set(body) - {"model", "messages", "max_tokens", "temperature", "seed"}:
            raise RefusedError(422, "Unexpected keys in the request")
        prompt = self._prompt(body["messages"])
        ids, reason = list(prompt), "length"
        for _ in range(body["max_tokens"]):
            token = int(self._logprobs(ids)[-1].argmax())
            if token in self.stops:
                reason = "stop"
                break
            ids.append(token)
        text = self.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
        return {"choices": [{"message": {"content": text}, "finish_reason": reason}], **self._usage(prompt)}


@contextmanager
def running(served: Served) -> Iterator[str]:
    """Serve in a thread; yield the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply({})

        def do_POST(self) -> None:
            self._reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _reply(self, body: dict[str, Any]) -> None:
            status, record = 200, {}
            try:
                if served.failures:
                    raise RefusedError(served.failures.pop(0), "out of order")
                if served.key and self.headers.get("Authorization") != f"Bearer {served.key}":
                    raise RefusedError(401, "Unauthorized")
                record = served.answer(self.path, body)
            except RefusedError as error:
                status, record = error.status, {"error": {"message": str(error)}}
            content = json.dumps(record).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
