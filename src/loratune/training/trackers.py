"""transformers' experiment trackers, whose failures cannot stop a run."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback, get_reporting_integration_callbacks

if TYPE_CHECKING:
    from collections.abc import Callable

    from loratune.run.directory import RunDir
    from loratune.training.event_log import EventLog


class Trackers(TrainerCallback):
    """Passes every event of the trainer to the recipe's trackers; one that fails is reported once and not called again.

    Args:
        names: The trackers of `train.report_to`.
        run: The run directory, whose folder for trackers gets TensorBoard's files.
        events: Where failures are reported.
    """

    def __init__(self, names: tuple[str, ...], run: RunDir, events: EventLog) -> None:
        self._events = events
        self._trackers: dict[str, Any] = {}
        for name in names:
            self._survives(name, partial(self._create, name, run))

    def _create(self, name: str, run: RunDir) -> None:
        self._trackers[name] = _make(name, run)

    def dispatch(
        self, event: str, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Pass an event, by its name in `TrainerCallback`, to all trackers."""
        for name, tracker in list(self._trackers.items()):
            call = getattr(tracker, event)
            if not self._survives(name, partial(call, args, state, control, **kwargs)):
                del self._trackers[name]

    def _survives(self, name: str, work: Callable[[], Any]) -> bool:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - third-party code, a server and a network, none needed to train
            problem = f"{type(error).__name__}: {error}".partition("\n")[0]
            self._events.emit("tracker_failed", f"{name} failed and gets no more data: {problem}")
            return False
        return True


def _dispatcher(event: str) -> Callable[..., None]:
    def dispatch(
        self: Trackers, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.dispatch(event, args, state, control, **kwargs)

    return dispatch


# All events, also those that later versions of transformers add.
for _event in [name for name in dir(TrainerCallback) if name.startswith("on_")]:
    setattr(Trackers, _event, _dispatcher(_event))


def _make(name: str, run: RunDir) -> TrainerCallback:
    if name == "tensorboard":  # transformers' own would write among the checkpoints
        from torch.utils.tensorboard import SummaryWriter  # an optional package

        return TensorBoardCallback(SummaryWriter(str(run.trackers)))  # type: ignore[no-untyped-call]
    (callback,) = get_reporting_integration_callbacks([name])  # type: ignore[no-untyped-call]
    tracker: TrainerCallback = callback()
    return tracker
