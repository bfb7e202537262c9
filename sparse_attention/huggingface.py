"""Hugging Face models enter the op through the attention registry: un-expanded K and V, no materialised causal mask.

Two functions are registered under one name. The mask function gets what a model knows about visibility and returns it
as a `Visibility` instead of a mask; the models hand that on to every attention module, whose attention function then
runs the op. What either does not understand becomes a boolean mask or an error that names it; nothing is dropped.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sparse_attention.errors import ModelError
from sparse_attention.layer import AttentionCall, layer_of
from sparse_attention.visibility import Visibility, merged, with_padding

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REGISTERED_NAME = "block_skip_attention"

_HELD = "_block_skip_registration"

# Keywords that models pass through to attention and that say nothing about its result.
_WITHOUT_EFFECT = frozenset(
    {"position_ids", "cache_position", "use_cache", "output_hidden_states", "return_dict", "num_items_in_batch",
     "logits_to_keep", "output_router_logits"}
)  # fmt: skip

_given: ContextVar[Visibility | None] = ContextVar("block_skip_given_visibility", default=None)


@contextmanager
def given_lengths(lengths: Visibility) -> Iterator[None]:
    """Inside the block, models use these lengths and starts instead of deriving them from an attention mask."""
    token = _given.set(lengths)
    try:
        yield
    finally:
        _given.reset(token)


def cache_name(model: nn.Module) -> str:
    """What `transformers` calls a model's keys and values, as an argument and in its output: `cache` since 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def computes_attention(module: nn.Module) -> bool:
    """Whether the module's own `forward` asks the attention registry for its attention."""
    forward = inspect.unwrap(type(module).forward)
    return "ALL_ATTENTION_FUNCTIONS" in getattr(forward, "__code__", computes_attention.__code__).co_names


class _Registration:
    """Held by every model that needs the registered functions; they are unregistered with the last of them."""

    current: weakref.ref[_Registration] | None = None

    @classmethod
    def get(cls) -> _Registration:
        """The one that other models hold, or a new one."""
        held = cls.current() if cls.current is not None else None
        if held is None:
            from transformers import AttentionInterface, AttentionMaskInterface

            held = cls()
            cls.current = weakref.ref(held)
            AttentionInterface.register(REGISTERED_NAME, registry_attention)
            AttentionMaskInterface.register(REGISTERED_NAME, registry_mask)
            weakref.finalize(held, _unregister)
        return held

    def __deepcopy__(self, memo: object) -> _Registration:
        return self

    def __reduce__(self) -> tuple[Callable[[], _Registration], tuple[()]]:
        return _Registration.get, ()


def _unregister() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop(REGISTERED_NAME, None)


def install(model: PreTrainedModel) -> str:
    """Switches the model to the registered attention; returns the implementation it had before."""
    before = model.config._attn_implementation
    model.__dict__[_HELD] = _Registration.get()
    model.set_attn_implementation(REGISTERED_NAME)
    return before


def uninstall(model: PreTrainedModel, implementation: str) -> None:
    """Switches the model back to `implementation`."""
    model.set_attn_implementation(implementation)
    model.__dict__.pop(_HELD, None)


def registry_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Visibility | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function of the registry: `query [B, Hq, Sq, D]`, un-expanded K and V; returns `[B, Sq, Hq, Dv]`.

    `s_aux` is the sinks, `[Hq]`; `position_bias` (T5) is added to the scores, `[1 or B, Hq, Sq, Sk]`.

    Raises:
        ModelError: for a keyword or a mask that cannot be expressed in the op, by name.
    """
    layer = layer_of(module)
    if layer is None:
        raise ModelError(
            "this attention module was not there when the model was sparsified",
            where=type(module).__name__,
            fix="sparsify the model again after changing its modules",
        )
    meant = {name for name, value in others.items() if value is not None and value is not False}
    refused = sorted(meant - _WITHOUT_EFFECT)
    if refused or dropout:
        raise ModelError(
            "attention was called with something block-skip attention cannot compute",
            where=f"{layer.name} ({type(module).__name__})",
            found=", ".join(refused) or f"dropout={dropout}",
            fix='leave it out, or sparsify with path="softmax"' if refused else "call model.eval()",
        )
    seen = _visibility(module, attention_mask, is_causal, key.shape[2])
    if sliding_window and seen.is_causal and not seen.window:  # some models say it only here
        seen = replace(seen, window=sliding_window)
    if seen.rows_of_encoder_only and getattr(module, "is_decoder", True):
        seen = replace(seen, q_lengths=None)
    bias = merged(position_bias, seen.bias)
    if bias is not None and bias.dtype != torch.bool:
        bias = bias.to(query.dtype)
    call = AttentionCall(
        query, key, value, scale=float(scaling if scaling is not None else query.shape[-1] ** -0.5),
        is_causal=seen.is_causal, window=seen.window, softcap=float(softcap or 0.0), bias=bias,
        kv_lengths=seen.kv_lengths, q_start=seen.q_start, q_lengths=seen.q_lengths, sinks=s_aux,
    )  # fmt: skip
    return layer.run(call).transpose(1, 2), None


def _visibility(
    module: nn.Module, mask: Visibility | Tensor | None, is_causal: bool | None, columns: int
) -> Visibility:
    if isinstance(mask, Visibility):
        return mask
    if mask is None:
        causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
        return replace(_given.get() or Visibility(), is_causal=bool(causal))
    if mask.dim() != 4:
        raise ModelError(
            "an attention mask must have four dimensions",
            where=type(module).__name__,
            found=str(list(mask.shape)),
            fix="pass [B, 1 or Hq, Sq, Sk], boolean or additive",
        )
    return Visibility(bias=mask[..., :columns])


def registry_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **others: Any,
) -> Visibility:
    """The mask function of the registry: what `transformers.masking_utils` knows, as a `Visibility`.

    `attention_mask` is `[B, tokens so far] bool`, False where padded. A pattern of visibility that is not plainly
    causal, causal with a window, or full becomes a boolean mask.
    """
    from transformers import masking_utils

    mask_function = mask_function or masking_utils.causal_mask_function
    known = _recognise(mask_function)
    given = _given.get()
    if given is not None and known is not None:
        return replace(given, is_causal=known.is_causal, window=known.window)
    if known is None:
        mask = masking_utils.sdpa_mask(
            batch_size, q_length, kv_length, cast(int, q_offset), kv_offset, mask_function, attention_mask,
            allow_is_causal_skip=False, allow_is_bidirectional_skip=False, use_vmap=use_vmap, device=device,
        )  # fmt: skip
        seen = Visibility(bias=mask)
    else:
        seen = known
    start: int | Tensor = kv_length - q_length
    if not _is_default_start(q_length, kv_length, q_offset, kv_offset):
        start = torch.as_tensor(q_offset - kv_offset, device=device)
        if seen.is_causal or seen.window:
            seen = replace(seen, q_start=start.to(torch.int32).expand(batch_size))
        if seen.is_causal:  # a preallocated cache: keys behind the last query are not there yet
            seen = replace(seen, kv_lengths=(start + q_length).clamp(max=kv_length).to(torch.int32).expand(batch_size))
    padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is None:
        return seen
    if not statically_known_true(padding.shape[-1] == kv_length):  # a sliding cache holds the last keys only
        padding = padding[:, kv_offset : kv_offset + kv_length]
    # Padded query rows must not vote, and only self-attention knows them from this mask. A pattern with causality is
    # self-attention; without it, an encoder's is, and every one of a model that has no cross-attention; other lengths
    # give away the rest.
    bidirectional = mask_function is masking_utils.bidirectional_mask_function
    crosses = getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False)
    rows_too = not bidirectional or not statically_known_true(q_length != kv_length)
    seen = with_padding(seen, padding.to(device), q_length, start, rows_too=rows_too)
    return replace(seen, rows_of_encoder_only=bidirectional and crosses)


def _recognise(mask_function: Callable[..., Any]) -> Visibility | None:
    """Causality and window of a mask function of `transformers`, None where it is something else.

    Composed functions are closures: `and_masks` holds its parts, a sliding overlay its window.
    """
    from transformers import masking_utils

    if mask_function is masking_utils.causal_mask_function:
        return Visibility(is_causal=True)
    if mask_function is masking_utils.bidirectional_mask_function:
        return Visibility()
    name = getattr(mask_function, "__qualname__", "")
    if not name.startswith(("and_masks.", "sliding_window_overlay.")):
        return None
    if getattr(mask_function, "__module__", "") != masking_utils.__name__:
        return None
    inner = inspect.getclosurevars(mask_function).nonlocals
    if "sliding_window" in inner:
        return Visibility(window=int(inner["sliding_window"]))
    parts = [_recognise(part) for part in inner.get("mask_functions", ())]
    if not parts or any(part is None for part in parts):
        return None
    known = [part for part in parts if part is not None]
    windows = [part.window for part in known if part.window]
    return Visibility(is_causal=any(part.is_causal for part in known), window=min(windows, default=0))


def _is_default_start(
    q_length: int | torch.SymInt, kv_length: int | torch.SymInt, q_offset: int | Tensor, kv_offset: int
) -> bool:
    """Whether the queries are the last `q_length` positions, which is the op's default; proven, not guessed."""
    if isinstance(q_offset, Tensor):
        return False
    return statically_known_true(kv_length + kv_offset == q_offset + q_length)
