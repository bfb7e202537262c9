"""Graphs with a KV cache: one graph for an empty past, chunks and single tokens, growing or preallocated, padded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from export.adapter import Signature
from export.cache import cached_signature
from export.finish import node_inputs, op_nodes
from sparse_attention import summary
from sparse_attention.errors import ModelError, UsageError
from sparse_attention.huggingface import cache_name
from tests.conftest import Exported, tokens
from tests.sparse_attention.attention_models import tiny

Export = Callable[..., Exported]
Tensors = dict[str, Tensor]
CLOSE = 2e-5
STATIC = 64  # preallocated keys
KINDS = {
    "growing": {"kv_cache": True, "tunable": True, "counts": True},
    "growing_right": {"kv_cache": True, "padding": "right"},
    "preallocated": {"static_cache": STATIC, "tunable": True},
}
CHUNKS = [(40,), (24, 16), (24, 16, 1, 1, 1), (7, 9, 1, 20, 1)]
"""Whole, in chunks at tile borders, with tokens behind them, and anyhow."""


def generate(run: Callable[[Tensors], Tensors], signature: Signature, ids: Tensor, counts: Sequence[int]) -> Tensor:
    """Logits of all tokens, fed in chunks, each on the cache that the one before left."""
    inputs = signature.sample(ids[:, :1])
    past = {name: value for name, value in inputs.items() if name.startswith("past_key_values")}
    start, logits = 0, []
    for count in counts:
        stop = start + count
        known = {
            "input_ids": ids[:, start:stop], "attention_mask": torch.ones(len(ids), stop, dtype=torch.int64),
            "q_start": torch.full((len(ids),), start, dtype=torch.int32),
            "kv_lengths": torch.full((len(ids),), stop, dtype=torch.int32),
        }  # fmt: skip
        outputs = run({name: known.get(name, past.get(name)) for name in inputs})
        past = {name: outputs[name.replace("past_key_values", "present")]
                for name in past}  # fmt: skip
        logits.append(outputs["logits"])
        start = stop
    return torch.cat(logits, 1)


def in_pytorch(model: nn.Module, ids: Tensor, counts: Sequence[int]) -> Tensor:
    """The same with the model's own cache."""
    from transformers import DynamicCache

    cache, start, logits = DynamicCache(config=model.config), 0, []
    for count in counts:
        with torch.no_grad():
            logits.append(model(ids[:, start : start + count], **{cache_name(model): cache}).logits)
        start += count
    return torch.cat(logits, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", CHUNKS, ids=str)
def test_chunks_and_tokens(kind: str, counts: tuple[int, ...], exported: Export) -> None:
    """One file for all of it, against the sparse model in PyTorch with the cache of transformers."""
    file = exported(**KINDS[kind])
    ids = tokens(2, sum(counts))
    model = file.sparse()
    expected = in_pytorch(model, ids, counts)
    found = generate(file.run, file.signature(), ids, counts)
    assert (found - expected).abs().max() < CLOSE
    phases = summary(model)[0].counts
    assert all(sum(phase.skipped) > 0 for phase in phases.values())
    assert ("decode" in phases) == (1 in counts)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_at_tile_borders_change_nothing(kind: str, exported: Export) -> None:
    """Not the decisions either: the rows of a tile stay together."""
    file = exported(**KINDS[kind])
    ids, signature = tokens(2, 40), file.signature()
    whole = generate(file.run, signature, ids, (40,))
    assert (generate(file.run, signature, ids, (12, 20, 8)) - whole).abs().max() < CLOSE
    assert (generate(file.run, signature, ids, (13, 19, 8)) - whole).abs().max() > 1e-3  # elsewhere they may


@pytest.mark.parametrize("kind", ["growing", "preallocated"])
def test_dense_chunks_are_the_dense_model(kind: str, exported: Export) -> None:
    """At λ = 0 it does not matter how the tokens come."""
    file = exported(**KINDS[kind])
    ids = tokens(2, 41)
    with torch.no_grad():
        expected = tiny("llama")(ids).logits
    off = {"threshold_scale": torch.zeros(1)}
    for counts in ((41,), (13, 27, 1), (40, 1)):
        found = generate(lambda inputs: file.run(inputs | off), file.signature(), ids, counts)
        assert (found - expected).abs().max() < CLOSE


def test_left_padding_on_a_growing_cache(exported: Export) -> None:
    """As `generate` of transformers pads: against the sparse model with the same masks; dense against unpadded."""
    from transformers import DynamicCache

    file = exported(**KINDS["growing"])
    model, ids = file.sparse(), tokens(2, 30)
    mask = torch.ones(2, 30, dtype=torch.int64)
    mask[1, :11] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    past = {name: value for name, value in file.signature().sample(ids).items() if name.startswith("past")}
    dense_past = dict(past)
    with torch.no_grad():
        alone = tiny("llama")(ids[1:, 11:]).logits
    for start, stop in ((0, 24), (24, 29), (29, 30)):
        with torch.no_grad():
            expected = model(ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=positions[:, start:stop],
                             **{cache_name(model): cache}).logits  # fmt: skip
        given = {"input_ids": ids[:, start:stop], "attention_mask": mask[:, :stop]}
        found = file.run(given | past)
        dense = file.run(given | dense_past | {"threshold_scale": torch.zeros(1)})
        valid = mask[:, start:stop].bool()
        assert (found["logits"] - expected)[valid].abs().max() < CLOSE
        mine = dense["logits"][1][valid[1]]
        assert (mine - alone[0, max(0, start - 11) : stop - 11]).abs().max() < CLOSE
        past = {name: found[name.replace("past_key_values", "present")] for name in past}
        dense_past = {name: dense[name.replace("past_key_values", "present")] for name in past}


def test_right_padding_on_a_growing_cache(exported: Export) -> None:
    """A batch padded on the right: each row as if it were alone, exactly."""
    file = exported(**KINDS["growing_right"])
    ids, lengths, signature = tokens(3, 45), (45, 22, 4), file.signature()
    mask = (torch.arange(45) < torch.tensor(lengths).unsqueeze(1)).long()
    together = file.run(signature.sample(ids) | {"attention_mask": mask})["logits"]
    for row, length in enumerate(lengths):
        alone = file.run(signature.sample(ids[row : row + 1, :length]))["logits"]
        assert (together[row, :length] - alone[0]).abs().max() < 2e-6


def test_rows_of_different_length_in_a_preallocated_cache(exported: Export) -> None:
    """Prefill padded on the right, then a chunk and tokens at each row's own position; each row as if alone."""
    file = exported(**KINDS["preallocated"])
    ids, lengths = tokens(3, 40), [28, 16, 5]
    steps = [lengths, [4, 4, 4], [1, 1, 1], [1, 1, 1]]
    past = {name: torch.full_like(value, float("nan")) for name, value in file.signature().sample(ids).items()
            if name.startswith("past")}  # fmt: skip
    start, found = [0, 0, 0], [[], [], []]
    for counts in steps:
        width = max(counts)
        chunk = torch.zeros(3, width, dtype=torch.int64)
        for row, count in enumerate(counts):
            chunk[row, :count] = ids[row, start[row] : start[row] + count]
        stop = [a + b for a, b in zip(start, counts, strict=True)]
        outputs = file.run(
            {"input_ids": chunk, "q_start": torch.tensor(start, dtype=torch.int32),
             "kv_lengths": torch.tensor(stop, dtype=torch.int32), **past}
        )  # fmt: skip
        for row, count in enumerate(counts):
            found[row].append(outputs["logits"][row, :count])
        past = {name: outputs[name.replace("past_key_values", "present")] for name in past}
        start = stop
    for row, length in enumerate(lengths):
        total = start[row]
        expected = in_pytorch(file.sparse(), ids[row : row + 1, :total], (length, 4, 1, 1))
        assert (torch.cat(found[row]) - expected[0]).abs().max() < CLOSE


def test_cache_beyond_the_lengths_may_hold_anything(exported: Export) -> None:
    file = exported(**KINDS["preallocated"])
    signature, ids = file.signature(), tokens(1, 20)
    inputs = signature.sample(ids)
    garbage = {name: torch.full_like(value, 1e30) for name, value in inputs.items() if name.startswith("past")}
    assert torch.equal(file.run(inputs)["logits"], file.run(inputs | garbage)["logits"])


@pytest.mark.parametrize(
    ("kind", "lengths"),
    [("growing", []), ("growing_right", ["kv_lengths", "q_lengths"]),
     ("preallocated", ["kv_lengths", "q_start", "q_lengths"])],
)  # fmt: skip
def test_names_shapes_and_inputs_of_the_op(kind: str, lengths: list[str], exported: Export) -> None:
    file = exported(**KINDS[kind])
    graph = ir.load(file.path).graph
    shapes = {value.name: [str(size) for size in value.shape] for value in (*graph.inputs, *graph.outputs)}
    past = "past" if kind != "preallocated" else str(STATIC)
    for layer in range(2):
        for part in ("key", "value"):
            assert shapes[f"past_key_values.{layer}.{part}"] == ["batch", "2", past, "8"]
            present = shapes[f"present.{layer}.{part}"]
            assert present[1] == "2" and present[3] == "8" and (present[2] == past) == (kind == "preallocated")
    assert shapes["input_ids"] == ["batch", "sequence"]
    for node in op_nodes(ir.load(file.path)):
        given = node_inputs(node)
        assert {"q", "k", "v", *lengths} <= set(given)
        if kind != "growing":
            assert "bias" not in given
        assert given["k"].shape[1] == 2


@pytest.mark.parametrize("kind", ["growing", "growing_right"])
@pytest.mark.parametrize(("rows", "length"), [(4, 8), (4, 10), (4, 4), (1, 5), (1, 7), (1, 1)])
def test_a_mask_of_another_length_is_named_by_the_runtime(kind: str, rows: int, length: int, exported: Export) -> None:
    """In a plain session of ONNX Runtime, on 5 past keys."""
    file = exported(**KINDS[kind])
    past = {name: value.new_zeros(2, value.shape[1], 5, value.shape[3])
            for name, value in file.signature().examples.items() if name.startswith("past")}  # fmt: skip
    inputs = past | {"input_ids": tokens(2, rows), "attention_mask": torch.ones(2, 5 + rows, dtype=torch.int64)}
    assert file.run(inputs)["logits"].isfinite().all()
    with pytest.raises(Exception, match=r"attention_mask must have the shape \[batch, past \+ sequence\]"):
        file.run(inputs | {"attention_mask": torch.ones(2, length, dtype=torch.int64)})


def test_refused() -> None:
    with pytest.raises(ModelError, match="only a decoder"):
        cached_signature(tiny("bert"))
    with pytest.raises(UsageError, match=r"--static-cache[\s\S]*use 256 or less"):
        cached_signature(tiny("llama"), static=257)
    with pytest.raises(UsageError, match="padded on the right"):
        cached_signature(tiny("llama"), static=64, padding="any")
