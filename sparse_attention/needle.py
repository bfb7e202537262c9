"""Needle in a haystack: a fact somewhere in a long text, asked for at its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_attention.errors import UsageError
from sparse_attention.trial import forward

_FACT = "\n\nThe secret number of {city} is {number}. Remember it.\n\n"
_QUESTION = "\n\nThe secret number of {city} is"
_CITIES = ("Amsterdam", "Lisbon", "Nairobi", "Oslo", "Quito", "Hanoi")


@dataclass(frozen=True)
class Needle:
    """One question: `ids [1, length]` end just before the answer's tokens `answer [K]`."""

    length: int
    depth: float
    ids: Tensor
    answer: Tensor


@dataclass(frozen=True)
class NeedleAnswer:
    """Whether greedy decoding would give the answer, and its log-likelihood a token, in nats."""

    found: bool
    log_likelihood: float


def needles(tokenizer: Any, filler: Tensor, lengths: Sequence[int], depths: Sequence[float]) -> list[Needle]:
    """One question for each length and depth.

    Args:
        tokenizer: of the model.
        filler: token ids `[N]` of a long text without the fact.
        lengths: tokens of the whole prompt with its answer.
        depths: where the fact lies: 0 at the start, 1 just before the question.

    Raises:
        UsageError: where the filler is too short, or a length leaves no room.
    """

    def encode(text: str) -> Tensor:
        return torch.tensor(tokenizer.encode(text, add_special_tokens=False), dtype=torch.int64)

    made = []
    for number, (length, depth) in enumerate((length, depth) for length in lengths for depth in depths):
        city, value = _CITIES[number % len(_CITIES)], 1000 + (number * 7919 + 4817) % 9000
        question = encode(_QUESTION.format(city=city))
        answer = encode(_QUESTION.format(city=city) + f" {value}")[len(question) :]
        fact = encode(_FACT.format(city=city, number=value))
        room = length - len(fact) - len(question) - len(answer)
        if room <= 0 or room > len(filler) or not 0.0 <= depth <= 1.0:
            raise UsageError(
                "this needle does not fit",
                where=f"length {length}, depth {depth}",
                found=f"{len(filler)} tokens of text around a fact and a question of {length - room} tokens",
                fix="choose a longer length, a depth in [0, 1], or give more text",
            )
        before = round(room * depth)
        ids = torch.cat([filler[:before], fact, filler[before:room], question])
        made.append(Needle(length, depth, ids.unsqueeze(0), answer))
    return made


def ask(model: nn.Module, needle: Needle) -> NeedleAnswer:
    """One forward over the prompt and its answer: every token of the answer must be the most likely one."""
    ids = torch.cat([needle.ids, needle.answer.unsqueeze(0)], dim=1)
    keep = len(needle.answer) + 1
    logits = forward(model, ids, use_cache=False, logits_to_keep=keep).logits[0, -keep:-1].float()
    answer = needle.answer.to(logits.device)
    log = torch.log_softmax(logits, dim=-1).gather(-1, answer.unsqueeze(-1))
    return NeedleAnswer(bool((logits.argmax(-1) == answer).all()), float(log.mean()))
