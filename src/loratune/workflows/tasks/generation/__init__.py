"""`model.task: causal_lm`: the model learns to generate text, from the loss on the trained tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loratune.run.errors import RecipeError
from loratune.workflows.tasks.task import Compared, Comparison, Task

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from peft import PeftModel
    from rich.console import RenderableType
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from loratune.data.examples import Example
    from loratune.data.prepared import PreparedData
    from loratune.data.prompts import Prompt
    from loratune.evaluation.user_metric import UserMetric
    from loratune.model.device import Choice
    from loratune.model.load import BaseModel
    from loratune.planning.task import TaskModel
    from loratune.recipe.recipe import Recipe
    from loratune.run.directory import Record
    from loratune.run.progress import Progress
    from loratune.training.loss import SupervisedLoss
    from loratune.training.trainer import RunTrainer, TrainerSetup
    from loratune.workflows.certify import Exported

_OTHER_COLUMNS = {
    **dict.fromkeys(("sentence1", "sentence2", "label"), "sequence_classification"),
    **dict.fromkeys(("chosen", "rejected"), "preference"),
}
"""Names of `data.columns` → the task that reads them."""


class TextGeneration(Task):
    """A model that writes text."""

    name = "causal_lm"

    def problems(self, recipe: Any) -> Iterator[tuple[str, str]]:
        for column in recipe.data.columns:
            if other := _OTHER_COLUMNS.get(column):
                yield f"data.columns names {column}, which is for model.task {other}", f"task={other}"

    def positions(self, recipe: Recipe, config: Any) -> int | None:
        from loratune.model.load import positions_of

        return positions_of(config)

    def resolve_model(
        self, recipe: Recipe, base: BaseModel, config: Any, max_length: int, progress: Progress
    ) -> TaskModel:
        from loratune.model.load import load_tokenizer
        from loratune.planning.task import TaskModel

        return TaskModel(config=config, tokenizer=load_tokenizer(base, recipe.model))

    def skeleton(self, config: Any, *, trust_remote_code: bool) -> PreTrainedModel:
        from loratune.planning.parameters import skeleton

        return skeleton(config, trust_remote_code=trust_remote_code)

    def read_data(
        self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, max_length: int, progress: Progress
    ) -> tuple[Choice, PreparedData]:
        from loratune.data.prepare import prepare_data
        from loratune.data.stream import MANY_ROWS, can_stream, open_tables, stream_data
        from loratune.model.device import Choice
        from loratune.run.cache_folder import cache_dir

        section, seed, wanted = recipe.data, recipe.train.seed, recipe.data.streaming
        possible = recipe.train.engine == "fast" and can_stream(section)
        if wanted is True and not possible:
            raise RecipeError(
                "data.streaming is true, but the rows of data.train cannot be read one by one",
                fix="give .jsonl files or Hub datasets without weights, or data.streaming=auto",
            )
        if possible and wanted is not False:
            tables = open_tables(section, progress)
            num_rows = sum(map(len, tables.values()))
            if wanted is True or num_rows >= MANY_ROWS:
                reason = f"{num_rows:,} rows, each verified before its step" if wanted == "auto" else ""
                data = stream_data(section, tables, tokenizer, max_length=max_length, seed=seed, progress=progress)
                return Choice("true", reason), data
        cache = cache_dir() / "examples"
        data = prepare_data(section, tokenizer, max_length=max_length, seed=seed, cache=cache, progress=progress)
        return Choice("false"), data

    def render_again(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Example]:
        from loratune.data.prepare import prepare_data

        return prepare_data(recipe.data, tokenizer, max_length=max_length, seed=recipe.train.seed).train

    def prompts(self, recipe: Recipe, data: PreparedData, tokenizer: PreTrainedTokenizerBase) -> tuple[Prompt, ...]:
        from loratune.data.prompts import render_prompts

        limit, thinking = recipe.evaluate.samples, recipe.data.thinking
        return tuple(render_prompts(data.eval_conversations, tokenizer, thinking=thinking, limit=limit))

    def num_outputs(self, config: Any) -> int:
        return int(config.vocab_size)

    def logits_rows(self, recipe: Recipe, config: Any, device: str) -> int:
        from loratune.model.kernels.cross_entropy import chunk_rows

        return chunk_rows(config.vocab_size, device)

    def make_loss(self, model: PeftModel, examples: Sequence[Example], recipe: Recipe) -> tuple[SupervisedLoss, str]:
        from loratune.training.loss import make_loss

        loss, reason = make_loss(model, examples)
        return loss, f"one example at a time: {reason}" if reason else ""

    def plain_loss(self, model: PeftModel, recipe: Recipe) -> SupervisedLoss:
        from loratune.training.loss import SupervisedLoss

        return SupervisedLoss(model, packed=False)

    def reference_trainer(self, setup: TrainerSetup) -> RunTrainer:
        from loratune.training.trl_trainer import TrlTrainer

        return TrlTrainer(setup)

    def check_reference(self, model: Any) -> None:
        from loratune.training.trl_dataset import check_trl_can_train

        check_trl_can_train(model)

    def measures(self, recipe: Recipe, metric: UserMetric | None) -> list[str]:
        name = metric.name if metric else recipe.evaluate.metric
        return [*([name] if name != "none" else []), "nll", "perplexity"]

    def compare(self, comparison: Comparison) -> Compared:
        from loratune.workflows.tasks.generation.compare import compare_answers

        return compare_answers(comparison)

    def tables(self, evaluation: Record) -> list[RenderableType]:
        from loratune.evaluation.record import evaluation_table, samples_table

        samples = [samples_table(evaluation, count=3)] if evaluation["items"] else []
        return [evaluation_table(evaluation), *samples]

    def merge(self, root: str | Path, target: Path, *, dtype: str, progress: Progress) -> Exported:
        from loratune.workflows.export import merge_text_model

        return merge_text_model(root, target, dtype=dtype, progress=progress)


TASK = TextGeneration()
