"""planning.preparation."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from loratune.data.batch import num_supervised
from loratune.data.examples import Example
from loratune.data.mixture import mixture
from loratune.data.prepare import PreparedData
from loratune.data.prompts import Prompt
from loratune.model.adapter.start_from import adapter_fingerprint
from loratune.model.classifier import Classes
from loratune.model.device import Choice
from loratune.model.load import BaseModel
from loratune.planning.advice import Advice
from loratune.planning.hardware.devices import Device
from loratune.planning.lock import examples_fingerprint, make_lock, model_fingerprint, text_fingerprint
from loratune.planning.memory.memory import MemoryPlan
from loratune.planning.parameters import ParameterCount
from loratune.planning.presets import PresetPlan
from loratune.planning.scaling import Scaling
from loratune.planning.speed import StepProbe, TimePlan, with_probe
from loratune.recipe.recipe import Recipe
from loratune.run import processes
from loratune.run.directory import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


NO_LIMIT = 2**31
"""Stands for no limit of an example's tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    """What `prepare` found out.

    Attributes:
        recipe: With every `auto` resolved.
        choices: Setting → what `auto` became, and why.
        base: Where the base model lies.
        tokenizer: Its tokenizer, with the new tokens.
        new_tokens: The numbers of these.
        targets: Full names of the adapted modules.
        targets_in_words: The same for people.
        parameters: Exact counts.
        presets: The four target presets side by side.
        data: Examples and the data report.
        prompts: The held-out prompts that will be answered; none where the metric is none.
        start: The folder of the adapter to begin with; None where it is a fresh one.
        forgetting: The examples of another kind; none where `evaluate.forgetting` is none.
        memory: Bytes by component.
        time: Seconds, and the rate they were computed from.
        num_steps: Optimizer steps of the run.
        warnings: What the user should read before starting.
        advice: What an expert would change.
        device: The named device that the plan is for; None for this machine.
        scaling: The run on more and more devices; None where the plan is for one.
        probe: What real steps took; None where none were run.
        classes: Of a classifier; None where the model writes text.
    """

    recipe: Recipe
    choices: dict[str, Choice]
    base: BaseModel
    tokenizer: PreTrainedTokenizerBase
    new_tokens: tuple[int, ...]
    targets: tuple[str, ...]
    targets_in_words: str
    parameters: ParameterCount
    presets: tuple[PresetPlan, ...]
    data: PreparedData
    prompts: tuple[Prompt, ...]
    start: Path | None
    forgetting: tuple[Example, ...]
    memory: MemoryPlan
    time: TimePlan
    num_steps: int
    warnings: tuple[str, ...]
    advice: tuple[Advice, ...]
    device: Device | None
    scaling: Scaling | None = None
    probe: StepProbe | None = None
    classes: Classes | None = None

    def with_probe(self, probe: StepProbe) -> Preparation:
        """The same with the times that the probe's speed makes."""
        tokens = self.recipe.train.epochs * sum(len(example.input_ids) for example in self.data.train)
        time = with_probe(self.time, probe, tokens)
        return replace(
            self,
            probe=probe,
            time=time,
            presets=tuple(preset.scaled(time.train_seconds / self.time.train_seconds) for preset in self.presets),
        )

    def as_plan(self) -> Record:
        """`plan.json`: what is promised."""
        train, scale = self.data.train, self.data.scale
        memory, clock = self.memory, self.time
        num_tokens = round(scale * sum(len(example.input_ids) for example in train))
        return {
            "parameters": {
                "trainable": self.parameters.trainable,
                "total": self.parameters.total,
                "share": self.parameters.trainable / self.parameters.total,
                "adapter_bytes": self.parameters.adapter_bytes,
                "targets": self.targets_in_words,
                "per_module": [
                    {
                        "name": item.matrix.name,
                        "d_in": item.matrix.d_in,
                        "d_out": item.matrix.d_out,
                        "trainable": item.trainable,
                    }
                    for item in self.parameters.per_module
                ],
                "whole": [
                    {"name": item.name, "shapes": [list(shape) for shape in item.shapes], "trainable": item.trainable}
                    for item in self.parameters.whole
                ],
            },
            "presets": {preset.count.name: preset.as_record() for preset in self.presets},
            "memory": {"peak_bytes": memory.peak_bytes, **asdict(memory)},
            "time": {
                **asdict(clock),
                "tokens_per_second": self.recipe.train.epochs * num_tokens / clock.train_seconds,
                "num_steps": self.num_steps,
                "is_upper_bound": self.recipe.train.early_stopping is not None,
            },
            "probe": self.probe and {**asdict(self.probe), "tokens_per_second": self.probe.tokens_per_second},
            "data": {
                "num_examples": self.data.num_examples,
                "num_tokens": num_tokens,
                "num_supervised_tokens": round(scale * sum(num_supervised(example) for example in train)),
                "num_eval_examples": len(self.data.eval),
                "is_estimate": self.data.stream is not None,
                "sources": mixture(train, self.data.report, scale),
                **({"num_classes": len(self.classes.names)} if self.classes else {}),
            },
            "choices": {
                name: {"value": choice.value, "reason": choice.reason} for name, choice in self.choices.items()
            },
            "warnings": list(self.warnings),
            "advice": [advice.as_record() for advice in self.advice],
            "num_processes": processes.size(),
            "device": self.device
            and {
                "name": self.device.name,
                "memory_bytes": self.device.memory_bytes,
                "bf16_flops_per_second": self.device.bf16_flops_per_second,
                "source": self.device.source,
                "is_estimate": True,
            },
            "scaling": self.scaling and self.scaling.as_record(),
        }

    def as_lock(self) -> Record:
        """`lock.json`: everything effective, and the fingerprints of all inputs."""
        return make_lock(
            recipe=self.recipe.model_dump(mode="json"),
            choices={name: {"value": choice.value, "reason": choice.reason} for name, choice in self.choices.items()},
            inputs={
                "model": model_fingerprint(self.base.path),
                "model_path": str(self.base.path),
                "model_revision": self.base.revision,
                "template": text_fingerprint(str(self.tokenizer.chat_template)),
                "train": examples_fingerprint(self.data.train)
                if self.data.stream is None
                else self.data.stream.contents,
                "eval": examples_fingerprint(self.data.eval),
                **({"labels": list(self.classes.names)} if self.classes else {}),
                **({"start": adapter_fingerprint(self.start)} if self.start else {}),
                **({"forgetting": examples_fingerprint(self.forgetting)} if self.forgetting else {}),
            },
            adapter={"targets": self.targets_in_words, "trainable": self.parameters.trainable},
        )
