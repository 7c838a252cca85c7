"""The bounds of a run's memory and time, as far as measured runs show.

Each interval is a pair of factors on the planned number, chosen so that it holds at least 90 % of the runs in
docs/results/memory.md, docs/results/quantization.md and docs/results/time.md. `tests/planning/test_intervals.py` counts
them. Where nothing was measured there is none: on a GPU, and for the time of an encoder.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Bounds of a measured number.

    Attributes:
        low: The lower bound, as a multiple of the planned number.
        high: The upper bound, likewise.
        source: The measured runs, and how many of them lie inside.
    """

    low: float
    high: float
    source: str


_DECODER_MEMORY = Bounds(low=0.88, high=1.05, source="25 of 26 runs on a CPU, 135M to 1.8B parameters")
_ENCODER_MEMORY = Bounds(low=0.84, high=1.13, source="5 of 5 runs of BERT and ModernBERT on a CPU")
_DECODER_TIME = Bounds(low=0.85, high=1.30, source="7 of 7 times of 5 runs on two quiet CPU cores")


def memory_interval(device: str, *, is_encoder: bool) -> Bounds | None:
    """Return the interval of the peak memory; None if no run has been measured.

    Args:
        device: `cpu`, `cuda` or `mps`; the name of a device that is planned for, but is not here.
        is_encoder: Whether examples are padded, as an encoder's are.
    """
    if device != "cpu":
        return None
    return _ENCODER_MEMORY if is_encoder else _DECODER_MEMORY


def time_interval(device: str, *, is_encoder: bool) -> Bounds | None:
    """Return the interval of the total time on an otherwise idle machine; None if no run has been measured.

    Args:
        device: As for `memory_interval`.
        is_encoder: As for `memory_interval`.
    """
    return _DECODER_TIME if device == "cpu" and not is_encoder else None
