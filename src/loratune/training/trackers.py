"""Experiment trackers of transformers, kept from stopping a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback, get_reporting_integration_callbacks

from loratune.run.directory import RunDir
from loratune.training.event_log import EventLog


class Trackers(TrainerCallback):
    """Hands every event of the trainer on to the trackers of the recipe. One that fails is told, and left out from then on.

    Args:
        names: `train.report_to`.
        run: Where TensorBoard's files go: the folder for trackers.
        events: Where failures are told.
    """

    def __init__(self, names: tuple[str, ...], run: RunDir, events: EventLog) -> None:
        self._events = events
        self._trackers: dict[str, Any] = {}
        for name in names:
            made: list[Any] = []
            if self._survives(name, lambda name=name, made=made: made.append(_make(name, run))):  # type: ignore[misc]
                self._trackers[name] = made[0]

    def hand_on(
        self, event: str, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell all trackers of an event."""
        for name, tracker in list(self._trackers.items()):
            call = getattr(tracker, event)
            if not self._survives(name, lambda call=call: call(args, state, control, **kwargs)):  # type: ignore[misc]
                del self._trackers[name]

    def _survives(self, name: str, work: Callable[[], Any]) -> bool:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - a stranger's code, its server and its network; training needs none of them
            problem = f"{type(error).__name__}: {error}".partition("\n")[0]
            self._events.emit("tracker_failed", f"{name} failed and is told nothing more: {problem}")
            return False
        return True


def _handed_on(event: str) -> Callable[..., None]:
    def hand_on(
        self: Trackers, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.hand_on(event, args, state, control, **kwargs)

    return hand_on


for _event in [name for name in dir(TrainerCallback) if name.startswith("on_")]:
    setattr(Trackers, _event, _handed_on(_event))


def _make(name: str, run: RunDir) -> TrainerCallback:
    if name == "tensorboard":  # into the run's directory for trackers instead of among the checkpoints
        from torch.utils.tensorboard import SummaryWriter  # an optional package

        return TensorBoardCallback(SummaryWriter(str(run.trackers)))  # type: ignore[no-untyped-call]
    (callback,) = get_reporting_integration_callbacks([name])  # type: ignore[no-untyped-call]
    made: TrainerCallback = callback()
    return made
