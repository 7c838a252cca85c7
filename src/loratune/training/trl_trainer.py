"""The plain path of text generation: stock `SFTTrainer`, whose steps the fast engine must equal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from loratune.data.prepared import Stream
from loratune.model.adapter.attach import trainable_parameters
from loratune.training.hf_arguments import trl_arguments
from loratune.training.step_dataset import ExampleOrder
from loratune.training.trainer import RunTrainer, TrainerSetup
from loratune.training.trl_dataset import with_label_ids

if TYPE_CHECKING:
    from torch.utils.data import Sampler


class TrlTrainer(RunTrainer, SFTTrainer):
    """Stock `SFTTrainer` on the same examples in the same order as `FastTrainer`."""

    def __init__(self, setup: TrainerSetup) -> None:
        callbacks, data = self._set_up(setup), setup.data
        assert not isinstance(data.train, Stream), "the recipe refuses it"
        self._order = ExampleOrder(len(data.train), setup.train, lambda: self.state.global_step)
        adapter = {name: parameter.data for name, parameter in trainable_parameters(setup.model).items()}
        bf16 = setup.model.get_base_model().dtype == torch.bfloat16
        SFTTrainer.__init__(
            self,
            model=setup.model,
            args=SFTConfig(**trl_arguments(setup.train, data, setup.run, bf16=bf16)),
            train_dataset=with_label_ids(data.train),
            eval_dataset=with_label_ids(data.eval) if data.eval else None,
            processing_class=setup.tokenizer,
            callbacks=callbacks,
        )
        # TRL casts adapters on a quantized base to bfloat16; put the float32 values back.
        for name, parameter in trainable_parameters(setup.model).items():
            parameter.data = adapter[name]
        self.remove_callback(PrinterCallback)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self._order

    def compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        if not len(self.sources) or self.setup.train.label_smoothing:
            return super().compute_loss(model, inputs, *args, **kwargs)

        def record_row_losses(_: Any, __: Any, outputs: Any) -> None:
            self.row_losses = -outputs.log_probs.detach().sum(1)  # log_probs are zero where nothing is supervised

        # A hook and not `return_outputs`, with which TRL would run a second forward pass.
        hook = model.register_forward_hook(record_row_losses)
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            hook.remove()

    def training_step(
        self, model: Any, inputs: dict[str, torch.Tensor], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        tokens = int(inputs["attention_mask"].sum()), int((inputs["labels"][:, 1:] != -100).sum())
        return self._stock_step(
            lambda: SFTTrainer.training_step(self, model, inputs, num_items_in_batch), inputs, tokens
        )
