"""What a calibrated configuration achieves: true sparse runs, counted by the op itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from sparse_attention.calibration_collect import Progress
from sparse_attention.config import SparseAttentionConfig
from sparse_attention.gap_collector import decode_rows
from sparse_attention.huggingface import cache_name
from sparse_attention.statistics import total_sparsity
from sparse_attention.threshold import Phase
from sparse_attention.trial import Batch, forward, shortened, tokens_of, trial

DECODE_STEPS = 32
"""Real decode steps at each length, about; neighbouring ones are alike, so they lie apart."""


@dataclass(frozen=True)
class Achieved:
    """Share of tiles skipped at one length, over `texts` texts and all calibrated layers together."""

    sparsity: float
    texts: int


def achieved_sparsity(
    model: nn.Module,
    config: SparseAttentionConfig,
    batches: Sequence[Batch],
    lengths: Mapping[Phase, Sequence[int]],
    units: Mapping[Phase, str],
    progress: Progress | None = None,
) -> dict[Phase, dict[int, Achieved]]:
    """Runs the model sparsely on the texts, cut to each length, and counts.

    Args:
        batches: texts; one that is shorter than a length is left out there.
        lengths: of keys, by phase.
        units: "head" or "group", by phase.

    Returns:
        By phase and length; a length that no text has is missing.
    """
    found: dict[Phase, dict[int, Achieved]] = {}
    runs = [(phase, length) for phase, some in lengths.items() for length in some]
    for index, (phase, length) in enumerate(runs):
        fitting = [batch for batch in batches if tokens_of(batch) >= length]
        if not fitting:
            continue
        with trial(model, config, unit=units[phase]) as layers:
            for number, batch in enumerate(fitting):
                if progress is not None:
                    progress("checking on held-out text", index * len(fitting) + number, len(runs) * len(fitting))
                cut = shortened(batch, length)
                if phase == "prefill":
                    forward(model, cut, use_cache=False, logits_to_keep=1)
                else:
                    _decode(model, cut, length)
            counted = [layer.statistics.by_phase for layer in layers if layer.enabled]
        counts = [by_phase[phase] for by_phase in counted if phase in by_phase]
        if counts:
            found.setdefault(phase, {})[length] = Achieved(total_sparsity(counts), len(fitting))
    return found


def _decode(model: nn.Module, batch: Batch, length: int) -> None:
    """Some of the tokens that stand for the decode steps at a length one by one; what lies between is prefilled."""
    ids = batch if not isinstance(batch, Mapping) else batch["input_ids"]
    name = cache_name(model)
    rows = decode_rows(length)
    done, cache = 0, None
    for position in rows[:: max(1, len(rows) // DECODE_STEPS)]:
        for end in (position, position + 1):
            if end > done:
                inputs = {"input_ids": ids[:, done:end], name: cache}
                cache = getattr(forward(model, inputs, use_cache=True, logits_to_keep=1), name)
                done = end
