"""Graphs with a KV cache: one graph for an empty past, chunks and single tokens; the cache grows or is preallocated.

Names are the ecosystem's: `past_key_values.N.key` / `.value` in, `present.N.key` / `.value` out, `[B, Hk, length, D]`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from export.adapter import BATCH, SEQUENCE, Adapter, Dynamic, Padding, Signature, is_decoder, positions, right_padded
from sparse_attention.errors import ModelError, UsageError
from sparse_attention.huggingface import Visibility, cache_name, given_lengths

_PAST = 40  # of the example inputs


@dataclass(frozen=True)
class CachedSignature(Signature):
    """A graph that takes and returns its cache; `static` is the preallocated length, 0 where the cache grows."""

    static: int = 0

    def sample(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Inputs of a first call: the whole prompt, an empty cache."""
        batch, length = input_ids.shape
        given = {"input_ids": input_ids, "attention_mask": torch.ones(batch, length, dtype=torch.int64)}
        given |= _lengths(torch.zeros(batch), torch.full((batch,), length))
        for name, example in self.examples.items():
            if name not in given:
                shape = (batch, example.shape[1], self.static, example.shape[3])
                given[name] = torch.zeros(shape, dtype=example.dtype)
        return {name: given[name] for name in self.examples}

    def following(self, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Inputs of a decode step: the likeliest token, on the cache that the call before left."""
        token = outputs["logits"][:, -1].argmax(-1, keepdim=True)
        given = {name.replace("present", "past_key_values"): value for name, value in outputs.items()}
        given["input_ids"] = token
        if "attention_mask" in self.examples:
            mask = inputs["attention_mask"]
            given["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
        if self.static:
            given |= _lengths(inputs["kv_lengths"], inputs["kv_lengths"] + 1)
        return {name: given[name] for name in self.examples}


def _lengths(start: Tensor, end: Tensor) -> dict[str, Tensor]:
    return {"q_start": start.to(torch.int32), "kv_lengths": end.to(torch.int32)}


def cached_signature(model: nn.Module, *, padding: Padding = "auto", static: int = 0) -> CachedSignature:
    """The signature of a decoder's graph with a KV cache.

    A growing cache (`static = 0`) takes `input_ids [batch, sequence]` and, unless `padding` is "none",
    `attention_mask [batch, past + sequence]`. A preallocated one holds `static` keys and takes `q_start [batch]`, the
    tokens that are in it already, and `kv_lengths [batch]`, those that are valid after this call: rows of the batch may
    have different lengths, padded on the right. Both are int32.

    Raises:
        ModelError: where the model keeps no keys and values of attention.
        UsageError: where `static` or `padding` does not fit the model.
    """
    if not is_decoder(model):
        raise ModelError("only a decoder has a KV cache", where=type(model).__name__, fix="leave out --kv-cache")
    config: Any = model.config
    limit = getattr(config, "max_position_embeddings", None)
    if static and limit and static > limit:
        raise UsageError("the cache is longer than the model's positions", where="--static-cache", found=str(static),
                         fix=f"use {limit} or less")  # fmt: skip
    shapes = _cache_shapes(model)
    names = [f"{i}.{part}" for i in range(len(shapes)) for part in ("key", "value")]
    past = {f"past_key_values.{name}": shapes[i // 2][i % 2] for i, name in enumerate(names)}
    dtype = next(model.parameters()).dtype
    examples = {"input_ids": torch.randint(0, config.vocab_size, (BATCH, SEQUENCE))}
    dynamic: dict[str, Dynamic] = {"input_ids": {0: "batch", 1: "sequence"}}
    if static:
        if padding not in ("auto", "right"):
            raise UsageError("a preallocated cache is padded on the right", where="--padding", found=padding,
                             fix="leave --padding out")  # fmt: skip
        examples |= _lengths(torch.zeros(BATCH), torch.full((BATCH,), SEQUENCE))
        dynamic |= {"q_start": {0: "batch"}, "kv_lengths": {0: "batch"}}
    elif padding != "none":
        examples["attention_mask"] = torch.ones(BATCH, _PAST + SEQUENCE, dtype=torch.int64)
        dynamic["attention_mask"] = {0: "batch", 1: "past + sequence"}
    for name, (heads, size) in past.items():
        examples[name] = torch.zeros(BATCH, heads, static or _PAST, size, dtype=dtype)
        dynamic[name] = {0: "batch"} if static else {0: "batch", 2: "past"}
    call = _static_call if static else _growing_call(padding)
    outputs = ("logits", *(f"present.{name}" for name in names))
    return CachedSignature(Adapter(model, call), examples, dynamic, outputs, static)


def _cache_shapes(model: nn.Module) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Heads and size of K and of V per layer, seen in a cache that the model itself filled."""
    with torch.no_grad():
        cache = getattr(model(torch.zeros(1, 2, dtype=torch.int64), use_cache=True), cache_name(model))
    shapes = []
    for layer in getattr(cache, "layers", ()):
        k, v = getattr(layer, "keys", None), getattr(layer, "values", None)
        if not isinstance(k, Tensor) or not isinstance(v, Tensor) or k.dim() != 4:
            raise ModelError("a layer of the cache does not hold keys and values", where=type(model).__name__,
                             found=type(layer).__name__, fix="export it without --kv-cache")  # fmt: skip
        shapes.append(((k.shape[1], k.shape[3]), (v.shape[1], v.shape[3])))
    if not shapes:
        raise ModelError("the model keeps no cache", where=type(model).__name__, fix="export it without --kv-cache")
    return shapes


def _growing_call(padding: Padding) -> Any:
    def call(model: nn.Module, input_ids: Tensor, *rest: Tensor) -> Sequence[Tensor]:
        from transformers.cache_utils import Cache, DynamicLayer

        mask, past = (None, rest) if padding == "none" else (rest[0], rest[1:])
        batch, length, rows = past[0].shape[0], past[0].shape[2], input_ids.shape[1]
        equal = [(input_ids, {0: batch}), *((tensor, {0: batch, 2: length}) for tensor in past)]
        _share_sizes(equal if mask is None else [*equal, (mask, {0: batch, 1: length + rows})])
        layers: list[Any] = [DynamicLayer() for _ in past[::2]]
        for layer, keys, values in zip(layers, past[::2], past[1::2], strict=True):
            # not by `update`, which would trace two concatenations more for each
            layer.keys, layer.values, layer.is_initialized = keys, values, True
            layer.dtype, layer.device = keys.dtype, keys.device
        cache = Cache(layers=layers)
        seen = torch.ones(batch, length + rows, dtype=torch.int64) if mask is None else mask
        position_ids = positions(seen, mask if padding != "right" else None).narrow(1, length, rows)
        options = {"attention_mask": seen, cache_name(model): cache, "use_cache": True}
        if _takes_positions(model):
            options["position_ids"] = position_ids
        if padding in ("auto", "any"):
            logits = model(input_ids, **options).logits
        else:
            lengths = Visibility() if mask is None else right_padded(mask, rows)
            with given_lengths(lengths):
                logits = model(input_ids, **options).logits
        return [logits, *_tensors(cache)]

    return call


def _share_sizes(sized: Sequence[tuple[Tensor, dict[int, int]]]) -> None:
    """Tells the tracer that dimensions of inputs are equal, each of which it gives a symbol of its own.

    Found out one by one in every layer, that made tracing a cache cost a quarter more than without: each discovery
    is an assertion, and the tracer knows operations that it has seen by the symbols a size was made with.
    """
    for tensor, sizes in sized:
        for axis, size in sizes.items():
            torch._check(tensor.shape[axis] == size)
    for made in (size for tensor, _ in sized for size in (*tensor.shape, *tensor.stride())):
        if isinstance(made, torch.SymInt):
            made.node._expr = made.node.expr  # from here on as if made with the symbol that is left


def _static_call(
    model: nn.Module, input_ids: Tensor, q_start: Tensor, kv_lengths: Tensor, *past: Tensor
) -> Sequence[Tensor]:
    batch = input_ids.shape[0]
    _share_sizes([(tensor, {0: batch}) for tensor in (input_ids, q_start, kv_lengths, *past)])
    start = q_start.to(torch.int64).unsqueeze(-1)
    valid = kv_lengths.to(torch.int64).unsqueeze(-1) - start
    rows = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
    cache = _preallocated(past, start, valid, rows)
    options = {"attention_mask": torch.ones_like(input_ids), cache_name(model): cache, "use_cache": True}
    if _takes_positions(model):
        options["position_ids"] = start + torch.minimum(rows, (valid - 1).clamp(min=0))
    lengths = Visibility(kv_lengths=kv_lengths, q_start=q_start, q_lengths=valid.squeeze(-1).to(torch.int32))
    with given_lengths(lengths):
        logits = model(input_ids, **options).logits
    return [logits, *_tensors(cache)]


def _tensors(cache: Any) -> list[Tensor]:
    """Keys and values of every layer, in order."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def _takes_positions(model: nn.Module) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters


def _preallocated(past: Sequence[Tensor], start: Tensor, valid: Tensor, rows: Tensor) -> Any:
    """A cache of `transformers` over the buffers `past`, that writes row i of a call at position `start + i`.

    `start`, `valid` (rows that count) are `[B, 1]`, `rows` `[1, S]`. Padded rows repeat the last valid one in its
    place, so that no write leaves the buffer and none overwrites a valid key with another.
    """
    from transformers.cache_utils import Cache, StaticLayer

    source = torch.minimum(rows, (valid - 1).clamp(min=0))
    target = start + source

    @functools.cache  # the same for most layers
    def places(heads: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
        shape = (-1, heads, -1, size)
        where, taken = (index[:, None, :, None].expand(shape) for index in (target, source.expand_as(target)))
        return where, taken, (valid > 0)[:, None, :, None]

    class Buffer(StaticLayer):
        def __init__(self, keys: Tensor, values: Tensor) -> None:
            super().__init__(max_cache_len=keys.shape[2])
            self.keys, self.values, self.is_initialized = keys, values, True

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            assert self.keys is not None and self.values is not None
            self.keys, self.values = self._written(self.keys, key_states), self._written(self.values, value_states)
            return self.keys, self.values

        def _written(self, buffer: Tensor, new: Tensor) -> Tensor:
            where, taken, some = places(new.shape[1], new.shape[3])
            value = torch.where(some, new.gather(2, taken), buffer.gather(2, where))
            return buffer.scatter(2, where, value)

        def get_seq_length(self) -> int:
            return 0  # positions are always given

    return Cache(layers=[Buffer(past[2 * i], past[2 * i + 1]) for i in range(len(past) // 2)])
