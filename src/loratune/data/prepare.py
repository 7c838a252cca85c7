"""From the recipe's data section to verified examples and the data report."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Literal

from loratune.data.cache import Cache, cache_key
from loratune.data.cache_entry import CachedData, from_arrays, to_arrays
from loratune.data.findings import check_conversations, check_lengths, findings_in_words, places
from loratune.data.masking.notices import unwritten_keys
from loratune.data.masking.policy import Policy
from loratune.data.masking.render import Rendered, render
from loratune.data.masking.tokenizer import backend_of
from loratune.data.prepared import PreparedData
from loratune.data.prompt_checks import PromptCheck, compare_with_prompts, shared_prompts
from loratune.data.report import (
    account_for_rows,
    overlap_report,
    places_by_key,
    row_notices,
    row_report,
    size_report,
    unread_notices,
    unread_report,
)
from loratune.data.rows.conversation import ROLES, Conversation
from loratune.data.rows.reading import Reader, ReadSide, apply_policy, held_out_sources, hold_out
from loratune.data.statistics import histogram, scripts
from loratune.recipe.roles import as_written, trained_roles
from loratune.run.errors import DataError, plural
from loratune.run.progress import NO_PROGRESS, Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from loratune.data.examples import Example
    from loratune.recipe.recipe import DataSection, Source


def prepare_data(
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    seed: int,
    cache: Path | None = None,
    processes: int | None = None,
    progress: Progress = NO_PROGRESS,
) -> PreparedData:
    """Read, validate, render and verify the data of a run, or load the result from the cache.

    Args:
        data: The recipe's data section.
        tokenizer: The tokenizer of the base model.
        max_length: The maximum length of an example, in tokens.
        seed: Seed for the rows that a fractional weight picks, and for the conversations that are held out.
        cache: The folder of the cache; None: no cache.
        processes: Number of processes that share the work; None: as many as repay their start. The result is the same.
        progress: Receives progress, lines and warnings.

    Returns:
        The examples, and the report.

    Raises:
        DataError: A row cannot be trained on and `on_bad_row` is `error`; nothing is left; or the mask of a
            conversation cannot be verified.
        MachineError: The Hub does not answer.
    """
    backend_of(tokenizer)  # fail early if the tokenizer is not a fast one
    held_out = held_out_sources(data)
    read = Reader(data, seed, progress)
    sources = [*data.train, *(held_out if isinstance(held_out, tuple) else ())]

    def assemble() -> PreparedData:
        return assemble_data(read, held_out, tokenizer, max_length, processes)

    def key() -> str:
        policy = {
            **data.model_dump(mode="json", exclude={"streaming"}),
            "max_length": max_length,
            "seed": seed,
            "held_out": str(held_out),
        }
        return cache_key(tokenizer, {"policy": policy, "contents": [read.contents(source) for source in sources]})

    return assemble() if cache is None else _load_or_store(Cache(cache, progress), key, assemble)


def _load_or_store(cache: Cache, key: Callable[[], str], assemble: Callable[[], PreparedData]) -> PreparedData:
    key_before = key()
    arrays = cache.load(key_before)
    if arrays is not None:
        found = from_arrays(arrays)
        return PreparedData(
            train=found.train,
            eval=found.eval,
            eval_conversations=found.eval_conversations,
            report=found.report,
            cached=True,
        )
    prepared = assemble()
    arrays = to_arrays(
        CachedData(
            train=prepared.train,
            eval=prepared.eval,
            eval_conversations=prepared.eval_conversations,
            report=prepared.report,
        )
    )
    if arrays is not None and key() == key_before:  # the files did not change while they were read
        cache.store(key_before, arrays)
    return prepared


def assemble_data(
    read: Reader,
    held_out: tuple[Source, ...] | float,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    processes: int | None,
) -> PreparedData:
    """Make examples and report of what a reader reads; other arguments and errors as for `prepare_data`.

    Args:
        read: Reads the sources.
        held_out: The sources of held-out data, or the fraction of the training data to hold out.
        tokenizer: The tokenizer of the base model.
        max_length: The maximum length of an example, in tokens.
        processes: Number of processes that share the work.
    """
    data, policy = read.data, Policy.of(read.data, max_length)
    train = read(data.train)
    absent = _absent_roles(train, data, complete=read.complete)
    evaluation: ReadSide[Conversation] | None = None
    if isinstance(held_out, float):
        train, evaluation = hold_out(train, held_out, read.seed)
    elif held_out:
        evaluation = read(held_out)
    rendered = _render("train", train, read, tokenizer, policy, processes)
    rendered_eval = _render("eval", evaluation, read, tokenizer, policy, processes) if evaluation else None
    report: dict[str, Any] = {
        "train_on": data.train_on,
        "thinking": data.thinking,
        "max_length": max_length,
        "on_long": data.on_long,
        "mask": {"method": rendered.method, "verified": rendered.counts.get("verified", 0)},
        "train": _side_report(train, rendered),
        "eval": _side_report(evaluation, rendered_eval) if evaluation and rendered_eval else None,
        "overlap": overlap_report(_places(train), _places(evaluation)) if evaluation else [],
    }
    report["notices"] = [
        *rendered.notices,
        *absent,
        *unread_notices(train, "train"),
        *(unread_notices(evaluation, "eval") if evaluation else ()),
        *row_notices(report, len(train.items), kind="conversation", measure="the held-out loss"),
    ]
    _add_checks(
        report,
        data,
        tokenizer,
        train=(rendered.examples, train.items),
        evaluation=(rendered_eval.examples, evaluation.items) if evaluation and rendered_eval else ((), ()),
    )
    kept = {example.origin for example in rendered_eval.examples} if rendered_eval else set()
    return PreparedData(
        train=rendered.examples,
        eval=rendered_eval.examples if rendered_eval else [],
        eval_conversations=[c for c in evaluation.items if c.origin in kept] if evaluation else [],
        report=report,
    )


def _render(
    name: Literal["train", "eval"],
    side: ReadSide[Conversation],
    read: Reader,
    tokenizer: PreTrainedTokenizerBase,
    policy: Policy,
    processes: int | None,
) -> Rendered:
    with read.progress.task(f"preparing {name} data", len(side.items), "conversations") as task:
        rendered = render(side.items, tokenizer, policy, processes=processes, progress=task.advance)
    apply_policy(rendered.rejected, read.data)
    if not rendered.examples:
        left_out = Counter(rejected.reason for rejected in [*side.rejected, *rendered.rejected])
        reasons = "; ".join(f"{number} × {reason}" for reason, number in left_out.most_common(3))
        dropped = sum(rendered.counts.get(name, 0) for name in ("dropped_long", "dropped_empty"))
        raise DataError(
            f"no {name} conversation is left of {plural(side.num_rows, 'row')}: {dropped} dropped for their length"
            + (f"; {reasons}" if reasons else ""),
            fix="see the reasons; raise data.max_length if the length is one of them",
        )
    return rendered


def _absent_roles(side: ReadSide[Conversation], data: DataSection, *, complete: bool) -> list[str]:
    """Check that every role of `data.train_on` occurs; return a warning if only a sample was read.

    Raises:
        DataError: No message has one of the roles.
    """
    found = dict.fromkeys(message["role"] for conversation in side.items for message in conversation.messages)
    named = data.train_on if isinstance(data.train_on, tuple) else ()
    absent = [role for role in named if role not in found]
    if not absent or not side.items:
        return []
    problem = f"data.train_on names the role {absent[0]}, which no message of the training data has"
    if not complete:
        return [f"{problem}, as far as the sample shows."]
    first = side.items[0].origin
    present = as_written([role for role in named if role in found] or [*found])
    raise DataError(
        problem,
        file=first.file,
        line=first.line,
        fix=f"the data has the roles {', '.join(found)}: data.train_on={present}",
    )


# ---- the report


def _places(side: ReadSide[Conversation]) -> dict[Any, Any]:
    return places_by_key(side.keys, (conversation.origin for conversation in side.items))


def _side_report(side: ReadSide[Conversation], rendered: Rendered) -> dict[str, Any]:
    counts = rendered.counts
    rejected = [*side.rejected, *rendered.rejected]
    dropped = counts.get("dropped_long", 0) + counts.get("dropped_empty", 0)
    return {
        **size_report(
            side,
            rendered.examples,
            num_turns=sum(len(conversation.messages) for conversation in side.items),
            num_supervised=sum(int(example.supervised.sum()) for example in rendered.examples),
        ),
        "truncated": counts.get("truncated", 0),
        "dropped": dropped,
        "dropped_for_length": counts.get("dropped_long", 0),
        "dropped_with_nothing_to_train_after_truncation": counts.get("dropped_empty", 0),
        "verified": counts.get("verified", 0),
        "straddling_tokens": counts.get("straddling", 0),
        "answers_with_thoughts": counts.get("thoughts", 0),
        "answers_with_thoughts_put_back": counts.get("thoughts_restored", 0),
        "answers_not_trained": counts.get("answers_not_trained", 0),
        "answers_in_prompts": counts.get("answers_in_prompts", 0),
        "trained_messages": _by_role(counts, "trained"),
        "trained_messages_without_stop_token": _by_role(counts, "without_stop_token"),
        "special_tokens_in_text": counts.get("special_tokens_in_text", 0),
        "conversations_without_last_answer": counts.get("unanswered", 0),
        **row_report(_places(side), rejected),
        **account_for_rows(side, rendered.num_rows, num_rejected=len(rejected), num_dropped=dropped),
        **unread_report(side, unwritten_keys(counts)),
    }


def _by_role(counts: dict[str, int], what: str) -> dict[str, int]:
    return {role: counts[f"{what} {role}"] for role in ROLES if f"{what} {role}" in counts}


def _add_checks(
    report: dict[str, Any],
    section: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    *,
    train: tuple[Sequence[Example], Sequence[Conversation]],
    evaluation: tuple[Sequence[Example], Sequence[Conversation]],
) -> None:
    """Add histograms, scripts, findings, shared prompts and the comparison of prompts to the data report.

    Args:
        report: The data report; its notices get a line for each kind of finding.
        section: The recipe's data section.
        tokenizer: The tokenizer of the base model.
        train: The examples, and all valid conversations, including those that became no example.
        evaluation: The same for the held-out data; empty if there is none.
    """
    for side, (examples, conversations) in (("train", train), ("eval", evaluation)):
        if not examples:
            continue
        findings = check_conversations(conversations, tokenizer)
        findings += check_lengths(
            examples, conversations, tokenizer, train_on=section.train_on, report=report, side=side
        )
        part = report[side]
        part["length"] = {**part["length"], "histogram": histogram([len(example.input_ids) for example in examples])}
        part["scripts"] = scripts(list(_all_text(conversations)))
        part["findings"] = [finding.as_record() for finding in findings]
        report["notices"] += findings_in_words(findings, side)
    shared = shared_prompts(train[1], evaluation[1])
    report["shared_prompts"] = [{"eval": one.as_record(), "train": other.as_record()} for one, other in shared]
    if shared:
        report["notices"].append(
            f"{plural(len(shared), 'held-out conversation has', 'held-out conversations have')} the same prompt as a "
            f"training conversation, with another answer: {places([one for one, _ in shared])}."
        )
    asks = section.train_on == "all" or "assistant" in trained_roles(section.train_on)
    check = compare_with_prompts(*train, tokenizer, thinking=section.thinking) if asks else PromptCheck()
    report["prompts"] = check.as_record()


def _all_text(conversations: Sequence[Conversation]) -> Iterator[str]:
    for conversation in conversations:
        yield conversation.text or ""
        for message in conversation.messages:
            yield message.get("content") or ""
