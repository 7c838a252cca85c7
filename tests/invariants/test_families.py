"""Every family of models that people fine-tune: the fast path equals the plain one, the merge the adapter; or it is
said."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from loratune.model.adapter.attach import attach_adapter, trainable_parameters
from loratune.model.adapter.targets import resolve_targets, target_notes
from loratune.planning.preparation import Preparation
from loratune.planning.prepare import prepare
from loratune.recipe.recipe import LoraSection, Recipe
from loratune.run.directory import RunDir
from loratune.run.errors import RecipeError, RunError
from loratune.run.progress import NoProgress
from loratune.training.loss import make_loss
from loratune.training.signals import StopRequest
from loratune.workflows.export import merge
from loratune.workflows.guidance.eject import eject
from loratune.workflows.load import attach_adapter_and_loss, load_base
from loratune.workflows.steps import train_steps
from loratune.workflows.train import train
from tests.invariants.families import (
    BY_HAND,
    COMMON,
    CONFIGS,
    RANDOM,
    adapted,
    base_of,
    check_loss,
    examine,
    examples,
    plain_loss_and_gradients,
)

LLAMA4 = ("Llama 4", "Llama 4 (text)")
DOCS = Path(__file__).parents[2] / "docs"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of transformers, on made-up token ids and configs


@pytest.fixture(scope="module")
def page() -> str:
    return (DOCS / "architectures.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DOCS))
        spec = importlib.util.spec_from_file_location("make_architectures", DOCS / "make_architectures.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        path = list(sys.path)
        spec.loader.exec_module(module)
        sys.path[:] = path
    return module


@pytest.mark.parametrize("name", CONFIGS)
def test_the_page_says_what_is_found(name: str, page: str, tmp_path: Path) -> None:
    """The row; that loss, gradients, adapted modules and the merge are right is asserted on the way."""
    row = f"| {' | '.join(examine(name, tmp_path).values())} |"
    assert row in page.splitlines(), "run `make docs`, if this is meant"


def test_the_page_has_these_rows_and_the_text_of_its_script(page: str, script: ModuleType) -> None:
    lines = page.splitlines()
    rows = [line for line in lines if line.startswith("| ")][2:]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == list(CONFIGS)
    before, after = script.TEXT.split("{rows}")
    assert page.startswith(before)
    assert page.endswith(after)


def test_a_window_that_stands_in_a_mask_only_is_kept_to(tmp_path: Path) -> None:
    """Micro-batches are packed up to that length and separate beyond, with one and the same loss."""
    settings = {"use_sliding_window": True, "sliding_window": 26}
    targets = resolve_targets(base_of("Qwen2 MoE", tmp_path / "0", **settings), "complete")
    model = adapted(base_of("Qwen2 MoE", tmp_path / "1", **settings), targets)
    assert check_loss(model) == (True, "only a mask limits its attention to 26 tokens")
    model = adapted(base_of("Qwen2 MoE", tmp_path / "2", **settings), targets)
    loss, reason = make_loss(model, [example for example in examples() if len(example.input_ids) <= 26])
    assert (loss.longest_packed, reason) == (26, "")


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_rotations_that_change_with_the_longest_example_are_each_examples_own(kind: str, tmp_path: Path) -> None:
    settings = {
        "longrope": {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4},
        "dynamic": {"factor": 4.0},
    }
    rope = {"rope_type": kind, "rope_theta": 1e4, **settings[kind]}
    name = "Phi 3, 4" if kind == "longrope" else "Llama 2, 3"
    place = "original_max_position_embeddings" if kind == "longrope" else "max_position_embeddings"
    base = base_of(name, tmp_path, rope_parameters=rope, **{place: 26})
    packed, reason = check_loss(adapted(base, resolve_targets(base, "complete")))
    assert packed
    assert reason.startswith(f"rotary positions of type {kind} depend on the longest example")


def test_a_leak_that_hides_below_rounding_is_known_from_the_structure(tmp_path: Path) -> None:
    """In bfloat16 a convolution over three tokens may change the next example's losses by less than the check
    allows."""
    base = base_of("LFM 2", tmp_path, initializer_range=0.01).to(torch.bfloat16)
    loss, reason = make_loss(adapted(base, resolve_targets(base, "complete")), examples())
    assert not loss.packed
    assert reason == "the state of Lfm2ShortConv would leak into the next example"


def test_a_model_whose_losses_are_not_numbers_is_refused() -> None:
    base = AutoModelForCausalLM.from_config(LlamaConfig(**COMMON))
    torch.nn.init.constant_(base.model.norm.weight, float("nan"))
    model = attach_adapter(base, LoraSection(r=3), resolve_targets(base, "balanced"), base_name="tiny", seed=0)
    with pytest.raises(RunError, match="loss differs from LlamaForCausalLM's own by nan"):
        make_loss(model, examples())


def test_where_presets_find_nothing_the_refusal_names_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no query matrix that loratune recognizes") as refusal:
        resolve_targets(base_of("Mamba", tmp_path), "minimal")
    assert "in_proj, x_proj, dt_proj, out_proj" in str(refusal.value.fix)


def test_matrices_that_peft_would_take_for_the_stacked_experts_are_refused_by_name(tmp_path: Path) -> None:
    base = base_of("DeepSeek V3, R1", tmp_path)
    with pytest.raises(
        RecipeError, match=r"names model\.layers\.0\.mlp\.up_proj, but PEFT would adapt .* stacked experts"
    ) as refusal:
        resolve_targets(base, ("q_b_proj", "up_proj"))
    assert str(refusal.value.fix) == "leave up_proj out"
    assert any("stay frozen too" in note for note in target_notes(base, "complete"))


@pytest.fixture(scope="module")
def byte_tokenizer() -> PreTrainedTokenizerBase:
    """A token for each byte: the embeddings of the tiny models stay tiny."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {piece: number for number, piece in enumerate([*special, *sorted(ByteLevel.alphabet())])}
    tokenizer = Tokenizer(BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=special[2], pad_token=special[0], additional_special_tokens=special[:2]
    )
    made.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return made


@pytest.fixture
def family_recipe(
    tiny_recipe: Callable[..., Recipe], byte_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> Callable[..., Recipe]:
    """Makes recipes on a tiny model of a family; settings as `train__epochs=1`."""

    def make(name: str, **settings: object) -> Recipe:
        folder = tmp_path / "base"
        if not folder.exists():
            changes = {"vocab_size": len(byte_tokenizer), "max_position_embeddings": 512, "n_positions": 512}
            base_of(name, folder, **changes)
            byte_tokenizer.save_pretrained(folder)
        chosen = {"lora__targets": BY_HAND.get(name, "complete"), "train__learning_rate": 2e-3, "train__epochs": 1}
        return tiny_recipe(model__name=str(folder), data__max_length=128, **{**chosen, **settings})

    return make


def trained(prepared: Preparation) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of all steps and the final adapter, without what comes after training."""
    run = RunDir.create(Path(prepared.recipe.train.output_dir), overwrite=False)
    model, loss = attach_adapter_and_loss(prepared, load_base(prepared, NoProgress()), NoProgress())
    train_steps(prepared, run, model, loss, None, StopRequest(), NoProgress())
    losses = [record["loss"] for record in run.read_metrics() if "loss" in record]
    return losses, {name: parameter.detach() for name, parameter in trainable_parameters(model).items()}


# Mixtral in the default run: its routers' loss is what stock TRL would add.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "Mixtral" else pytest.mark.slow)
        for name in CONFIGS
        if name not in (*RANDOM, *LLAMA4)
    ],
)
def test_the_fast_engine_takes_the_steps_of_stock_trl(
    name: str, family_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    prepared = prepare(family_recipe(name), NoProgress())
    losses, adapter = trained(prepared)
    other = {"engine": "trl", "output_dir": str(tmp_path / "trl")}
    section = prepared.recipe.train.model_copy(update=other)
    stock_losses, stock_adapter = trained(
        replace(prepared, recipe=prepared.recipe.model_copy(update={"train": section}))
    )
    assert len(losses) == 3
    assert losses == pytest.approx(stock_losses, abs=1e-5)
    assert adapter.keys() == stock_adapter.keys()
    for parameter_name, parameter in adapter.items():
        # Adam divides gradients by their size, so weights differ a little more
        torch.testing.assert_close(parameter, stock_adapter[parameter_name], rtol=0, atol=1e-4)
    assert max(float(parameter.abs().max()) for name, parameter in adapter.items() if "lora_B" in name) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama 2, 3", "Qwen2, 2.5", "Qwen3", "Mistral", "Gemma 3", "Phi 3, 4"])
def test_the_families_with_recipes_can_be_trained_as_qlora(
    name: str, family_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """The head of each recipe says so; the base in 4 bits must be another one than that in float32."""
    prepared = prepare(family_recipe(name, model__quantization="nf4"), NoProgress())
    losses, adapter = trained(prepared)
    section = prepared.recipe.train.model_copy(update={"engine": "trl", "output_dir": str(tmp_path / "trl")})
    stock = prepared.recipe.model_copy(update={"train": section})
    stock_losses, stock_adapter = trained(replace(prepared, recipe=stock))
    assert losses == pytest.approx(stock_losses, abs=1e-4)  # products of unpacked weights in float32
    assert adapter.keys() == stock_adapter.keys()
    whole, _ = trained(prepare(family_recipe(name, train__output_dir=str(tmp_path / "whole")), NoProgress()))
    assert losses[0] != pytest.approx(whole[0], abs=1e-3)


def test_where_stock_trl_cannot_train_a_model_its_engine_and_the_ejected_script_say_so(
    family_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    prepared = prepare(family_recipe("Llama 4", train__engine="trl"), NoProgress())
    with pytest.raises(RecipeError, match="stock TRL cannot train Llama4ForCausalLM"):
        attach_adapter_and_loss(prepared, load_base(prepared, NoProgress()), NoProgress())
    with pytest.raises(RecipeError, match="stock TRL cannot train Llama4ForCausalLM"):
        eject(prepared, tmp_path / "script.py", overwrite=False, progress=NoProgress())


def test_the_ejected_script_of_a_mixture_of_experts_leaves_the_routers_loss_out_too(
    family_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    eject(prepare(family_recipe("OLMoE"), NoProgress()), script, overwrite=False, progress=NoProgress())
    assert "router_aux_loss_coef=0.0," in script.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["Llama 4", "Qwen3.5", "Gemma 4", "gpt-oss", "DeepSeek V3, R1", "Falcon", "Jamba", "LFM 2", "Mamba"]
)
def test_a_whole_run_answers_and_merges(name: str, family_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """With evaluation by answers, which takes the model's own attention and caches, and the certificate of the
    merge."""
    finished = train(family_recipe(name, evaluate__metric="exact_match", evaluate__max_new_tokens=4))
    assert finished.evaluation is not None
    assert finished.evaluation["tuned"]["nll"] != finished.evaluation["base"]["nll"]
    merge(finished.run.root, tmp_path / "merged")


def test_the_reference_is_not_blind_to_the_window(tmp_path: Path) -> None:
    """The tiny models' windows are narrow enough to be seen by the comparison."""
    targets = None
    losses = []
    for window in (6, 64):
        base = base_of("Mistral", tmp_path / str(window), sliding_window=window)
        targets = targets or resolve_targets(base, "balanced")
        losses.append(plain_loss_and_gradients(adapted(base, targets))[0])
    assert abs(losses[0] - losses[1]) > 0.1
