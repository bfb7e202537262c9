"""`sparse-attention quality`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from export.cli_calibrate import Device, Dtype, Model, Text, Unit, check_length, cut, halves, on_device, parse_lengths
from export.cli_common import Force, Json, Overrides, one_of, print_json
from export.cli_progress import bar
from export.models import LoadedModel
from export.report import write_json
from export.save import check_output
from sparse_attention import load_config, observed
from sparse_attention.config import SparseAttentionConfig
from sparse_attention.errors import CheckError, UsageError
from sparse_attention.needle import Needle
from sparse_attention.needle import needles as make_needles
from sparse_attention.quality import DENSE, Quality
from sparse_attention.quality import quality as measure
from sparse_attention.quality_mass import LayerMass, TileMapObserver
from sparse_attention.retarget import at_target
from sparse_attention.texts import read_texts, tokenize
from sparse_attention.trial import forward, shortened, trial


def quality(
    model: Model,
    config: Annotated[list[str], typer.Option("--config", "-c", help="A configuration file or preset. Repeatable.")],
    overrides: Overrides = None,
    target: Annotated[str | None, typer.Option(help="Prefill targets to move calibrated curves to: `0.3,0.5`.")] = None,
    text: Text = None,
    lengths: Annotated[str, typer.Option(help="Tokens of the texts, such as `2048,8192`.")] = "2048",
    samples: Annotated[int, typer.Option(min=1, help="Texts of each length, held out by `calibrate`.")] = 2,
    needles: Annotated[
        str | None, typer.Option(help="Lengths of needle-in-a-haystack prompts, such as `1024,2048`.")
    ] = None,
    depths: Annotated[str, typer.Option(help="Where needles lie: 0 start, 1 end.")] = "0.1,0.5,0.9",
    masses: Annotated[bool, typer.Option(help="Measure dropped mass and its bound per layer.")] = True,
    plots: Annotated[Path | None, typer.Option(help="Write pictures into this folder.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the result to this JSON file.")] = None,
    state: Annotated[
        Path | None, typer.Option(help="Keep finished pieces here; a run that was cut off goes on.")
    ] = None,
    most_rise: Annotated[float | None, typer.Option(help="Fail where perplexity rises by more, such as 0.003.")] = None,
    unit: Unit = "head",
    dtype: Dtype = "float32",
    device: Device = "cpu",
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Measure what sparsity costs: perplexity, KL, top-1 agreement, dropped mass, needles; against the dense model."""
    one_of("--unit", unit, ("head", "group"))
    if output is not None:
        check_output(output, force=force)
    if state is None and output is not None:
        state = output.with_name(output.name + ".state.json")
    if state is not None:
        check_output(state, force=True)  # one that is there is gone on with
    if plots is not None:
        check_output(plots / "perplexity.png", force=True)
    candidates = _candidates(config, overrides or [], target)
    wanted = parse_lengths(lengths) or []
    loaded = on_device(model, dtype, device)
    _, half = halves(loaded, text)
    texts = {length: cut(loaded, half, length, samples, "texts") for length in wanted}
    with bar() as told:
        result = measure(
            loaded.model, candidates, texts, needles=_needles(loaded, text, needles, depths), unit=unit, masses=masses,
            state=state, progress=told,
        )  # fmt: skip
    console = Console(quiet=as_json)
    _print(console, result)
    if output is not None:
        write_json(output, result.as_dict(), force=force)
    if plots is not None:
        for path in _draw(loaded, candidates, result, texts, plots):
            console.print(f"wrote {path}", highlight=False)
    if output is not None and state is not None:
        state.unlink(missing_ok=True)
    if as_json:
        print_json(result.as_dict())
    beyond = [row for row in result.rows if most_rise is not None and not row.rise <= most_rise]  # NaN is beyond
    broken = sum(mass.violations for of in result.layers.values() for some in of.values() for mass in some.values())
    if beyond or broken:
        worst = ", ".join(f"{row.candidate} at {row.length} tokens: {100 * row.rise:+.2f} %" for row in beyond)
        console.print(f"FAILED {worst or f'{broken} rows dropped more mass than the bound'}", style="bold red")
        raise typer.Exit(CheckError.exit_code)


def _candidates(configs: list[str], overrides: list[str], targets: str | None) -> dict[str, SparseAttentionConfig]:
    found: dict[str, SparseAttentionConfig] = {}
    names: set[str] = set()
    for source in configs:
        config = load_config(source, overrides)
        if configs.count(source) > 1:
            raise UsageError("the same configuration twice", where="--config", found=source, fix="name each once")
        name = Path(source).stem
        name = source if name in names else name  # two files of one name, in two folders
        names.add(name)
        if targets is None:
            found[name] = config
            continue
        for part in targets.split(","):
            try:
                value = float(part.rpartition("=")[2])
            except ValueError:
                raise UsageError("not a target", where="--target", found=part, fix="write 0.3,0.5") from None
            found[f"{name}@{value:g}"] = at_target(config, {"prefill": value})
    return found


def _needles(loaded: LoadedModel, text: list[str] | None, lengths: str | None, depths: str) -> list[Needle]:
    wanted = parse_lengths(lengths)
    if wanted is None:
        return []
    try:
        where = [float(part) for part in depths.split(",")]
    except ValueError:
        raise UsageError("not a list of depths", where="--depths", found=depths, fix="write 0.1,0.5,0.9") from None
    for length in wanted:
        check_length(loaded, length, "--needles")
    filler = tokenize(read_texts(list(text or ["builtin"])), loaded.tokenizer)
    return make_needles(loaded.tokenizer, filler, wanted, where)


def _print(console: Console, result: Quality) -> None:
    table = Table(title="against the dense model", box=SIMPLE_HEAD, show_edge=False, padding=0)  # 80 columns
    table.add_column("configuration", overflow="fold")
    for column in ("length", "texts", "skipped\n%", "perplexity", "rise\n%", "±", "KL", "top-1\n%"):
        table.add_column(column, justify="right", no_wrap=True)
    for length in dict.fromkeys(row.length for row in result.rows):
        rows = [row for row in result.rows if row.length == length]
        dense = rows[0].dense_perplexity
        table.add_row(DENSE, str(length), str(rows[0].texts), "0.0", f"{dense:.3f}", "", "", "", "", style="dim")
        for row in rows:
            error = "" if row.error is None else f"{100 * row.error:.3f}"
            table.add_row(
                row.candidate, str(length), str(row.texts), f"{100 * row.sparsity:.1f}", f"{row.perplexity:.3f}",
                f"{100 * row.rise:+.3f}", error, f"{row.kl:.1e}", f"{100 * row.top1:.2f}",
            )  # fmt: skip
    console.print(table)
    for row in result.rows:
        if row.sparsity == 0.0:
            console.print(
                f"note: {row.candidate} skips nothing at {row.length} tokens", style="yellow", highlight=False
            )
    for name, lengths in result.layers.items():
        for length, layers in lengths.items():
            pairs = sum(mass.rows for mass in layers.values())
            mean = sum(mass.mass for mass in layers.values()) / max(pairs, 1)
            worst = max(layers.items(), key=lambda item: item[1].mass / max(item[1].rows, 1))
            console.print(
                f"{name} at {length} tokens: mean dropped mass {mean:.2e}, most in {worst[0]} "
                f"({worst[1].mass / max(worst[1].rows, 1):.2e}), rows beyond the bound "
                f"{sum(mass.violations for mass in layers.values())}",
                highlight=False,
            )
    for needle in result.needles:
        console.print(
            f"needle at {needle.depth:.0%} of {needle.length} tokens, {needle.candidate}: "
            f"{'found' if needle.found else 'lost'} (dense {'found' if needle.dense_found else 'lost'}), "
            f"log-likelihood {needle.log_likelihood:.3f} (dense {needle.dense_log_likelihood:.3f})",
            highlight=False,
        )


def _draw(
    loaded: LoadedModel, candidates: dict[str, SparseAttentionConfig], result: Quality,
    texts: dict[int, list[Tensor]], folder: Path,
) -> list[Path]:  # fmt: skip
    from export.plots import plot_curve, plot_heads, plot_tiles

    folder.mkdir(parents=True, exist_ok=True)
    drawn = [plot_curve(result.rows, folder / "perplexity.png")]
    for name, lengths in result.layers.items():
        length, layers = max(lengths.items())
        if not any(mass.total for mass in layers.values()):
            continue
        file = re.sub(r"[^\w.@-]+", "-", name).strip("-")
        drawn.append(plot_heads(layers, folder / f"heads-{file}.png", f"{name}, {length} tokens"))
        # the head nearest to half: one that skips all or nothing shows nothing
        layer, head = min(
            ((layer, head) for layer, mass in layers.items() for head in range(len(mass.total or ()))),
            key=lambda place: abs(_share(layers[place[0]], place[1]) - 0.5),
        )
        watcher = TileMapObserver(layer)
        with trial(loaded.model, candidates[name]), observed(loaded.model, watcher):
            forward(loaded.model, shortened(texts[length][0], length), use_cache=False, logits_to_keep=1)
        if watcher.tiles is not None:
            title = f"{name}, {length} tokens, {layer}, head {head}"
            drawn.append(plot_tiles(watcher.tiles[head], folder / f"tiles-{file}.png", title))
    return drawn


def _share(mass: LayerMass, head: int) -> float:
    return mass.skipped[head] / max(mass.total[head], 1) if mass.skipped and mass.total else 0.0
