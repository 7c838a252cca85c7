"""What an expert would say about a run before it starts: short, each piece with its reason and source.

Advice changes nothing. Each rule speaks only if it applies; a run that needs no advice gets none.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from loratune.model.adapter.variants import saved_rank, scale_of
from loratune.planning.task import planned_task
from loratune.recipe.roles import as_written, trained_roles

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from loratune.planning.advice_facts import AdviceFacts

SCHULMAN = "Schulman et al. 2025, LoRA Without Regret, thinkingmachines.ai/blog/lora"


VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM's `max_lora_rank` can have (`MaxLoRARanks` in vllm/config/lora.py, 0.14); its default is 16."""


WITHOUT_LORA_IN_VLLM = ("GPT2LMHeadModel", "GPTNeoXForCausalLM", "GPTJForCausalLM")
"""Common architectures that docs.vllm.ai/en/latest/models/supported_models does not list as supporting LoRA."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """One piece of advice.

    Attributes:
        about: The setting, or another subject such as `stop token`.
        text: What to do.
        reason: Why.
        source: Where the reason comes from; empty if it is arithmetic.
    """

    about: str
    text: str
    reason: str
    source: str = ""

    def __str__(self) -> str:
        source = f" ({self.source})" if self.source else ""
        return f"{self.text}: {self.reason}{source}"

    def as_record(self) -> dict[str, str]:
        """Return the entry of `plan.json`."""
        return {"about": self.about, "text": self.text, "reason": self.reason, "source": self.source}


def give_advice(facts: AdviceFacts) -> tuple[Advice, ...]:
    """Return all advice that applies, the most important first."""
    return tuple(chain.from_iterable(rule(facts) for rule in _RULES))


def _prompt(facts: AdviceFacts) -> Iterator[Advice]:
    check = facts.prompt_check
    if not check or not check["header_differs"] + check["history_differs"]:
        return
    shown = (
        f"at {check['file']}:{check['line']} training has {check['trained']!r}, but a server sends {check['served']!r}"
    )
    if check["header_differs"]:
        if "</think>" in check["served"]:
            text = "data.thinking=strip, or serve with a template whose generation prompt leaves room for thoughts"
        elif "<think>" in check["served"]:
            text = "add thoughts to the answers, or serve with a template whose generation prompt does not open <think>"
        else:
            text = "serve with the prompt that was trained"
        yield Advice(
            about="chat template",
            text=text,
            reason=f"{check['header_differs']} of {check['checked']} compared prompts start the answer differently "
            f"from training: {shown}",
        )
    if check["history_differs"]:
        yield Advice(
            about="data.thinking",
            text="end conversations after their first answer with thoughts, or set data.thinking=strip",
            reason=f"{check['history_differs']} of {check['checked']} compared prompts differ from training before the "
            f"last answer, usually because templates drop the thoughts of earlier answers: {shown}",
        )


def _stop_token(facts: AdviceFacts) -> Iterator[Advice]:
    if facts.stop_token and facts.generation_stops and facts.stop_token not in facts.generation_stops:
        yield Advice(
            about="stop token",
            text=f"serve with the stop token {facts.stop_token}",
            reason=f"the answers are trained to end with {facts.stop_token}, but the model's generation settings stop "
            f"at {', '.join(facts.generation_stops)} only, so a server that reads them generates past the answer",
            source="eos_token_id in the model's generation_config.json or config.json",
        )


def _cut(facts: AdviceFacts) -> Iterator[Advice]:
    data = facts.recipe.data
    if facts.num_cut and facts.num_cut >= 0.01 * facts.num_examples and data.train_on != "all":
        yield Advice(
            about="data.max_length",
            text="data.max_length=auto, or data.on_long=drop",
            reason=f"{facts.num_cut:,} of {facts.num_examples:,} examples are truncated to {data.max_length:,} tokens, "
            "and a truncated answer is trained without its end",
        )


def _untrained_answers(facts: AdviceFacts) -> Iterator[Advice]:
    recipe = facts.recipe
    if recipe.evaluate.metric != "none" and "assistant" not in (trained_roles(recipe.data.train_on) or ("assistant",)):
        yield Advice(
            about="evaluate.metric",
            text="evaluate.metric=none, or add assistant to data.train_on",
            reason=f"assistant answers are generated and scored by {recipe.evaluate.metric}, but data.train_on is "
            f"{as_written(recipe.data.train_on)}: the held-out loss measures what is trained, the score does not",
        )


def _learning_rate(facts: AdviceFacts) -> Iterator[Advice]:
    rate = facts.recipe.train.learning_rate
    if facts.recipe.train.optimizer == "sgd" or not planned_task(facts.recipe).is_supervised:
        return  # the source is about learning rates of Adam, in supervised fine-tuning and policy gradients
    if rate < 1e-4:
        yield Advice(
            about="train.learning_rate",
            text="train.learning_rate=2e-4",
            reason=f"{rate:g} is low for LoRA, whose best learning rate is about ten times that of full fine-tuning",
            source=SCHULMAN,
        )
    if rate > 2e-3:
        yield Advice(
            about="train.learning_rate",
            text="train.learning_rate=5e-4",
            reason=f"{rate:g} is high for LoRA, whose best learning rate lies between 1e-4 and 1e-3 for most models",
            source=SCHULMAN,
        )


def _targets(facts: AdviceFacts) -> Iterator[Advice]:
    if facts.feed_forward is False:
        yield Advice(
            about="lora.targets",
            text="lora.targets=complete",
            reason="adapters on attention only learn less than adapters on the feed-forward matrices, even with the "
            "same number of parameters",
            source=SCHULMAN,
        )


def _capacity(facts: AdviceFacts) -> Iterator[Advice]:
    # One epoch, since repeated data is not new. 2 bits a parameter is the most that was measured (Allen-Zhu & Li).
    data_bits, adapter_bits = facts.num_supervised_tokens, 2 * facts.trainable
    if data_bits > adapter_bits:
        yield Advice(
            about="lora.r",
            text="raise lora.r, or set lora.targets=complete",
            reason=f"{facts.num_supervised_tokens:,} trained tokens at about 1 bit each are more than the adapter's "
            f"{facts.trainable:,} parameters can store at about 2 bits each",
            source=f"{SCHULMAN}; Allen-Zhu & Li 2024, arXiv 2404.05405",
        )


def _scale(facts: AdviceFacts) -> Iterator[Advice]:
    lora = facts.recipe.lora
    scale = scale_of(lora)
    if lora.variant != "rslora" and not 0.5 <= scale <= 8:
        yield Advice(
            about="lora.alpha",
            text=f"lora.alpha={2 * lora.r:g}",
            reason=f"the update is scaled by alpha/r = {scale:g}, so it learns far "
            f"{'slower' if scale < 0.5 else 'faster'} at the usual learning rates, which assume a scale of 1 to 2",
            source="Hu et al. 2021, arXiv 2106.09685, section 4.1",
        )


def _warmup(facts: AdviceFacts) -> Iterator[Advice]:
    train = facts.recipe.train
    if (
        train.optimizer == "adamw"
        and train.warmup_fraction == 0
        and (train.learning_rate >= 5e-4 or facts.num_steps >= 1000)
    ):
        yield Advice(
            about="train.warmup_fraction",
            text="train.warmup_fraction=0.03",
            reason=f"without warm-up AdamW's first steps have the full learning rate of {train.learning_rate:g}, on "
            "second moments estimated from only a few batches",
            source="Ma & Yarats 2021, arXiv 1910.04209",
        )


def _idle_devices(facts: AdviceFacts) -> Iterator[Advice]:
    size, devices = facts.recipe.train.batch_size, facts.num_devices
    if size < devices:
        yield Advice(
            about="train.batch_size",
            text=f"train.batch_size={devices}, or use {size} devices",
            reason=f"a step of {size} examples keeps {size} of {devices} devices busy and {devices - size} idle; "
            f"the smallest batch size for all of them is {devices}, which changes the run: fewer and larger steps",
        )


def _num_steps(facts: AdviceFacts) -> Iterator[Advice]:
    train = facts.recipe.train
    if facts.num_examples < 50:
        yield Advice(
            about="data.train",
            text="collect more examples",
            reason=f"{facts.num_examples} examples are few; expect a clear improvement from 50 to 100 good ones",
            source="platform.openai.com/docs/guides/supervised-fine-tuning",
        )
    elif facts.num_steps < 30 and train.batch_size > 8:
        yield Advice(
            about="train.batch_size",
            text=f"train.batch_size=8, or more train.{'epochs' if train.max_steps is None else 'max_steps'}",
            reason=f"{facts.num_steps} optimizer steps are probably too few; each step uses {train.batch_size} of "
            f"{facts.num_examples:,} examples",
        )
    elif train.batch_size > 128:
        yield Advice(
            about="train.batch_size",
            text="train.batch_size=32",
            reason=f"at large batch sizes such as {train.batch_size} LoRA loses more quality than full fine-tuning",
            source=SCHULMAN,
        )


def _cadence(facts: AdviceFacts) -> Iterator[Advice]:
    train, steps = facts.recipe.train, facts.num_steps
    never = {
        "log_every": ("log nothing", "10"),
        "eval_every": ("measure no held-out loss during training", "0.1"),
        "save_every": ("save no checkpoint, so a crash would lose everything", "0.1"),
    }
    for name, (consequence, better) in never.items():
        every = getattr(train, name)
        if not isinstance(every, str) and every > steps:
            yield Advice(
                about=f"train.{name}",
                text=f"train.{name}={better}",
                reason=f"with {steps:,} steps, {name}={every:g} would {consequence}",
            )
    per_epoch = steps / max(1.0, train.epochs)
    if per_epoch > 2000:
        names = [name for name in ("eval_every", "save_every", "log_every") if getattr(train, name) == "epoch"]
        names = [name for name in names if name != "eval_every" or facts.recipe.data.eval != "none"]
        if names:
            yield Advice(
                about=f"train.{names[0]}",
                text=" ".join(f"train.{name}={'100' if name == 'log_every' else '0.05'}" for name in names),
                reason=f"an epoch has {per_epoch:,.0f} steps, and nothing is reported or saved in between",
            )


def _serving(facts: AdviceFacts) -> Iterator[Advice]:
    if not planned_task(facts.recipe).writes_text:
        return
    r = saved_rank(facts.recipe.lora)
    if facts.recipe.lora.variant == "dora":
        yield Advice(
            about="lora.variant",
            text="merge the adapter before serving it with vLLM, llama.cpp or Ollama, or set lora.variant=plain",
            reason="they load A and B, but cannot load DoRA's magnitudes",
            source="docs.vllm.ai/en/latest/features/lora; convert_lora_to_gguf.py of llama.cpp",
        )
    elif facts.architecture in WITHOUT_LORA_IN_VLLM:
        yield Advice(
            about="vLLM",
            text="merge the adapter before serving it with vLLM",
            reason=f"vLLM does not load LoRA adapters on {facts.architecture}",
            source="docs.vllm.ai/en/latest/models/supported_models",
        )
    elif r > VLLM_RANKS[-1]:
        yield Advice(
            about="lora.r",
            text=f"lora.r={VLLM_RANKS[-1] * facts.recipe.lora.r // r}, or merge the adapter before serving it",
            reason=f"vLLM rejects adapters of rank {r}; its highest --max-lora-rank is {VLLM_RANKS[-1]}",
            source="MaxLoRARanks in vllm/config/lora.py",
        )
    elif r > 16:
        allowed = next(rank for rank in VLLM_RANKS if rank >= r)
        yield Advice(
            about="lora.r",
            text=f"serve with vLLM's --max-lora-rank {allowed}",
            reason=f"its default rejects ranks over 16, and this adapter has rank {r}",
            source="docs.vllm.ai/en/latest/features/lora",
        )
    if facts.unknown_to_gguf:
        yield Advice(
            about="llama.cpp",
            text="merge the adapter before exporting it to GGUF",
            reason=f"no architecture of llama.cpp has {', '.join(facts.unknown_to_gguf)}, so an adapter on it cannot "
            "be converted without its base",
            source="tensor names of the gguf package",
        )


_RULES: tuple[Callable[[AdviceFacts], Iterator[Advice]], ...] = (
    _prompt,
    _stop_token,
    _cut,
    _untrained_answers,
    _learning_rate,
    _targets,
    _capacity,
    _scale,
    _warmup,
    _idle_devices,
    _num_steps,
    _cadence,
    _serving,
)
