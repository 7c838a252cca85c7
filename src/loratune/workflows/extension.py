"""What `loratune extend` reads from a run, and how the new run starts: as if planned longer, or with a new schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loratune.data.steps import num_steps, num_steps_per_epoch
from loratune.planning.lock import changed_inputs, changed_settings
from loratune.planning.prepare import prepare
from loratune.recipe.recipe import Recipe, TrainSection
from loratune.recipe.tasks import load_task
from loratune.run.directory import read_json
from loratune.run.errors import LoratuneError, RecipeError, plural
from loratune.training.checkpoint import averaged_steps, checkpoints_in, damage_of
from loratune.training.event_log import History
from loratune.training.hf_arguments import (
    fraction_of,
    learning_rate_factor,
    schedule_arguments,
    steps_in_common,
)
from loratune.workflows.locked_recipe import located
from loratune.workflows.resume import start_from_command

if TYPE_CHECKING:
    from pathlib import Path

    from loratune.planning.preparation import Preparation
    from loratune.run.directory import Record, RunDir
    from loratune.run.progress import Progress

REWARM_FRACTION = 0.05
"""Warm-up of a new schedule where the run had none. Ibrahim et al. 2024 (arXiv 2403.08763) find that rates must rise
again before they decay again, and that the length of the rise hardly matters."""

_AFTER_THE_STEPS = frozenset(
    f"train.{name}"
    for name in (
        *("output_dir", "epochs", "save_every", "eval_every", "log_every", "keep_checkpoints", "early_stopping"),
        *("final_adapter", "average_checkpoints", "report_to", "max_skipped_steps", "on_bad_step"),
    )
)
"""Settings that decide when a run ends and what it keeps, not its steps; those of `evaluate` and `data.eval` too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Extension:
    """A run, and what changes in the one that extends it.

    Attributes:
        parent: The run.
        lock: Its `lock.json`.
        written: The recipe of the new run, with `auto` unresolved.
        changed: Setting → its new value, for all settings that differ from those that the run was started with.
        out: Directory of the new run.
        command: The command line that was given.
    """

    parent: RunDir
    lock: Record
    written: Recipe
    changed: dict[str, Any]
    out: Path
    command: str

    def recipe(self, settings: dict[str, dict[str, Any]] | None = None) -> Recipe:
        """Return the effective recipe of the new run: the run's own, with what changed and these further settings."""
        values = located(self.lock)
        for name, value in self.changed.items():
            section, _, key = name.partition(".")
            values[section][key] = value
        values["train"]["output_dir"] = str(self.out)
        for section, fields in (settings or {}).items():
            values[section] |= fields
        return Recipe.parse(values, file=self.parent.lock)

    @property
    def before(self) -> Recipe:
        """The effective recipe of the run."""
        return Recipe.parse(located(self.lock), file=self.parent.lock)

    @property
    def differences(self) -> tuple[str, ...]:
        """The changed settings, as `train.epochs (1 → 2)`."""
        named = changed_settings(self.lock["written"], self.written.model_dump(mode="json"))
        return tuple(words for words in named if not words.startswith("train.output_dir "))


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtensionStart:
    """How a new run begins.

    Attributes:
        prepared: The new run, prepared.
        settings: What its recipe has besides what the user changed.
        checkpoint: The run's checkpoint that it begins with.
        exact: Whether it goes on from there as if planned longer; else it begins at step 0, with a new schedule.
        differs: What it has otherwise than the run.
    """

    prepared: Preparation
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    checkpoint: Path
    exact: bool
    differs: tuple[str, ...]


def as_if_planned_longer(extension: Extension, progress: Progress) -> ExtensionStart | None:
    """Return the start of a run whose steps are those of the run that had been planned longer, to the bit.

    None if the examples, or a setting that decides steps, are others.

    Raises:
        RecipeError: It would be no longer; or there is no checkpoint up to which both runs have the same rates.
    """
    if not _same_settings(extension):
        return None
    before, parent = extension.before.train, extension.parent
    prepared = prepare(extension.recipe(), progress)
    refuse_another_base(extension, prepared)
    chooses = _chooses_by_held_out_loss(extension.written.train)
    if changed_inputs(extension.lock, prepared.as_lock(), keys=("train", "eval") if chooses else ("train",)):
        return None
    wanted, size = prepared.recipe.train, prepared.data.num_examples
    planned, steps = (num_steps(size, before.batch_size, epochs) for epochs in (before.epochs, wanted.epochs))
    if steps <= planned:
        raise nothing_more(extension)
    if wanted.early_stopping is not None and History.of(parent.read_metrics()).stopped_early:
        raise RecipeError(
            f"early stopping ended the run, and would end a longer one at the same step: train.early_stopping is "
            f"{wanted.early_stopping}",
            file=parent.root,
            fix="train.early_stopping=null, or a higher patience",
        )
    settings = _as_in_steps(before, planned, wanted, steps, extension.changed)
    longer = wanted.model_copy(update=settings)
    common = steps_in_common((before, planned), (longer, steps))
    checkpoint = newest_checkpoint(parent, at_most=common)
    if checkpoint is None:
        raise _refused(extension, (before, planned), (longer, steps), common)
    _require_averaged(parent, longer, int(checkpoint.name), steps, num_steps_per_epoch(size, longer.batch_size))
    if settings:
        prepared = prepare(extension.recipe({"train": settings}), progress)
    progress.line(
        f"as if {parent.root.name} had been planned for {plural(longer.epochs, 'epoch')}: from its step "
        f"{int(checkpoint.name):,} to step {steps:,}"
    )
    return ExtensionStart(
        prepared=prepared,
        settings={"train": settings} if settings else {},
        checkpoint=checkpoint,
        exact=True,
        differs=extension.differences,
    )


def with_new_schedule(extension: Extension, progress: Progress, *, rewarm: bool) -> ExtensionStart:
    """Return the start of a run with the adapter and the optimizer's state of the run, and a schedule of its own.

    Raises:
        RecipeError: There is nothing more to train, no checkpoint, or `rewarm` is needed and false.
    """
    parent, before = extension.parent, extension.before
    prepared = prepare(extension.recipe({"lora": {"start_from": None}}), progress)
    refuse_another_base(extension, prepared)
    changed = changed_inputs(extension.lock, prepared.as_lock(), keys=("train",))
    if not (changed or rewarm):
        words = "; ".join(extension.differences)
        raise RecipeError(
            f"a longer run with these settings would not have taken the steps of this one: {words}",
            file=parent.root,
            fix=f"`{extension.command} --rewarm`, which trains further with a new schedule; or leave them as they are",
        )
    checkpoint = _last_or_best(parent, before.train)
    train = prepared.recipe.train
    settings: dict[str, dict[str, Any]] = {"train": {}}
    if not changed:
        per_epoch = num_steps_per_epoch(prepared.data.num_examples, train.batch_size)
        taken = int(checkpoint.name) / num_steps_per_epoch(prepared.data.num_examples, before.train.batch_size)
        more = math.ceil(round((train.epochs - taken) * per_epoch, 6))
        if more <= 0:
            raise nothing_more(extension)
        settings["train"]["epochs"] = fraction_of(more, per_epoch)
    if train.warmup_fraction == 0 and train.schedule != "constant" and "train.warmup_fraction" not in extension.changed:
        settings["train"]["warmup_fraction"] = REWARM_FRACTION
    if before.lora.start_from is not None:
        settings["lora"] = {"start_from": None}
    settings |= _forgetting(extension, prepared, progress) if changed else {}
    if changed:
        _warn_of_known_answers(extension, prepared, progress)
    prepared = prepare(extension.recipe(settings), progress)
    final = prepared.recipe.train
    progress.line(
        f"from the adapter and the optimizer's state of {parent.root.name} at step {int(checkpoint.name):,}: "
        f"{plural(prepared.estimate.num_steps, 'step')} with a new {final.schedule} schedule, warm-up over "
        f"{final.warmup_fraction:.0%} of them"
    )
    return ExtensionStart(
        prepared=prepared,
        settings=settings,
        checkpoint=checkpoint,
        exact=False,
        differs=(*extension.differences, *changed, "train.schedule (begins again)"),
    )


def newest_checkpoint(parent: RunDir, *, at_most: int | None = None) -> Path | None:
    """Return a run's newest undamaged checkpoint, of at most this step; None if it has none there.

    Raises:
        RecipeError: The run has no checkpoint at all.
    """
    found = checkpoints_in(parent.checkpoints)
    usable = [path for path in found if not damage_of(path)]
    if not usable:
        raise RecipeError(
            "the run has no checkpoint, with the optimizer's state" if not found else "every checkpoint is damaged",
            file=parent.checkpoints,
            fix=f"train its adapter further without that state, as a new run: `{start_from_command(parent)}`",
        )
    return next((path for path in reversed(usable) if at_most is None or 0 < int(path.name) <= at_most), None)


def nothing_more(extension: Extension) -> RecipeError:
    """Return the refusal of an extension that adds no step."""
    epochs = extension.before.train.epochs
    return RecipeError(
        f"nothing more to train: the run was planned for {plural(epochs, 'epoch')}, and the examples are the same",
        file=extension.parent.root,
        fix=f"train.epochs={2 * epochs:g} for as many again, or data.train=FILE for other data",
    )


def refuse_another_base(extension: Extension, prepared: Preparation) -> None:
    """Refuse an extension on another base or template.

    Raises:
        RecipeError: They changed since the run.
    """
    changed = changed_inputs(extension.lock, prepared.as_lock(), keys=("model", "template", "labels"), known_only=True)
    if changed:
        raise RecipeError(
            f"changed since the run: {', '.join(changed)}", file=extension.parent.lock, fix="restore it, or train again"
        )


def _same_settings(extension: Extension) -> bool:
    """Tell whether no setting changed that decides the steps already taken."""
    allowed = {*_AFTER_THE_STEPS, "data.eval"}
    if _chooses_by_held_out_loss(extension.written.train):
        allowed -= {"train.eval_every", "train.save_every", "data.eval"}
    return all(name in allowed or name.startswith("evaluate.") for name in extension.changed)


def _chooses_by_held_out_loss(train: TrainSection) -> bool:
    """Tell whether the held-out losses of the steps decide which adapter a run ends with."""
    return train.final_adapter == "best" or train.early_stopping is not None


def _as_in_steps(
    before: TrainSection, planned: int, wanted: TrainSection, steps: int, changed: dict[str, Any]
) -> dict[str, Any]:
    """Return the settings that are fractions of the run, so that they are the same numbers of steps in a longer one."""
    settings: dict[str, Any] = {}
    for name in ("save_every", "eval_every"):
        every = getattr(before, name)
        if f"train.{name}" not in changed and not isinstance(every, str) and every < 1:
            settings[name] = math.ceil(planned * every)
    warmup = schedule_arguments(before, planned)["warmup_steps"]
    if warmup:
        settings["warmup_fraction"] = fraction_of(warmup, steps)
    return {name: value for name, value in settings.items() if value != getattr(wanted, name)}


def _refused(
    extension: Extension, before: tuple[TrainSection, int], longer: tuple[TrainSection, int], common: int
) -> RecipeError:
    """Return the refusal of a run that has no checkpoint from before the two learning rates part."""
    rates = [train.learning_rate * learning_rate_factor(train, steps)(common + 1) for train, steps in (before, longer)]
    schedule = before[0].schedule
    kept = " and no checkpoint from before is left" if common else ""
    return RecipeError(
        f"a run planned for {plural(longer[0].epochs, 'epoch')} would have had other learning rates from step "
        f"{common + 2:,} on: {rates[1]:.3g} there, {rates[0]:.3g} here (train.schedule: {schedule}){kept}",
        file=extension.parent.root,
        fix=f"`{extension.command} --rewarm` trains further with a new schedule, which rises again before it decays; "
        f"or train the longer run from the start: `loratune train {extension.parent.recipe} "
        f"train.epochs={longer[0].epochs:g} train.output_dir={extension.out}`",
    )


def _require_averaged(parent: RunDir, train: TrainSection, step: int, steps: int, per_epoch: int) -> None:
    """Refuse a run whose end would average checkpoints that the extended run did not keep."""
    wanted = averaged_steps(train, last_step=steps, num_steps=steps, num_per_epoch=per_epoch)
    kept = {int(path.name) for path in checkpoints_in(parent.checkpoints)}
    missing = [number for number in wanted if number <= step and number not in kept]
    if missing:
        raise RecipeError(
            f"train.average_checkpoints is {train.average_checkpoints}, but the run did not keep the checkpoint of "
            f"step {missing[0]}, one of those to average",
            file=parent.checkpoints,
            fix="more epochs, a lower train.average_checkpoints, or train.average_checkpoints=null",
        )


def _last_or_best(parent: RunDir, train: TrainSection) -> Path:
    """Return the checkpoint of the adapter that the run ended with, or its newest one."""
    best = parent.checkpoints / str(read_json(parent.best)["step"]) if parent.best.is_file() else None
    if train.final_adapter == "best" and best is not None and not damage_of(best):
        return best
    newest = newest_checkpoint(parent)
    assert newest is not None
    return newest


def _forgetting(extension: Extension, prepared: Preparation, progress: Progress) -> dict[str, dict[str, Any]]:
    """Return the settings with which the new run measures the held-out data of the run that it extends."""
    before = extension.before
    if prepared.recipe.evaluate.forgetting != "none" or not load_task(before.model.task).writes_text:
        return {}
    if not changed_inputs(extension.lock, prepared.as_lock(), keys=("eval",)):
        return {}  # held out here too, so it is measured in any case
    if isinstance(before.data.eval, tuple) and before.data.format == "auto" and not before.data.columns:
        return {"evaluate": {"forgetting": [source.model_dump(mode="json") for source in before.data.eval]}}
    progress.warn(
        "what is forgotten of the old data is not measured, since its held-out rows have no file of their own that "
        "can be read alone; evaluate.forgetting=FILE names one"
    )
    return {}


def _warn_of_known_answers(extension: Extension, prepared: Preparation, progress: Progress) -> None:
    """Warn of held-out examples that the extended run was trained on."""
    held_out = {example.input_ids.tobytes() for example in prepared.data.eval}
    if not held_out:
        return
    try:
        old = prepare(extension.before, progress).data
    except LoratuneError as error:
        progress.warn(f"whether the run was trained on what is held out now cannot be checked: {error.problem}")
        return
    known = held_out & {example.input_ids.tobytes() for example in old.train}
    if known:
        progress.warn(
            f"{len(known)} of {plural(len(held_out), 'held-out example')} were trained on by "
            f"{extension.parent.root.name}, so the held-out loss looks too good: data.eval=FILE names others"
        )
