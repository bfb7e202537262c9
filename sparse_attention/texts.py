"""Texts to calibrate and measure on: files, folders, or English prose that every Python brings along."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_attention.errors import MissingError, ModelError, UsageError

BUILTIN = "builtin"
_STRIPES = 16
_SUFFIXES = (".txt", ".md", ".rst", ".json", ".jsonl", ".py", ".html")


@dataclass(frozen=True)
class Text:
    """One document and where it came from."""

    name: str
    text: str


def read_texts(sources: str | Path | Sequence[str | Path]) -> list[Text]:
    """The documents of files and folders, in order of their names; "builtin" is Python's own documentation.

    "builtin" (`pydoc_data.topics`, about 700 kB of English) needs no download, and is the same for everyone with the
    same Python.

    Raises:
        MissingError: where a file or folder is not there.
        UsageError: where a file is not UTF-8 text, or nothing is found.
    """
    if isinstance(sources, (str, Path)):
        sources = [sources]
    texts = [text for source in sources for text in _read(source)]
    texts = [text for text in texts if text.text.strip()]
    if not texts:
        raise UsageError(
            "no text found", where=", ".join(map(str, sources)), fix="name text files, a folder of them, or builtin"
        )
    return texts


def _read(source: str | Path) -> list[Text]:
    if str(source) == BUILTIN:
        from pydoc_data import topics

        return [Text(f"{BUILTIN}:{name}", text) for name, text in topics.topics.items()]
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in _SUFFIXES)
        return [_read_file(file) for file in files]
    if not path.is_file():
        raise MissingError("the text is not there", where=str(path), fix="check the path, or use builtin")
    return [_read_file(path)]


def _read_file(path: Path) -> Text:
    try:
        return Text(str(path), path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UsageError("not UTF-8 text", where=str(path), found=str(error), fix="convert it to UTF-8") from None
    except OSError as error:
        raise MissingError(
            "the text cannot be read", where=str(path), found=error.strerror or str(error), fix="check its permissions"
        ) from None


def tokenize(texts: Sequence[Text], tokenizer: Any, vocabulary: int | None = None) -> Tensor:
    """All texts as one row of token ids, `[N] int64`, blank lines between them.

    Args:
        tokenizer: a `transformers` tokenizer, or any callable from text to ids.
        vocabulary: size of the model's; ids beyond it are refused.

    Raises:
        ModelError: where the tokenizer is not the model's.
    """
    encode: Callable[[str], Any] = tokenizer
    if hasattr(tokenizer, "encode"):

        def encode(text: str) -> Any:
            return tokenizer.encode(text, add_special_tokens=False, verbose=False)

    ids = torch.tensor(list(encode("\n\n".join(text.text for text in texts))), dtype=torch.int64)
    if vocabulary is not None and ids.numel() and (int(ids.max()) >= vocabulary or int(ids.min()) < 0):
        raise ModelError(
            "the tokenizer is not the model's",
            where=type(tokenizer).__name__,
            found=f"token id {int(ids.max())}, but the model knows {vocabulary} tokens",
            fix="use the tokenizer that lies beside the model",
        )
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is not None and ids.numel():
        share = float((ids == unknown).double().mean())
        if share > 0.5:
            raise ModelError(
                "the tokenizer does not know this text",
                where=type(tokenizer).__name__,
                found=f"{share:.0%} of the tokens are unknown",
                fix="use the tokenizer that belongs to the model, or text in a language it knows",
            )
    return ids


def split(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Two halves of `ids [N]` that share no token: one to calibrate on, the other to measure on.

    Each takes every other sixteenth of the text, so that both are alike where the text changes on its way. It depends
    on the text alone: two commands that are given the same text agree on the halves.
    """
    stripes = ids.split(max(1, -(-ids.numel() // _STRIPES)))
    odd = stripes[1::2]
    return torch.cat(stripes[::2]), torch.cat(odd) if odd else ids[:0]


def windows(ids: Tensor, length: int, count: int | None = None) -> list[Tensor]:
    """Cuts `ids [N]` into texts of `length` tokens that do not overlap, `[1, length]` each; a rest is left out.

    `count` limits them; they are spread over the whole text then.

    Raises:
        UsageError: where the text is shorter than one window.
    """
    available = ids.numel() // length if length > 0 else 0
    if available == 0:
        raise UsageError(
            "too little text",
            where="texts",
            found=f"{ids.numel()} tokens, for texts of {length}",
            fix="give more text, or a shorter length",
        )
    take = available if count is None else min(count, available)
    chosen = [i * available // take for i in range(take)]
    return [ids[i * length : (i + 1) * length].unsqueeze(0) for i in chosen]
