"""An adapter for mlx-lm holds the run's updates; MLX itself answers as training does where it is installed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from loratune.exporting.adapter_matrices import LowRank
from loratune.exporting.mlx import MlxReader, check_mlx, has_mlx, read_mlx_adapter, write_mlx_adapter
from loratune.exporting.weights_proof import prove_adapter
from loratune.recipe.recipe import Recipe
from loratune.run.directory import RunDir
from loratune.run.errors import RecipeError, RunError
from loratune.workflows import export_mlx
from loratune.workflows.export import export
from loratune.workflows.train import train

needs_mlx = pytest.mark.skipif(not has_mlx(), reason="mlx-lm is not installed")


def update(rank: int, scale: float, **others: object) -> LowRank:
    return LowRank(a=torch.randn(rank, 6), b=torch.randn(4, rank), scale=scale, **others)  # type: ignore[arg-type]


def test_ranks_and_scales_of_single_matrices_are_kept_in_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    updates = {"model.layers.1.self_attn.q_proj": update(2, 0.5), "model.layers.0.mlp.up_proj": update(3, 2.0)}
    check_mlx(updates)
    write_mlx_adapter(updates, 2, tmp_path)
    read = read_mlx_adapter(tmp_path)
    proof = prove_adapter(updates, read)
    assert proof["problems"] == []
    assert proof["relative_error"] < 1e-6
    settings = json.loads((tmp_path / "adapter_config.json").read_text())["lora_parameters"]
    assert (settings["rank"], settings["keys"]) == (3, ["mlp.up_proj", "self_attn.q_proj"])
    wrong = {name: LowRank(a=item.a, b=item.b, scale=2.0) for name, item in read.items()}
    assert prove_adapter(updates, wrong)["problems"]


@pytest.mark.parametrize(
    ("module", "others"),
    [
        ("lm_head", {}),
        ("model.layers.0.mlp.up_proj", {"magnitude": torch.ones(4)}),
        ("transformer.layers.0.attn.c_attn", {"transposed": True}),
    ],
)
def test_what_mlx_lm_cannot_hold_is_refused(module: str, others: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=f"cannot represent {module}"):
        check_mlx({module: update(2, 1.0, **others)})


def test_an_adapter_for_mlx_is_certified(finished_run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported = export(finished_run.root, to="mlx", out=tmp_path / "mlx")
    assert exported.certificate["verdict"] == "same"
    assert exported.certificate["checked_with"].startswith("mlx " if has_mlx() else "transformers ")
    assert {path.name for path in (tmp_path / "mlx").iterdir()} == {
        *("adapters.safetensors", "adapter_config.json", "parity.json", "base")
    }
    assert f"--model {tmp_path / 'mlx' / 'base'} --adapter-path" in exported.usage[0]
    write = export_mlx.write_mlx_adapter

    def halved(updates: dict[str, LowRank], num_layers: int, folder: Path) -> None:
        half = {name: LowRank(a=item.a, b=item.b, scale=item.scale / 2) for name, item in updates.items()}
        write(half, num_layers, folder)

    monkeypatch.setattr(export_mlx, "write_mlx_adapter", halved)
    with pytest.raises(RunError, match="a different update than the adapter's"):
        export(finished_run.root, to="mlx", out=tmp_path / "half")


@pytest.fixture
def theta_run(tiny_model: Path, tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> RunDir:
    """A run whose base turns its positions by another theta than mlx-lm's default, as SmolLM2 does."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "theta"))
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 100.0
    (folder / "config.json").write_text(json.dumps(config))
    return train(tiny_recipe(model__name=str(folder))).run


@pytest.mark.parametrize("merged", [False, True])
def test_rotary_positions_are_where_mlx_lm_reads_them(theta_run: RunDir, tmp_path: Path, merged: bool) -> None:
    out = tmp_path / "mlx"
    exported = export(theta_run.root, to="mlx", merged=merged, out=out)
    assert exported.certificate["verdict"] == "same"
    written = json.loads((out / ("" if merged else "base") / "config.json").read_text())
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 100.0


@needs_mlx
def test_a_merged_model_is_loaded_by_mlx(finished_run: RunDir, tmp_path: Path) -> None:
    exported = export(finished_run.root, to="mlx", merged=True, out=tmp_path / "merged")
    assert exported.certificate["verdict"] == "same"
    assert exported.certificate["checked_with"].startswith("mlx ")
    reader = MlxReader(tmp_path / "merged")
    assert reader.logits([1, 2, 3], [0, 2]).shape[0] == 2
