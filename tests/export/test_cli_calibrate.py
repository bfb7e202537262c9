"""The commands `calibrate` and `quality`: files in, files out, exit codes."""

import json
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from export.cli_calibrate import calibrate, halves, on_device
from export.cli_quality import quality
from sparse_attention import load_config
from sparse_attention.errors import ConfigError, UsageError
from sparse_attention.interchange import from_checkpoint_record
from sparse_attention.texts import read_texts, tokenize

sys.path.append(str(Path(__file__).parents[1] / "sparse_attention"))
from calibration_models import peaky_llama

app = typer.Typer()
app.command("calibrate")(calibrate)
app.command("quality")(quality)
TILES = ["--set", "br=8", "--set", "bc=8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with a tokenizer of single bytes, and a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    base = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.WordLevel({chr(32 + i): i for i in range(95)} | {"?": 95}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(base / "model")
    peaky_llama(layers=2).save_pretrained(base / "model")
    letters = torch.randint(33, 126, (4000,), generator=torch.Generator().manual_seed(2)).tolist()
    (base / "text.txt").write_text("".join(map(chr, letters)))
    return base


def run(*arguments):
    """Exit code and standard output; errors of this project come through as they are."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    return result.exit_code, result.stdout


def of(folder, *more):
    return (folder / "model", "--text", folder / "text.txt", *more)


def test_calibrate_then_quality(folder, tmp_path):
    calibrated, record = tmp_path / "calibrated.json", tmp_path / "record.json"
    code, out = run(
        "calibrate", *of(folder), *TILES, "--length", 256, "--lengths", 256, "--samples", 8, "--target", "prefill=0.25",
        "-o", calibrated, "--record", record, "--refine", 1, "--compare", "--json",
    )  # fmt: skip
    result = json.loads(out)
    assert code == 0 and result["missed"] == []
    config = load_config(calibrated)
    curve = config.calibration[1].prefill
    assert curve.observed["lengths"]["256"]["held_out"] == pytest.approx(0.25, abs=0.03)
    found = from_checkpoint_record(json.loads(record.read_text())).config.calibration[1].fitted["prefill"]
    assert (found.a, found.b, found.target) == (curve.a, curve.b, 0.25)
    assert not list(tmp_path.glob("*.gaps.safetensors"))

    code, out = run(
        "quality", *of(folder), "-c", calibrated, "--target", "0.2,0.25", "--lengths", "256", "--samples", 1,
        "--needles", 256, "--depths", "0.5", "--plots", tmp_path / "plots", "-o", tmp_path / "quality.json", "--json",
    )  # fmt: skip
    assert code == 0
    rows = json.loads(out)["rows"]
    assert [row["candidate"] for row in rows] == ["calibrated@0.2", "calibrated@0.25"]
    assert 0.1 < rows[0]["sparsity"] < rows[1]["sparsity"] and rows[1]["kl"] > 0
    assert json.loads((tmp_path / "quality.json").read_text())["needles"][0]["length"] == 256
    assert len(list((tmp_path / "plots").glob("*.png"))) == 5


def test_shards_give_what_one_process_gives(folder, tmp_path):
    common = (*of(folder), *TILES, "--length", 128, "--lengths", 128, "--samples", 4, "--target", "prefill=0.1")
    for number in (1, 2):
        part = tmp_path / f"{number}.safetensors"
        assert run("calibrate", *common, "--shard", f"{number}/2", "--histograms", part)[0] == 0
    parts = [item for number in (1, 2) for item in ("--merge", tmp_path / f"{number}.safetensors")]
    run("calibrate", *common, *parts, "-o", tmp_path / "merged.json", "--held-out", 0)
    run("calibrate", *common, "-o", tmp_path / "whole.json", "--held-out", 0)
    merged, whole = (load_config(tmp_path / name).calibration[1] for name in ("merged.json", "whole.json"))
    assert merged.prefill == whole.prefill


def test_out_of_reach_is_exit_code_1(folder, tmp_path):
    code, out = run(
        "calibrate", *of(folder), *TILES, "--length", 128, "--target", "prefill=0.95", "-o", tmp_path / "c.json",
        "--samples", 2, "--held-out", 0,
    )  # fmt: skip
    assert code == 1 and "out of reach" in out
    assert (tmp_path / "c.json").exists()


def test_too_high_a_price_is_exit_code_1(folder, tmp_path):
    config = tmp_path / "high.json"
    config.write_text('{"sparse_cfg": {"*attention*": {"br": 8, "bc": 8, "threshold": 0.9}}}')
    code, out = run("quality", *of(folder), "-c", config, "--lengths", 128, "--samples", 1, "--most-rise", "-0.5")
    assert code == 1 and "FAILED" in out


def test_bench(folder):
    code, out = run("calibrate", *of(folder), *TILES, "--length", 128, "--samples", 2, "--bench", "--json")
    assert code == 0
    assert len(json.loads(out)["dense"]) == 2 and json.loads(out)["ratio"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "prefill=1"], "between 0 and 1"),
        (["--target", "0"], "every target is 0"),
        (["--target", "half"], "not a target"),
        (["--target", "prefill=0.2,decode"], "not a target"),
        (["--target", "prefill=0.2,prefill=0.3"], "not a target"),
        (["--histograms", "{folder}/text.txt/part.safetensors"], "cannot be written"),
        (["--length", "5000"], "positions"),
        (["--length", "500", "--samples", "1", "--held-out", "9"], "too little text"),
        (["--shard", "1/2"], "needs a place"),
        (["--shard", "3/2", "--histograms", "x.safetensors"], "not a shard"),
        (["--strategy", "best"], "unknown value"),
        (["--lengths", "many"], "not a list"),
        (["--device", "tpu"], "unknown value"),
    ],
)
def test_usage_errors(folder, tmp_path, arguments, message):
    with pytest.raises(UsageError, match=message):
        given = [argument.format(folder=folder) for argument in arguments]
        run("calibrate", *of(folder), *TILES, "--length", 128, "-o", tmp_path / "c.json", *given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "0"], "at least two tokens"),
        (["--lengths", "600"], "positions"),
        (["--needles", "600"], "positions"),
        (["--needles", "40"], "does not fit"),
        (["--samples", "40"], "too little text"),
        (["-c", "{config}"], "the same configuration twice"),
        (["--state", "{config}/state.json"], "cannot be written"),
        (["--plots", "{config}"], "cannot be written"),
    ],
)
def test_usage_errors_of_quality(folder, tmp_path, arguments, message):
    config = tmp_path / "half.json"
    config.write_text('{"sparse_cfg": {"*attention*": {"br": 8, "bc": 8, "threshold": 0.5}}}')
    given = [argument.format(config=config) for argument in arguments]
    with pytest.raises(UsageError, match=message):
        run("quality", *of(folder), "-c", config, "--lengths", 256, "--samples", 1, *given)


def test_files_of_one_name_are_two_configurations_and_nothing_skipped_is_said(folder, tmp_path):
    sources = []
    for name, threshold in (("a", 0.5), ("b", 0.0)):
        (tmp_path / name).mkdir()
        sources += ["-c", tmp_path / name / "same.json"]
        sources[-1].write_text(f'{{"sparse_cfg": {{"*attention*": {{"br": 8, "bc": 8, "threshold": {threshold}}}}}}}')
    result = tmp_path / "q.json"
    options = ("-o", result, "--most-rise", 1, "--plots", tmp_path / "plots")
    code, out = run("quality", *of(folder), *sources, "--lengths", 128, "--samples", 2, *options)
    assert len(list((tmp_path / "plots").glob("*.png"))) == 5
    rows = json.loads(result.read_text())["rows"]
    assert code == 0 and [row["sparsity"] > 0 for row in rows] == [True, False]
    assert rows[0]["error"] > 0 and rows[1]["error"] == 0
    assert out.count("skips nothing") == 1
    assert run("quality", *of(folder), *sources, "--lengths", 128, "--samples", 1, "--most-rise", "nan")[0] == 1


def test_both_commands_take_other_halves_of_a_text(folder):
    loaded = on_device(str(folder / "model"), "float32", "cpu")
    ours, theirs = halves(loaded, [str(folder / "text.txt")])
    letters = tokenize(read_texts(folder / "text.txt"), loaded.tokenizer)
    assert sorted([*ours.tolist(), *theirs.tolist()]) == sorted(letters.tolist())
    assert torch.equal(ours[:250], letters[:250]) and torch.equal(theirs[:250], letters[250:500])


def test_outputs_are_not_overwritten(folder, tmp_path):
    (tmp_path / "c.json").write_text("{}")
    with pytest.raises((UsageError, ConfigError), match="exists"):
        run("calibrate", *of(folder), "-o", tmp_path / "c.json")
