"""Datasets of the Hugging Face Hub, and those that `datasets` saved to disk."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

from loratune.data.rows.row import Row, without_nested_nulls
from loratune.run.errors import DataError, MachineError

if TYPE_CHECKING:
    from pathlib import Path

    from loratune.recipe.recipe import Source

HUB_TIMEOUT_SECONDS = 6.0

_LOCAL_FIX = (
    "use a local file: data.train=FILE.jsonl data.eval=FILE.jsonl (also .json, .parquet, .csv, or a folder); "
    "or, if it was loaded on this machine before, set HF_HUB_OFFLINE=1"
)


def read_hub(source: Source) -> list[Row]:
    """Read all rows of a Hub dataset; errors as `hub_table`."""
    place, table = hub_table(source)
    return _rows(place, table)


def _rows(place: str, table: Any) -> list[Row]:
    return [Row(file=place, line=n, value=without_nested_nulls(value)) for n, value in enumerate(table, start=1)]


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of `datasets` wrote the folder."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def read_saved(folder: Path, split: str | None) -> list[Row]:
    """Read the rows of a dataset that `save_to_disk` wrote.

    Args:
        folder: The folder.
        split: The split; None: `train`, or the only one.

    Raises:
        DataError: It cannot be read, or has no such split.
    """
    import datasets

    try:
        table = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"a dataset saved by datasets that cannot be loaded: {error}", file=folder, fix="save it again"
        ) from None
    if isinstance(table, datasets.DatasetDict):
        names = list(table)
        name = split or ("train" if "train" in names else names[0] if len(names) == 1 else "")
        if name not in table:
            raise DataError(
                f"no split {name or 'train'} in this dataset; it has {', '.join(names)}", file=folder,
                fix=f"name one: data.train='{{name: {folder}, split: {names[0]}}}'",
            )  # fmt: skip
        table = table[name]
    elif split is not None:
        raise DataError(f"split is {split}, but this dataset has none", file=folder, fix="remove split")
    return _rows(str(folder), table)


def hub_table(source: Source) -> tuple[str, Any]:
    """Return the name of a Hub dataset for messages, and its rows as a `datasets.Dataset`.

    Raises:
        DataError: There is no dataset with this name, config and split.
        MachineError: The Hub does not answer, and the dataset is not in the local cache.
    """
    # `datasets` takes a second to import, and only hub sources need it.
    import datasets
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError

    split = source.split or "train"
    _require_hub(source)
    try:
        table = datasets.load_dataset(source.name, source.config, split=split)
    except DatasetNotFoundError as error:
        raise DataError(
            f"no such dataset: {error}", file=source.name, fix="check the id; log in if it is gated"
        ) from None
    except ValueError as error:
        raise DataError(f"cannot load: {error}", file=source.name, fix="check config and split") from None
    except (OSError, HfHubHTTPError) as error:
        raise _unreachable(source, str(error)) from None
    return ":".join(part for part in ("hub", source.name, source.config, split) if part), table


def hub_class_names(source: Source, column: str) -> list[str]:
    """Return the class names of an integer column of a Hub dataset, in order; empty if it has none."""
    features = hub_table(source)[1].features
    names: list[str] = list(getattr(features.get(column), "names", None) or ())
    return names


def hub_has_split(source: Source, split: str) -> bool:
    """Whether a Hub dataset has a split of this name.

    Raises:
        MachineError: The Hub does not answer within a few seconds.
    """
    import datasets

    _require_hub(source)
    try:
        return split in datasets.get_dataset_split_names(source.name, source.config)
    except (OSError, ValueError):
        return False


def _require_hub(source: Source) -> None:
    """Raise if the Hub does not answer."""
    from huggingface_hub import constants

    # Asked once and briefly, since `datasets` itself retries for half a minute. With HF_HUB_OFFLINE it reads its cache.
    if not constants.HF_HUB_OFFLINE and not hub_answers():
        raise _unreachable(source, f"{constants.ENDPOINT} does not answer")


def hub_answers(seconds: float = HUB_TIMEOUT_SECONDS) -> bool:
    """Whether the Hub answers within this many seconds."""
    from huggingface_hub import constants

    done = threading.Event()
    thread = threading.Thread(target=_ask_hub, args=(constants.ENDPOINT, done), daemon=True)
    thread.start()
    thread.join(seconds)  # a thread, because name resolution has no timeout
    return done.is_set()


def _ask_hub(endpoint: str, done: threading.Event) -> None:
    request = urllib.request.Request(endpoint, method="HEAD")  # noqa: S310 - the Hub's own address
    try:
        urllib.request.urlopen(request, timeout=HUB_TIMEOUT_SECONDS / 2).close()  # noqa: S310
    except urllib.error.HTTPError:
        done.set()  # any answer counts
    except OSError:
        return
    done.set()


def _unreachable(source: Source, reason: str) -> MachineError:
    problem = f"cannot load the dataset {source.name} from the Hugging Face Hub: {reason}"
    return MachineError(problem, fix=_LOCAL_FIX)
