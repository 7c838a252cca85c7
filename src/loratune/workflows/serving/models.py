"""What `loratune serve RUN1 RUN2 ADAPTER` names: models of one base, each with its own chat template."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratune.data.masking.special_tokens import texts_in
from loratune.data.masking.template import ChatTemplate
from loratune.data.prompts import stop_token_ids
from loratune.exporting.adapters.folder import Adapter, read_folder
from loratune.exporting.transformers_serve import BASE_NAME, served_name
from loratune.model.adapter.attach import load_adapter
from loratune.model.device import choose_device, device_here, torch_dtype
from loratune.model.load import (
    BaseModel,
    download_weights,
    load_config,
    load_model,
    load_tokenizer,
    locate_model,
    stored_dtype,
)
from loratune.recipe.recipe import ModelSection
from loratune.recipe.tasks import require_text
from loratune.run.directory import RunDir, read_json
from loratune.run.errors import RecipeError
from loratune.workflows.adapters.base import checked_base
from loratune.workflows.finished import recipe_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peft import PeftModel

    from loratune.run.progress import Progress

_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)=(.+)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model that requests can name.

    Attributes:
        name: Its name in requests.
        tokenizer: The tokenizer of training, with its template.
    """

    name: str
    tokenizer: Any

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template of training."""
        return ChatTemplate(self.tokenizer)

    @cached_property
    def stops(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        return stop_token_ids(self.tokenizer)

    def prompt_ids(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Return the tokens of a conversation, up to where the answer begins.

        Names of special tokens in messages are text, as in training.

        Raises:
            BadRow: The template rejects these messages.
        """
        special = self.template.special_text
        if not any(special.names.search(text) for text in texts_in(messages)):
            text = self.template.render(messages, prompt=True)
            ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            return ids
        return [int(i) for i in special.tokens(self.template.render(special.hide(messages), prompt=True)).ids]

    def text_of(self, tokens: Sequence[int]) -> str:
        """Return an answer's text: without its stop token; other special tokens stay visible, as in the evaluation."""
        if tokens and tokens[-1] in self.stops:
            tokens = tokens[:-1]
        text = self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedSource:
    """A run or an adapter, as named on the command line or in a request.

    Attributes:
        name: The name that requests use.
        folder: The adapter's folder.
        section: How its base is loaded: the recipe's `model` section, or that of a model named by the adapter.
        run: The run; None for an adapter that is not in a run's folder.
        adapter: What the folder holds.
    """

    name: str
    folder: Path
    section: ModelSection
    run: RunDir | None
    adapter: Adapter


def open_source(text: str) -> ServedSource:
    """Open `RUN`, `ADAPTER`, or `NAME=` either of them.

    Raises:
        RecipeError: It is neither, or it holds more than updates of the base's matrices.
        RunError: The adapter is damaged.
    """
    name, path = "", Path(text).expanduser()
    if (named := _NAMED.fullmatch(text)) and not path.exists():
        name, path = named[1], Path(named[2]).expanduser()
    run = _run_of(path)
    if run is None and not (path / "adapter_config.json").is_file():
        raise RecipeError("neither a run nor an adapter's folder", file=path, fix="a run directory, or one of PEFT's")
    folder = path if run is None or path.resolve() != run.root.resolve() else run.adapter
    if run is not None:
        run.require_adapter()
        require_text(recipe_of(run), "loratune serve", f"loratune merge {run.root} OUT")
    adapter = read_folder(folder)
    adapter.require_plain("serving several models", allowed=frozenset({"use_dora"}))
    if adapter.whole or adapter.biases:
        more = next(iter({**adapter.whole, **adapter.biases}))
        raise RecipeError(
            f"the adapter replaces a tensor of its base ({more}), which other adapters share",
            file=folder,
            fix=f"loratune serve {run.root}, alone" if run is not None else "load base and adapter with PEFT",
        )
    section = recipe_of(run).model if run is not None else ModelSection(name=adapter.base_name)
    own = run.root.resolve().name if run is not None else path.resolve().name
    return ServedSource(name=name or served_name(own), folder=folder, section=section, run=run, adapter=adapter)


def require_one_base(first: ServedSource, other: ServedSource, base: BaseModel, progress: Progress) -> None:
    """Refuse a model whose base is not that of the first.

    Raises:
        RecipeError: It was trained on other weights, or on weights that were quantized in another way.
    """
    if other.section.quantization != first.section.quantization and other.run is not None:
        raise RecipeError(
            f"{other.name} was trained on a base with model.quantization {other.section.quantization}, "
            f"{first.name} with {first.section.quantization}",
            file=other.folder,
            fix=f"loratune serve {other.run.root}, as a server of its own",
        )
    if other.section.dtype != first.section.dtype and other.run is not None:
        progress.warn(f"{other.name} was trained in {other.section.dtype}; the base is in {first.section.dtype} here")
    if first.run is not None and other.run is not None:
        ours, theirs = (read_json(source.run.lock)["inputs"]["model"] for source in (first, other) if source.run)
        if ours != theirs:
            raise RecipeError(
                f"{other.name} was trained on another base ({other.section.name}) than {first.name} "
                f"({first.section.name})",
                file=other.folder,
                fix=f"loratune serve {other.run.root}, as a server of its own",
            )
        return
    checked_base([other.adapter], download_weights(base), progress)


def load_first(source: ServedSource, progress: Progress) -> tuple[PeftModel, BaseModel]:
    """Load a model with its base; further adapters are loaded onto the same base."""
    if not source.section.name:
        raise RecipeError("the adapter names no base", file=source.folder, fix="name a run first, or set the base")
    base = locate_model(source.section, progress)
    checked_base([source.adapter], download_weights(base), progress)
    if source.run is not None:
        recipe = recipe_of(source.run)
        device, dtype = device_here(recipe.train.device), torch_dtype(recipe.model.dtype)
    else:
        device, dtype = choose_device("auto").value, stored_dtype(load_config(base, source.section), source.section)
    progress.line(f"loading {source.section.name} on {device}")
    model = load_model(base, source.section, dtype=dtype, device=device)
    return load_adapter(model, source.folder).eval(), base


def served_model(source: ServedSource, base: BaseModel) -> ServedModel:
    """Return a model's tokenizer and template: the adapter's own, or those of its base.

    Raises:
        DataError: The tokenizer has no chat template, or no token ends an answer.
    """
    own = (source.folder / "tokenizer_config.json").is_file()
    section = ModelSection(name=str(source.folder)) if own else source.section
    tokenizer = load_tokenizer(replace(base, path=source.folder) if own else base, section)
    model = ServedModel(name=source.name, tokenizer=tokenizer)
    _ = model.template, model.stops  # errors now, not in the first request
    return model


def check_served_names(names: Sequence[str]) -> None:
    """Refuse two models of one name, and one that has the base's.

    Raises:
        RecipeError: A name is taken.
    """
    for place, name in enumerate(names):
        if name == BASE_NAME or name in names[:place]:
            raise RecipeError(f"two models are named {name}", fix=f"name one of them: other-{name}=FOLDER")


def _run_of(path: Path) -> RunDir | None:
    """Return the run that a folder is, or whose adapter it is."""
    for root in (path, path.resolve().parent):
        if (root / "lock.json").is_file() and (root == path or path.resolve() == (root / "adapter").resolve()):
            return RunDir.open(root)
    return None
