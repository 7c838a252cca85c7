"""Which task a file of another tool trains, and the losses of preferences: translated, or refused with the reason."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loratune.recipe.validation_errors import shown
from loratune.workflows.guidance.other_tools.data import factory_entries
from loratune.workflows.guidance.other_tools.settings import OFF, Answer, OtherSettings, Translated

if TYPE_CHECKING:
    from collections.abc import Iterator

_METHODS = ("stage", "rl", "train_mode", "rlhf_type")
_LOSS_TYPES = ("pref_loss", "dpo_loss_type", "loss_type")
_LOSSES = {"dpo": "dpo", "sigmoid": "dpo", "ipo": "ipo", "orpo": "orpo", "simpo": "simpo"}
"""Loss or method elsewhere → `preference.loss`."""
_SUPERVISED = ("sft", "pt", "pretrain", "nll", "chunked_nll", *OFF)

_OTHER_TRAINERS = {
    "GRPO": ("num_generations", "reward_funcs", "reward_weights", "num_iterations", "scale_rewards"),
    "KTO": ("desirable_weight", "undesirable_weight", "kto_desirable_weight", "kto_undesirable_weight"),
    "reward modeling": ("center_rewards_coefficient", "reward_model", "process_reward_model"),
    "PPO": ("reward_model_path", "cliprange", "kl_coef", "vf_coef"),
    "distillation": ("teacher_model_name_or_path", "teacher_model", "lmbda"),
}
"""What is not translated → settings that only it has."""

_ONLY_DPO = ("f_divergence_type", "ld_alpha", "rpo_alpha", "use_weighting", "discopop_tau", "dpo_beta")
_SEVERAL = (
    *("beta", "max_prompt_length", "precompute_ref_log_probs", "ref_model_name_or_path", "label_smoothing"),
    *("simpo_gamma", "cpo_alpha"),
)
"""Settings of TRL that several of its trainers have, none of them supervised."""

_OTHER_LOSS = {
    "ld_alpha": "LD-DPO",
    "use_weighting": "WPO",
    "dpo_use_weighting": "WPO",
    "pref_bco_weight": "BCO",
    "sync_ref_model": "TR-DPO",
    "f_divergence_type": "f-DPO",
}
"""Setting that changes the loss of pairs into another one → that loss."""
_SAME_LOSS = (*OFF, "reverse_kl")

_BETAS = ("beta", "rl_beta", "pref_beta", "dpo_beta", "orpo_alpha")
_SFT_WEIGHTS = ("rpo_alpha", "pref_ftx", "cpo_alpha")
_SMOOTHING = ("label_smoothing", "dpo_label_smoothing")
_REFERENCE = ("precompute_ref_log_probs", "ref_model", "ref_model_name_or_path", "ref_model_init_kwargs")
TASK_KEYS = frozenset(
    (
        *(*_METHODS, *_LOSS_TYPES, "loss_weights", "simpo_gamma"),
        *(*_OTHER_LOSS, *_BETAS, *_SFT_WEIGHTS, *_SMOOTHING, *_REFERENCE),
    )
)
"""Settings that are translated here."""

TASK_WORDS = TASK_KEYS - {*_LOSS_TYPES, "loss_weights", "ref_model_init_kwargs"}
"""Those whose value is one word, number or truth value."""


def task_parts(file: OtherSettings) -> list[Translated]:
    """Translate what a file says about its task and the loss of preferences.

    Raises:
        RecipeError: It trains something that loratune does not, or does not say what.
    """
    said, method = _method(file)
    pairs = [name for name, entry in factory_entries(file, "dataset").items() if entry.get("ranking") not in OFF]
    _check_ranking(file, method, pairs)
    if method is None:
        return [*_supervised(file)]
    return [*_pairs(file, said, method)]


def is_preference(parts: list[Translated]) -> bool:
    """Whether the task that was translated is that of preferences."""
    return any(isinstance(part.answer, dict) and part.answer.get("model.task") == "preference" for part in parts)


def _word(file: OtherSettings, *names: str) -> tuple[str, str] | None:
    """Return full name and value, in small letters, of the first of these settings at the top or in `trl`."""
    for name in names:
        for full in (name, f"trl.{name}"):
            if file.named.get(full) not in OFF:
                value = file.named[full]
                only = value[0] if isinstance(value, list) and len(value) == 1 else value
                return full, only.lower() if isinstance(only, str) else only
    return None


def _method(file: OtherSettings) -> tuple[str, str | None]:
    """Return the setting that says so, and the loss of preferences; None for supervised fine-tuning.

    Raises:
        RecipeError: It is neither.
    """
    method, loss = _word(file, *_METHODS), _word(file, *_LOSS_TYPES)
    if method is not None:
        name, value = method
        if value in _SUPERVISED:
            return name, None
        if value not in _LOSSES:
            raise _refuse(file, name, f"{name} is {value}")
        return (name, _LOSSES[value]) if value != "dpo" or loss is None else _loss(file, *loss)
    if trainer := next(
        ((kind, found) for kind, names in _OTHER_TRAINERS.items() if (found := _word(file, *names))), None
    ):
        kind, (name, _) = trainer
        raise _refuse(file, name, f"{name} is set, which is for {kind}")
    if loss is not None:
        return (loss[0], None) if loss[1] in (*_SUPERVISED, "dft") else _loss(file, *loss)
    if found := _word(file, *_ONLY_DPO):
        return found[0], "dpo"
    if found := _word(file, *_SEVERAL):
        raise file.error(
            found[0],
            f"{found[0]} is {found[1]}, which the trainers of DPO, KTO, ORPO and GRPO have, and the file does not say "
            "which it is for",
            "add a line to it: loss_type: sigmoid for DPO, or ipo, orpo or simpo",
        )
    return "", None


def _loss(file: OtherSettings, name: str, value: Any) -> tuple[str, str]:
    """Return the setting and the loss of preferences.

    Raises:
        RecipeError: It is not one of ours.
    """
    kinds = value if isinstance(value, list) else [value]
    if len(kinds) == 2 and kinds[1] == "sft" and _sft_weight(file) is not None:
        kinds = kinds[:1]
    if len(kinds) != 1 or not isinstance(kinds[0], str) or kinds[0] not in _LOSSES:
        raise _refuse(file, name, f"{name} is {value}")
    return name, _LOSSES[kinds[0]]


def _sft_weight(file: OtherSettings) -> float | None:
    """Return the weight of TRL's `sft` beside another loss; None if that one has another weight than 1."""
    weights = file.named.get("loss_weights", [1.0, 1.0])
    if isinstance(weights, list) and len(weights) == 2 and weights[0] == 1 and isinstance(weights[1], int | float):
        return float(weights[1])
    return None


def _refuse(file: OtherSettings, name: str, problem: str) -> Exception:
    return file.error(
        name,
        f"{problem}, which is not translated: supervised fine-tuning is, and pairs with the loss of dpo, ipo, orpo or "
        "simpo",
        "`loratune init DATA` writes a recipe for your data; see docs/preferences.md",
    )


def _check_ranking(file: OtherSettings, method: str | None, pairs: list[str]) -> None:
    """Refuse pairs under supervised fine-tuning and answers under preferences, as LLaMA-Factory does."""
    entries = factory_entries(file, "dataset")
    if pairs and method is None:
        raise file.error(
            "dataset",
            f"{pairs[0]} has ranking: true in dataset_info.json, so its rows are pairs, but stage is "
            f"{file.named.get('stage', 'sft')}",
            "stage: dpo in the file, to train preferences; or name a dataset of answers",
        )
    if method is not None and (others := [name for name, entry in entries.items() if entry and name not in pairs]):
        raise file.error(
            "dataset",
            f"{others[0]} has no ranking: true in dataset_info.json, so its rows are not pairs, but the file trains "
            "preferences",
            "stage: sft in the file, or name a dataset of pairs",
        )


def _own(file: OtherSettings) -> Iterator[tuple[str, str, Any]]:
    """Yield full name, last name and value of every setting that is translated here."""
    for full, value in file.named.items():
        above, _, last = full.rpartition(".")
        if last in TASK_KEYS and above in ("", "trl"):
            yield full, last, value


def _supervised(file: OtherSettings) -> Iterator[Translated]:
    for full, last, value in _own(file):
        answer: Answer = "the file does not train preferences"
        if last in _METHODS:
            text = str(value).lower() in ("pt", "pretrain")
            answer = {"model.task": "causal_lm", **({"data.train_on": "all"} if text else {})}
        elif last == "loss_type":
            answer = "the loss is the cross-entropy of the trained tokens"
        elif last == "label_smoothing":
            answer = {"train.label_smoothing": value}
        yield Translated(name=full, value=value, answer=answer)


def _pairs(file: OtherSettings, said: str, loss: str) -> Iterator[Translated]:
    given = list(_own(file))
    names = {last for _, last, _ in given}
    task: Answer = {"model.task": "preference", "preference.loss": loss}
    yield Translated(name=said, value=file.named[said], answer=task)
    for full, last, value in given:
        if last in _OTHER_LOSS and value not in _SAME_LOSS:
            raise _refuse(file, full, f"{full} is {shown(value)}, which makes the loss {_OTHER_LOSS[last]}")
        if full != said or last not in (*_METHODS, *_LOSS_TYPES) or isinstance(value, list):
            yield Translated(name=full, value=value, answer=_answer_of_pairs(file, last, value, task))
    if loss != "simpo":
        return
    usual: dict[str, tuple[tuple[str, ...], float]] = {
        "preference.beta": (_BETAS, 0.1),
        "preference.target_margin": (("simpo_gamma",), 0.5),
    }
    if file.tool != "LLaMA-Factory":  # TRL's CPOTrainer, which Axolotl uses
        usual["preference.sft_weight"] = (_SFT_WEIGHTS, 1.0)
    for ours, (theirs, value) in usual.items():
        if not names & set(theirs):
            yield Translated(name=f"the default of {file.tool}", value=value, answer={ours: value})


def _answer_of_pairs(file: OtherSettings, last: str, value: Any, task: Answer) -> Answer:
    if last in _METHODS:
        return task
    if last in _LOSS_TYPES:
        if isinstance(value, list) and len(value) == 2 and isinstance(task, dict):
            return {**task, "preference.sft_weight": _sft_weight(file)}
        return task
    if last == "loss_weights":
        two = _sft_weight(file) is not None
        return {"preference.sft_weight": _sft_weight(file)} if two else "there is one loss"
    for names, ours in ((_BETAS, "beta"), (_SFT_WEIGHTS, "sft_weight"), (_SMOOTHING, "label_smoothing")):
        if last in names:
            return {f"preference.{ours}": value}
    if last == "simpo_gamma":
        return {"preference.target_margin": value}
    if last in _OTHER_LOSS:
        return "off, as here"
    return "the reference is the model before step 1, computed once"
