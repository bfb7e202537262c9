"""Histograms on disk: what a shard hands over, and where a run that was cut off goes on. Safetensors, never pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparse_attention.errors import MissingError, UsageError
from sparse_attention.gap_histogram import BINS, GapHistogram, LayerGaps
from sparse_attention.layer import AttentionLayer
from sparse_attention.threshold import Phase

_FORMAT = "block-skip gap histograms 1"


def save_histograms(
    path: Path | str, histograms: Mapping[Phase, GapHistogram], *, how: str = "", done: Iterable[str] = ()
) -> None:
    """Writes histograms whole or not at all.

    Args:
        how: fingerprint of how they were collected (`fingerprint`); files with different ones are not added.
        done: fingerprints of the texts they hold.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    tensors: dict[str, Tensor] = {}
    layers: dict[str, dict[str, bool]] = {}
    for phase, histogram in histograms.items():
        tensors[f"{phase}/sequences"] = histogram.sequences
        layers[phase] = {name: gaps.cumulative for name, gaps in histogram.layers.items()}
        for name, gaps in histogram.layers.items():
            for part in ("tiles", "mass", "rows"):
                tensors[f"{phase}/{name}/{part}"] = getattr(gaps, part).contiguous()
    lengths = {phase: list(histogram.lengths) for phase, histogram in histograms.items()}
    about = {"format": _FORMAT, "how": how, "done": list(done), "lengths": lengths, "layers": layers}
    draft = path.with_name(path.name + ".part")
    try:
        draft.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, draft, metadata={"about": json.dumps(about)})
        draft.replace(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            draft.unlink()
        raise UsageError(
            "the histograms cannot be written", where=str(path), found=getattr(error, "strerror", None) or str(error),
            fix="choose a folder you can write to",
        ) from None  # fmt: skip


def load_histograms(path: Path | str) -> tuple[dict[Phase, GapHistogram], str, list[str]]:
    """What `save_histograms` wrote: the histograms, how they were collected, and the texts they hold.

    Raises:
        MissingError: where there is no such file.
        UsageError: where it is damaged or something else.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise MissingError("the histogram file is not there", where=str(path), fix="check the path")
    try:
        with safe_open(path, framework="pt") as file:
            about: dict[str, Any] = json.loads((file.metadata() or {}).get("about", "{}"))
            if about.get("format") != _FORMAT:
                raise ValueError(f"format {about.get('format')!r}")
            return _histograms(file, about), str(about["how"]), list(about["done"])
    except (SafetensorError, ValueError, KeyError) as error:
        raise UsageError(
            "not a histogram file of this version, or a damaged one",
            where=str(path),
            found=str(error),
            fix="delete it and collect again",
        ) from None


def _histograms(file: Any, about: Mapping[str, Any]) -> dict[Phase, GapHistogram]:
    result: dict[Phase, GapHistogram] = {}
    for phase, lengths in about["lengths"].items():
        histogram = GapHistogram(tuple(lengths), file.get_tensor(f"{phase}/sequences"))
        for name, cumulative in about["layers"][phase].items():
            tiles, mass, rows = (file.get_tensor(f"{phase}/{name}/{part}") for part in ("tiles", "mass", "rows"))
            if tiles.shape[-1] != BINS:
                raise ValueError(f"{tiles.shape[-1]} bins instead of {BINS}")
            histogram.layers[name] = LayerGaps(tiles, mass, rows, cumulative)
        result[cast(Phase, phase)] = histogram
    return result


def merge_files(paths: Iterable[Path | str]) -> dict[Phase, GapHistogram]:
    """The exact sum of what several processes collected over shards of the text.

    Raises:
        UsageError: where they were not collected in the same way, or the same text is in two of them.
    """
    total: dict[Phase, GapHistogram] = {}
    seen: dict[str, str] = {}
    first: tuple[str, str] | None = None
    for path in paths:
        histograms, how, done = load_histograms(path)
        first = first or (str(path), how)
        if how != first[1]:
            raise UsageError(
                "histograms of different runs cannot be added",
                where=str(path),
                found=f"another model, tiles, lengths or units than {first[0]}",
                fix="collect every shard with the same options",
            )
        for text in done:
            if text in seen:
                raise UsageError(
                    "the same text is in two shards", where=str(path), found=f"also in {seen[text]}",
                    fix="give every shard its own number: --shard 1/4, 2/4, ...",
                )  # fmt: skip
            seen[text] = str(path)
        for phase, histogram in histograms.items():
            total[phase] = total[phase].merge(histogram) if phase in total else histogram
    if not total:
        raise UsageError("no histogram to add", where="shards", fix="name at least one file")
    return total


def fingerprint(model: nn.Module, layers: Iterable[AttentionLayer], how: Mapping[str, Any]) -> str:
    """A short name of everything that histograms depend on besides the text: model, tiles, lengths, units."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if (
            parameter.device.type != "meta" and parameter.numel()
        ):  # a few numbers of each: cheap, and tells models apart
            sample = parameter.detach().flatten()[:: max(1, parameter.numel() // 8)][:8]
            digest.update(sample.float().cpu().numpy().tobytes())
    for layer in layers:
        digest.update(f"{layer.name} {layer.settings.br} {layer.settings.bc}".encode())
    digest.update(json.dumps(dict(how), sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def text_fingerprint(batch: Tensor | Mapping[str, Any]) -> str:
    """A short name of one batch, by its content."""
    digest = hashlib.sha256()
    for name, value in [("input_ids", batch)] if isinstance(batch, Tensor) else sorted(batch.items()):
        content = value.detach().cpu().contiguous() if isinstance(value, Tensor) else torch.empty(0)
        digest.update(f"{name} {tuple(content.shape)} {content.dtype}".encode())
        digest.update(content.view(torch.uint8).numpy().tobytes() if content.numel() else repr(value).encode())
    return digest.hexdigest()[:16]
