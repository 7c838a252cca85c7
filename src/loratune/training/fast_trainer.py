"""The optimizer step of the fast engine: a loop over micro-batches without padding.

One step, in full (`FastTrainer.training_step`):

    step = the examples of this rank                         # step_dataset: a function of seed and step number
    n = terms of the step's loss (tokens), over all ranks    # gradient_sync.StepTotals
    for micro_batch in pack(step, token_budget):             # token_budget: halved when memory runs out
        loss = loss_sum(micro_batch) / n                     # loss: a sum over supervised tokens, not a mean of means
        loss.backward()
    gradients = their sum over all ranks                     # gradient_sync: every rank then takes the same step
    skip the step if loss or gradient norm is not finite     # anomalies
    optimizer.step(), schedule, metrics, checkpoint          # transformers' loop, which calls `training_step`

`examples/plain_loop.py` is the same mathematics as one flat loop.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PrinterCallback, TrainingArguments

from loratune.data.batch import FILLER, MicroBatch, collate
from loratune.data.shared_prefixes import LEAST_SHARED, share_prefixes
from loratune.model.adapter.narrow import cast_once
from loratune.model.kernels.dropout import row_numbers
from loratune.run import processes
from loratune.run.errors import LoratuneError
from loratune.run.progress import NoProgress
from loratune.training.gradient_sync import StepTotals, all_reduce_gradients, seed_step
from loratune.training.held_out_loss import evaluate_nll
from loratune.training.hf_arguments import training_arguments
from loratune.training.step_dataset import HeldOutDataset, StepExamples
from loratune.training.token_budget import random_state, set_random_state
from loratune.training.trainer import RunTrainer, TrainerSetup

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch.utils.data import DataLoader

    from loratune.data.rows.row import Rejected


class FastTrainer(RunTrainer):
    """The fast engine: one `training_step` is one optimizer step and loops over its micro-batches."""

    def __init__(self, setup: TrainerSetup) -> None:
        callbacks = self._set_up(setup)
        if processes.size() > 1:
            logging.getLogger("transformers.training_args").addFilter(_is_not_launch_advice)
        # transformers counts batches in items of the dataset, and one item here is a whole optimizer step
        args = TrainingArguments(
            **training_arguments(setup.train, setup.data, setup.run),
            per_device_train_batch_size=1,
            remove_unused_columns=False,
        )
        super().__init__(
            model=setup.model,
            args=args,
            train_dataset=self.steps,
            eval_dataset=HeldOutDataset(setup.data.eval),
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)

    def get_train_dataloader(self) -> DataLoader[StepExamples | LoratuneError]:
        return self.steps.loader(lambda: self.state.global_step)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], None]:
        """Return the examples of the next step.

        Raises:
            LoratuneError: A row of streamed data cannot be trained on, and the recipe does not allow skipping it.
        """
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        for batch in batches:
            if isinstance(batch, LoratuneError):  # raised in the loader's worker, which could only hand it over
                raise batch
        return batches, None

    def training_step(  # type: ignore[override] # the examples of a step, not one batch
        self, model: Any, inputs: StepExamples, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Compute the gradients of one optimizer step; return its loss, the mean over the step's supervised tokens."""
        started = time.perf_counter()
        model.train()
        self.events.step = self.state.global_step + 1
        self.current_step = inputs
        totals = StepTotals.over_all(inputs, self.sources, self.events)
        self._report_left_out(totals.left_out)
        seed_step(self.setup.train.seed, self.state.global_step)
        self.setup.loss.before_step(self.state.global_step, self.budget)
        with cast_once(model):
            losses = self.budget.retry(
                lambda: self._accumulate_gradients(inputs, totals.num_terms), undo=model.zero_grad
            )
        losses = all_reduce_gradients(self.model, losses, self.setup.stop)
        return self._record_and_check(
            losses[0],
            started=started,
            tokens=(totals.num_tokens, totals.num_supervised_tokens),
            by_source=self.sources.means(losses[1:-1].tolist(), totals.by_source),
            num_processed_tokens=int(losses[-1]) if self.setup.loss.shares_prefixes else None,
        )

    def _accumulate_gradients(self, share: StepExamples, num_terms: int) -> torch.Tensor:
        """Run forward and backward over all micro-batches.

        Args:
            share: This rank's share of the step.
            num_terms: Terms of the step's loss over all ranks: supervised tokens, or pairs of answers.

        Returns:
            float32 [2 + G]: this rank's part of the step's loss, the summed loss of each of the G data sources, and the
            tokens that went through the model.
        """
        examples, loss_of = share.examples, self.setup.loss
        losses = torch.zeros(2 + len(self.sources), device=self.args.device)
        for chosen in self.budget.micro_batches(examples, range(len(examples)), shared=loss_of.shares_prefixes):
            batch = self._batch(share, chosen)
            losses[-1] += batch.num_tokens * bool(chosen)
            batch = batch.to(self.args.device)
            tally = self.sources.tally([examples[i] for i in chosen], self.args.device)
            each = None if tally is None else tally.each_S
            # Dividing by the whole step's count makes the accumulated sum exact: a mean of micro-batch means would
            # give a micro-batch of 10 supervised tokens the weight of one of 1,000.
            loss = loss_of.sum(batch, each) * bool(chosen) / num_terms
            self.accelerator.backward(loss)
            losses[0] += loss.detach()
            if tally is not None:
                losses[1:-1] += tally.sums()
        return losses

    def _batch(self, share: StepExamples, chosen: tuple[int, ...]) -> MicroBatch:
        """Return a micro-batch of a step's examples, on the host."""
        # It may be empty where ranks share the base: all must call the model equally often.
        together = [share.examples[i] for i in chosen] or [FILLER]
        batch = collate(together)
        batch = replace(batch, rows=self._rows(share, chosen, [len(example.input_ids) for example in together]))
        if not self.setup.loss.may_share(batch):
            return batch
        return share_prefixes(batch, LEAST_SHARED if share.owners is not None else batch.num_tokens + 1)

    def _rows(self, share: StepExamples, chosen: tuple[int, ...], lengths: list[int]) -> torch.Tensor:
        """Return each token's number for dropout and noise, int32 [T]; a shared token has that of its owner."""
        seed, step = self.setup.train.seed, self.state.global_step
        if share.owners is None or not chosen:
            return row_numbers(seed, step, [share.numbers[i] for i in chosen] or [0], lengths)
        examples_T, places_T = np.concatenate([share.owners[i] for i in chosen], axis=1)
        numbers, of_token = np.unique(examples_T, return_inverse=True)
        longest = int(places_T.max()) + 1
        rows = row_numbers(seed, step, numbers.tolist(), [longest] * len(numbers)).view(-1, longest)
        return rows[torch.from_numpy(of_token), torch.from_numpy(places_T)]

    def rehearse(self) -> None:
        """Run the largest micro-batches of training and evaluation once, so that a lack of memory shows before step 1.

        Gradients and random states are restored afterwards, so the run stays bit-for-bit the same.
        """
        setup, before = self.setup, random_state()
        self.events.step = self.state.global_step
        known = setup.data.known
        chosen = self.budget.largest_micro_batch(known, setup.train.batch_size)
        largest = StepExamples(examples=[known[i] for i in chosen], numbers=chosen, left_out=[])
        setup.model.train()
        with cast_once(setup.model):
            self.budget.retry(lambda: self._accumulate_gradients(largest, 1), undo=setup.model.zero_grad)
        setup.model.zero_grad()
        if setup.data.eval:
            chosen = self.budget.largest_micro_batch(setup.data.eval, len(setup.data.eval))
            evaluate_nll(setup.loss, [setup.data.eval[i] for i in chosen], self.budget, NoProgress())
        set_random_state(before)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Do nothing: dropout and noise need no generator, and what a model draws itself is seeded for each step."""

    def _report_left_out(self, rows: Sequence[Rejected]) -> None:
        if rows:
            places = "; ".join(f"{row.origin}: {row.reason}" for row in rows)
            listed = [{"file": row.origin.file, "line": row.origin.line, "reason": row.reason} for row in rows]
            self.events.emit("left_out", f"left out of step {self.events.step}: {places}", rows=listed)


def _is_not_launch_advice(record: logging.LogRecord) -> bool:
    """Drop transformers' advice to use torchrun: the process group is hidden from the Trainer on purpose.

    See `loratune.run.processes`.
    """
    return "parallel_mode" not in record.getMessage()
