"""Make changes of the source that tests must see, one at a time, and check that a test fails for each.

    python benchmarks/named_mutants.py          # all of them
    python benchmarks/named_mutants.py adapter  # those whose name begins so

As in `mutation.py`, no file is written. Prints a table, and exits with 1 if a change goes unseen or its tests fail
without it.
"""

from __future__ import annotations

import ast
import importlib
import os
import sys

from mutation import BEFORE_FORK, ROOT, run

LIMIT = 600.0
"""Seconds after which the tests of a change are stopped."""

ADAPTERS, PROOFS, REFUSALS = (
    (f"tests/workflows/adapters/test_{name}.py",) for name in ("make", "proofs", "exact_or_refused")
)

MUTANTS = (
    (
        "the slower dtype is chosen",
        ("model/device.py", "ratio >= FASTER else", "ratio < FASTER else"),
        ("tests/model/test_device.py",),
    ),
    (
        "tokens per second count supervised tokens only",
        ("training/callbacks.py", "step.num_tokens / seconds", "step.num_supervised_tokens / seconds"),
        ("tests/training/test_callbacks.py",),
    ),
    (
        "the disk check ignores the checkpoints",
        ("planning/checks.py", "needed = kept * checkpoint + parameters", "needed = parameters"),
        ("tests/planning/test_checks.py", "-k", "disk"),
    ),
    (
        "the planned loss has no working copies",
        ("planning/memory/memory.py", "chunk * 2 + chunk * model.dtype_bytes // 4", "chunk"),
        ("tests/planning/memory/test_memory.py", "-k", "vocabulary"),
    ),
    (
        "a run that never evaluates is planned without its last evaluation",
        ("planning/cost.py", 'evaluations += recipe.train.eval_every == "never"', "pass"),
        ("tests/planning/test_cost.py",),
    ),
    (
        "the start-up comparison accepts anything",
        ("training/loss.py", "tolerance, reason = TOLERANCE[loss_dtype(model)]", "tolerance, reason = 1e6"),
        ("tests/training/test_loss.py",),
    ),
    (
        "planned and actual are swapped in the report",
        (
            "reporting/plan_section.py",
            "as_duration(planned), as_duration(actual)",
            "as_duration(actual), as_duration(planned)",
        ),
        ("tests/reporting/test_run_page.py", "-k", "swapped"),
    ),
    (
        "a best adapter is recorded as the last",
        ("workflows/final_adapter.py", '"kind": "best"', '"kind": "last"'),
        ("tests/workflows/test_final_adapter.py",),
    ),
    (
        "missing stop tokens pass the certificate",
        ("exporting/certificate.py", "missing_stops=missing if stops_required else []", "missing_stops=[]"),
        ("tests/exporting/test_certificate.py",),
    ),
    (
        "files added to the model do not count as a change",
        ("planning/lock.py", "sorted({*old, *new}) if old", "sorted({*old}) if old"),
        ("tests/workflows/test_changed_inputs.py", "-k", "differences"),
    ),
    (
        "every step has the same dropout",
        ("model/kernels/dropout.py", "seed * _GOLDEN + step + 1", "seed * _GOLDEN + 1"),
        ("tests/model/kernels/test_dropout.py",),
    ),
    (
        "dropout masks depend on the place in the micro-batch",
        ("training/fast_trainer.py", "[share.numbers[i] for i in chosen] or [0]", "[*range(len(chosen))] or [0]"),
        ("tests/invariants/test_same_mathematics.py", "-k", "token_budget and complete and 64"),
    ),
    (
        "a stop token of several tokens is trained in part",
        ("data/masking/token_labels.py", "if ended and int(tokens.ids[last]) not in self._stops", "if False"),
        ("tests/data/masking/test_token_labels.py",),
    ),
    (
        "adapter: the scale of rank-stabilized LoRA is forgotten",
        (
            "exporting/adapter_matrices.py",
            'alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank',
            "alpha / rank",
        ),
        (*ADAPTERS, "-k", "rslora or share"),
    ),
    (
        "adapter: alpha is lost",
        (
            "exporting/adapter_matrices.py",
            'float(patterns.get(get_pattern_key(patterns.keys(), module), config["lora_alpha"]))',
            "float(rank)",
        ),
        (*ADAPTERS, "-k", "rslora or share"),
    ),
    (
        "adapter: a module's own alpha is lost",
        (
            "exporting/adapter_matrices.py",
            'patterns.get(get_pattern_key(patterns.keys(), module), config["lora_alpha"])',
            'config["lora_alpha"]',
        ),
        (*ADAPTERS, "-k", "patterns"),
    ),
    (
        "adapter: a written adapter keeps the alpha of its first source",
        ("exporting/adapters/folder.py", "lora_alpha=usual", 'lora_alpha=old["lora_alpha"]'),
        (*ADAPTERS, "-k", "rslora or share"),
    ),
    (
        "adapter: weights are ignored by the sum",
        ("exporting/adapters/algebra.py", "(weight * update.scale * update.b", "(update.scale * update.b"),
        (*ADAPTERS, "-k", "rslora or share"),
    ),
    (
        "adapter: weights are ignored by the sum and by its proof",
        ("workflows/adapters/make.py", "list(weights) or [1.0] * len(adapters)", "[1.0] * len(adapters)"),
        (*ADAPTERS, "-k", "rslora or share"),
    ),
    (
        "adapter: a matrix that the first of two does not have is dropped",
        (
            "exporting/adapters/combine.py",
            "modules = sorted({module for adapter in adapters for module in adapter.updates})",
            "modules = sorted(adapters[0].updates)",
        ),
        (*ADAPTERS, "-k", "rslora or share"),
    ),
    (
        "adapter: the share of the squared norm is missed by one singular value",
        (
            "exporting/adapters/algebra.py",
            "int((squares < energy * squares[-1]).sum()) + 1)",
            "int((squares < energy * squares[-1]).sum()))",
        ),
        (*ADAPTERS, "-k", "rslora or share"),
    ),
    (
        "adapter: what extract leaves out is not told",
        ("exporting/adapters/extract.py", "left_out |= _only_in(after, before)", "pass"),
        (*ADAPTERS, "-k", "full_fine_tune"),
    ),
    (
        "adapter: the seed of what is dropped is ignored",
        ("exporting/adapters/combine.py", "torch.manual_seed(method.used_seed or 0)", "torch.manual_seed(0)"),
        (*ADAPTERS, "-k", "dare_draws"),
    ),
    (
        "adapter: the base's fingerprint is not compared",
        ("workflows/adapters/base.py", "if found != wanted:", "if False:"),
        (*ADAPTERS, "-k", "other_bases"),
    ),
    (
        "adapter: the base's shapes are not compared",
        ("workflows/adapters/base.py", "if own is None or shapes[own] == shape:", "if True:"),
        (*REFUSALS, "-k", "other_shapes or quantized_run"),
    ),
    (
        "adapter: the base on the disk is taken for the quantized one of training",
        ("workflows/adapters/base.py", "if kind in PACKED:", "if False:"),
        (*REFUSALS, "-k", "other_shapes or quantized_run"),
    ),
    (
        "adapter: written updates are compared with a tenth for tolerance",
        ("exporting/adapters/check.py", "WEIGHTS_TOLERANCE = 1e-6", "WEIGHTS_TOLERANCE = 0.1"),
        (*ADAPTERS, "-k", "wrong_scale"),
    ),
    (
        "adapter: what PEFT reads is not compared",
        (
            "workflows/adapters/make.py",
            "check_by_peft(base, folder, wanted, adapter) if base is not None else _NO_BASE",
            "_NO_BASE",
        ),
        (*ADAPTERS, "-k", "wrong_scale"),
    ),
    (
        "adapter: a merge is not proven",
        ("workflows/adapters/compare.py", 'if proof["problems"]:', "if False:"),
        (*PROOFS, "-k", "drops_the_adapter"),
    ),
    (
        "adapter: a merge that rounding undid is called the same",
        ("workflows/adapters/compare.py", '"same" if kept["kept"] else "undecided"', '"same"'),
        (*PROOFS, "-k", "drops_the_adapter"),
    ),
    (
        "adapter: certify does not look at whole tensors",
        (
            "workflows/adapters/compare.py",
            "prove_adapter(adapter.updates, other.updates, adapter.whole, other.whole)",
            "prove_adapter(adapter.updates, other.updates)",
        ),
        (*PROOFS, "-k", "beside_the_matrices"),
    ),
    (
        "adapter: certify does not look at biases",
        ("workflows/adapters/compare.py", "in _other_biases(adapter, other)]", "in ()]"),
        (*PROOFS, "-k", "another_bias"),
    ),
    (
        "adapter: certify passes an adapter that lacks a matrix",
        ("exporting/weights_proof.py", "Sums(missing=sorted(names - others))", "Sums()"),
        (*PROOFS, "-k", "another_bias"),
    ),
    (
        "adapter: certify passes a quarter more of an update",
        ("exporting/weights_proof.py", "values=found, most=most", "values=found"),
        (*PROOFS, "-k", "two_adapters_are_the_same"),
    ),
)
"""What changes, (file under src/loratune, text, its replacement), and the tests that must fail."""


def main() -> int:
    for library in BEFORE_FORK:
        importlib.import_module(library)
    os.chdir(ROOT)
    sound: dict[tuple[str, ...], bool] = {}
    unseen = 0
    print("| change | tests | seen |\n|---|---|---|")
    for name, (file, text, replacement), tests in MUTANTS:
        if not name.startswith(tuple(sys.argv[1:] or [""])):
            continue
        path, module = ROOT / "src" / "loratune" / file, f"loratune.{file.removesuffix('.py').replace('/', '.')}"
        source = path.read_text(encoding="utf-8")
        if source.count(text) != 1:
            raise SystemExit(f"{file}: {text!r} occurs {source.count(text)} times")
        if tests not in sound:
            sound[tests] = run(module, path, ast.parse(source), [*tests], LIMIT) == "survived"
        seen = run(module, path, ast.parse(source.replace(text, replacement)), [*tests], LIMIT) != "survived"
        verdict = ("yes" if seen else "NO") if sound[tests] else "the tests fail without it"
        unseen += verdict != "yes"
        print(f"| {name} | `{' '.join(tests)}` | {verdict} |", flush=True)
    return 1 if unseen else 0


if __name__ == "__main__":
    sys.exit(main())
