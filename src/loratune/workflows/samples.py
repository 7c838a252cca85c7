"""Answers to a few held-out prompts while a run trains (`evaluate.samples_every`), to see them change."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loratune.data.prompts import stop_token_ids
from loratune.data.steps import num_steps_per_epoch, trigger_steps
from loratune.evaluation.generate import generate_answers
from loratune.run import processes
from loratune.run.errors import MachineError, plural
from loratune.training.event_log import EventLog

if TYPE_CHECKING:
    from peft import PeftModel

    from loratune.planning.preparation import Preparation
    from loratune.run.directory import Record, RunDir
    from loratune.run.progress import Progress
    from loratune.training.signals import StopRequest

NUM_SAMPLES = 3
"""The held-out prompts that are answered, the first ones."""


def sample_callbacks(
    prepared: Preparation, run: RunDir, model: PeftModel, stop: StopRequest, progress: Progress, together: bool
) -> list[TrainerCallback]:
    """Return the callback that answers prompts, if the recipe wants it; arguments as of `SampleCallback`."""
    if prepared.recipe.evaluate.samples_every == "never" or not prepared.data.prompts:
        return []
    return [SampleCallback(prepared, run, model, stop, progress, together=together)]


class SampleCallback(TrainerCallback):
    """Answers held-out prompts after the steps of `evaluate.samples_every`, and records the answers as an event.

    The last step is left out: the evaluation after it answers all prompts. An answer is on disk before the checkpoint
    of its step, so that a resumed run has the answers of the run without the interruption. A run that is stopped does
    not wait for them; it writes them when it is resumed.

    Args:
        prepared: The prepared run.
        run: Its directory.
        model: The base model with the adapter.
        stop: The user's request to stop.
        progress: Shows how far the answers are.
        together: Whether all processes answer, as those must that share the base model; else the first alone does.
    """

    def __init__(
        self,
        prepared: Preparation,
        run: RunDir,
        model: PeftModel,
        stop: StopRequest,
        progress: Progress,
        *,
        together: bool,
    ) -> None:
        self._prepared, self._model, self._stop = prepared, model, stop
        self._progress, self._together = progress, together
        self._events = EventLog(run, progress)
        recipe, total = prepared.recipe, prepared.estimate.num_steps
        per_epoch = num_steps_per_epoch(prepared.data.num_examples, recipe.train.batch_size)
        steps = trigger_steps(recipe.evaluate.samples_every, steps=total, num_per_epoch=per_epoch)
        self._steps = {step for step in steps if step < total}
        known = processes.gather([line["step"] for line in run.read_metrics() if line.get("event") in _RECORDED])[0]
        self._known = set(known)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._answer(state.global_step)  # of a run that was stopped before it

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._answer(state.global_step)

    def _answer(self, step: int) -> None:
        if step not in self._steps or step in self._known or self._stop:
            return
        self._known.add(step)
        if not (self._together or processes.is_main()):
            return
        self._events.step = step
        try:
            self._record(step)
        except processes.LostPeerError:
            raise
        except Exception as error:  # from the model's own code; a look at answers must not cost hours of training
            if self._together:
                raise  # the other processes wait for this one in the middle of a layer
            problem = f"{type(error).__name__}: {error}".partition("\n  fix:")[0]
            self._events.emit("samples_failed", f"no held-out prompt was answered: {problem}")

    def _record(self, step: int) -> None:
        prepared, started = self._prepared, time.perf_counter()
        prompts, tokenizer = prepared.data.prompts[:NUM_SAMPLES], prepared.model.tokenizer
        with self._progress.task("sample answers", len(prompts), "prompts") as task:
            answers = generate_answers(
                self._model,
                tokenizer,
                prompts,
                max_new_tokens=prepared.recipe.evaluate.max_new_tokens,
                stop_token_ids=stop_token_ids(tokenizer),
                token_limit=prepared.estimate.memory.generation_tokens,
                progress=task.advance,
                warn=self._report_smaller_batches,
            )
        items: list[Record] = [
            {
                "question": prompt.question,
                "reference": prompt.references[0],
                "text": answer.text,
                "stopped": answer.stopped,
            }
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        message = f"{plural(len(items), 'held-out prompt')} answered after step {step}"
        seconds = time.perf_counter() - started
        self._events.emit("samples", message, warn=False, answers=items, seconds=seconds)

    def _report_smaller_batches(self, message: str) -> None:
        if self._together:
            raise MachineError(
                f"process {processes.rank()}: {message}, which processes that share the base cannot do alone",
                fix="a smaller evaluate.max_new_tokens, or evaluate.samples_every=never",
            )
        self._events.emit("smaller_answer_batches", message)


_RECORDED = ("samples", "samples_failed")
