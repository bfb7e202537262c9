"""`sparse-attention calibrate`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from export.cli_common import Force, Json, Overrides, err, one_of, print_json
from export.cli_progress import bar
from export.models import DTYPES, LoadedModel, load_model
from export.report import write_json
from export.save import check_output
from sparse_attention import load_config, save_config
from sparse_attention.calibrate import Calibration
from sparse_attention.calibrate import calibrate as run_calibration
from sparse_attention.calibration_bench import collecting_cost
from sparse_attention.calibration_collect import collect
from sparse_attention.calibration_fit import DEFAULT_STRATEGY, STRATEGIES, Fit, Strategy, fit
from sparse_attention.config_files import SUFFIXES
from sparse_attention.errors import CheckError, MissingError, UsageError
from sparse_attention.gap_files import merge_files, save_histograms
from sparse_attention.gap_histogram import GapHistogram
from sparse_attention.interchange import to_checkpoint_record
from sparse_attention.sparsify import attention_modules
from sparse_attention.texts import read_texts, split, tokenize, windows
from sparse_attention.threshold import PHASES, Phase

TOLERANCE = 0.03
"""How far from its target a sparsity may lie on held-out text."""

Model = Annotated[str, typer.Argument(help="A Hugging Face directory or id, a .gguf file, or module:callable.")]
Text = Annotated[list[str] | None, typer.Option("--text", help="Text files, folders, or `builtin`. Repeatable.")]
Dtype = Annotated[str, typer.Option("--dtype", help=f"Of the model: {', '.join(DTYPES)}.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, or auto: spread over what is there.")]
Unit = Annotated[str, typer.Option("--unit", help="How prefill decides: head, or group.")]


def calibrate(
    model: Model,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The calibrated configuration.")] = None,
    config: Annotated[
        str, typer.Option("--config", "-c", help="A configuration file or preset.")
    ] = "skip_softmax_calib",
    overrides: Overrides = None,
    text: Text = None,
    target: Annotated[str | None, typer.Option(help="Tiles to skip: `0.5` or `prefill=0.5,decode=0.4`.")] = None,
    strategy: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(STRATEGIES)}; by default {DEFAULT_STRATEGY}.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Texts to calibrate on.")] = 16,
    length: Annotated[int, typer.Option(min=2, help="Tokens of each text.")] = 2048,
    lengths: Annotated[
        str | None,
        typer.Option(help="Lengths to meet the target at with one configuration, such as `2048,4096`; else --length."),
    ] = None,
    held_out: Annotated[int, typer.Option(min=0, help="Other texts to measure the result on.")] = 2,
    refine: Annotated[int, typer.Option(min=0, help="Corrections by a sparse run.")] = 0,
    unit: Unit = "head",
    decode_unit: Annotated[str, typer.Option(help="How decode decides: head, or group.")] = "group",
    compare: Annotated[
        bool, typer.Option("--compare", help="Also print what the other strategies would give.")
    ] = False,
    shard: Annotated[
        str | None, typer.Option(help="`2/4`: collect on every fourth text only; needs --histograms.")
    ] = None,
    histograms: Annotated[Path | None, typer.Option(help="Keep what was collected in this file.")] = None,
    merge: Annotated[
        list[Path] | None, typer.Option(help="Histogram files of all shards, instead of collecting.")
    ] = None,
    record: Annotated[
        Path | None, typer.Option(help="Write TensorRT-LLM's and vLLM's config.json record here.")
    ] = None,
    bench: Annotated[bool, typer.Option("--bench", help="Only time collecting against dense forward passes.")] = False,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Find the thresholds that skip a wanted share of the tiles; exit code 1 where that is out of reach or missed."""
    console = Console(quiet=as_json)
    targets = parse_targets(target)
    for option, value in (("--unit", unit), ("--decode-unit", decode_unit)):
        one_of(option, value, ("head", "group"))
    if strategy is not None:
        one_of("--strategy", strategy, STRATEGIES)
    _check_outputs(output, record, shard, histograms, bench, force)
    loaded = on_device(model, dtype, device)
    chosen = load_config(config, overrides or ())
    wanted = parse_lengths(lengths)
    ours, theirs = halves(loaded, text)
    every = cut(loaded, ours, length, samples, "texts to calibrate on", fewer=True)
    others = cut(loaded, theirs, length, held_out, "held-out texts") if held_out and not (shard or bench) else []
    with bar() as told:
        if bench:
            cost = collecting_cost(loaded.model, chosen, every, told)
            told("timing", len(every), len(every))
            result = {
                **asdict(cost),
                "tokens": length,
                "ratio": cost.ratio,
                "cpu_ratio": cost.cpu_ratio,
                "median_ratio": cost.median_ratio,
            }
            console.print(
                f"collecting takes {cost.ratio:.3f} x the dense forward (median of texts {cost.median_ratio:.3f})"
            )
            if as_json:
                print_json(result)
            return
        if shard is not None:
            units = {phase: decode_unit if phase == "decode" else unit for phase in targets or PHASES}
            mine = _shard(every, shard)
            collect(loaded.model, chosen, mine, lengths=wanted, units=cast(Any, units), state=histograms, progress=told)
            console.print(f"{len(mine)} of {len(every)} texts collected in {histograms}")
            return
        state = histograms or (output.with_name(output.name + ".gaps.safetensors") if output else None)
        merged = merge_files(merge) if merge else None
        result_of = run_calibration(
            loaded.model, chosen, () if merged else every, targets=targets, strategy=cast("Strategy | None", strategy),
            lengths=wanted, held_out=others, unit=unit, decode_unit=decode_unit, histograms=merged, refine=refine,
            state=None if merged else state, progress=told,
        )  # fmt: skip
    if histograms is not None and merged:
        save_histograms(histograms, result_of.histograms)
    notes = _write(result_of, loaded, output, record, force)
    if state is not None and histograms is None and not merged:
        state.unlink(missing_ok=True)
    _print(console, result_of, compare, wanted)
    missed = result_of.missed(TOLERANCE)
    for line in (*missed, *notes):
        console.print(f"note: {line}", style="yellow", highlight=False)
    if as_json:
        print_json({"config": result_of.config.model_dump(mode="json"), "missed": missed, "notes": notes})
    if missed:
        raise typer.Exit(CheckError.exit_code)


def on_device(source: str, dtype: str, device: str) -> LoadedModel:
    """The model on one device, or spread over all with `auto`; it must bring its tokenizer."""
    one_of("--device", device, ("cpu", "cuda", "auto"))
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise MissingError("no CUDA device", where="--device cuda", fix="use --device cpu, or a machine with a GPU")
    loaded = load_model(source, dtype=one_of("--dtype", dtype, tuple(DTYPES)))
    if loaded.tokenizer is None:
        raise MissingError("the model brings no tokenizer", where=source, fix="put its tokenizer files beside it")
    if device == "cuda":
        loaded.model.to("cuda")
    elif device == "auto":
        try:
            from accelerate import dispatch_model, infer_auto_device_map
        except ImportError:
            raise MissingError(
                "accelerate is not installed", where="--device auto", fix="pip install accelerate"
            ) from None

        split = list(getattr(loaded.model, "_no_split_modules", None) or [])
        dispatch_model(loaded.model, infer_auto_device_map(loaded.model, no_split_module_classes=split))
    return loaded


def parse_targets(given: str | None) -> dict[Phase, float] | None:
    """`0.5` or `prefill=0.5,decode=0.4`; None where nothing is given."""
    if given is None:
        return None
    parts = [part.partition("=") for part in given.split(",")] if "=" in given else [(p, "=", given) for p in PHASES]
    try:
        targets = {cast(Phase, phase.strip()): float(value) for phase, _, value in parts}
    except ValueError:
        targets = {}
    if len(targets) != len(parts):
        raise UsageError("not a target", where="--target", found=given, fix="write 0.5, or prefill=0.5,decode=0.4")
    return targets


def parse_lengths(given: str | None) -> list[int] | None:
    """`2048,4096`; None where nothing is given."""
    if given is None:
        return None
    try:
        return sorted({int(part) for part in given.split(",")})
    except ValueError:
        raise UsageError("not a list of lengths", where="--lengths", found=given, fix="write 2048,4096") from None


def halves(loaded: LoadedModel, sources: list[str] | None) -> tuple[Tensor, Tensor]:
    """All the text as token ids `[N]`: the half to calibrate on, and the half to measure on, for every command."""
    config = getattr(loaded.model, "config", None)
    texts = read_texts(cast(Any, sources) or "builtin")
    return split(tokenize(texts, loaded.tokenizer, getattr(config, "vocab_size", None)))


def check_length(loaded: LoadedModel, length: int, where: str) -> None:
    """Refuses texts that are no texts, or longer than what the model has positions for."""
    longest = getattr(getattr(loaded.model, "config", None), "max_position_embeddings", None)
    if length < 2:
        raise UsageError("a text has at least two tokens", where=where, found=str(length), fix="use 2048, or more")
    if isinstance(longest, int) and length > longest:
        raise UsageError("longer than the model's positions", where=where, found=str(length),
                         fix=f"use at most {longest}")  # fmt: skip


def cut(
    loaded: LoadedModel, half: Tensor, length: int, count: int, what: str, *, fewer: bool = False
) -> list[Tensor]:  # fmt: skip
    """`count` texts `[1, length]` spread over one half of the text; `fewer` will do where there are not so many."""
    check_length(loaded, length, what)
    there = half.numel() // length
    if there < (1 if fewer else count):
        raise UsageError(
            "too little text", where=what, found=f"{half.numel()} tokens: {there} texts of {length}, not {count}",
            fix="give more text (half is to calibrate on, half to measure on), a shorter length, or ask for fewer",
        )  # fmt: skip
    if count > there:
        err.print(
            f"note: {there} {what} of {length} tokens instead of {count}: that is all the text there is", style="yellow"
        )
    return windows(half, length, count)


def _check_outputs(
    output: Path | None, record: Path | None, shard: str | None, histograms: Path | None, bench: bool, force: bool
) -> None:
    if shard is not None and histograms is None:
        raise UsageError(
            "a shard needs a place for its histograms", where="--shard", fix="add --histograms part.safetensors"
        )
    if output is None and shard is None and not bench:
        raise UsageError("no output", where="--output", fix="add -o calibrated.json")
    for path in (output, record):
        if path is not None:
            check_output(path, force=force)
    if histograms is not None:
        check_output(histograms, force=True)  # one that is there is gone on with
    if output is not None and output.suffix.lower() not in SUFFIXES:
        raise UsageError("unknown suffix", where=str(output), fix=f"use one of {', '.join(SUFFIXES)}")


def _shard(texts: list[Tensor], given: str) -> list[Tensor]:
    number, _, count = given.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise UsageError("not a shard", where="--shard", found=given, fix="write 1/4, 2/4, 3/4 and 4/4")
    mine = texts[int(number) - 1 :: int(count)]
    if not mine:
        raise UsageError("no text for this shard", where="--shard", found=given, fix=f"there are {len(texts)} texts")
    return mine


def _write(
    result: Calibration, loaded: LoadedModel, output: Path | None, record: Path | None, force: bool
) -> tuple[str, ...]:
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        save_config(result.config, output, overwrite=force)
    if record is None:
        return ()
    classes = sorted({module.class_name for module in attention_modules(loaded.model)})
    exported = to_checkpoint_record(result.config, classes)
    write_json(record, {"sparse_attention_config": exported.record}, force=force)
    return exported.notes


def _print(console: Console, result: Calibration, compare: bool, lengths: list[int] | None) -> None:
    table = Table(title="thresholds, and what they skip", box=SIMPLE_HEAD, show_edge=False, padding=0)  # 80 columns
    for column in ("phase", "strategy", "length", "λ", "target", "fitted", "held out", "most", "mass"):
        table.add_column(column, justify="left" if column in ("phase", "strategy") else "right", no_wrap=True)
    for phase, found in result.fits.items():
        shown = [found]
        if compare:
            histogram: GapHistogram = result.histograms[phase]
            used = lengths or list(found.lengths)
            shown += [fit(histogram, found.target, other, used) for other in STRATEGIES if other != found.strategy]
        for one in shown:
            _add_rows(table, phase, one, result if one is found else None)
    console.print(table)
    text = "fitted: to the calibration text; held out: in sparse runs on other text; most: what any λ can skip;"
    console.print(f"{text}\nmass: of the softmax, that a row loses on average", style="dim", highlight=False)


def _add_rows(table: Table, phase: Phase, found: Fit, result: Calibration | None) -> None:
    for length, given in found.lengths.items():
        got = result.achieved.get(phase, {}).get(length) if result is not None else None
        table.add_row(
            phase, found.strategy, str(length), "per layer" if given.threshold is None else f"{given.threshold:.4g}",
            f"{found.target:.2f}", f"{given.sparsity:.3f}", "" if got is None else f"{got.sparsity:.3f}",
            f"{given.most:.3f}", f"{given.mass:.1e}",
        )  # fmt: skip
