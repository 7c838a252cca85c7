"""The datasets that files of other tools name, as settings of a recipe: every key of theirs is translated or
reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratune.data.rows.conversation import ROLES
from loratune.data.rows.messages import SHAREGPT_ROLES
from loratune.workflows.guidance.other_tools.settings import OFF, Answer, OtherSettings, Translated

if TYPE_CHECKING:
    from collections.abc import Iterator

_OF_HUB = ("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split")
DATA_WORDS = ("dataset_dir", *_OF_HUB[1:])
"""Settings about data whose value is one word."""

_FORMATS = {
    "alpaca": "alpaca",
    "chat_template": "messages",
    "sharegpt": "sharegpt",
    "completion": "text",
    "pretrain": "text",
}
"""Type of a dataset in Axolotl → `data.format`."""

_PAIRS: dict[str, dict[str, str]] = {
    "icr": {"prompt": "input"},
    "argilla": {"chosen": "chosen_response", "rejected": "rejected_response"},
}
"""Second part of the type of a dataset of pairs in Axolotl, such as `chatml.icr` → `data.columns`."""

_FIELDS = {
    "field_messages": "messages",
    "field": "text",
    **{f"field_{name}": name for name in ("instruction", "input", "output", "system", "tools")},
    **{f"field_{name}": name for name in ("prompt", "chosen", "rejected")},
}
"""Setting of a dataset of Axolotl → the field in `data.columns`."""

_LOADERS = ("json", "csv", "parquet", "arrow", "text")
"""What Axolotl names as the path of a dataset whose files are in `data_files`."""

NAMED_OTHERWISE = "data.train takes files and Hub datasets: name them"
_SAME_NAME = "read by this name anyway"
_AUTO_FORMAT = "data.format: auto finds the format of each dataset"


def data_parts(file: OtherSettings, *, pairs: bool) -> list[Translated]:
    """Translate what a file says about its data.

    Args:
        file: All settings of the file.
        pairs: Whether it trains preferences.
    """
    parts = [*_axolotl(file, pairs=pairs), *_factory(file, "dataset", pairs=pairs), *_factory(file, "eval_dataset")]
    parts += _hub(file)
    if "dataset_dir" in file.named:
        whole = next((part.answer for part in parts if part.name in ("dataset", "eval_dataset")), "no dataset is named")
        parts.append(Translated(name="dataset_dir", value=file.named["dataset_dir"], answer=whole))
    formats = {part.answer.get("data.format") for part in parts if isinstance(part.answer, dict)} - {None}
    if len(formats) > 1 or pairs:
        reason = "pairs are read by their fields" if pairs else _AUTO_FORMAT
        parts = [_without_format(part, reason) for part in parts]
    return parts


def _without_format(part: Translated, reason: str) -> Translated:
    if not isinstance(part.answer, dict):
        return part
    rest = {name: value for name, value in part.answer.items() if name != "data.format"}
    return Translated(name=part.name, value=part.value, answer=rest or reason)


def _column(field: str, column: Any) -> Answer:
    if not isinstance(column, str):
        return "data.columns maps a field to the name of one column"
    return _SAME_NAME if column == field else {"data.columns": {field: column}}


# ---- Axolotl: datasets: [{path, type, …}, …]; TRL has path, name and split of it


def _axolotl(file: OtherSettings, *, pairs: bool) -> Iterator[Translated]:
    value = file.named.get("datasets")
    if value is not None:
        yield Translated(name="datasets", value=value, answer=NAMED_OTHERWISE)  # anything but a list of mappings
    items: dict[str, dict[str, Any]] = {}
    for name, part in file.named.items():
        of, _, rest = name.partition(".")
        number, _, key = rest.partition(".")
        if of == "datasets" and number.isdigit() and key:
            items.setdefault(number, {})[key] = part
    if not items:
        return
    sources = [source for item in items.values() for source in _axolotl_sources(item)]
    train: Answer = {"data.train": sources} if sources else NAMED_OTHERWISE
    for number, item in items.items():
        for key, part in item.items():
            yield Translated(
                name=f"datasets.{number}.{key}", value=part, answer=_axolotl_answer(item, key, train, pairs=pairs)
            )


def _axolotl_sources(item: dict[str, Any]) -> list[dict[str, Any]]:
    if files := _files_of(item):
        return [{"name": name} for name in files]
    if not isinstance(item.get("path"), str) or (item["path"] in _LOADERS and not Path(item["path"]).exists()):
        return []
    of_hub = {"config": item.get("name"), "split": item.get("split")} if not Path(item["path"]).suffix else {}
    return [{"name": item["path"], **{key: part for key, part in of_hub.items() if part is not None}}]


def _files_of(item: dict[str, Any]) -> list[str]:
    """Return the files of a dataset, if they are on this machine: those of a Hub dataset cannot be chosen here."""
    files, path = item.get("data_files"), item.get("path")
    names = [files] if isinstance(files, str) else files
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        return []
    if path is None or path in _LOADERS:
        return names
    return [str(Path(path, name)) for name in names] if isinstance(path, str) and Path(path).is_dir() else []


def _axolotl_answer(item: dict[str, Any], key: str, train: Answer, *, pairs: bool) -> Answer:
    own_files = _files_of(item)
    if key == "path" and own_files and item["path"] in _LOADERS:
        return "the names of the files say how they are read"
    if key == "path":
        return train
    if key.partition(".")[0] == "data_files":
        return train if own_files else "data.train takes whole Hub datasets, by their config and split"
    if key in ("name", "split"):
        return "a file has none" if own_files or Path(str(item.get("path"))).suffix else train
    if key == "ds_type":
        return "the names of the files say how they are read"
    if key == "type":
        return _axolotl_type(str(item["type"]), pairs=pairs)
    if key == "roles_to_train":
        return {"data.train_on": item[key]}
    last = key.rpartition(".")[2]
    if last in _FIELDS and key in (last, f"type.{last}"):
        return _column(_FIELDS[last], item[key])
    if key.startswith("type."):
        return "the tokenizer's chat template writes the prompt"
    return "unknown to loratune"


def _axolotl_type(value: str, *, pairs: bool) -> Answer:
    kind, _, rest = value.partition(".")
    if pairs:
        if rest in _PAIRS and kind != "chat_template":
            return {"data.columns": _PAIRS[rest]}
        return "pairs are read by their fields: prompt, chosen and rejected, or those of data.columns"
    if kind not in _FORMATS:
        return _AUTO_FORMAT
    return {"data.format": _FORMATS[kind], **({"data.train_on": "all"} if _FORMATS[kind] == "text" else {})}


# ---- LLaMA-Factory: dataset: names in dataset_info.json, separated by commas


_ENTRY_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output"}
_COMMON_COLUMNS = ("system", "tools", "chosen", "rejected")
_TAGS = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "assistant",
    "system_tag": "system",
}


def factory_entries(file: OtherSettings, key: str) -> dict[str, dict[str, Any]]:
    """Return the entries of `dataset_info.json` that a setting names; empty ones for names that are not in it."""
    names = file.named.get(key)
    if not isinstance(names, str):
        return {}
    known = _dataset_info(_info_folder(file) / "dataset_info.json")
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    return {name: entry if isinstance(entry := known.get(name), dict) else {} for name in wanted}


def _info_folder(file: OtherSettings) -> Path:
    return Path(file.path.parent, str(file.first("dataset_dir", default="data")))


def _dataset_info(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _factory(file: OtherSettings, key: str, *, pairs: bool = False) -> Iterator[Translated]:
    if key not in file.named:
        return
    value, entries, folder = file.named[key], factory_entries(file, key), _info_folder(file)
    sources = []
    answer: Answer | None = None if entries else NAMED_OTHERWISE
    for name, entry in entries.items():
        source = _factory_source(name, entry, folder)
        if isinstance(source, str):
            answer = answer or source
        else:
            sources.append(source)
    answer = answer or {"data.train" if key == "dataset" else "data.eval": sources}
    yield Translated(name=key, value=value, answer=answer)
    for name, entry in entries.items():
        for part in _flat(entry):
            answer_here = _entry_answer(entry, part[0], part[1], answer, pairs=pairs)
            yield Translated(name=f"dataset_info.{name}.{part[0]}", value=part[1], answer=answer_here)


def _factory_source(name: str, entry: dict[str, Any], folder: Path) -> dict[str, Any] | str:
    """Return the source of one name, or why it has none."""
    if not entry:
        if Path(name).exists() or "/" in name or Path(name).suffix:
            return {"name": name}
        return (
            f"{name} is a name in LLaMA-Factory's dataset_info.json, which is not in {folder}; "
            "name the data: loratune init DATA --from FILE"
        )
    if isinstance(entry.get("file_name"), str) and "hf_hub_url" not in entry:
        return {"name": str(folder / entry["file_name"])}
    if not isinstance(entry.get("hf_hub_url"), str):
        return f"{name} is neither a file nor a Hub dataset; name the data: loratune init DATA --from FILE"
    of_hub = {"config": entry.get("subset"), "split": entry.get("split")}
    return {"name": entry["hf_hub_url"], **{part: text for part, text in of_hub.items() if text is not None}}


def _flat(entry: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in entry.items():
        if isinstance(value, dict) and value:
            yield from ((f"{key}.{inner}", part) for inner, part in value.items())
        else:
            yield key, value


def _entry_answer(entry: dict[str, Any], key: str, value: Any, whole: Answer, *, pairs: bool) -> Answer:
    from_hub = "hf_hub_url" in entry
    if key == "hf_hub_url" or (key == "file_name" and not from_hub):
        return {**whole, "data.format": _entry_form(entry)} if isinstance(whole, dict) else whole
    if key in ("subset", "split"):
        return whole if from_hub else "a file has none"
    if key == "file_name":
        return "hf_hub_url names the data"
    if key == "ranking":
        return {"model.task": "preference"} if pairs and value not in OFF else "off, as here"
    form = _entry_form(entry)
    if key == "formatting":
        return {"data.format": form}
    group, _, inner = key.partition(".")
    if group == "columns":
        if inner == "messages":
            return _column("messages" if form == "messages" else "conversations", value)
        ours = _ENTRY_COLUMNS.get(inner) or (inner if inner in _COMMON_COLUMNS else "")
        if inner == "history" and value == "history":
            return _SAME_NAME
        return _column(ours, value) if ours else "data.columns has no such field"
    return _tag_answer(form, inner, value) if group == "tags" else "unknown to loratune"


def _entry_form(entry: dict[str, Any]) -> str:
    """Return the format of an entry's rows; that of Alpaca is the default there."""
    tags = entry.get("tags")
    if entry.get("formatting", "alpaca") != "sharegpt":
        return "alpaca"
    return "messages" if isinstance(tags, dict) and tags.get("content_tag") == "content" else "sharegpt"


def _tag_answer(form: str, tag: str, value: Any) -> Answer:
    usual = {"role_tag": "role", "content_tag": "content"} if form == "messages" else {}
    usual = usual or {"role_tag": "from", "content_tag": "value"}
    if tag in usual:
        if value == usual[tag]:
            return {"data.format": form}
        return "messages are read by role and content, or by from and value: rename these keys in the data"
    roles = {role: role for role in ROLES} if form == "messages" else SHAREGPT_ROLES
    if tag in _TAGS and roles.get(str(value).lower()) == _TAGS[tag]:
        return "read as this role anyway"
    return f"messages are from {', '.join(roles)}: rename it in the data"


# ---- TRL: dataset_name with a configuration and splits


def _hub(file: OtherSettings) -> Iterator[Translated]:
    given = {key: file.named[key] for key in _OF_HUB if key in file.named}
    name = given.get("dataset_name")
    if not isinstance(name, str):
        reason = NAMED_OTHERWISE if name is not None else "it is about dataset_name, which is not set"
        yield from (Translated(name=key, value=value, answer=reason) for key, value in given.items())
        return
    parts = {"config": given["dataset_config"]} if "dataset_config" in given else {}
    train, test = given.get("dataset_train_split"), given.get("dataset_test_split")
    answer: dict[str, Any] = {"data.train": [{"name": name, **parts, **({"split": train} if train else {})}]}
    held_out = {"data.eval": [{"name": name, **parts, "split": test}]} if test else {}
    for key, value in given.items():
        yield Translated(name=key, value=value, answer=held_out if key == "dataset_test_split" else answer)
