"""Pictures are files with something in them; what cannot be drawn is refused."""

import builtins
from dataclasses import replace

import pytest
import torch

from export.plots import _short, plot_curve, plot_heads, plot_tiles
from sparse_attention.errors import MissingError, UsageError
from sparse_attention.quality import QualityRow
from sparse_attention.quality_mass import LayerMass


def row(name, sparsity, perplexity, length=2048):
    return QualityRow(name, length, 1, sparsity, perplexity, 10.0, 0.0, 1.0, 1.0)


def pixels(path):
    from matplotlib import image

    return image.imread(path)


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_curve(tmp_path, suffix):
    rows = [row("length@0.3", 0.3, 10.04), row("length@0.5", 0.5, 10.3), row("balanced@0.3", 0.31, 10.02)]
    path = plot_curve(rows, tmp_path / f"curve{suffix}")
    assert path.stat().st_size > 1000


def test_curve_shows_each_line(tmp_path):
    one = plot_curve([row("a", 0.3, 10.1)], tmp_path / "one.png")
    two = plot_curve([row("a", 0.3, 10.1), row("b", 0.3, 10.3)], tmp_path / "two.png")
    assert (pixels(one) != pixels(two)).any()


def test_curve_shows_how_sure_it_is(tmp_path):
    one = plot_curve([row("a", 0.3, 10.1)], tmp_path / "one.png")
    several = plot_curve([replace(row("a", 0.3, 10.1), error=0.001)], tmp_path / "several.png")
    assert (pixels(one) != pixels(several)).any()


def test_layers_are_named_by_what_they_differ_in():
    names = [f"model.layers.{i}.self_attn" for i in range(3)]
    assert _short(names) == (["0", "1", "2"], "model.layers.*.self_attn")
    assert _short(["a.0.x", "b.1.x"]) == (["a.0", "b.1"], "*.*.x")
    assert _short(["a.x", "b.y.z"]) == (["a.x", "b.y.z"], "")
    assert _short(["model.attention"]) == (["model.attention"], "")


def test_heads(tmp_path):
    layers = {f"layers.{i}": LayerMass(skipped=[i, 2 * i, 30], total=[100, 100, 100 + i]) for i in range(5)}
    layers["dense"] = LayerMass()
    coloured = pixels(plot_heads(layers, tmp_path / "heads.png"))
    assert len({tuple(value) for value in coloured.reshape(-1, coloured.shape[-1])[::7]}) > 10
    with pytest.raises(UsageError, match="nothing to draw"):
        plot_heads({"dense": LayerMass()}, tmp_path / "none.png")


def test_tiles(tmp_path):
    tiles = torch.tril(torch.ones(6, 6, dtype=torch.uint8))
    kept = pixels(plot_tiles(tiles, tmp_path / "kept.png"))
    tiles[4, 2] = 2
    assert (pixels(plot_tiles(tiles, tmp_path / "skipped.png")) != kept).any()
    with pytest.raises(UsageError, match="one head"):
        plot_tiles(tiles.unsqueeze(0), tmp_path / "no.png")


def test_what_cannot_be_drawn(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="nothing to draw"):
        plot_curve([], tmp_path / "none.png")
    with pytest.raises(UsageError, match="cannot be written"):
        plot_curve([row("a", 0.3, 10.1)], tmp_path / "none.xyz")
    real = builtins.__import__

    def without_matplotlib(name, *rest, **others):
        if name == "matplotlib":
            raise ImportError(name)
        return real(name, *rest, **others)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(MissingError, match="matplotlib") as error:
        plot_curve([row("a", 0.3, 10.1)], tmp_path / "none.png")
    assert "pip install" in str(error.value)
