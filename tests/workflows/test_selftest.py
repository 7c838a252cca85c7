"""The self-test passes here, and notices what it is there to notice."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import loratune.__main__
from loratune.model.adapter import attach
from loratune.model.kernels import lora_linear as lora_kernel
from loratune.model.kernels import varlen_attention
from loratune.model.kernels.dropout import row_numbers
from loratune.training import fast_trainer, trainer
from loratune.workflows import selftest
from tests.conftest import some
from tests.model.kernels.varlen import SIGNATURES, pretend_gpu, varlen_2_12


def failed(checks: list[selftest.SelfCheck]) -> set[str]:
    return {check.name.partition(" ")[0] for check in checks if not check.ok}


def test_every_check_passes_here_and_the_exit_code_says_so() -> None:
    result = CliRunner().invoke(loratune.__main__.app, ["selftest", "--json"])
    record = json.loads(result.stdout)
    assert result.exit_code == 0, record
    assert record["ok"]
    assert [check["name"].partition(" ")[0] for check in record["checks"]] == [
        *("kernels", "fast", "resumed", "saved"),
        *("kernels", "fast"),  # in bfloat16
    ]
    assert all(0 <= check["difference"] <= check["tolerance"] for check in record["checks"])
    assert sum(check["seconds"] for check in record["checks"]) < 60


def wrong_scale(*args: Any, **kwargs: Any) -> torch.Tensor:
    x, weight, bias, a, b, scale, *rest = args
    return lora_kernel.lora_linear(x, weight, bias, a, b, scale * 1.001, *rest, **kwargs)


def wrong_gradient(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The right loss with a gradient that is one part in a thousand too small."""
    return true_cross_entropy(hidden.detach() * 0.001 + hidden * 0.999, *args, **kwargs)


def sees_other_examples(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    ends = kwargs["cu_seq_lens_q"]
    joined = torch.stack([ends[0], ends[-1]])
    return true_attention(*args, **{**kwargs, "cu_seq_lens_q": joined, "max_length_q": int(joined[-1])})


def takes_the_first_head_s_keys(*args: Any, **kwargs: Any) -> torch.Tensor:
    """What becomes of grouped heads if all read the keys of the first group; on the way of a GPU."""
    query, key, value, *rest = args
    return varlen_2_12(query, key[:, :1].expand_as(key), value, *rest, **kwargs)


def loses_an_example(examples: Any) -> Any:
    return true_collate(examples[:-1])


true_cross_entropy, true_attention, true_collate = (
    selftest.sum_cross_entropy,
    selftest.packed_attention,
    selftest.collate,
)

calls = count()


def rows_by_call(seed: int, step: int, *rest: Any) -> torch.Tensor:
    return row_numbers(seed, next(calls), *rest)


# fault: what is replaced by what, and the checks that must fail
FAULTS: dict[str, tuple[list[tuple[Any, str, Callable[..., Any]]], set[str]]] = {
    "a wrong scale": (
        [(selftest, "lora_linear", wrong_scale), (attach, "lora_linear", wrong_scale)],
        {"kernels", "fast"},
    ),
    "a wrong gradient": ([(selftest, "sum_cross_entropy", wrong_gradient)], {"kernels"}),
    "attention across examples": ([(selftest, "packed_attention", sees_other_examples)], {"kernels"}),
    "a micro-batch without an example": ([(selftest, "collate", loses_an_example)], {"fast"}),
    "a kernel that fails": ([(selftest, "lora_linear", lambda *args: 1 / 0)], {"kernels"}),
    "dropout that counts calls, not steps": ([(fast_trainer, "row_numbers", rows_by_call)], {"resumed"}),
    "an optimizer that starts over": ([(trainer, "load_optimizer", lambda *args: None)], {"resumed"}),
    "an adapter that PEFT loads wrongly": (
        [(selftest.PeftModel, "from_pretrained", lambda base, folder: base)],
        {"saved"},
    ),
}


@pytest.mark.parametrize(
    "fault", some(list(FAULTS), "a wrong gradient", "attention across examples", "an adapter that PEFT loads wrongly")
)
def test_a_planted_fault_is_noticed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced, expected = FAULTS[fault]
    for module, name, function in replaced:
        monkeypatch.setattr(module, name, function)
    # Checks that train are skipped where the fault cannot concern them.
    needed = expected if expected <= {"resumed", "saved"} else {"kernels", "fast"}
    real = selftest._measure

    def measure(name: str, work: Callable[[], float], tolerance: float) -> selftest.SelfCheck:
        return real(name, work if name.partition(" ")[0] in needed else lambda: 0.0, tolerance)

    monkeypatch.setattr(selftest, "_measure", measure)
    checks = selftest.selftest()
    assert failed(checks) == expected
    assert all(check.note for check in checks if fault == "a kernel that fails" and not check.ok)


@pytest.mark.parametrize("signature", some(list(SIGNATURES), "torch 2.12"))
def test_the_narrow_checks_reach_the_kernel_of_a_gpu(signature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, SIGNATURES[signature], any_type=False)
    calls = []
    substitute = varlen_attention.varlen_attn

    def counted(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(query.dtype)
        return substitute(query, *args, **kwargs)

    monkeypatch.setattr(varlen_attention, "varlen_attn", counted)
    real = selftest._measure

    def measure(name: str, work: Callable[[], float], tolerance: float) -> selftest.SelfCheck:
        return real(name, work if "bfloat16" in name else lambda: 0.0, tolerance)

    monkeypatch.setattr(selftest, "_measure", measure)
    checks = selftest.selftest()
    assert failed(checks) == set(), checks
    assert len(calls) == 4  # with a window and without; one in each layer of the model
    assert set(calls) == {torch.bfloat16}

    monkeypatch.setattr(varlen_attention, "_TAKES_SHARED_HEADS", True)
    monkeypatch.setattr(varlen_attention, "varlen_attn", takes_the_first_head_s_keys)
    assert failed(selftest.selftest()) == {"kernels", "fast"}


def test_a_failure_is_reported_and_ends_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = selftest.SelfCheck(name="a [b] = c", difference=0.5, tolerance=1e-4, seconds=0.1, note="RunError: [red]no")
    monkeypatch.setattr(selftest, "selftest", lambda progress: [bad])
    result = CliRunner().invoke(loratune.__main__.app, ["selftest"])
    assert result.exit_code == 1
    for text in ("a [b] = c", "5.0e-01", "[red]no", "✗", "1 of the checks failed on this machine"):
        assert text in result.output
    result = CliRunner().invoke(loratune.__main__.app, ["selftest", "--json"])
    assert (result.exit_code, json.loads(result.stdout)["ok"]) == (1, False)
