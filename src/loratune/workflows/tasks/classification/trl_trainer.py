"""The plain path of classification: transformers' own `Trainer` on padded batches, in the recipe's order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset as HubDataset
from torch.nn.functional import cross_entropy
from transformers import DataCollatorWithPadding, PrinterCallback, Trainer, TrainingArguments

from loratune.data.examples import LabeledExample
from loratune.data.prepared import Stream
from loratune.training.hf_arguments import training_arguments
from loratune.training.step_dataset import ExampleOrder
from loratune.training.trainer import RunTrainer, TrainerSetup

if TYPE_CHECKING:
    from torch.utils.data import Sampler


class TrlClassifierTrainer(RunTrainer):
    """Stock `Trainer` with transformers' own forward, loss and padded batches: the reference for the fast engine."""

    def __init__(self, setup: TrainerSetup) -> None:
        callbacks, data = self._set_up(setup), setup.data
        assert not isinstance(data.train, Stream), "the recipe refuses it"
        self._order = ExampleOrder(len(data.train), setup.train, lambda: self.state.global_step)
        bf16 = setup.model.get_base_model().dtype == torch.bfloat16
        Trainer.__init__(
            self,
            model=setup.model,
            args=TrainingArguments(
                **training_arguments(setup.train, data, setup.run),
                per_device_train_batch_size=setup.train.batch_size,
                remove_unused_columns=False,
                bf16=bf16,
            ),
            data_collator=DataCollatorWithPadding(setup.tokenizer),
            train_dataset=_rows(data.train),
            eval_dataset=_rows(data.eval) if data.eval else None,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self._order

    def compute_loss(
        self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs["labels"]
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if len(self.sources):
            self.row_losses = cross_entropy(outputs.logits.detach().float(), labels, reduction="none")
        return (loss, outputs) if return_outputs else loss

    def training_step(
        self, model: Any, inputs: dict[str, torch.Tensor], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        tokens = int(inputs["attention_mask"].sum()), len(inputs["labels"])
        return self._stock_step(lambda: Trainer.training_step(self, model, inputs, num_items_in_batch), inputs, tokens)


def _rows(examples: Any) -> HubDataset:
    """Return examples in transformers' format: `input_ids`, `labels`, and `token_type_ids` if there are any."""
    rows = []
    for example in examples:
        assert isinstance(example, LabeledExample)
        types = {} if example.token_types is None else {"token_type_ids": example.token_types.tolist()}
        rows.append({"input_ids": example.input_ids.tolist(), "labels": example.label, **types})
    return HubDataset.from_list(rows)
