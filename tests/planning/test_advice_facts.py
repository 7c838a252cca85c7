from __future__ import annotations

import copy

from gguf.tensor_mapping import TensorNameMap

from loratune.planning.advice_facts import unknown_to_gguf


def test_modules_of_common_models_are_known_to_llama_cpp() -> None:
    assert (
        unknown_to_gguf(
            [
                "model.layers.3.self_attn.q_proj",
                "model.layers.11.mlp.gate_proj",
                "model.language_model.layers.2.self_attn.v_proj",
                "model.layers.1.mlp.experts.7.down_proj",
                "transformer.h.5.attn.c_attn",
            ]
        )
        == ()
    )


def test_a_module_that_llama_cpp_does_not_have_is_named_once() -> None:
    assert unknown_to_gguf(["model.layers.3.odd", "model.layers.4.odd"]) == ("model.layers.{bid}.odd",)


def test_asking_leaves_the_tables_of_the_package_as_they_are() -> None:
    before = copy.deepcopy(TensorNameMap.block_mappings_cfg)
    unknown_to_gguf(["model.layers.0.odd"])
    assert before == TensorNameMap.block_mappings_cfg
