"""The plain path of preferences: stock `DPOTrainer`, whose steps the fast engine must equal.

TRL computes the reference itself, in every step, from a frozen copy of the adapter as it begins.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset as HubDataset
from torch.nn.utils.rnn import pad_sequence
from transformers import PrinterCallback
from trl import DPOConfig, DPOTrainer

from loratune.data.prepared import Stream
from loratune.model.adapter.attach import trainable_parameters
from loratune.training.hf_arguments import training_arguments
from loratune.training.step_dataset import ExampleOrder
from loratune.training.trainer import RunTrainer, TrainerSetup
from loratune.workflows.tasks.preference.log_probs import answers_of
from loratune.workflows.tasks.preference.loss import PreferenceLoss
from loratune.workflows.tasks.preference.objective import beta_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from peft import PeftModel
    from torch.utils.data import Sampler

    from loratune.recipe.recipe import PreferenceSection

LOSS_TYPES = {"dpo": "sigmoid", "ipo": "ipo"}
"""`preference.loss` → TRL's name."""


class TrlPreferenceTrainer(RunTrainer, DPOTrainer):
    """Stock `DPOTrainer` on the same pairs in the same order as `FastTrainer`."""

    def __init__(self, setup: TrainerSetup) -> None:
        callbacks, data = self._set_up(setup), setup.data
        assert not isinstance(data.train, Stream), "the recipe refuses it"
        assert isinstance(setup.loss, PreferenceLoss)
        self._order = ExampleOrder(len(data.train), setup.train, lambda: self.state.global_step)
        section = setup.loss.section
        bf16 = setup.model.get_base_model().dtype == torch.bfloat16
        with keep_as_ours(setup.model):
            DPOTrainer.__init__(
                self,
                model=setup.model,
                args=DPOConfig(
                    **training_arguments(setup.train, data, setup.run),
                    per_device_train_batch_size=setup.train.batch_size,
                    **dpo_arguments(section),
                    bf16=bf16,
                ),
                data_collator=padded_pairs,
                train_dataset=rows_of_pairs(answers_of(data.train)),
                eval_dataset=rows_of_pairs(answers_of(data.eval)) if data.eval else None,
                processing_class=setup.tokenizer,
                callbacks=callbacks,
            )
        self.remove_callback(PrinterCallback)

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset  # its tokens and masks are ours

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self._order

    def training_step(
        self, model: Any, inputs: dict[str, torch.Tensor], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        tokens = int(inputs["attention_mask"].sum()), int(inputs["completion_mask"].sum())
        return self._stock_step(
            lambda: DPOTrainer.training_step(self, model, inputs, num_items_in_batch), inputs, tokens
        )


def dpo_arguments(section: PreferenceSection) -> dict[str, Any]:
    """Return the arguments of TRL's `DPOConfig` for tokenized pairs."""
    return {
        "remove_unused_columns": False,
        "max_length": None,  # the pairs are truncated already, by the recipe's policy
        "disable_dropout": False,
        "router_aux_loss_coef": 0.0,
        "gradient_checkpointing": False,
        "beta": beta_of(section),
        "loss_type": [LOSS_TYPES[section.loss]],
    }


@contextmanager
def keep_as_ours(model: PeftModel) -> Iterator[None]:
    """Undo what a trainer of TRL changes in an adapted model when it is made."""
    adapter = {name: parameter.data for name, parameter in trainable_parameters(model).items()}
    yield
    # Its reference of a started adapter is a copy that it calls in training mode: the reference has no dropout.
    for module in model.modules():
        dropout = getattr(module, "lora_dropout", {})
        if "ref" in dropout:
            dropout["ref"] = torch.nn.Identity()
    # TRL casts adapters on a quantized base to bfloat16; put the float32 values back.
    for name, parameter in trainable_parameters(model).items():
        parameter.data = adapter[name]


def rows_of_pairs(pairs: Sequence[Any]) -> HubDataset:
    """Return pairs as rows: token ids and masks of both sequences."""
    return HubDataset.from_list(
        [
            {
                f"{name}_{what}": getattr(part, field).astype(int).tolist()
                for name, part in zip(("chosen", "rejected"), pair.sequences, strict=True)
                for what, field in (("ids", "input_ids"), ("mask", "supervised"))
            }
            for pair in pairs
        ]
    )


def padded_pairs(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Return a batch as TRL's collator does: all chosen sequences, then all rejected ones, padded to the longest."""

    def padded(what: str) -> torch.Tensor:
        parts = [torch.tensor(row[f"{name}_{what}"]) for name in ("chosen", "rejected") for row in rows]
        return pad_sequence(parts, batch_first=True)

    ids = [row[f"{name}_ids"] for name in ("chosen", "rejected") for row in rows]
    attention = pad_sequence([torch.ones(len(one), dtype=torch.long) for one in ids], batch_first=True)
    return {"input_ids": padded("ids"), "attention_mask": attention, "completion_mask": padded("mask")}
