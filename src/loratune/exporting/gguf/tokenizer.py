"""Write a tokenizer as GGUF metadata: pieces, merges or scores, special tokens, pre-tokenizer, chat template."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from gguf import GGUFWriter, TokenType

from loratune.run.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS: Mapping[str, str] = {
    f"{_WORDS}\\p{{N}}{{1,3}}{_REST}": "llama-bpe",
    f"{_WORDS}\\p{{N}}{_REST}": "qwen2",
}
"""The pre-tokenizer's regular expression → llama.cpp's name for it."""


def add_tokenizer(
    writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, *, vocab_size: int, stop_token_ids: Sequence[int]
) -> None:
    """Write the tokenizer and its chat template.

    Args:
        writer: The writer of the GGUF file.
        tokenizer: A fast tokenizer.
        vocab_size: The number of rows of the embedding; rows without a piece are written as unused, and tokens without
            a row, which no model can read or write, are left out (`tokens_without_row`), as llama.cpp's converter does.
        stop_token_ids: The tokens that end an answer, the most important first.

    Raises:
        RecipeError: The tokenizer is not BPE, or llama.cpp's name for its pre-tokenizer is unknown.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    record = json.loads(backend.to_str()) if backend is not None else {"model": {}}
    model = record["model"]
    if model.get("type") != "BPE":
        raise RecipeError(
            f"a {model.get('type', 'slow')} tokenizer cannot be written to GGUF", fix="use `loratune merge`"
        )
    pieces, types = _pieces(record, vocab_size)
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(model, pieces))
        writer.add_add_space_prefix(_adds_space(record))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(split_name(record))
        writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    writer.add_token_list(pieces)
    writer.add_token_types(types)
    _add_special(writer, tokenizer, [index for index in stop_token_ids if index < vocab_size], vocab_size)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.get_chat_template())


def split_name(record: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for the pre-tokenizer in `tokenizer.json`.

    Raises:
        RecipeError: The name is unknown.
    """
    steps = record["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    by_bytes = steps[-1].get("type") == "ByteLevel" and not steps[-1].get("add_prefix_space")
    if by_bytes and steps[-1].get("use_regex", True):
        if kinds == ["ByteLevel"]:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
            return "smollm"
    elif by_bytes and kinds == ["Split", "ByteLevel"]:
        name = _SPLITS.get(steps[0]["pattern"].get("Regex", ""))
        if name is not None:
            return name
    raise RecipeError(
        f"llama.cpp's name for this tokenizer's pre-tokenizer is unknown: {json.dumps(steps)[:200]}",
        fix="`loratune merge` writes a folder for llama.cpp's own converter",
    )


def _pieces(record: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[TokenType]]:
    """Return all pieces by id, and the type of each."""
    model = record["model"]
    pieces = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [TokenType.UNUSED] * vocab_size
    for piece, index in model["vocab"].items():
        if index >= vocab_size:
            continue
        pieces[index] = piece
        is_byte = model.get("byte_fallback") and len(piece) == 6 and piece.startswith("<0x")
        types[index] = TokenType.BYTE if is_byte else TokenType.NORMAL
        if piece == model.get("unk_token"):
            types[index] = TokenType.UNKNOWN
    for token in record["added_tokens"]:
        index = token["id"]
        if index >= vocab_size:
            continue
        pieces[index] = token["content"]
        if types[index] is not TokenType.UNKNOWN:
            types[index] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    return pieces, types


def _scores(model: Mapping[str, Any], pieces: Sequence[str]) -> list[float]:
    """Return SentencePiece scores: the higher, the earlier a piece is merged."""
    # Merges are listed in the order of their scores, so their ranks serve as scores.
    ranks: dict[str, int] = {}
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(left + right, len(ranks))
    last = float(len(ranks))
    return [-float(ranks[piece]) if piece in ranks else -last for piece in pieces]


def _adds_space(record: Mapping[str, Any]) -> bool:
    """Return whether the tokenizer puts a space before the text."""
    text = json.dumps([record.get("normalizer"), record.get("pre_tokenizer")])
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text


def tokens_without_row(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[str]:
    """Return the tokens whose ids are beyond the embedding of `vocab_size` rows, in the order of their ids."""
    beyond = sorted((index, token) for token, index in tokenizer.get_vocab().items() if index >= vocab_size)
    return [token for _, token in beyond]


def _add_special(
    writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int], vocab_size: int
) -> None:
    known: Any = tokenizer
    ids = {
        writer.add_bos_token_id: known.bos_token_id,
        writer.add_unk_token_id: known.unk_token_id,
        writer.add_pad_token_id: known.pad_token_id,
    }
    for add, index in ids.items():
        if index is not None and index < vocab_size:
            add(index)
    # llama.cpp has one token for the end of the sequence, of the turn, and of the message; each ends an answer.
    own = known.eos_token_id
    eos = own if own is not None and own < vocab_size else stop_token_ids[0]
    writer.add_eos_token_id(eos)
    others = [index for index in stop_token_ids if index != eos]
    if others:
        writer.add_eot_token_id(others[0])
    if len(others) > 1:
        writer.add_eom_token_id(others[1])
    with_special = known("a")["input_ids"]
    writer.add_add_bos_token(known.bos_token_id is not None and with_special[:1] == [known.bos_token_id])
    writer.add_add_eos_token(False)
