"""Compare a running server with a run: `loratune certify RUN URL`."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import numpy as np

from loratune.exporting.endpoint.client import TIMEOUT_SECONDS, Endpoint
from loratune.exporting.endpoint.decision import ServedEvidence, served_certificate
from loratune.exporting.endpoint.proof import ServedAnswers, ServedDistributions
from loratune.exporting.endpoint.reader import EndpointReader
from loratune.exporting.transformers_serve import served_name
from loratune.run.digest import file_sha256
from loratune.run.directory import RunDir
from loratune.run.records.base import as_json, parse
from loratune.run.records.certificate import CertificateRecord
from loratune.workflows.endpoint_reference import endpoint_reference
from loratune.workflows.finished import open_finished

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from loratune.exporting.endpoint.reader import ChatAnswer
    from loratune.exporting.endpoint.reference import EndpointReference
    from loratune.run.directory import Record
    from loratune.run.progress import Progress
    from loratune.workflows.finished import FinishedRun

_FURTHER_TOKENS = 8
"""Tokens that a server may give beyond the limit of our own answers, to show that it does not stop."""


def certify_endpoint(
    root: str | Path,
    url: str,
    *,
    model: str | None = None,
    api_key: str | None = None,
    timeout: float = TIMEOUT_SECONDS,
    progress: Progress,
) -> Record:
    """Compare the model behind a server with a run. Nothing is written.

    Args:
        root: The run directory.
        url: The address of an OpenAI-compatible API.
        model: The model's name in requests; None for the run's, or the only one that the server lists.
        api_key: The key that requests must send; None for none.
        timeout: How long the server may take for one answer, in seconds.
        progress: The listener for progress and warnings.

    Returns:
        The certificate, as in `parity.json`.

    Raises:
        RecipeError: The run is not finished, the address is none, the key is wrong, or the server has no such model.
        MachineError: The server does not answer.
        RunError: The server fails.
    """
    endpoint = Endpoint(root=url, key=api_key, timeout=timeout)
    run = RunDir.open(root)
    run.require_adapter()
    endpoint.choose_model(model, list(dict.fromkeys([served_name(run.root.name), run.root.name])))
    finished = open_finished(root, progress)
    progress.line(f"asking {endpoint.url} for {endpoint.model}")
    expected = endpoint_reference(finished)
    gc.collect()
    certificate = ask_server(expected, endpoint, finished.prepared.model.tokenizer, progress)
    return as_json(parse(CertificateRecord, _with_origin(finished, endpoint.url, certificate)))


def ask_server(
    expected: EndpointReference, endpoint: Endpoint, tokenizer: PreTrainedTokenizerBase, progress: Progress
) -> Record:
    """Ask a server whose model was chosen, and return its certificate."""
    reader = EndpointReader(endpoint, tokenizer)
    given, template = _chat(expected, reader, progress)
    distributions = _read_distributions(expected, reader, progress)
    answers = ServedAnswers(wanted=expected.answers, given=given)
    evidence = ServedEvidence(
        endpoint=endpoint, way=reader.way, template=template, distributions=distributions, answers=answers
    )
    return served_certificate(expected, evidence)


def _with_origin(finished: FinishedRun, url: str, certificate: Record) -> Record:
    run = finished.run
    adapter = file_sha256(run.adapter_weights)
    return {"kind": "endpoint", "run": str(run.root), "path": url, "adapter_sha256": adapter, **certificate}


def _read_distributions(expected: EndpointReference, reader: EndpointReader, progress: Progress) -> ServedDistributions:
    """Ask for the likeliest tokens at all positions."""
    found = ServedDistributions()
    places = [(np.flatnonzero(example.supervised) - 1).tolist() for example in expected.examples]
    for example, positions in zip(expected.examples[:8], places, strict=False):
        if not reader.way:
            reader.choose_way(example.input_ids.tolist(), positions[0])
    if not reader.way:
        return found
    with progress.task(f"asking the server ({reader.way})", len(places), "examples") as task:
        for example, positions, trained, base in zip(
            expected.examples, places, expected.trained, expected.base, strict=True
        ):
            found.add(trained, base, reader.tops(example.input_ids.tolist(), positions))
            task.advance(1)
    return found


def _chat(
    expected: EndpointReference, reader: EndpointReader, progress: Progress
) -> tuple[list[ChatAnswer | None], Record]:
    """Have all chats answered; return the answers and the comparison of their prompts."""
    given: list[ChatAnswer | None] = []
    compared, same, first = 0, 0, None
    by_ids = False
    with progress.task("asking the server for answers", len(expected.answers), "prompts") as task:
        for wanted in expected.answers:
            question = wanted.question
            answer = reader.chat(question.messages, expected.max_new_tokens + _FURTHER_TOKENS)
            given.append(answer)
            ids = reader.prompt_ids(question.messages) if by_ids or not compared else None
            counted = answer.num_prompt_tokens if answer is not None else None
            if ids is not None and counted not in (None, len(ids)):
                ids = None  # not what the chat read
            count = len(ids) if ids is not None else counted
            by_ids = by_ids or ids is not None
            task.advance(1)
            if count is None:
                continue
            compared += 1
            right = ids == question.input_ids if ids is not None else count == len(question.input_ids)
            same += right
            if not right and first is None:
                first = f"the server reads {count} tokens where training has {len(question.input_ids)}"
                if count == len(question.input_ids):
                    first = f"other ids of the same number, {count}"
    template = {"num_prompts": compared, "same_token_ids": same, "first_difference": first}
    return given, {**template, "compared_by": "token ids" if by_ids else "number of tokens"}
