"""Histograms say exactly what every λ skips; they add up exactly, and a prefill holds its shorter prefills."""

import math

import pytest
import torch
from attention_models import DECODERS, tiny
from calibration_models import CONFIG, peaky_llama, peaky_qkv, random_texts

from sparse_attention import load_config, reference
from sparse_attention.calibration_collect import collect
from sparse_attention.errors import UsageError
from sparse_attention.gap_collector import DECODE_ROWS, GapCollector, decode_rows
from sparse_attention.gap_files import load_histograms, merge_files, save_histograms
from sparse_attention.gap_histogram import BINS, EDGES, GapHistogram, bins_of, merged
from sparse_attention.layer import AttentionCall, AttentionLayer
from sparse_attention.patterns import ResolvedAttention
from sparse_attention.threshold import Thresholds
from sparse_attention.trial import forward, trial


def layer(br=8, bc=8, name="attention"):
    return AttentionLayer(name, "Attention", ResolvedAttention(True, Thresholds(), br=br, bc=bc))


@pytest.mark.parametrize("unit", ["head", "group"])
@pytest.mark.parametrize("causal", [True, False])
def test_counts_at_every_edge_are_those_of_the_rule(unit, causal):
    q, k, v = peaky_qkv(batch=2, heads=4, kv_heads=2, rows=61, columns=61)
    collector = GapCollector([61], {"prefill": unit})
    collector(layer(), AttentionCall(q, k, v, scale=0.4, is_causal=causal))
    curve = collector.histograms["prefill"].curve(61)
    _, tiles = reference.attention(q, k, v, threshold=0.0, br=8, bc=8, scale=0.4, is_causal=causal, unit=unit)
    compared = 0
    for index, edge in enumerate(EDGES):
        skipped = (tiles.exists & (tiles.gap < edge)).sum(dim=(0, 2, 3))
        near = (tiles.gap - edge).abs().min() < 1e-4  # two float32 products may round a gap apart
        if not near:
            assert (curve.skipped[:, index] * 2).tolist() == skipped.tolist()
            compared += int(skipped.sum()) > 0
    assert compared > 50
    assert (curve.total * 2).tolist() == tiles.exists.sum(dim=(0, 2, 3)).tolist()


def test_bins():
    gaps = torch.tensor([-math.inf, -30.0, EDGES[0], EDGES[1], -1 / 64, 0.0])
    assert bins_of(gaps).tolist() == [0, 0, 1, 2, BINS - 2, BINS - 1]


def test_a_gap_of_zero_is_never_skipped():
    q, k, v = (torch.zeros(1, 1, 32, 4) for _ in range(3))
    collector = GapCollector([32], {"prefill": "head"})
    collector(layer(), AttentionCall(q, k, v, scale=1.0, is_causal=True))
    assert collector.histograms["prefill"].curve(32).sparsities.max() == 0.0


@pytest.fixture(scope="module")
def model():
    return peaky_llama()


def test_a_prefill_holds_its_shorter_prefills(model):
    text = random_texts(1, 128)
    whole = collect(model, CONFIG, text, lengths=[64, 128])["prefill"]
    short = collect(model, CONFIG, [text[0][:, :64]], lengths=[64])["prefill"]
    assert short.curve(64).sparsity(0.3) > 0.02
    assert (whole.curve(64).total == short.curve(64).total).all()
    # the same numbers up to gaps that two products of different shape round apart
    assert abs(whole.curve(64).skipped - short.curve(64).skipped).max() <= 1


@pytest.mark.parametrize("unit", ["head", "group"])
def test_last_rows_are_the_decode_steps(unit):
    model = peaky_llama(layers=1)  # one layer: what a step skips changes nothing for the next
    text = random_texts(1, 96)[0]
    curve = collect(model, CONFIG, [text], lengths=[96], units={"decode": unit})["decode"].curve(96)
    config = {"sparse_cfg": {"*attention*": {"br": 8, "bc": 8, "threshold": {"prefill": 0.0, "decode": 0.05}}}}
    with trial(model, load_config(config), unit=unit) as layers:
        cache = forward(model, text[:, : 96 - 32], use_cache=True).past_key_values
        for position in range(96 - 32, 96):
            step = {"input_ids": text[:, position : position + 1], "past_key_values": cache}
            cache = forward(model, step, use_cache=True).past_key_values
        counted = layers[0].statistics.by_phase["decode"]
    assert sum(counted.skipped) > 100
    assert curve.total.tolist() == list(counted.total)
    assert curve.sparsity(0.05) == pytest.approx(counted.sparsity, abs=0.01)  # 0.05 lies between two edges


@pytest.mark.parametrize("family", DECODERS)
def test_every_kind_of_decoder_is_counted_as_its_op_decides(family):
    """Windows, soft caps and sinks included; in the first layer, whose input no skipping has changed yet."""
    model = tiny(family, sharpness=8.0)
    text = torch.randint(1, 64, (2, 96), generator=torch.Generator().manual_seed(1))
    collected = collect(model, CONFIG, [text], lengths=[96])["prefill"]
    threshold = math.exp(EDGES[-4])
    config = {"sparse_cfg": {"*": {"br": 8, "bc": 8, "threshold": threshold}}}
    with trial(model, load_config(config)) as layers:
        forward(model, text, use_cache=False)
        counted = layers[0].statistics.by_phase["prefill"]
    curve = collected.curve(96, [layers[0].name])
    assert sum(counted.skipped) > 0
    assert (2 * curve.total).tolist() == list(counted.total)
    assert abs(2 * curve.skipped[:, -4] - counted.skipped).max() <= 1


def test_decode_rows_are_spread_over_what_is_nearly_one_length():
    assert decode_rows(96) == range(64, 96)
    assert decode_rows(8192) == range(7168, 8192, 16) and len(decode_rows(8192)) == DECODE_ROWS
    assert decode_rows(20) == range(20)


def test_shards_add_up_exactly_in_any_order(model, tmp_path):
    texts = random_texts(5, 96)
    whole = collect(model, CONFIG, texts, lengths=[48, 96])
    parts = []
    for index, shard in enumerate((texts[0::2], texts[1::2])):
        path = tmp_path / f"{index}.safetensors"
        collect(model, CONFIG, shard, lengths=[48, 96], state=path)
        parts.append(path)
    for order in (parts, parts[::-1]):
        total = merge_files(order)
        for phase in whole:
            assert torch.equal(total[phase].sequences, whole[phase].sequences)
            for name, gaps in whole[phase].layers.items():
                assert int(gaps.tiles.sum()) > 0
                assert torch.equal(total[phase].layers[name].tiles, gaps.tiles)
                assert torch.equal(total[phase].layers[name].mass, gaps.mass)
                assert torch.equal(total[phase].layers[name].rows, gaps.rows)
    assert merged([load_histograms(path)[0] for path in parts])["prefill"].reached == (48, 96)


def test_shards_that_do_not_fit_are_refused(model, tmp_path):
    texts = random_texts(2, 96)
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    collect(model, CONFIG, texts[:1], lengths=[96], state=paths[0])
    collect(model, CONFIG, texts[1:], lengths=[48, 96], state=paths[1])
    collect(model, CONFIG, texts[:1], lengths=[96], state=paths[2])
    with pytest.raises(UsageError, match="different runs"):
        merge_files(paths[:2])
    with pytest.raises(UsageError, match="same text is in two shards"):
        merge_files([paths[0], paths[2]])
    with pytest.raises(UsageError, match="no histogram"):
        merge_files([])


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "gaps.safetensors"
    path.write_bytes(b"not a histogram")
    with pytest.raises(UsageError, match="damaged"):
        load_histograms(path)
    save_histograms(path, {"prefill": GapHistogram.empty([64])}, how="x", done=["a"])
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UsageError, match="damaged"):
        load_histograms(path)


def test_a_length_that_no_text_reached(model):
    with pytest.raises(UsageError, match="nothing was collected"):
        collect(model, CONFIG, random_texts(1, 64), lengths=[64])["prefill"].curve(128)
