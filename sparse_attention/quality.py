"""`quality(model, candidates, texts)`: what sparsity costs, measured against the same model run densely.

Perplexity, KL divergence and top-1 agreement on every text; dropped softmax mass and its bound per layer on the first
text of a length; needles in haystacks where asked for. Every finished piece is kept, so that a long run can resume.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparse_attention.calibration_collect import Progress
from sparse_attention.config import SparseAttentionConfig
from sparse_attention.config_io import Source, load_config
from sparse_attention.errors import UsageError
from sparse_attention.gap_files import fingerprint, text_fingerprint
from sparse_attention.layer import observed
from sparse_attention.needle import Needle, ask
from sparse_attention.quality_logits import Comparison, Predictions, total
from sparse_attention.quality_mass import LayerMass, MassObserver
from sparse_attention.quality_state import QualityState
from sparse_attention.statistics import TileCounts, total_sparsity
from sparse_attention.trial import shortened, tokens_of, trial

DENSE = "dense"


@dataclass(frozen=True)
class QualityRow:
    """One configuration at one length, over `texts` texts.

    Args:
        sparsity: share of tiles skipped in prefill.
        perplexity, dense_perplexity: of the same tokens.
        kl: mean KL(dense || sparse) a token, in nats.
        top1: share of tokens whose most likely next token stays the same.
        seconds: of the sparse forward passes.
        error: standard error of `rise`, from its spread over the texts; None for a single one.
    """

    candidate: str
    length: int
    texts: int
    sparsity: float
    perplexity: float
    dense_perplexity: float
    kl: float
    top1: float
    seconds: float
    error: float | None = None

    @property
    def rise(self) -> float:
        """Relative rise in perplexity: 0.003 is 0.3 %."""
        return self.perplexity / self.dense_perplexity - 1


@dataclass(frozen=True)
class NeedleRow:
    """One needle for one configuration, beside the dense model's answer."""

    candidate: str
    length: int
    depth: float
    found: bool
    log_likelihood: float
    dense_found: bool
    dense_log_likelihood: float


@dataclass
class Quality:
    """Everything that was measured; `as_dict` is what goes into a JSON file."""

    rows: list[QualityRow] = field(default_factory=list)
    layers: dict[str, dict[int, dict[str, LayerMass]]] = field(default_factory=dict)
    needles: list[NeedleRow] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and dicts."""
        rows = [{**asdict(row), "rise": row.rise} for row in self.rows]
        layers = {
            name: {str(n): {layer: asdict(mass) for layer, mass in of.items()} for n, of in lengths.items()}
            for name, lengths in self.layers.items()
        }
        return {"rows": rows, "layers": layers, "needles": [asdict(row) for row in self.needles]}


def quality(
    model: nn.Module,
    candidates: Mapping[str, SparseAttentionConfig | Source],
    texts: Sequence[Tensor] | Mapping[int, Sequence[Tensor]],
    *,
    lengths: Sequence[int] | None = None,
    needles: Iterable[Needle] = (),
    unit: str = "head",
    masses: bool = True,
    state: Path | str | None = None,
    progress: Progress | None = None,
) -> Quality:
    """Measures every candidate against the dense model. The model is left as it was given.

    Args:
        model: a causal language model in eval mode.
        candidates: configurations by the name they get in the result.
        texts: token ids `[B, S]`, cut to each length; or the texts of each length.
        lengths: tokens; by default the length of the longest text.
        needles: from `sparse_attention.needle.needles`.
        unit: "head" or "group", as the kernel decides.
        masses: whether to run the first text of each length once more, to measure dropped mass and its bound per layer.
        state: a JSON file of finished pieces; a run that was cut off goes on from there.
        progress: is told what is being done.

    Raises:
        UsageError: without candidates or texts, for a text shorter than a length, or a state file of another run.
        ModelError: where the model predicts no tokens, or NaN.
    """
    configs = {name: load_config(config) for name, config in candidates.items()}
    by_length = _by_length(texts, lengths)
    needles = list(needles)
    if not configs:
        raise UsageError("nothing to measure", where="candidates", found="none", fix="give at least one configuration")
    first = next(iter(configs.values()))
    with trial(model, first, unit=unit) as layers:
        kept = QualityState(state, fingerprint(model, layers, {"unit": unit}))
        run = _Run(model, first, configs, unit, masses, kept, progress, _amount(by_length, needles, configs))
        for length, some in by_length.items():
            run.texts(length, some)
        run.needles(needles)
    return run.result()


class _Run:
    """One pass over texts and needles, piece by piece."""

    def __init__(
        self, model: nn.Module, dense: SparseAttentionConfig, configs: Mapping[str, SparseAttentionConfig], unit: str,
        masses: bool, state: QualityState, progress: Progress | None, amount: int,
    ) -> None:  # fmt: skip
        self.model, self.configs, self.unit, self.state = model, configs, unit, state
        self.dense, self.masses = dense, masses
        self.progress, self.amount, self.done = progress, amount, 0
        self.predictions: Predictions | None = None
        self.pieces: dict[tuple[str, int], list[dict[str, Any]]] = {}
        self.answers: list[NeedleRow] = []

    def texts(self, length: int, texts: Sequence[Tensor]) -> None:
        for index, text in enumerate(texts):
            ids = shortened(text, length)
            assert isinstance(ids, Tensor)
            with_mass = self.masses and index == 0
            keys = {name: _key(config, text_fingerprint(ids), with_mass) for name, config in self.configs.items()}
            if any(key not in self.state for key in keys.values()):
                self.predictions = self.predictions or Predictions(self.model, ids)
                dense = self._dense(ids)
            for name, key in keys.items():
                if key not in self.state:
                    self.state[key] = self._judge(name, ids, dense, with_mass)
                self.pieces.setdefault((name, length), []).append(self.state[key])
                self._step(f"{name} at {length} tokens")

    def needles(self, needles: Sequence[Needle]) -> None:
        for needle in needles:
            where = text_fingerprint(needle.ids)
            answers = {}
            for name, config in {DENSE: None, **self.configs}.items():
                key = _key(config, where, False)
                if key not in self.state:
                    with trial(self.model, config or self.dense, unit=self.unit) as layers:
                        for layer in layers:
                            layer.enabled = layer.enabled and config is not None
                        self.state[key] = asdict(ask(self.model, needle))
                answers[name] = self.state[key]
                self._step(f"needle at {needle.length} tokens")
            self.answers += [
                NeedleRow(
                    name, needle.length, needle.depth, answer["found"], answer["log_likelihood"],
                    answers[DENSE]["found"], answers[DENSE]["log_likelihood"],
                )
                for name, answer in answers.items()
                if name != DENSE or DENSE in self.configs
            ]  # fmt: skip

    def result(self) -> Quality:
        found = Quality(needles=self.answers)
        for (name, length), pieces in self.pieces.items():
            sums = total([Comparison(**piece["comparison"]) for piece in pieces])
            counts = [TileCounts(tuple(piece["skipped"]), tuple(piece["total"])) for piece in pieces]
            found.rows.append(
                QualityRow(
                    name,
                    length,
                    len(pieces),
                    total_sparsity(counts),
                    math.exp(sums.nll / sums.tokens),
                    math.exp(sums.dense_nll / sums.tokens),
                    sums.kl / sums.tokens,
                    sums.agree / sums.tokens,
                    sum(piece["seconds"] for piece in pieces),
                    _standard_error([Comparison(**piece["comparison"]) for piece in pieces]),
                )
            )
            for piece in pieces:
                if "layers" in piece:
                    masses = {layer: LayerMass(**numbers) for layer, numbers in piece["layers"].items()}
                    found.layers.setdefault(name, {})[length] = masses
        return found

    def _dense(self, ids: Tensor) -> Tensor:
        assert self.predictions is not None
        with trial(self.model, self.dense) as layers:
            for layer in layers:
                layer.enabled = False
            return self.predictions.of(ids)

    def _judge(self, name: str, ids: Tensor, dense: Tensor, with_mass: bool) -> dict[str, Any]:
        assert self.predictions is not None
        watcher = MassObserver()
        with trial(self.model, self.configs[name], unit=self.unit) as layers:
            started = time.perf_counter()
            judged = self.predictions.of(ids)
            seconds = time.perf_counter() - started
            counts = [layer.statistics.by_phase.get("prefill", TileCounts((), ())) for layer in layers if layer.enabled]
            if with_mass:
                with observed(self.model, watcher):
                    self.predictions.of(ids)
        piece: dict[str, Any] = {
            "comparison": asdict(self.predictions.compare(ids, dense, judged)),
            "skipped": [sum(one.skipped) for one in counts],
            "total": [sum(one.total) for one in counts],
            "seconds": seconds,
        }
        if with_mass:
            piece["layers"] = {layer: asdict(mass) for layer, mass in watcher.layers.items()}
        return piece

    def _step(self, what: str) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(what, self.done, self.amount)


def _by_length(
    texts: Sequence[Tensor] | Mapping[int, Sequence[Tensor]], lengths: Sequence[int] | None
) -> dict[int, Sequence[Tensor]]:
    if isinstance(texts, Mapping):
        chosen = {n: list(some) for n, some in texts.items() if lengths is None or n in lengths}
    else:
        longest = max((tokens_of(text) for text in texts), default=0)
        chosen = {n: list(texts) for n in (lengths or [longest])}
    for length, some in chosen.items():
        shortest = min((tokens_of(text) for text in some), default=0)
        if shortest < length or length < 2:
            raise UsageError(
                "too little text",
                where=f"length {length}",
                found=f"{len(some)} texts, the shortest of {shortest} tokens",
                fix="give more text, or a shorter length",
            )
    if not chosen:
        raise UsageError("too little text", where="texts", found="none", fix="give at least one text")
    return chosen  # type: ignore[return-value]


def _amount(
    by_length: Mapping[int, Sequence[Tensor]], needles: Sequence[Needle], configs: Mapping[str, SparseAttentionConfig]
) -> int:
    return len(configs) * sum(map(len, by_length.values())) + len(needles) * (len(configs) + 1)


def _standard_error(parts: Sequence[Comparison]) -> float | None:
    """Of the rise in perplexity. Texts are the samples: the tokens of one text are not independent."""
    if len(parts) < 2:
        return None
    return statistics.stdev((part.nll - part.dense_nll) / part.tokens for part in parts) / math.sqrt(len(parts))


def _key(config: SparseAttentionConfig | None, text: str, with_mass: bool) -> str:
    """Names a piece by what it depends on; notes that a calibration carries are no part of that."""
    if config is None:
        return f"dense {text}"
    settings = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return f"{hashlib.sha256(settings.encode()).hexdigest()[:16]} {text}{' mass' if with_mass else ''}"
