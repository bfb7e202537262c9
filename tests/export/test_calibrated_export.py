"""A calibration goes into the exported file: per-layer curves, whose λ follows the length at run time."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from export.pipeline import ExportOptions, export_onnx
from export.runners import session
from sparse_attention import reset_statistics, restore, sparsify, summary
from sparse_attention.calibrate import calibrate
from sparse_attention.trial import forward

sys.path.append(str(Path(__file__).parents[1] / "sparse_attention"))
from calibration_models import CONFIG, peaky_llama, random_texts


def test_the_file_skips_what_pytorch_skips_at_every_length(tmp_path):
    model = peaky_llama(layers=2)
    config = calibrate(
        model, CONFIG, random_texts(2, 256), targets={"prefill": 0.25}, strategy="balanced", lengths=[128, 256]
    ).config
    options = ExportOptions(counts=True)
    runner = session(str(export_onnx(model, config, tmp_path / "model.onnx", options=options).path))
    sparsify(model, config)
    try:
        for length in (128, 256):
            text = random_texts(1, length, seed=4)[0]
            names = [output.name for output in runner.get_outputs()]
            counted = dict(zip(names, runner.run(None, {"input_ids": text.numpy()}), strict=True))
            assert all(layer.settings.thresholds.prefill.a > 0 for layer in summary(model))
            logits = forward(model, text).logits
            expected = [layer.counts["prefill"] for layer in summary(model)]
            skipped = np.array([counts.skipped for counts in expected])
            assert skipped.sum() > 0
            # a gap within rounding of ln λ may be decided apart, at most here and there
            assert np.abs(counted["tile_counts"][..., 0] - skipped).max() <= 1
            assert counted["tile_counts"][..., 1].tolist() == [list(counts.total) for counts in expected]
            if (counted["tile_counts"][..., 0] == skipped).all():
                torch.testing.assert_close(torch.from_numpy(counted["logits"]), logits, atol=1e-3, rtol=1e-3)
            reset_statistics(model)
    finally:
        restore(model)


@pytest.mark.model
def test_smollm2_meets_its_target_on_other_text(smollm2):
    from export.models import load_model
    from sparse_attention.texts import read_texts, split, tokenize, windows

    loaded = load_model(str(smollm2))
    ours, theirs = split(tokenize(read_texts("builtin"), loaded.tokenizer, loaded.model.config.vocab_size))
    found = calibrate(
        loaded.model, "skip_softmax_calib", windows(ours, 1024, 2), targets={"prefill": 0.15}, strategy="length",
        lengths=[1024], held_out=windows(theirs, 1024, 1),
    )  # fmt: skip
    assert found.achieved["prefill"][1024].sparsity == pytest.approx(0.15, abs=0.03)
    assert found.missed() == []
