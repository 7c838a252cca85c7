"""The plain path of judged answers: stock `KTOTrainer`, whose steps the fast engine must equal.

TRL computes the reference, and the baseline, itself in every step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset as HubDataset
from torch.nn.utils.rnn import pad_sequence
from transformers import PrinterCallback
from trl import KTOConfig, KTOTrainer

from loratune.data.examples import JudgedExample
from loratune.data.prepared import Stream
from loratune.data.rows.row import Origin
from loratune.training.hf_arguments import training_arguments
from loratune.training.step_dataset import ExampleOrder
from loratune.training.trainer import RunTrainer, TrainerSetup
from loratune.workflows.tasks.preference.baseline import mismatches
from loratune.workflows.tasks.preference.log_probs import answers_of
from loratune.workflows.tasks.preference.loss import JudgedLoss
from loratune.workflows.tasks.preference.objective import beta_of
from loratune.workflows.tasks.preference.trl_trainer import keep_as_ours

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.utils.data import Sampler


class TrlJudgedTrainer(RunTrainer, KTOTrainer):
    """Stock `KTOTrainer` on the same answers in the same order as `FastTrainer`."""

    def __init__(self, setup: TrainerSetup) -> None:
        callbacks, data = self._set_up(setup), setup.data
        assert not isinstance(data.train, Stream), "the recipe refuses it"
        assert isinstance(setup.loss, JudgedLoss)
        assert setup.loss.baseline is not None
        self._order = ExampleOrder(len(data.train), setup.train, lambda: self.state.global_step)
        section = setup.loss.section
        with keep_as_ours(setup.model):
            KTOTrainer.__init__(
                self,
                model=setup.model,
                args=KTOConfig(
                    **training_arguments(setup.train, data, setup.run),
                    per_device_train_batch_size=setup.train.batch_size,
                    remove_unused_columns=False,
                    max_length=None,  # the answers are truncated already, by the recipe's policy
                    disable_dropout=False,
                    router_aux_loss_coef=0.0,
                    gradient_checkpointing=False,
                    beta=beta_of(section),
                    desirable_weight=section.desirable_weight,
                    undesirable_weight=section.undesirable_weight,
                    bf16=setup.model.get_base_model().dtype == torch.bfloat16,
                ),
                data_collator=PaddedAnswers(setup.loss.baseline.max_length),
                train_dataset=rows_of_answers(answers_of(data.train)),
                eval_dataset=rows_of_answers(answers_of(data.eval)) if data.eval else None,
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
            lambda: KTOTrainer.training_step(self, model, inputs, num_items_in_batch), inputs, tokens
        )


def rows_of_answers(examples: Sequence[JudgedExample]) -> HubDataset:
    """Return judged answers as rows: token ids, masks and labels."""
    return HubDataset.from_list(
        [
            {
                "ids": example.input_ids.astype(int).tolist(),
                "mask": example.supervised.astype(int).tolist(),
                "label": bool(example.label),
            }
            for example in examples
        ]
    )


class PaddedAnswers:
    """Makes a batch as TRL's collator does: the answers, and each prompt with the answer before its own.

    Args:
        max_length: The maximum length of an example, in tokens.
    """

    def __init__(self, max_length: int) -> None:
        self._max_length = max_length

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        examples = [
            JudgedExample(
                input_ids=np.array(row["ids"], dtype=np.int32),
                supervised=np.array(row["mask"], dtype=bool),
                origin=Origin(file="", line=0),
                label=int(row["label"]),
            )
            for row in rows
        ]
        batch = {"label": torch.tensor([row["label"] for row in rows])}
        for prefix, part in (("", examples), ("KL_", mismatches(examples, self._max_length))):
            ids = [torch.from_numpy(example.input_ids).long() for example in part]
            masks = [torch.from_numpy(example.supervised).long() for example in part]
            batch[f"{prefix}input_ids"] = pad_sequence(ids, batch_first=True)
            batch[f"{prefix}attention_mask"] = pad_sequence([torch.ones_like(one) for one in ids], batch_first=True)
            batch[f"{prefix}completion_mask"] = pad_sequence(masks, batch_first=True)
        return batch
