"""What collecting costs beside the same model's dense forward, measured in turns so that both see the same machine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from torch import nn

from sparse_attention.calibration_collect import Progress, collect
from sparse_attention.config import SparseAttentionConfig
from sparse_attention.config_io import Source, load_config
from sparse_attention.errors import UsageError
from sparse_attention.layer import layers_of
from sparse_attention.trial import Batch, forward


@dataclass(frozen=True)
class CollectingCost:
    """Seconds of every text, dense and while collecting: by the clock, and of this process on all its CPU cores.

    On a machine that other programs use too, waiting for a core counts in the first pair and not in the second.
    """

    dense: tuple[float, ...]
    collecting: tuple[float, ...]
    dense_cpu: tuple[float, ...]
    collecting_cpu: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Collecting over dense, all texts together."""
        return sum(self.collecting) / sum(self.dense)

    @property
    def cpu_ratio(self) -> float:
        """The same in CPU time; says nothing about a GPU."""
        return sum(self.collecting_cpu) / sum(self.dense_cpu)

    @property
    def median_ratio(self) -> float:
        """The median over the texts: less sensitive to other programs on the machine."""
        return median(c / d for c, d in zip(self.collecting, self.dense, strict=True))


def collecting_cost(
    model: nn.Module, config: SparseAttentionConfig | Source, batches: Sequence[Batch], progress: Progress | None = None
) -> CollectingCost:
    """Runs every text densely with the model's own attention, then while collecting, and so on in turns.

    Both leave out the logits of all but the last token, where the model can: without that the ratio would flatter.

    Raises:
        UsageError: where the model is sparsified, so that its own attention is not there, or there is no text.
    """
    if layers_of(model) or not batches:
        raise UsageError(
            "cannot compare", where="model" if batches else "texts",
            found="a sparsified model" if batches else "none", fix="pass the dense model and at least one text",
        )  # fmt: skip
    config = load_config(config)
    forward(model, batches[0], use_cache=False, logits_to_keep=1)  # the first run of a process is slower
    clock: list[tuple[float, float]] = []
    cpu: list[tuple[float, float]] = []
    for index, batch in enumerate(batches):
        if progress is not None:
            progress("timing", index, len(batches))
        started = time.perf_counter(), time.process_time()
        forward(model, batch, use_cache=False, logits_to_keep=1)
        between = time.perf_counter(), time.process_time()
        collect(model, config, [batch])
        ended = time.perf_counter(), time.process_time()
        clock.append((between[0] - started[0], ended[0] - between[0]))
        cpu.append((between[1] - started[1], ended[1] - between[1]))
    dense, collecting = zip(*clock, strict=True)
    dense_cpu, collecting_cpu = zip(*cpu, strict=True)
    return CollectingCost(dense, collecting, dense_cpu, collecting_cpu)
