"""Pictures of a calibration and of its cost: sparsity against perplexity, layers by heads, the tiles of one head.

Needs matplotlib (`pip install block-skip-attention[plots]`), which is imported only here and only when used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from sparse_attention.errors import MissingError, UsageError
from sparse_attention.quality import QualityRow
from sparse_attention.quality_mass import LayerMass

TILE_COLOURS = ("#ffffff", "#1f77b4", "#fdd9a8")
"""Of a tile that does not exist, is kept, is skipped."""


def plot_curve(rows: Sequence[QualityRow], path: Path | str) -> Path:
    """Rise in perplexity (%) against sparsity (%), a line per strategy and length, to a .png, .svg or .pdf.

    Bars are standard errors over the texts, where there are several. Rows whose names share what comes before the last
    "@" are one line: "balanced@0.3" and "balanced@0.5".
    """
    if not rows:
        raise UsageError("nothing to draw", where=str(path), fix="measure at least one configuration")
    figure, axes = _figure((7, 4.5))
    lines: dict[tuple[str, int], list[QualityRow]] = {}
    for row in rows:
        lines.setdefault((row.candidate.rpartition("@")[0] or row.candidate, row.length), []).append(row)
    for (name, length), some in lines.items():
        points = sorted((100 * row.sparsity, 100 * row.rise, 100 * (row.error or 0.0)) for row in some)
        sparsities, rises, errors = zip(*points, strict=True)
        bars = errors if any(errors) else None
        axes.errorbar(sparsities, rises, yerr=bars, fmt="o-", capsize=3, label=f"{name}, {length} tokens")
    axes.axhline(0, color="black", linewidth=0.5)
    axes.grid(alpha=0.3)
    axes.set_xlabel("tiles skipped (%)")
    axes.set_ylabel("rise in perplexity (%)")
    axes.legend(fontsize="small")
    return _saved(figure, path)


def plot_heads(layers: Mapping[str, LayerMass], path: Path | str, title: str = "") -> Path:
    """Share of tiles skipped (%) by layer and query head, to a .png, .svg or .pdf.

    Args:
        layers: of one configuration and length, from `Quality.layers`.
    """
    counted = {name: mass for name, mass in layers.items() if mass.total}
    if not counted:
        raise UsageError("nothing to draw", where=str(path), fix="measure with masses=True")
    heads = max(len(mass.total or ()) for mass in counted.values())
    image = np.full((len(counted), heads), np.nan)
    for row, mass in enumerate(counted.values()):
        for head, (skipped, total) in enumerate(zip(mass.skipped or (), mass.total or (), strict=True)):
            image[row, head] = 100 * skipped / max(total, 1)
    names, pattern = _short(list(counted))
    figure, axes = _figure((2.5 + 0.35 * heads, 1.5 + 0.2 * len(counted)))
    shown = axes.imshow(image, aspect="auto", vmin=0, vmax=100, cmap="viridis", interpolation="nearest")
    axes.set_title(title, fontsize="small")
    axes.set_xlabel("query head")
    axes.set_ylabel(pattern or "layer")
    axes.set_xticks(range(heads) if heads <= 32 else range(0, heads, heads // 16))
    axes.set_yticks(range(len(names)), names, fontsize=7)
    figure.colorbar(shown, label="tiles skipped (%)")
    return _saved(figure, path)


def _short(names: Sequence[str]) -> tuple[list[str], str]:
    """The dotted parts in which module names differ, and the pattern they share: `model.layers.*.self_attn`."""
    parts = [name.split(".") for name in names]
    if len(parts) < 2 or len({len(part) for part in parts}) > 1:
        return list(names), ""
    differ = [len(set(column)) > 1 for column in zip(*parts, strict=True)]
    short = [".".join(word for word, keep in zip(part, differ, strict=True) if keep) for part in parts]
    return short, ".".join("*" if keep else word for word, keep in zip(parts[0], differ, strict=True))


def plot_tiles(tiles: Tensor, path: Path | str, title: str = "") -> Path:
    """Which tiles of one head were skipped, to a .png, .svg or .pdf.

    Args:
        tiles: `[R, C] uint8` of one head: 0 absent, 1 kept, 2 skipped (`quality_mass.TileMapObserver`).
    """
    if tiles.dim() != 2:
        raise UsageError("a tile map is of one head", where=str(path), found=str(list(tiles.shape)), fix="pass [R, C]")
    _matplotlib()
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    figure, axes = _figure((5, 5))
    axes.imshow(tiles.numpy(), cmap=ListedColormap(list(TILE_COLOURS)), vmin=0, vmax=2, interpolation="nearest")
    total, skipped = int((tiles > 0).sum()), int((tiles == 2).sum())
    heading = f"{title}\n" if title else ""
    axes.set_title(f"{heading}{skipped} of {total} tiles skipped", fontsize="small")
    axes.set_xlabel("key tile")
    axes.set_ylabel("query tile")
    axes.locator_params(integer=True)
    kinds = [
        Patch(facecolor=colour, label=kind) for colour, kind in zip(TILE_COLOURS[1:], ("kept", "skipped"), strict=True)
    ]
    figure.legend(handles=kinds, loc="outside lower center", ncols=2, fontsize="small")
    return _saved(figure, path)


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise MissingError(
            "matplotlib is not installed", where="plots", fix="pip install 'block-skip-attention[plots]'"
        ) from None
    matplotlib.use("Agg")  # no display is needed to write a file
    return matplotlib


def _figure(size: tuple[float, float]) -> tuple[Any, Any]:
    _matplotlib()
    from matplotlib import pyplot

    return pyplot.subplots(figsize=size, constrained_layout=True)


def _saved(figure: Any, path: Path | str) -> Path:
    from matplotlib import pyplot

    path = Path(path)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UsageError(
            "the picture cannot be written", where=str(path), found=str(error), fix="use .png, .svg or .pdf"
        ) from None
    finally:
        pyplot.close(figure)
    return path
