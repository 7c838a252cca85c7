"""What may be served together: adapters of one base that change nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from loratune.data.masking.template import ChatTemplate
from loratune.run.directory import RunDir, read_json
from loratune.run.errors import RecipeError
from loratune.run.progress import NO_PROGRESS
from loratune.workflows.serving.models import (
    ServedModel,
    check_served_names,
    load_first,
    open_source,
    require_one_base,
    served_model,
)


@pytest.fixture
def copy(finished_run: RunDir, tmp_path: Path) -> Path:
    """A run of the same base, under another name."""
    return Path(shutil.copytree(finished_run.root, tmp_path / "copy"))


def rewrite(file: Path, change: str, into: str) -> None:
    text = file.read_text()
    assert change in text
    file.write_text(text.replace(change, into))


def test_a_run_its_adapter_and_a_folder_of_peft_are_opened(finished_run: RunDir, other_adapter: Path) -> None:
    run = open_source(str(finished_run.root))
    assert (run.name, run.folder, run.run is not None) == ("tiny", finished_run.adapter, True)
    own = open_source(str(finished_run.adapter))
    assert (own.name, own.run is not None) == ("tiny", True)
    foreign = open_source(f"friendly={other_adapter}")
    assert (foreign.name, foreign.run) == ("friendly", None)
    assert Path(foreign.section.name) == Path(
        read_json(other_adapter / "adapter_config.json")["base_model_name_or_path"]
    )


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="neither a run nor an adapter's folder"):
        open_source(str(tmp_path))


def test_an_adapter_that_replaces_tensors_is_refused(other_adapter: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(other_adapter, tmp_path / "rows"))
    config = read_json(folder / "adapter_config.json")
    (folder / "adapter_config.json").write_text(json.dumps({**config, "trainable_token_indices": [1]}))
    with pytest.raises(RecipeError, match="trains rows of the embedding"):
        open_source(str(folder))


def test_runs_of_other_bases_and_kinds_are_refused(finished_run: RunDir, copy: Path) -> None:
    first = open_source(str(finished_run.root))
    _, base = load_first(first, NO_PROGRESS)
    require_one_base(first, open_source(str(copy)), base, NO_PROGRESS)
    (digest, *_) = read_json(copy / "lock.json")["inputs"]["model"].values()
    rewrite(copy / "lock.json", digest, "0" * len(digest))
    with pytest.raises(RecipeError, match="copy was trained on another base"):
        require_one_base(first, open_source(str(copy)), base, NO_PROGRESS)
    rewrite(copy / "lock.json", '"quantization": "none"', '"quantization": "nf4"')
    with pytest.raises(RecipeError, match="quantization nf4, tiny with none"):
        require_one_base(first, open_source(str(copy)), base, NO_PROGRESS)


def test_an_adapter_of_another_base_is_refused(
    finished_run: RunDir, other_adapter: Path, tiny_model: Path, tmp_path: Path
) -> None:
    first = open_source(str(finished_run.root))
    _, base = load_first(first, NO_PROGRESS)
    require_one_base(first, open_source(str(other_adapter)), base, NO_PROGRESS)
    changed = Path(shutil.copytree(tiny_model, tmp_path / "changed"))
    weights = bytearray((changed / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (changed / "model.safetensors").write_bytes(weights)
    folder = Path(shutil.copytree(other_adapter, tmp_path / "foreign"))
    config = read_json(folder / "adapter_config.json")
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(changed)}))
    with pytest.raises(RecipeError, match="trained on other weights"):
        require_one_base(first, open_source(str(folder)), base, NO_PROGRESS)


def test_two_models_of_one_name_are_refused() -> None:
    check_served_names(["a", "b"])
    for names in (["a", "a"], ["base"]):
        with pytest.raises(RecipeError, match=f"two models are named {names[-1]}"):
            check_served_names(names)


def test_an_adapter_without_a_tokenizer_has_its_bases(other_adapter: Path, tmp_path: Path, tiny: ServedModel) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    for file in other_adapter.glob("adapter_*"):
        shutil.copy(file, folder)
    source = open_source(str(folder))
    _, base = load_first(source, NO_PROGRESS)
    messages = [{"role": "user", "content": "Hi"}]
    assert served_model(source, base).prompt_ids(messages) == tiny.prompt_ids(messages)


def test_names_of_special_tokens_in_messages_are_text(tiny: ServedModel) -> None:
    ids = tiny.prompt_ids([{"role": "user", "content": "a<|im_end|>b"}])
    structure = tiny.prompt_ids([{"role": "user", "content": "ab"}])
    (end,) = tiny.tokenizer.convert_tokens_to_ids(["<|im_end|>"])
    assert ids.count(end) == structure.count(end)
    assert tiny.tokenizer.decode(ids) == ChatTemplate(tiny.tokenizer).render(
        [{"role": "user", "content": "a<|im_end|>b"}], prompt=True
    )
