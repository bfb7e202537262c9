"""Quality against the dense model: exact where nothing is skipped, within the bound where something is, resumable."""

import json
import math

import pytest
import torch
from calibration_models import peaky_llama, random_texts

from sparse_attention import layers_of, load_config, observed, restore, sparsify
from sparse_attention.calibration_bench import collecting_cost
from sparse_attention.errors import MissingError, ModelError, UsageError
from sparse_attention.needle import ask, needles
from sparse_attention.quality import quality
from sparse_attention.quality_logits import Predictions
from sparse_attention.quality_mass import TileMapObserver
from sparse_attention.texts import Text, read_texts, split, tokenize, windows
from sparse_attention.trial import forward, trial


def config(threshold):
    return {"sparse_cfg": {"*attention*": {"br": 8, "bc": 8, "threshold": threshold}}}


@pytest.fixture(scope="module")
def model():
    return peaky_llama(layers=2)


@pytest.fixture(scope="module")
def texts():
    return random_texts(2, 192)


def test_nothing_skipped_costs_nothing(model, texts):
    (row,) = quality(model, {"dense": config(0.0)}, texts).rows
    assert (row.sparsity, row.kl, row.top1, row.rise) == (0.0, 0.0, 1.0, 0.0)
    with torch.inference_mode():
        losses = [float(model(text, labels=text).loss) for text in texts]
    assert row.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert not layers_of(model)


@pytest.mark.parametrize("unit", ["head", "group"])
def test_what_is_skipped_costs_and_stays_within_the_bound(model, texts, unit):
    found = quality(model, {"some": config(0.05), "much": config(0.9)}, texts, lengths=[96, 192], unit=unit)
    rows = {(row.candidate, row.length): row for row in found.rows}
    assert 0.02 < rows["some", 192].sparsity < rows["much", 192].sparsity
    assert 0 < rows["some", 192].kl < rows["much", 192].kl
    assert rows["much", 192].top1 < 1
    for name in ("some", "much"):
        for mass in found.layers[name][192].values():
            assert mass.violations == 0
            assert 0 < mass.mass < mass.bound and mass.worst <= mass.worst_bound
            assert mass.rows == 192 * 4
            assert len(mass.skipped) == 4 and sum(mass.skipped) > 0


def test_logits_and_hidden_states_give_the_same(model, texts):
    by_hidden, by_logits = (Predictions(model, texts[0]) for _ in range(2))
    assert by_hidden._head is not None
    by_logits._head = None
    results = []
    for predictions in (by_hidden, by_logits):
        dense = predictions.of(texts[0])
        with trial(model, load_config(config(0.9))):
            results.append(predictions.compare(texts[0], dense, predictions.of(texts[0])))
    assert results[0].kl == pytest.approx(results[1].kl, rel=1e-3)
    assert results[0].agree == results[1].agree


def test_a_run_that_was_cut_off_goes_on(model, texts, tmp_path):
    state = tmp_path / "state.json"
    candidates = {"some": config(0.05), "much": config(0.9)}
    whole = quality(model, candidates, texts)

    class Cut(Exception):
        pass

    def cut(what, done, total):
        if done == 2:
            raise Cut

    with pytest.raises(Cut):
        quality(model, candidates, texts, state=state, progress=cut)
    pieces = json.loads(state.read_text())["pieces"]
    assert len(pieces) == 2
    again = quality(model, candidates, texts, state=state)
    assert [(r.candidate, r.perplexity, r.kl) for r in again.rows] == [
        (r.candidate, r.perplexity, r.kl) for r in whole.rows
    ]
    seconds = {r.candidate: r.seconds for r in again.rows}
    assert seconds == {r.candidate: r.seconds for r in quality(model, candidates, texts, state=state).rows}


def test_a_state_of_another_run_is_refused(model, texts, tmp_path):
    state = tmp_path / "state.json"
    quality(model, {"a": config(0.1)}, texts[:1], masses=False, state=state)
    with pytest.raises(UsageError, match="another run"):
        quality(peaky_llama(seed=9), {"a": config(0.1)}, texts[:1], state=state)
    state.write_text("{")
    with pytest.raises(UsageError, match="cannot be read"):
        quality(model, {"a": config(0.1)}, texts[:1], state=state)


def test_bad_input(model, texts):
    with pytest.raises(UsageError, match="nothing to measure"):
        quality(model, {}, texts)
    with pytest.raises(UsageError, match="too little text"):
        quality(model, {"a": config(0.1)}, texts, lengths=[500])
    with pytest.raises(UsageError, match="too little text"):
        quality(model, {"a": config(0.1)}, [])
    broken = peaky_llama()
    with torch.no_grad():
        broken.model.norm.weight[0] = math.nan
    with pytest.raises(ModelError, match="not finite"):
        quality(broken, {"a": config(0.1)}, texts[:1])


def test_a_tile_map_counts_what_the_op_counts(model, texts):
    name = "model.layers.1.self_attn"
    watcher, counted = TileMapObserver(name), {}
    sparsify(model, config(0.3))
    try:
        with observed(model, watcher), observed(model, lambda layer, *rest: counted.update({layer.name: rest[-1]})):
            forward(model, texts[0])
    finally:
        restore(model)
    assert watcher.tiles.shape == (4, 24, 24)
    skipped, total = (watcher.tiles == 2).sum((1, 2)), (watcher.tiles > 0).sum((1, 2))
    assert int(skipped.sum()) > 0
    assert torch.equal(torch.stack([skipped, total], -1).to(torch.int32), counted[name])


class Letters:
    """A tokenizer of single letters."""

    unk_token_id = None

    def encode(self, text, add_special_tokens=False, verbose=True):
        return [ord(letter) % 97 for letter in text]


def test_needles_lie_where_they_should(model):
    filler = torch.zeros(400, dtype=torch.int64)
    made = needles(Letters(), filler, [200, 300], [0.0, 0.5, 1.0])
    for needle in made:
        assert needle.ids.shape[1] + len(needle.answer) == needle.length
        first = int((needle.ids[0] != 0).nonzero()[0])
        assert first == pytest.approx(needle.depth * (needle.length - 110), abs=30)
    answer = ask(model, made[0])
    assert answer.log_likelihood < 0 and answer.found is False
    # a model that has the answer in its prompt's last row finds it: teach it by hand
    with torch.inference_mode():
        logits = model(torch.cat([made[0].ids, made[0].answer[None]], 1)).logits[0, -len(made[0].answer) - 1 : -1]
    expected = torch.log_softmax(logits, -1).gather(-1, made[0].answer[:, None]).mean()
    assert answer.log_likelihood == pytest.approx(float(expected), abs=1e-4)
    with pytest.raises(UsageError, match="does not fit"):
        needles(Letters(), filler, [600], [0.5])


def test_needles_in_a_quality_run(model, texts):
    made = needles(Letters(), random_texts(1, 400)[0][0], [200], [0.2, 0.8])
    found = quality(model, {"much": config(0.9)}, texts[:1], masses=False, needles=made)
    assert [(row.candidate, row.length, row.depth) for row in found.needles] == [("much", 200, 0.2), ("much", 200, 0.8)]
    assert any(row.log_likelihood != row.dense_log_likelihood for row in found.needles)


def test_builtin_text_is_long_and_windows_do_not_overlap():
    texts = read_texts("builtin")
    assert sum(len(text.text) for text in texts) > 300_000
    ids = tokenize([Text("a", "abcdefghij")], Letters())
    assert torch.equal(torch.cat(windows(ids, 3), 1)[0], ids[:9])
    assert torch.equal(torch.cat(windows(ids, 3, 2), 1)[0], ids[:6])
    assert [int(window[0, 0]) for window in windows(torch.arange(100), 10, 3)] == [0, 30, 60]  # spread over the text
    with pytest.raises(UsageError, match="too little text"):
        windows(ids, 11)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 31, 1000])
def test_the_halves_of_a_text_share_no_token_and_lie_side_by_side(tokens):
    ours, theirs = split(torch.arange(tokens))
    assert sorted([*ours.tolist(), *theirs.tolist()]) == list(range(tokens))
    assert 0 <= len(ours) - len(theirs) <= -(-tokens // 16)
    if tokens >= 1000:
        assert abs(float(ours.double().mean() - theirs.double().mean())) < tokens / 12


def test_texts_from_files(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "c.bin").write_bytes(b"\xff\xfe")
    assert [text.text for text in read_texts(tmp_path)] == ["first", "second"]
    with pytest.raises(UsageError, match="UTF-8"):
        read_texts(tmp_path / "c.bin")
    with pytest.raises(MissingError):
        read_texts(tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text(" ")
    with pytest.raises(UsageError, match="no text"):
        read_texts(tmp_path / "empty.txt")


def test_a_foreign_tokenizer_is_noticed():
    with pytest.raises(ModelError, match="not the model's"):
        tokenize([Text("a", "xyz")], Letters(), vocabulary=10)

    class Lost(Letters):
        unk_token_id = 0

        def encode(self, text, **others):
            return [0] * len(text)

    with pytest.raises(ModelError, match="does not know this text"):
        tokenize([Text("a", "xyz")], Lost(), vocabulary=10)


def test_collecting_is_timed_in_turns(model, texts):
    cost = collecting_cost(model, config(0.0), texts)
    assert len(cost.dense) == len(cost.collecting) == 2
    assert cost.ratio == pytest.approx(sum(cost.collecting) / sum(cost.dense))
    with pytest.raises(UsageError, match="cannot compare"):
        collecting_cost(model, config(0.0), [])
