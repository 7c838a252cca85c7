"""Failures of the Hugging Face hub, reported in our own errors."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from loratune.run.errors import MachineError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Iterator


def unreachable_errors() -> tuple[type[Exception], ...]:
    """Return the errors that say that the Hub could not be reached, as opposed to `HfHubHTTPError`, its answer."""
    import httpx2
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    return (httpx2.HTTPError, OSError, OfflineModeIsEnabled, LocalEntryNotFoundError)


@contextmanager
def explain_hub_errors(setting: str, name: str, kind: str, *, fix: str, offline_fix: str) -> Iterator[None]:
    """Turn a refusal of the Hub into an error of the recipe, and an unreachable hub into one of the machine.

    Args:
        setting: The recipe's field, such as `model.name`.
        name: Its value, a Hub id.
        kind: What is fetched, such as `model`.
        fix: What to do if the Hub refuses.
        offline_fix: What to do if the Hub cannot be reached.

    Raises:
        RecipeError: The Hub answers with an error.
        MachineError: The Hub cannot be reached, and the local cache does not have it.
    """
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:  # before the others: it is an OSError too
        raise RecipeError(f"{setting} is {name}: the Hub answers {error.response.status_code}", fix=fix) from error
    except unreachable_errors() as error:
        raise MachineError(
            f"{setting} is {name}: the Hub cannot be reached, and the {kind} is not in the local cache",
            fix=offline_fix,
        ) from error
