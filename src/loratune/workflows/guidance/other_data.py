"""The data sets that files of other tools name, as settings of a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Settings = dict[str, Any]

_FORMATS = {
    "alpaca": "alpaca",
    "chat_template": "messages",
    "sharegpt": "sharegpt",
    "completion": "text",
    "pretrain": "text",
}
"""Type of a data set in Axolotl → `data.format`."""

AXOLOTL_KEYS = ("path", "type", "name", "split", "data_files", "ds_type", "field_messages", "field")
"""What is read of a data set of Axolotl."""


def axolotl_datasets(value: Any, _: Any) -> Settings | str:
    """Return the training data of Axolotl's `datasets`: a list with `path`, `type` and the names of the fields."""
    if not isinstance(value, list) or not all(isinstance(item, dict) and "path" in item for item in value):
        return "data.train takes files and Hub data sets: name them"
    settings: Settings = {"data.train": [_axolotl_source(item) for item in value]}
    kinds = {str(item.get("type", "")).partition(".")[0] for item in value}
    forms = {_FORMATS.get(kind, "auto") for kind in kinds}
    if len(forms) == 1 and forms != {"auto"}:
        settings["data.format"] = forms.pop()
    if settings.get("data.format") == "text":
        settings["data.train_on"] = "all"
    columns = {
        ours: item[theirs]
        for item in value
        for theirs, ours in (("field_messages", "messages"), ("field", "text"))
        if item.get(theirs, ours) != ours
    }
    return settings | ({"data.columns": columns} if columns else {})


def _axolotl_source(item: dict[str, Any]) -> dict[str, Any]:
    files = item.get("data_files")
    name = str(files if isinstance(files, str) else item["path"])
    given = {"config": item.get("name"), "split": item.get("split")}
    return {"name": name, **{key: part for key, part in given.items() if part is not None and not Path(name).suffix}}


def factory_datasets(value: Any, everything: Any) -> Settings | str:
    """Return the training data of LLaMA-Factory's `dataset`: names in `dataset_info.json`, separated by commas."""
    if not isinstance(value, str):
        return "data.train takes files and Hub data sets: name them"
    folder = Path(everything["FOLDER"], everything.get("dataset_dir", "data"))
    known = _dataset_info(folder / "dataset_info.json")
    names = [name.strip() for name in value.split(",") if name.strip()]
    sources, shapes = [], []
    for name in names:
        entry = known.get(name, {})
        if not entry and not Path(name).exists() and "/" not in name and not Path(name).suffix:
            return (
                f"{name} is a name in LLaMA-Factory's dataset_info.json, which is not in {folder}; "
                "name the data: loratune init DATA --from FILE"
            )
        file, hub = entry.get("file_name"), entry.get("hf_hub_url")
        source = str(folder / file) if file else str(hub or name)
        sources.append({"name": source, **({"config": entry["subset"]} if "subset" in entry and hub else {})})
        shapes.append(_factory_shape(entry) if entry else {})
    same = all(shape == shapes[0] for shape in shapes)
    return {"data.train": sources, **(shapes[0] if same else {})}


def _factory_shape(entry: dict[str, Any]) -> Settings:
    """Return format and columns of an entry of `dataset_info.json`; those of Alpaca are the default there."""
    columns, tags = entry.get("columns", {}), entry.get("tags", {})
    form = entry.get("formatting", "alpaca")
    names = {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "tools": "tools"}
    if form == "sharegpt":
        form = "messages" if tags.get("content_tag") == "content" else "sharegpt"
        names = {"messages": "messages" if form == "messages" else "conversations", "tools": "tools"}
    found = {names[theirs]: column for theirs, column in columns.items() if names.get(theirs, column) != column}
    return {"data.format": form, **({"data.columns": found} if found else {})}


def _dataset_info(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def hub_split(value: Any, everything: Any) -> Settings | str:
    """Return the data of TRL's `dataset_name` with its configuration and splits."""
    if not isinstance(value, str):
        return "data.train takes files and Hub data sets: name them"
    config = everything.get("dataset_config")
    parts = {"config": config} if config is not None else {}
    train, test = everything.get("dataset_train_split"), everything.get("dataset_test_split")
    settings: Settings = {"data.train": [{"name": value, **parts, **({"split": train} if train else {})}]}
    return settings | ({"data.eval": [{"name": value, **parts, "split": test}]} if test else {})
