"""`loratune sample`: a run's model answers prompts several times, and the best and worst answers become rows to train
on, scored against the data's own answers.

Training on the best is rejection-sampling fine-tuning (Yuan et al. 2023, arXiv 2308.01825); pairs of best and worst are
preferences whose rejected answers are the model's own mistakes, as direct preference optimization assumes.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from loratune.data.masking.policy import trained_turns
from loratune.data.masking.template import ChatTemplate
from loratune.data.prompts import Prompt, render_prompts, stop_token_ids
from loratune.data.rows.reading import Reader
from loratune.evaluation.generate import sample_answers
from loratune.evaluation.record import said
from loratune.evaluation.sampling import Sampling
from loratune.evaluation.scoring import check_references, score
from loratune.evaluation.user_metric import load_metric
from loratune.model.load import positions_of
from loratune.recipe.recipe import Source
from loratune.recipe.sections.evaluate import METRICS
from loratune.recipe.tasks import require_text
from loratune.run.directory import RunDir, write_text
from loratune.run.errors import DataError, RecipeError, plural
from loratune.run.progress import NO_PROGRESS, Progress
from loratune.run.records.outputs import SampleOutput
from loratune.workflows.finished import recipe_of
from loratune.workflows.trained_model import load_model_of, load_tokenizer_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from transformers import PreTrainedTokenizerBase

    from loratune.evaluation.generate import Answer
    from loratune.recipe.recipe import Recipe

Keep = Literal["best,worst", "best"]

Score = float


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSettings:
    """How answers are drawn and chosen.

    Attributes:
        n: The number of answers to each prompt.
        keep: `best,worst`: rows with `prompt`, `chosen` and `rejected`; `best`: rows with `messages`.
        at_least: The score that the best answer must have, 0 to 1.
        with_reference: Whether the data's own answer takes the place of the best where none is good enough.
        temperature: The sampling temperature.
        top_p: The probability mass to sample from, 0 to 1.
        max_new_tokens: The longest answer, in tokens; None: as in the run's evaluation.
        seed: The sampling seed.
    """

    n: int = 8
    keep: Keep = "best,worst"
    at_least: float = 1.0
    with_reference: bool = False
    temperature: float = 0.8
    top_p: float = 1.0
    max_new_tokens: int | None = None
    seed: int = 0

    def check(self) -> None:
        """Refuse settings that can give no rows.

        Raises:
            RecipeError: A value is out of range, or all answers to a prompt would be the same.
        """
        if self.keep not in get_args(Keep):
            raise RecipeError(f"--keep {self.keep}", fix=f"one of {' and '.join(get_args(Keep))}")
        if self.n < 1 or not 0 < self.at_least <= 1:
            raise RecipeError(
                f"--n {self.n} --at-least {self.at_least}", fix="at least one answer, and a score above 0, at most 1"
            )
        if self.n > 1 and self.temperature == 0:
            raise RecipeError(
                f"--temperature 0 gives the same answer {self.n} times", fix="--temperature 0.8, or --n 1"
            )
        if self.n == 1 and self.keep == "best,worst" and not self.with_reference:
            raise RecipeError("--n 1 has no best and worst answer", fix="--n 8, --with-reference, or --keep best")


def sample(
    root: str | Path,
    prompts: str | Path,
    out: str | Path,
    *,
    settings: SampleSettings = SampleSettings(),
    metric: str = "",
    allow_code: bool = False,
    overwrite: bool = False,
    progress: Progress = NO_PROGRESS,
) -> SampleOutput:
    """Answer prompts with a run's model and write the best answers, or pairs of the best and the worst, as rows.

    Args:
        root: The directory of a finished run.
        prompts: A file, folder or Hub dataset of rows with answers, in any format that the run's data could have. The
            last answer of each is the reference; what comes before it is the prompt.
        out: The JSONL file to write.
        settings: How answers are drawn and chosen.
        metric: A metric of `evaluate.metric`, or `path/to/file.py:function`; empty for the run's.
        allow_code: Whether the Python code of the metric may run.
        overwrite: Whether a file in the place of `out` is replaced.
        progress: Shows how far it is.

    Raises:
        RecipeError: The run is not finished or writes no text; no metric scores one answer; the file exists.
        DataError: A row cannot be read, or no prompt gives a row.
        RunError: The user's metric fails.
        MachineError: The base model is not on this machine, or the file cannot be written.
    """
    settings.check()
    run, file = RunDir.open(root), Path(out).expanduser()
    run.require_adapter()
    recipe = recipe_of(run)
    require_text(recipe, "loratune sample", "a classifier's labels need no answers")
    name, rate = _metric(recipe, metric, allow_code=allow_code)
    if file.exists() and not overwrite:
        raise RecipeError("the file exists", file=file, fix="--overwrite, or another --out")
    tokenizer = load_tokenizer_of(run, progress)
    asked = _read_prompts(recipe, str(prompts), tokenizer, progress)
    check_references(name, asked)
    model = load_model_of(run, progress)
    drawn = _draw(model, tokenizer, asked, settings, recipe.evaluate.max_new_tokens, progress)
    special = ChatTemplate(tokenizer).special_text.names
    scored = Scored(settings, rate, lambda text: special.search(text) is not None)
    rows = [scored.row(prompt, drawn[i * settings.n :][: settings.n]) for i, prompt in enumerate(asked)]
    return _write(file, name, [row for row in rows if row is not None], scored)


class Scored:
    """Scores answers, chooses among them, and counts.

    Args:
        settings: How answers are chosen.
        rate: Scores an answer against a reference, 0 to 1.
        is_special: Whether a text has a special token, which a row cannot hold.
    """

    def __init__(
        self, settings: SampleSettings, rate: Callable[[str, str], Score], is_special: Callable[[str], bool]
    ) -> None:
        self._settings, self._rate, self._is_special = settings, rate, is_special
        self.scores: list[Score] = []
        self.num_prompts = self.num_solved = 0
        self.left_out: Counter[str] = Counter()
        self.unusable: Counter[str] = Counter()

    def row(self, prompt: Prompt, answers: Sequence[Answer]) -> dict[str, Any] | None:
        """Return the row that a prompt and its answers give; None if it gives none, and why is counted."""
        wanted = self._settings.at_least
        candidates = list(self._candidates(prompt, answers))
        self.num_prompts += 1
        scores = [value for _, value in candidates]
        self.num_solved += max(scores, default=0.0) >= wanted
        best = _most_frequent(candidates, max(scores, default=0.0))
        if max(scores, default=0.0) < wanted:
            if not self._settings.with_reference:
                self.left_out[f"no answer scored {wanted:g}"] += 1
                return None
            best = prompt.references[0]
        asked = {"tools": list(prompt.tools)} if prompt.tools else {}
        messages = list(prompt.messages)
        if self._settings.keep == "best":
            return {"messages": [*messages, {"role": "assistant", "content": best}], **asked}
        if not scores or min(scores) >= wanted:
            self.left_out[f"all answers scored {wanted:g}" if scores else "no answer is usable"] += 1
            return None
        worst = _most_frequent(candidates, min(scores))
        return {"prompt": messages, "chosen": best, "rejected": worst, **asked}

    def _candidates(self, prompt: Prompt, answers: Sequence[Answer]) -> Iterable[tuple[str, Score]]:
        for answer in answers:
            value = max(self._rate(said(answer), reference) for reference in prompt.references)
            self.scores.append(value)
            if not answer.stopped:  # a row would teach to stop there
                self.unusable["hit --max-new-tokens"] += 1
            elif self._is_special(answer.text):
                self.unusable["has a special token"] += 1
            elif not answer.text.strip():
                self.unusable["is empty"] += 1
            else:
                yield answer.text.strip(), value


def _most_frequent(candidates: Sequence[tuple[str, Score]], wanted: Score) -> str:
    """Return the answer of this score that was drawn most often, of those the first; empty if there is none."""
    texts = Counter(text for text, value in candidates if value == wanted)
    return texts.most_common(1)[0][0] if texts else ""


def _metric(recipe: Recipe, metric: str, *, allow_code: bool) -> tuple[str, Callable[[str, str], Score]]:
    name = metric or recipe.evaluate.metric
    if name in ("none", "bleu"):
        why = "the run has no metric" if name == "none" else "bleu scores all answers together, not one"
        raise RecipeError(
            f"{why}: nothing says which answer is better",
            fix="--metric exact_match, json or contains, or --metric FILE.py:FUNCTION",
        )
    if name in METRICS:
        return name, partial(score, name)
    own = load_metric(name, allow_code=allow_code)
    return own.name, own


def _read_prompts(recipe: Recipe, name: str, tokenizer: PreTrainedTokenizerBase, progress: Progress) -> list[Prompt]:
    """Read rows as the run's data was read.

    Raises:
        DataError: They cannot be, or none has a prompt and an answer; the fix names no setting, which cannot be changed
            here.
    """
    data = recipe.data
    try:
        found = Reader(data, recipe.train.seed, progress)([Source(name=name)])
    except DataError as error:
        if not any(setting in error.fix for setting in ("data.", "task=", "split", "config")):
            raise
        raise DataError(error.problem, fix=_expected_rows(recipe), file=error.file, line=error.line) from None
    answered = [item for item in found.items if trained_turns(item.messages, "last", item.excluded)]
    asked = [item for item in answered if not item.started]
    for number, reason in (
        (len(found.rejected), "cannot be read"),
        (len(found.items) - len(answered), "without an answer"),
        (len(answered) - len(asked), "whose prompt ends with the beginning of an answer"),
    ):
        if number:
            progress.warn(f"{plural(number, 'row is', 'rows are')} left out: {reason}")
    prompts = render_prompts(asked, tokenizer, thinking=data.thinking)
    if not prompts:
        raise DataError("no row has a prompt and an answer to compare with", file=name, fix="give rows with answers")
    return prompts


def _expected_rows(recipe: Recipe) -> str:
    data = recipe.data
    columns = f", with {', '.join(f'{name} in {column}' for name, column in data.columns.items())}"
    known = f"of the format {data.format}" if data.format != "auto" else "of any format that data may have"
    return f"PROMPTS is read as the run's own data: give a file of rows {known}{columns if data.columns else ''}"


def _draw(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Prompt],
    settings: SampleSettings,
    longest: int,
    progress: Progress,
) -> list[Answer]:
    """Return `n` answers to each prompt, one prompt after another."""
    sampling = Sampling(
        temperature=settings.temperature,
        top_p=settings.top_p,
        max_new_tokens=settings.max_new_tokens or longest,
        seed=settings.seed,
    )
    _check_room(asked, sampling, positions_of(model.config))
    with progress.task("answers", len(asked) * settings.n, "answers") as task:
        return sample_answers(
            model,
            tokenizer,
            [prompt for prompt in asked for _ in range(settings.n)],
            sampling,
            stop_token_ids=stop_token_ids(tokenizer),
            progress=task.advance,
            warn=progress.warn,
        )


def _check_room(asked: Sequence[Prompt], sampling: Sampling, positions: int | None) -> None:
    longest = max(asked, key=lambda prompt: len(prompt.input_ids))
    length = len(longest.input_ids)
    if positions is not None and length + sampling.max_new_tokens > positions:
        raise DataError(
            f"a prompt of {length:,} tokens and an answer of {sampling.max_new_tokens:,} do not fit the model's "
            f"{positions:,} positions",
            file=longest.origin.file,
            line=longest.origin.line,
            fix=f"--max-new-tokens {positions - length}" if length < positions else "leave this row out",
        )


def _write(file: Path, metric: str, rows: Sequence[dict[str, Any]], scored: Scored) -> SampleOutput:
    result = SampleOutput(
        file=str(file),
        metric=metric,
        num_rows=len(rows),
        num_prompts=scored.num_prompts,
        num_answers=len(scored.scores),
        mean_score=sum(scored.scores) / len(scored.scores),
        solved=scored.num_solved / scored.num_prompts,
        left_out=dict(scored.left_out),
        unusable=dict(scored.unusable),
    )
    if not rows:
        why = ", ".join(f"{reason}: {count}" for reason, count in {**result.left_out, **result.unusable}.items())
        raise DataError(
            f"no prompt gives a row ({why})",
            fix="more answers (--n), another --temperature or --at-least, --with-reference, or harder prompts",
        )
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(file, text, fix="another --out")
    return result
