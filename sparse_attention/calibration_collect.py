"""The first half of a calibration: one dense pass over the texts, every tile's gap counted; a run can resume."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from torch import nn

from sparse_attention.config import SparseAttentionConfig
from sparse_attention.config_io import Source, load_config
from sparse_attention.errors import ConfigError, ModelError, UsageError
from sparse_attention.gap_collector import GapCollector
from sparse_attention.gap_files import fingerprint, load_histograms, save_histograms, text_fingerprint
from sparse_attention.gap_histogram import GapHistogram
from sparse_attention.layer import AttentionLayer, substituted
from sparse_attention.patterns import match
from sparse_attention.sparsify import attention_modules
from sparse_attention.threshold import Phase
from sparse_attention.trial import Batch, forward, tokens_of, trial

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""

_SAVE_EVERY = 30.0
"""Seconds between two saves of a run's state: what a cut-off run can lose."""


def default_lengths(longest: int, br: int, bc: int) -> tuple[int, ...]:
    """The longest text and its halves, down to an eighth or to four tiles, rounded to whole tile rows; ascending."""
    lengths = [longest]
    while len(lengths) < 4 and lengths[-1] // 2 >= 4 * max(br, bc):
        lengths.append(lengths[-1] // 2 // br * br)
    return tuple(sorted(set(lengths)))


def collect(
    model: nn.Module,
    config: SparseAttentionConfig | Source,
    batches: Iterable[Batch],
    *,
    lengths: Sequence[int] | None = None,
    units: Mapping[Phase, str] | None = None,
    state: Path | str | None = None,
    progress: Progress | None = None,
) -> dict[Phase, GapHistogram]:
    """The first half of `calibrate`: histograms of every layer's tile gaps, from one dense pass over the texts.

    Several processes may each take some of the texts: `gap_files.merge_files` adds what they keep in `state`, exactly.

    Args:
        units: "head" or "group" for each phase to collect; by default heads in prefill and groups in decode.
    """
    config, batches = load_config(config), list(batches)
    units = dict(units or {"prefill": "head", "decode": "group"})
    with trial(model, config) as layers:
        chosen = _calibrated_layers(model, config, layers)
        lengths = _checked_lengths(batches, lengths, chosen)
        collector = GapCollector(lengths, units)
        how = fingerprint(model, chosen, {"lengths": list(lengths), "units": units})
        done = _resume(collector, state, how, batches)
        names = [text_fingerprint(batch) for batch in batches]
        saved = time.monotonic()
        for index, (batch, name) in enumerate(zip(batches, names, strict=True)):
            if progress is not None:
                progress("collecting", index, len(batches))
            if name in done:
                continue
            with substituted(chosen, collector):
                forward(model, batch, use_cache=False, logits_to_keep=1)
            done.append(name)
            if state is not None and (time.monotonic() - saved > _SAVE_EVERY or index == len(batches) - 1):
                save_histograms(state, collector.histograms, how=how, done=done)
                saved = time.monotonic()
        if progress is not None:
            progress("collecting", len(batches), len(batches))
    found = {phase: histogram for phase, histogram in collector.histograms.items() if histogram.layers}
    if not found:
        raise ModelError(
            "no tile was seen in the phases that were asked for",
            where=", ".join(units),
            found="decode needs a causal model" if list(units) == ["decode"] else "",
            fix="calibrate prefill",
        )
    return found


def _calibrated_layers(
    model: nn.Module, config: SparseAttentionConfig, layers: Sequence[AttentionLayer]
) -> list[AttentionLayer]:
    """The enabled layers of the pattern that carries, or will carry, the calibration."""
    carrier = config.calibration[0] if config.calibration else None
    names = match(config, attention_modules(model))
    reached = names.get(carrier, ()) if carrier is not None else [name for found in names.values() for name in found]
    chosen = [layer for layer in layers if layer.settings.enable and layer.name in reached]
    if not chosen:
        raise ConfigError(
            "no enabled attention module to calibrate", where="sparse_cfg", fix="set enable: true on the pattern"
        )
    return chosen


def _checked_lengths(
    batches: Sequence[Batch], lengths: Sequence[int] | None, layers: Sequence[AttentionLayer]
) -> tuple[int, ...]:
    br, bc = (max(getattr(layer.settings, side) for layer in layers) for side in ("br", "bc"))
    sizes = [tokens_of(batch) for batch in batches]
    if not sizes:
        raise UsageError("too little text", where="batches", found="none", fix="give at least one text")
    longest = max(sizes)
    if longest <= bc:
        raise UsageError(
            "the texts are shorter than a tile, so nothing could ever be skipped",
            where="batches",
            found=f"{longest} tokens, tiles of {br} x {bc}",
            fix=f"use texts of at least {4 * bc} tokens; thousands tell more",
        )
    if not lengths:
        return default_lengths(longest, br, bc)
    if max(lengths) > longest or min(lengths) <= bc:
        raise UsageError(
            "lengths that the texts cannot show",
            where="lengths",
            found=f"{', '.join(map(str, lengths))}; texts of up to {longest} tokens, tiles of {bc}",
            fix="choose lengths between a tile and the longest text",
        )
    return tuple(sorted(set(lengths)))


def _resume(collector: GapCollector, state: Path | str | None, how: str, batches: Sequence[Batch]) -> list[str]:
    if state is None or not Path(state).exists():
        return []
    histograms, before, done = load_histograms(state)
    if before != how:
        raise UsageError(
            "the state file belongs to another run",
            where=str(state),
            found="another model, tiles, lengths or units",
            fix="delete it to start over, or name another file",
        )
    extra = set(done) - {text_fingerprint(batch) for batch in batches}
    if extra:
        raise UsageError(
            "the state file holds texts that this run does not have",
            where=str(state),
            found=f"{len(extra)} of {len(done)}",
            fix="give the same texts again, or name another file",
        )
    collector.restore(histograms)
    return list(done)
