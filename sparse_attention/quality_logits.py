"""How far a sparse run's predictions lie from a dense run's: perplexity, KL divergence, top-1 agreement."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_attention.errors import ModelError
from sparse_attention.trial import Batch, forward

_LOGITS_AT_ONCE = {"cpu": 1 << 22}
"""Logits held at once: 16 MiB on a CPU (its caches), 256 MiB elsewhere."""


@dataclass(frozen=True)
class Comparison:
    """Sums over the predicted tokens of one text.

    Args:
        tokens: predictions compared.
        nll: negative log-likelihood of the text's own tokens, in nats, of the run that was judged.
        dense_nll: the same of the dense run.
        kl: KL(dense || judged), in nats.
        agree: predictions whose most likely token is the dense run's.
    """

    tokens: int
    nll: float
    dense_nll: float
    kl: float
    agree: int


class Predictions:
    """What a model predicts for a text, kept as hidden states where the model allows it, as logits otherwise."""

    def __init__(self, model: nn.Module, ids: Tensor) -> None:
        """Checks on the first tokens of `ids [B, S]` how the model's logits come about.

        Raises:
            ModelError: where the model gives no logits, or NaN.
        """
        self._model = model
        self._base, self._head = model, None  # type: nn.Module, nn.Module | None
        probe = forward(model, ids[:1, :8], use_cache=False)
        if getattr(probe, "logits", None) is None or probe.logits.dim() != 3:
            raise ModelError(
                "the model predicts no tokens, so it has no perplexity",
                where=type(model).__name__,
                found=type(probe).__name__,
                fix="pass a causal language model",
            )
        base: nn.Module = getattr(model, "base_model", model)
        head: nn.Module | None = None
        if callable(embeddings := getattr(model, "get_output_embeddings", None)):
            head = embeddings()
        if head is None or base is model:
            return
        hidden = forward(base, ids[:1, :8], use_cache=False).last_hidden_state
        with torch.inference_mode():  # some models scale or cap their logits after the head: those keep logits
            if torch.equal(head(hidden.to(probe.logits.device)), probe.logits):
                self._base, self._head = base, head

    def of(self, batch: Batch) -> Tensor:
        """Hidden states `[B, S, width]` or logits `[B, S, vocabulary]` of a text, for `compare`."""
        if self._head is not None:
            out: Any = forward(self._base, batch, use_cache=False).last_hidden_state
        else:
            out = forward(self._model, batch, use_cache=False).logits
        if not bool(torch.isfinite(out[:, -1]).all()):
            raise ModelError(
                "the model's predictions are not finite",
                where=type(self._model).__name__,
                found="NaN or Inf at the last position",
                fix="load it with dtype float32 or bfloat16, and check its weights",
            )
        return torch.as_tensor(out)

    def compare(self, ids: Tensor, dense: Tensor, judged: Tensor) -> Comparison:
        """`ids [B, S]`, and what `of` gave in both runs."""
        nll = dense_nll = kl = 0.0
        agree = tokens = 0
        with torch.inference_mode():
            vocabulary = self._log(dense[:1, :1]).shape[-1]
            at_once = max(1, _LOGITS_AT_ONCE.get(dense.device.type, 1 << 26) // vocabulary)
            for b in range(ids.shape[0]):
                for first in range(0, ids.shape[1] - 1, at_once):
                    rows = slice(first, min(first + at_once, ids.shape[1] - 1))
                    next_ids = ids[b, rows.start + 1 : rows.stop + 1].to(dense.device).unsqueeze(-1)
                    reference, log = self._log(dense[b, rows]), self._log(judged[b, rows])
                    nll -= float(log.gather(-1, next_ids).double().sum())
                    dense_nll -= float(reference.gather(-1, next_ids).double().sum())
                    agree += int((reference.argmax(-1) == log.argmax(-1)).sum())
                    kl += float((log.neg_().add_(reference).mul_(reference.exp_())).sum(dtype=torch.float64))
                    tokens += rows.stop - rows.start
        return Comparison(tokens, nll, dense_nll, kl, agree)

    def _log(self, values: Tensor) -> Tensor:
        logits = values if self._head is None else self._head(values)
        return torch.log_softmax(logits.float(), dim=-1)


def total(parts: list[Comparison]) -> Comparison:
    """Several texts together."""
    return Comparison(
        sum(p.tokens for p in parts), math.fsum(p.nll for p in parts), math.fsum(p.dense_nll for p in parts),
        math.fsum(p.kl for p in parts), sum(p.agree for p in parts),
    )  # fmt: skip
