"""Text generation with an exported graph in ONNX Runtime: chunked prefill, then token by token, batches included."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from export.finish import finish
from export.runners import metadata, read_graph, session
from sparse_attention.errors import MissingError, UsageError
from sparse_attention.statistics import TileCounts, phase_of, total_sparsity
from sparse_attention.threshold import Phase

CHUNK = 512
"""Prompt tokens of one call: a multiple of the default tile, so that chunks decide the tiles of the whole prompt.

The portable body holds the scores of a call; with 512 rows an 8k prompt of SmolLM2 stays under 4 GB.
"""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the likeliest where `temperature` is 0, else drawn with `seed`.

    `temperature` > 0 divides the logits; `top_k` > 0 keeps the likeliest, `top_p` < 1 the smallest set of that mass.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


@dataclass
class Generation:
    """What was generated for each prompt, and what it took."""

    token_ids: list[list[int]]
    prompt_tokens: list[int]
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_steps: int = 0
    sparsity: dict[Phase, float] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        """New tokens a second of decode, all prompts together."""
        if not self.decode_seconds:
            return 0.0
        return sum(max(len(ids) - 1, 0) for ids in self.token_ids) / self.decode_seconds

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a report."""
        return vars(self) | {"tokens_per_second": self.tokens_per_second}


class Generator:
    """A loaded graph with a KV cache.

    Args:
        path: a file that `export --kv-cache` or `--static-cache` wrote.
        counts: count tiles, for `Generation.sparsity`; a graph without the `tile_counts` output gets it in memory.
        threshold_scale: multiplies every λ (0 = dense); other than 1 needs a graph exported with `--tunable`.

    Raises:
        MissingError, ModelError: where the file cannot be read or holds no block-skip attention.
        UsageError: where it has no cache, or cannot be tuned.
    """

    def __init__(self, path: Path, *, counts: bool = False, threshold_scale: float = 1.0) -> None:
        graph = read_graph(path)
        names = [value.name or "" for value in graph.graph.inputs]
        if not any(name.startswith("past_key_values.") for name in names):
            raise UsageError("the file has no KV cache, so it cannot generate", where=str(path),
                             fix="export the model again with --kv-cache")  # fmt: skip
        if threshold_scale != 1 and "threshold_scale" not in names:
            raise UsageError("the file's thresholds are fixed", where=str(path), found=f"scale {threshold_scale:g}",
                             fix="export the model again with --tunable")  # fmt: skip
        self.path = path
        self._scale = np.full(1, threshold_scale, np.float32)
        self.static = int((metadata(graph, "signature") or {}).get("static_cache", 0))
        self.positions = _positions(path)
        self._counted = counts
        self._session = _with_counts(path, graph) if counts else session(str(path))
        self._inputs = {one.name: one for one in self._session.get_inputs()}
        self._outputs = [one.name for one in self._session.get_outputs()]
        self.takes_mask = "attention_mask" in self._inputs

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        sampling: Sampling | None = None,
        stop: Sequence[int] = (),
        chunk: int = CHUNK,
        on_token: Callable[[int, int], None] = lambda row, token: None,
    ) -> Generation:
        """Continues each prompt by at most `max_new_tokens` tokens.

        Several prompts run as one batch, padded on the right; where their lengths differ that needs a preallocated
        cache (`--static-cache`), in which each keeps its own places: the result is that of one by one.

        Args:
            prompts: token ids, none empty.
            max_new_tokens: at least 1.
            sampling: how the next token is chosen, default the likeliest.
            stop: token ids after which a prompt is done.
            chunk: prompt tokens of one call.
            on_token: told each new token: number of the prompt, token id.

        Raises:
            UsageError: where a prompt is empty or too long, or the batch does not fit the cache.
        """
        self._check(prompts, max_new_tokens, chunk)
        lengths = np.array([len(prompt) for prompt in prompts])
        ids = np.zeros((len(prompts), lengths.max()), np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
        cache = _Cache(self._inputs, len(prompts), self.static)
        choose = _Chooser(sampling or Sampling(), len(prompts))
        result = Generation([[] for _ in prompts], lengths.tolist())
        counts: dict[Phase, list[TileCounts]] = {"prefill": [], "decode": []}

        started = time.perf_counter()
        logits = np.zeros((len(prompts), 1), np.float32)
        for begin, end in _chunks(ids.shape[1], chunk):
            out = self._call(ids[:, begin:end], cache, np.minimum(lengths, end), counts)
            value = out[np.arange(len(prompts)), np.clip(lengths - 1 - begin, 0, end - begin - 1)]
            logits = np.where((lengths > begin)[:, None], value, logits) if begin else value
        result.prefill_seconds = time.perf_counter() - started

        started = time.perf_counter()
        done = np.zeros(len(prompts), bool)
        while True:
            token = choose(logits)
            for row in np.flatnonzero(~done).tolist():
                result.token_ids[row].append(int(token[row]))
                on_token(row, int(token[row]))
                done[row] = token[row] in stop or len(result.token_ids[row]) == max_new_tokens
            if done.all():
                break
            lengths = lengths + ~done
            logits = self._call(token[:, None], cache, lengths, counts)[:, -1]
            result.decode_steps += 1
        result.decode_seconds = time.perf_counter() - started
        if self._counted:
            result.sparsity = {phase: total_sparsity(found) for phase, found in counts.items() if found}
        return result

    def _check(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, chunk: int) -> None:
        lengths = [len(prompt) for prompt in prompts]
        if not prompts or min(lengths) == 0 or max_new_tokens < 1 or chunk < 1:
            raise UsageError(
                "nothing to generate from", found=f"prompts of {lengths} tokens, {max_new_tokens} new ones",
                fix="give prompts that are not empty, at least one new token, and chunks of one or more",
            )  # fmt: skip
        if len(set(lengths)) > 1 and not self.static:
            raise UsageError(
                "prompts of different lengths need a preallocated cache", where=str(self.path),
                found=f"lengths {lengths}", fix="export with --static-cache N, or generate one by one",
            )  # fmt: skip
        need, limits = max(lengths) + max_new_tokens - 1, [n for n in (self.static, self.positions) if n]
        if limits and need > min(limits):
            raise UsageError(
                "the prompt and the new tokens are longer than the model's positions" if not self.static
                else "the prompt and the new tokens do not fit the preallocated cache", where=str(self.path),
                found=f"{max(lengths)} + {max_new_tokens} tokens, room for {min(limits)}",
                fix="shorten the prompt, or ask for fewer new tokens",
            )  # fmt: skip

    def _call(
        self, ids: np.ndarray, cache: _Cache, ends: np.ndarray, counts: dict[Phase, list[TileCounts]]
    ) -> np.ndarray:
        """One call on `ids [B, S]`, after which `ends [B]` tokens are valid; gives the logits `[B, S, vocabulary]`."""
        feed = {"input_ids": ids, **cache.feed(ids.shape[1], ends, self.takes_mask)}
        if "threshold_scale" in self._inputs:
            feed["threshold_scale"] = self._scale
        out = dict(zip(self._outputs, self._session.run_with_ort_values(self._outputs, _ort_values(feed)), strict=True))
        cache.keep(out, ends)
        if self._counted:
            counts[phase_of(ids.shape[1])].append(_total(out["tile_counts"].numpy()))
        return out["logits"].numpy().astype(np.float32, copy=False)


class _Cache:
    """Keys and values between calls, as the runtime's own values: nothing is copied to Python."""

    def __init__(self, inputs: dict[str, Any], batch: int, static: int) -> None:
        from onnxruntime import OrtValue

        self.static = static
        self.starts = np.zeros(batch, np.int64)
        self.length = 0
        self.values = {}
        for name, one in inputs.items():
            if name.startswith("past_key_values."):
                dtype = np.float16 if one.type == "tensor(float16)" else np.float32
                shape = (batch, one.shape[1], static, one.shape[3])
                self.values[name] = OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype))

    def feed(self, rows: int, ends: np.ndarray, takes_mask: bool) -> dict[str, Any]:
        """The inputs beside the tokens."""
        if self.static:
            lengths = {"q_start": self.starts.astype(np.int32), "kv_lengths": ends.astype(np.int32)}
            return lengths | self.values
        mask = {"attention_mask": np.ones((len(ends), self.length + rows), np.int64)} if takes_mask else {}
        return mask | self.values

    def keep(self, out: dict[str, Any], ends: np.ndarray) -> None:
        """Takes the cache that a call returned."""
        self.values = {name: out[name.replace("past_key_values", "present")] for name in self.values}
        self.starts = ends.astype(np.int64)
        self.length = int(ends.max())


class _Chooser:
    """Chooses the next token of every row; one random stream a row, so that a batch draws what single prompts draw."""

    def __init__(self, sampling: Sampling, batch: int) -> None:
        self.sampling = sampling
        self.streams = [np.random.default_rng(sampling.seed) for _ in range(batch)]

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        if self.sampling.temperature <= 0:
            return logits.argmax(-1)
        return np.array([self._draw(row, stream) for row, stream in zip(logits, self.streams, strict=True)])

    def _draw(self, logits: np.ndarray, stream: np.random.Generator) -> int:
        scaled = logits.astype(np.float64) / self.sampling.temperature
        order = np.argsort(-scaled, kind="stable")
        if self.sampling.top_k:
            order = order[: self.sampling.top_k]
        mass = np.exp(scaled[order] - scaled[order[0]])
        mass /= mass.sum()
        keep = max(int(np.searchsorted(np.cumsum(mass), self.sampling.top_p)) + 1, 1)
        mass = mass[:keep] / mass[:keep].sum()
        return int(stream.choice(order[:keep], p=mass))


def load_tokenizer(path: Path) -> Any:
    """The tokenizer beside an exported file.

    Raises:
        MissingError: where there is none.
    """
    if not any((path.parent / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise MissingError("there is no tokenizer beside the file", where=str(path.parent),
                           fix="export the model again, or copy its tokenizer files there")  # fmt: skip
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path.parent)
    except (OSError, ValueError, KeyError) as error:
        raise MissingError(
            "the tokenizer beside the file cannot be loaded", where=str(path.parent),
            found=str(error).splitlines()[0], fix="copy the model's tokenizer files there",
        ) from error  # fmt: skip


def _chunks(length: int, chunk: int) -> list[tuple[int, int]]:
    """Begin and end of each call on a prompt; no call has a single row, which would count as decode."""
    begins = list(range(0, length, chunk))
    if len(begins) > 1 and length - begins[-1] == 1:
        begins.pop()
    return list(zip(begins, [*begins[1:], length], strict=True))


def _positions(path: Path) -> int:
    """The model's positions, from the configuration beside the file; 0 where nothing tells."""
    config = path.parent / "config.json"
    if not config.is_file():
        return 0
    try:
        return int(json.loads(config.read_text()).get("max_position_embeddings") or 0)
    except (ValueError, AttributeError):
        return 0


def _with_counts(path: Path, graph: ir.Model) -> Any:
    """A session of the file that also counts tiles."""
    if any(output.name == "tile_counts" for output in graph.graph.outputs):
        return session(str(path))
    finish(graph, counts=True)
    return session(ir.to_proto(graph).SerializeToString(), weights=path.parent)


def _ort_values(feed: dict[str, Any]) -> dict[str, Any]:
    from onnxruntime import OrtValue

    return {
        name: OrtValue.ortvalue_from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in feed.items()
    }


def _total(counts: np.ndarray) -> TileCounts:
    """Tile counts of one call, `[layers, Hq, 2]`, over all layers."""
    skipped, total = counts.astype(np.int64).sum((0, 1))
    return TileCounts((int(skipped),), (int(total),))
