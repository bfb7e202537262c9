"""`sparse-attention generate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from export.cli_common import Json, err, print_json
from export.generate import CHUNK, Generator, Sampling, load_tokenizer
from sparse_attention.errors import MissingError, UsageError


def generate(
    file: Annotated[Path, typer.Argument(help="An .onnx exported with --kv-cache or --static-cache.")],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="A text to continue; repeat for a batch.")
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option("--prompt-file", help="A file with the text to continue.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="At most so many new tokens.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0, help="0 takes the likeliest token, else tokens are drawn.")
    ] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from so many likeliest tokens; 0 = all.")] = 0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Draw from the smallest set of this mass.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the drawing.")] = 0,
    chunk: Annotated[int, typer.Option(min=1, help="Prompt tokens of one call; bounds the memory.")] = CHUNK,
    threshold_scale: Annotated[
        float, typer.Option(min=0, help="Multiplies every λ of a --tunable file; 0 = dense.")
    ] = 1.0,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Do not stop at the end-of-text token.")] = False,
    as_json: Json = False,
) -> None:
    """Continue a text with an exported graph in ONNX Runtime, streaming it to the terminal."""
    texts = _texts(prompt, prompt_file)
    generator = Generator(file, counts=as_json, threshold_scale=threshold_scale)
    tokenizer = load_tokenizer(file)
    if chat:
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
            for text in texts
        ]
    prompts = [tokenizer(text, add_special_tokens=not chat, verbose=False)["input_ids"] for text in texts]
    stop = () if ignore_eos else end_tokens(file, tokenizer)
    console = Console(quiet=as_json, soft_wrap=True)
    stream = _Stream(tokenizer, console) if len(prompts) == 1 else None
    result = generator.generate(
        prompts, max_new_tokens, sampling=Sampling(temperature, top_k, top_p, seed), stop=stop, chunk=chunk,
        on_token=stream or (lambda row, token: None),
    )  # fmt: skip
    written = [tokenizer.decode(ids, skip_special_tokens=True) for ids in result.token_ids]
    if as_json:
        print_json(result.as_dict() | {"text": written})
        return
    if stream is not None:
        stream.end()
    else:
        for number, text in enumerate(written):
            console.print(f"[{number}] {text}", markup=False, highlight=False)
    err.print(
        f"{sum(result.prompt_tokens)} prompt tokens in {result.prefill_seconds:.1f} s, "
        f"{sum(map(len, result.token_ids))} new ones at {result.tokens_per_second:.1f} tokens/s",
        style="dim", highlight=False,
    )  # fmt: skip


def end_tokens(file: Path, tokenizer: object) -> tuple[int, ...]:
    """Token ids that end a text: the tokenizer's, and those of the generation configuration beside the file."""
    beside = file.parent / "generation_config.json"
    try:
        named = json.loads(beside.read_text()).get("eos_token_id") if beside.is_file() else None
    except (ValueError, AttributeError):  # not what transformers writes: nothing is known from it
        named = None
    found = [getattr(tokenizer, "eos_token_id", None), *(named if isinstance(named, list) else [named])]
    return tuple(sorted({token for token in found if isinstance(token, int)}))


class _Stream:
    """Prints text as its tokens come; a character of several tokens is printed when it is whole."""

    def __init__(self, tokenizer: object, console: Console) -> None:
        self.tokenizer, self.console = tokenizer, console
        self.ids: list[int] = []
        self.printed = ""

    def __call__(self, row: int, token: int) -> None:
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)  # type: ignore[attr-defined]
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self.console.print(text[len(self.printed) :], end="", markup=False, highlight=False)
            self.printed = text

    def end(self) -> None:
        self.console.print()


def _texts(prompts: list[str] | None, file: Path | None) -> list[str]:
    if bool(prompts) == (file is not None):
        raise UsageError("give one prompt", found="both kinds" if prompts else "none",
                         fix='pass --prompt "..." or --prompt-file FILE')  # fmt: skip
    if file is None:
        return prompts or []
    if not file.is_file():
        raise MissingError("there is no such file", where=str(file), fix="pass a text file that exists")
    try:
        return [file.read_text(encoding="utf-8")]
    except UnicodeDecodeError as error:
        raise UsageError("the prompt file is not UTF-8 text", where=str(file), found=str(error),
                         fix="convert it to UTF-8") from error  # fmt: skip
