"""Generation with an exported graph gives the tokens of transformers with the same sparsified model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from export.cli_generate import end_tokens
from export.generate import Generator, Sampling, load_tokenizer
from sparse_attention import disable, restore, sparsify
from sparse_attention.errors import MissingError, ModelError, UsageError
from tests.conftest import Exported, tokens

NEW = 12
STATIC = 96


def by_transformers(model: nn.Module, prompt: list[int], new: int = NEW) -> list[int]:
    """Greedy tokens of `generate` of transformers, one prompt at a time."""
    with torch.no_grad():
        out = model.generate(  # type: ignore[operator]
            torch.tensor([prompt]), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    return out[0, len(prompt) :].tolist()


@pytest.fixture(scope="module", params=["growing", "static"])
def cached(request: pytest.FixtureRequest, exported: Callable[..., Exported]) -> Exported:
    """A tunable file with each kind of cache."""
    kind = {"static_cache": STATIC} if request.param == "static" else {"kv_cache": True}
    return exported("llama", tunable=True, **kind)


@pytest.mark.parametrize("length", [1, 7, 41])
@pytest.mark.parametrize("chunk", [8, 512])
def test_greedy_tokens_are_those_of_transformers(cached: Exported, length: int, chunk: int) -> None:
    prompt = tokens(1, length, seed=length)[0].tolist()
    generator = Generator(cached.path, counts=True)
    result = generator.generate([prompt], NEW, chunk=chunk)
    assert result.token_ids == [by_transformers(cached.sparse(), prompt)]
    assert result.decode_steps == NEW - 1 and result.prompt_tokens == [length]
    if length == 41:
        assert 0 < result.sparsity["prefill"] < 1 and 0 < result.sparsity["decode"] < 1


def test_scale_zero_is_the_dense_model(cached: Exported) -> None:
    prompt = tokens(1, 41, seed=3)[0].tolist()
    result = Generator(cached.path, counts=True, threshold_scale=0.0).generate([prompt], NEW)
    assert result.sparsity == {"prefill": 0.0, "decode": 0.0}
    assert result.token_ids == [by_transformers(cached.dense(), prompt)]
    disabled = cached.sparse()
    disable(disabled)
    assert result.token_ids == [by_transformers(disabled, prompt)]


def test_a_ragged_batch_gives_what_single_prompts_give(exported: Callable[..., Exported]) -> None:
    file = exported("llama", tunable=True, static_cache=STATIC)
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (41, 5, 17)]
    generator = Generator(file.path)
    together = generator.generate(prompts, NEW, chunk=16)
    alone = [generator.generate([prompt], NEW, chunk=16).token_ids[0] for prompt in prompts]
    assert together.token_ids == alone
    sampling = Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=5)
    drawn = generator.generate(prompts, NEW, sampling=sampling).token_ids
    assert drawn == [generator.generate([prompt], NEW, sampling=sampling).token_ids[0] for prompt in prompts]
    assert drawn != together.token_ids


def test_a_prompt_that_is_done_does_not_disturb_the_others(exported: Callable[..., Exported]) -> None:
    file = exported("llama", tunable=True, static_cache=STATIC)
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (9, 30)]
    generator = Generator(file.path)
    free = generator.generate(prompts, NEW).token_ids
    stop = next(token for token in free[0] if token not in free[1])
    stopped = generator.generate(prompts, NEW, stop=[stop])
    assert stopped.token_ids == [free[0][: free[0].index(stop) + 1], free[1]]


def test_sampling_is_repeatable_and_follows_the_distribution() -> None:
    from export.generate import _Chooser

    logits = np.log(np.array([[0.6, 0.3, 0.1]]))
    drawn = [int(_Chooser(Sampling(temperature=1.0, seed=seed), 1)(logits)[0]) for seed in range(2000)]
    assert np.allclose(np.bincount(drawn, minlength=3) / 2000, [0.6, 0.3, 0.1], atol=0.04)
    assert set(_draws(logits, Sampling(temperature=1.0, top_k=2))) == {0, 1}
    assert set(_draws(logits, Sampling(temperature=1.0, top_p=0.5))) == {0}
    assert set(_draws(logits, Sampling(temperature=1.0, top_p=0.7))) == {0, 1}
    assert _draws(logits, Sampling(temperature=1.0)) == _draws(logits, Sampling(temperature=1.0))


def _draws(logits: np.ndarray, sampling: Sampling) -> list[int]:
    from export.generate import _Chooser

    choose = _Chooser(sampling, 1)
    return [int(choose(logits)[0]) for _ in range(200)]


def test_bad_input_is_named(exported: Callable[..., Exported], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no KV cache"):
        Generator(exported("llama").path)
    fixed = exported("llama", kv_cache=True)
    with pytest.raises(UsageError, match="--tunable"):
        Generator(fixed.path, threshold_scale=0.5)
    growing, static = Generator(fixed.path), Generator(exported("llama", tunable=True, static_cache=STATIC).path)
    with pytest.raises(UsageError, match="--static-cache"):
        growing.generate([[1, 2], [1]], 4)
    with pytest.raises(UsageError, match="preallocated"):
        static.generate([[1] * STATIC], 2)
    static.generate([[1] * STATIC], 1)  # the last place of the cache is usable
    for prompts, new, chunk in ([[]], 4, 8), ([], 4, 8), ([[1]], 0, 8), ([[1]], 4, 0):
        with pytest.raises(UsageError, match="nothing to generate"):
            growing.generate(prompts, new, chunk=chunk)
    with pytest.raises(MissingError, match="tokenizer"):
        load_tokenizer(tmp_path / "model.onnx")
    (tmp_path / "tokenizer.json").write_text("not json")
    with pytest.raises(MissingError, match="cannot be loaded"):
        load_tokenizer(tmp_path / "model.onnx")


def test_a_file_that_the_runtime_cannot_load_is_named(exported: Callable[..., Exported], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no bfloat16: export with --dtype"):
        Generator(exported("llama", "bfloat16", kv_cache=True).path)
    alone = tmp_path / "model.onnx"
    alone.write_bytes(exported("llama", kv_cache=True).path.read_bytes())
    with pytest.raises(ModelError, match=r"model.onnx.data[\s\S]*keep its .data file beside it"):
        Generator(alone)
    with pytest.raises(ModelError, match=r"keep its .data file beside it"):
        Generator(alone, counts=True)


def test_a_prompt_beyond_the_models_positions_is_refused(exported: Callable[..., Exported]) -> None:
    file = exported("llama", kv_cache=True)
    file.dense().config.save_pretrained(file.path.parent)
    with pytest.raises(UsageError, match="positions"):
        Generator(file.path).generate([[1] * 250], 8)


@pytest.mark.parametrize(
    ("written", "expected"),
    [(None, (7,)), ('{"eos_token_id": 7}', (7,)), ('{"eos_token_id": [9, 3]}', (3, 7, 9)), ("{}", (7,)), ("[", (7,))],
)
def test_tokens_that_end_a_text(written: str | None, expected: tuple[int, ...], tmp_path: Path) -> None:
    """Models such as Llama 3 have several, and name them only in the generation configuration."""
    if written is not None:
        (tmp_path / "generation_config.json").write_text(written)
    assert end_tokens(tmp_path / "model.onnx", SimpleNamespace(eos_token_id=7)) == expected


@pytest.mark.model
def test_smollm2_generates_what_transformers_generates(smollm2: Path, tmp_path: Path) -> None:
    """64 greedy tokens after 16 and 1500, at λ = 0 (the dense model) and at the default configuration."""
    from export import ExportOptions, export_onnx
    from export.models import load_model
    from export.samples import token_ids

    loaded = load_model(str(smollm2))
    path = tmp_path / "smollm2.onnx"
    options = ExportOptions(kv_cache=True, tunable=True)
    export_onnx(loaded.model, "skip_softmax_default", path, options=options)
    ids = token_ids(loaded.tokenizer, 1500, loaded.model.config.vocab_size)[0].tolist()
    for scale in (0.0, 1.0):
        generator = Generator(path, counts=True, threshold_scale=scale)
        for length in (16, 1500):
            if scale:
                sparsify(loaded.model, "skip_softmax_default")
            expected = by_transformers(loaded.model, ids[:length], 64)
            if scale:
                restore(loaded.model)
            result = generator.generate([ids[:length]], 64)
            assert result.token_ids == [expected], (scale, length)
            if length == 1500:
                assert (result.sparsity["prefill"] > 0.005) == bool(scale)
