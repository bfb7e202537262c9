"""The pass that calibration collects from computes what the reference defines: output, gaps, existence, mass."""

import pytest
import torch
from calibration_models import peaky_qkv

from sparse_attention import reference
from sparse_attention.calibration_tiles import TileRow, dense_attention
from sparse_attention.layer import AttentionCall

CASES = {
    "causal": {"is_causal": True},
    "full": {},
    "window": {"is_causal": True, "window": 11},
    "lengths": {
        "is_causal": True,
        "kv_lengths": torch.tensor([29, 37]),
        "q_start": torch.tensor([3, 8]),
        "q_lengths": torch.tensor([26, 29]),
    },
    "softcap": {"is_causal": True, "softcap": 20.0},
    "sinks": {"is_causal": True, "sinks": torch.tensor([0.5, -1.0, 2.0, 30.0])},
    "mask": {"bias": torch.rand(2, 1, 29, 37, generator=torch.Generator().manual_seed(3)) > 0.3},
    "additive": {"bias": torch.randn(1, 4, 29, 37, generator=torch.Generator().manual_seed(4))},
    "hidden row": {"bias": (torch.arange(29) != 5).view(1, 1, 29, 1)},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tile", [(8, 8), (16, 5)])
def test_agrees_with_the_reference(name, tile):
    br, bc = tile
    q, k, v = peaky_qkv(batch=2, heads=4, kv_heads=2, rows=29, columns=37)
    extra = CASES[name]
    rows: list[TileRow] = []
    out = dense_attention(AttentionCall(q, k, v, scale=0.3, **extra), br, bc, rows.append)
    expected, tiles = reference.attention(q, k, v, threshold=0.0, br=br, bc=bc, scale=0.3, **extra)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)

    gap = torch.full_like(tiles.gap, -torch.inf)
    exists = torch.zeros_like(tiles.exists)
    start = extra.get("q_start", torch.full((2,), 37 - 29))
    mass = torch.zeros(2, 4, 29)
    for row in rows:
        last = row.end - int(start[row.batch])
        block = (last - 1) // br
        gap[row.batch, :, block, : row.gap.shape[-1]] = row.gap.amax(1)
        exists[row.batch, :, block, : row.gap.shape[-1]] = row.exists
        mass[row.batch, :, last - row.mass.shape[1] : last] = row.mass.sum(-1)
    assert torch.equal(exists, tiles.exists)
    torch.testing.assert_close(gap, tiles.gap, atol=1e-5, rtol=1e-5)
    seen = expected.abs().sum(-1) > 0
    whole = torch.ones_like(mass)
    if "sinks" in extra:  # the sink takes its share
        assert float(mass[:, 3].max()) < 1
        whole[:, :] = mass
    torch.testing.assert_close(mass, torch.where(seen, whole, 0.0), atol=1e-5, rtol=1e-5)


def test_mass_is_what_a_tile_holds():
    q, k, v = peaky_qkv(batch=1, heads=2, kv_heads=1, rows=24, columns=24)
    rows: list[TileRow] = []
    dense_attention(AttentionCall(q, k, v, scale=0.3, is_causal=True), 8, 8, rows.append)
    scores = reference.attention_scores(q, k, reference.visible_pairs(1, 24, 24, is_causal=True), scale=0.3)
    expected = torch.softmax(scores, -1)[0, :, 16:24].unflatten(-1, (3, 8)).sum(-1)
    torch.testing.assert_close(rows[-1].mass, expected, atol=1e-6, rtol=1e-5)


def test_one_row_is_decode():
    q, k, v = peaky_qkv(batch=1, heads=4, kv_heads=2, rows=1, columns=40)
    rows: list[TileRow] = []
    dense_attention(AttentionCall(q, k, v, scale=0.3), 128, 8, rows.append)
    assert [row.gap.shape for row in rows] == [(4, 1, 5)]
