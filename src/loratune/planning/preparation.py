"""The result of `prepare`: everything that is known about a run before the weights load."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

from loratune.data.batch import num_supervised
from loratune.data.mixture import mixture
from loratune.model.adapter.start_from import adapter_fingerprint
from loratune.planning.intervals import memory_interval, time_interval
from loratune.planning.lock import examples_fingerprint, make_lock, model_fingerprint, text_fingerprint
from loratune.planning.speed import StepProbe, TimePlan, with_probe
from loratune.planning.task import planned_task
from loratune.run import processes
from loratune.run.errors import plural
from loratune.run.html_table import html_table
from loratune.training.packing_support import obstacle

if TYPE_CHECKING:
    from collections.abc import Callable

    from loratune.data.prepared import PreparedData
    from loratune.model.device import Choice
    from loratune.planning.advice import Advice
    from loratune.planning.hardware.devices import Device
    from loratune.planning.intervals import Bounds
    from loratune.planning.memory.memory import MemoryPlan
    from loratune.planning.parts import RunAdapter, RunModel
    from loratune.planning.presets import PresetPlan
    from loratune.planning.scaling import Scaling
    from loratune.recipe.recipe import Recipe
    from loratune.run.directory import Record


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEstimate:
    """What a run costs.

    Attributes:
        memory: Bytes by component.
        time: Seconds, and the rates they were computed from.
        num_steps: Optimizer steps of the run.
        presets: The four target presets side by side.
        device: The named device that the plan is for; None for this machine.
        scaling: The run on more and more devices; None if the plan is for one.
        probe: Measured times of real steps; None if none were run.
    """

    memory: MemoryPlan
    time: TimePlan
    num_steps: int
    presets: tuple[PresetPlan, ...]
    device: Device | None
    scaling: Scaling | None = None
    probe: StepProbe | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunNotes:
    """What the user should read before starting.

    Attributes:
        warnings: A sentence each.
        advice: What an expert would change, with reasons and sources.
    """

    warnings: tuple[str, ...]
    advice: tuple[Advice, ...]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Preparation:
    """Everything that is known about a run before the weights load. Training reads the first five fields.

    Attributes:
        recipe: The recipe with every `auto` resolved.
        choices: Setting → what `auto` became, and why.
        model: The base model, without weights.
        adapter: What is trained.
        data: Examples, data report, and the held-out prompts that will be answered.
        estimate: Memory and time.
        notes: Warnings and advice.
    """

    recipe: Recipe
    choices: dict[str, Choice]
    model: RunModel
    adapter: RunAdapter
    data: PreparedData = field(repr=False)
    estimate: RunEstimate
    notes: RunNotes

    def __repr__(self) -> str:
        """Return a line with what matters: the fields hold every token of the data."""
        parameters, costs = self.adapter.parameters, self.estimate
        return (
            f"Preparation({self.recipe.model.name}: {parameters.trainable:,} of {parameters.total:,} parameters, "
            f"{plural(self.data.num_examples, 'example')}, {plural(costs.num_steps, 'step')}, "
            f"{costs.memory.peak_bytes / 2**30:.1f} GiB, {costs.time.total_seconds:,.0f} s; .as_plan() is the record)"
        )

    def _repr_html_(self) -> str:
        """Return a table of what matters, for notebooks."""
        parameters, costs, data = self.adapter.parameters, self.estimate, self._data_record()
        rows = [
            (
                "trained",
                f"{parameters.trainable:,} of {parameters.total:,} parameters: {self.adapter.targets_in_words}",
            ),
            ("examples", f"{data['num_examples']:,}, and {data['num_eval_examples']:,} held out"),
            ("tokens", f"{data['num_tokens']:,}, of which {data['num_supervised_tokens']:,} are trained"),
            ("steps", f"{costs.num_steps:,}"),
            ("memory", f"{costs.memory.peak_bytes / 2**30:.1f} GiB"),
            ("time", f"{costs.time.total_seconds:,.0f} s"),
            *(("warning", warning) for warning in self.notes.warnings),
        ]
        return html_table(self.recipe.model.name, rows)

    def with_probe(self, probe: StepProbe) -> Preparation:
        """Return the same with the times that measured steps give."""
        tokens = self.recipe.train.epochs * sum(len(example.input_ids) for example in self.data.train)
        before = self.estimate
        time = with_probe(before.time, probe, tokens)
        ratio = time.train_seconds / before.time.train_seconds
        presets = tuple(preset.scaled(ratio) for preset in before.presets)
        return replace(self, estimate=replace(before, probe=probe, time=time, presets=presets))

    def as_plan(self) -> Record:
        """Return `plan.json`: what is planned."""
        costs = self.estimate
        memory, device, probe = costs.memory, costs.device, costs.probe
        data = self._data_record()
        return {
            "parameters": self._parameters_record(),
            "presets": {preset.count.name: preset.as_record() for preset in costs.presets},
            "memory": {
                "peak_bytes": memory.peak_bytes,
                **asdict(memory),
                "interval": self._interval(memory_interval, memory.peak_bytes),
            },
            "time": {
                **asdict(costs.time),
                "interval": self._interval(time_interval, costs.time.total_seconds),
                "tokens_per_second": self.recipe.train.epochs * data["num_tokens"] / costs.time.train_seconds,
                "num_steps": costs.num_steps,
                "is_upper_bound": self.recipe.train.early_stopping is not None,
            },
            "probe": probe and {**asdict(probe), "tokens_per_second": probe.tokens_per_second},
            "data": data,
            "choices": self._choices_record(),
            "packing": self._packing_record(),
            "warnings": list(self.notes.warnings),
            "advice": [advice.as_record() for advice in self.notes.advice],
            "num_processes": processes.size(),
            "device": device
            and {
                "name": device.name,
                "memory_bytes": device.memory_bytes,
                "bf16_flops_per_second": device.bf16_flops_per_second,
                "source": device.source,
                "is_estimate": True,
            },
            "scaling": costs.scaling and costs.scaling.as_record(),
        }

    def as_lock(self) -> Record:
        """Return `lock.json`: every effective setting, and the fingerprints of all inputs."""
        base, data, start = self.model.base, self.data, self.adapter.start
        return make_lock(
            recipe=self.recipe.model_dump(mode="json"),
            choices=self._choices_record(),
            inputs={
                "model": model_fingerprint(base.path),
                "model_path": str(base.path),
                "model_revision": base.revision,
                "template": text_fingerprint(str(self.model.tokenizer.chat_template)),
                "train": examples_fingerprint(data.train) if data.stream is None else data.stream.contents,
                "eval": examples_fingerprint(data.eval),
                **planned_task(self.recipe).lock_entries(self.model.classes),
                **({"start": adapter_fingerprint(start)} if start else {}),
                **({"forgetting": examples_fingerprint(data.forgetting)} if data.forgetting else {}),
            },
            adapter={"targets": self.adapter.targets_in_words, "trainable": self.adapter.parameters.trainable},
        )

    def _interval(self, find: Callable[..., Bounds | None], planned: float) -> Record | None:
        """Return the bounds between which a planned number lies; None where no run was measured."""
        device = self.estimate.device
        costs = planned_task(self.recipe).step_costs(self.model.skeleton)
        found = find(self.model.device.value if device is None else device.name, is_encoder=costs.is_padded)
        if found is None:
            return None
        return {"low": found.low * planned, "high": found.high * planned, "source": found.source}

    def _packing_record(self) -> Record:
        skeleton = self.model.skeleton
        reason = "train.engine is trl" if self.recipe.train.engine == "trl" else ""
        if not reason and planned_task(self.recipe).step_costs(skeleton).is_padded:
            reason = "examples are padded"
        reason = reason or obstacle(skeleton)
        return {"packed": not reason, "why_unpacked": reason}

    def _choices_record(self) -> Record:
        return {name: {"value": choice.value, "reason": choice.reason} for name, choice in self.choices.items()}

    def _parameters_record(self) -> Record:
        parameters = self.adapter.parameters
        return {
            "trainable": parameters.trainable,
            "total": parameters.total,
            "share": parameters.trainable / parameters.total,
            "adapter_bytes": parameters.adapter_bytes,
            "targets": self.adapter.targets_in_words,
            "per_module": [
                {
                    "name": item.matrix.name,
                    "d_in": item.matrix.d_in,
                    "d_out": item.matrix.d_out,
                    "trainable": item.trainable,
                }
                for item in parameters.per_module
            ],
            "whole": [
                {"name": item.name, "shapes": [list(shape) for shape in item.shapes], "trainable": item.trainable}
                for item in parameters.whole
            ],
        }

    def _data_record(self) -> Record:
        train, scale = self.data.train, self.data.scale  # of streamed data, a sample and what it stands for
        return {
            "num_examples": self.data.num_examples,
            "num_tokens": round(scale * sum(len(example.input_ids) for example in train)),
            "num_supervised_tokens": round(scale * sum(num_supervised(example) for example in train)),
            "shared_fraction": self.data.shared_fraction,
            "num_eval_examples": len(self.data.eval),
            "is_estimate": self.data.stream is not None,
            "sources": mixture(train, self.data.report, scale),
            **planned_task(self.recipe).plan_entries(self.model.classes),
        }
