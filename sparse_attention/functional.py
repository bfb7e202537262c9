"""Models of plain PyTorch: `nn.MultiheadAttention`, and modules written around `F.scaled_dot_product_attention`.

The call inside the module's forward is replaced by the op, for that module and in that thread only; torch.export
(non-strict) sees the op.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn.attention.bias import CausalBias, CausalVariant
from torch.overrides import TorchFunctionMode

from sparse_attention.errors import ModelError
from sparse_attention.interception import forward_before, names_called, replace_forward, restore_forward
from sparse_attention.layer import AttentionCall, AttentionLayer, layer_of
from sparse_attention.visibility import Visibility, merged, with_padding

_SDPA = torch.nn.functional.scaled_dot_product_attention
_HOOK = "_block_skip_hook"
_NESTED = "_block_skip_use_nested_tensor"


def computes_attention(module: nn.Module) -> bool:
    """Whether the module is a `nn.MultiheadAttention`, or its own code calls `scaled_dot_product_attention`."""
    return _is_multihead(module) or "scaled_dot_product_attention" in names_called(module)


def _is_multihead(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward


def install(module: nn.Module) -> None:
    """Routes the attention of `module`, to which a layer is attached, into the op.

    Raises:
        ModelError: for a `nn.MultiheadAttention` with `add_bias_kv` or `add_zero_attn`.
    """
    if _is_multihead(module):
        assert isinstance(module, nn.MultiheadAttention)
        if module.bias_k is not None or module.add_zero_attn:
            layer = layer_of(module)
            raise ModelError(
                "MultiheadAttention appends keys of its own, which the op does not know",
                where=layer.name if layer else "",
                found="add_bias_kv" if module.bias_k is not None else "add_zero_attn",
                fix="exclude the module with a pattern and `enable: false`",
            )
        replace_forward(module, _multihead_forward)
        # nn.TransformerEncoderLayer computes attention in one fused call, past this module, unless it has a hook
        module.__dict__[_HOOK] = module.register_forward_pre_hook(_no_fused_call)
        return
    replace_forward(module, _intercepting_forward)


def uninstall(module: nn.Module) -> None:
    """Undoes `install`."""
    restore_forward(module)
    hook = module.__dict__.pop(_HOOK, None)
    if hook is not None:
        hook.remove()


def keep_padding(model: nn.Module) -> None:
    """Keeps `nn.TransformerEncoder` from packing padded batches into nested tensors, which the op does not take."""
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and any(_HOOK in module.__dict__ for module in encoder.modules()):
            encoder.__dict__[_NESTED] = encoder.use_nested_tensor
            encoder.use_nested_tensor = False


def allow_packing(model: nn.Module) -> None:
    """Undoes `keep_padding`."""
    for encoder in model.modules():
        if _NESTED in encoder.__dict__:
            encoder.use_nested_tensor = encoder.__dict__.pop(_NESTED)


def _no_fused_call(module: nn.Module, args: Any) -> None:
    """Its presence is what counts."""


class _Interception(TorchFunctionMode):
    def __init__(self, layer: AttentionLayer) -> None:
        super().__init__()
        self.layer = layer
        self.called = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _SDPA:
            self.called = True
            return _scaled_dot_product_attention(self.layer, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _intercepting_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    layer = layer_of(module)
    assert layer is not None
    with _Interception(layer) as interception:
        out = forward_before(module)(*args, **kwargs)
    _require(
        layer, interception.called, "this module computed its attention without scaled_dot_product_attention",
        "another branch of its code", "switch the model to scaled_dot_product_attention, or exclude the module",
    )  # fmt: skip
    return out


def _scaled_dot_product_attention(
    layer: AttentionLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention` by the op: `[B, H, S, D]`, or `[B, S, D]` as one head."""
    _require(layer, dropout_p == 0.0, "dropout in attention", f"dropout_p={dropout_p}", "call model.eval()")
    shapes = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
    _require(
        layer, query.dim() == key.dim() == value.dim() and query.dim() in (3, 4), "attention of an unusual shape",
        shapes, "the op takes [B, H, S, D] or [B, S, D]",
    )  # fmt: skip
    _require(layer, attn_mask is None or not is_causal, "a mask and is_causal at once", "both", "pass one of them")
    one_head = query.dim() == 3
    if one_head:
        query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
    _require(
        layer,
        query.shape[0] == key.shape[0] == value.shape[0] and key.shape[1] == value.shape[1]
        and (query.shape[1] % key.shape[1] == 0 if enable_gqa else key.shape[1] in (1, query.shape[1])),
        "queries, keys and values broadcast in a way the op does not", shapes, "expand them, or set enable_gqa",
    )  # fmt: skip
    upper_left = is_causal
    if isinstance(attn_mask, CausalBias):
        is_causal, upper_left = True, attn_mask.variant == CausalVariant.UPPER_LEFT
        attn_mask = None
    seen = Visibility(is_causal=is_causal, q_start=_upper_left(query, key) if upper_left else None)
    if attn_mask is not None:
        if one_head and attn_mask.dim() == 3:
            attn_mask = attn_mask.unsqueeze(1)
        seen = Visibility(bias=_four_dimensions(attn_mask, query.dtype))
    out = _run(layer, query, key, value, scale, seen)
    return out.squeeze(1) if one_head else out


class NoWeights:
    """Stands for the attention weights, which `nn.MultiheadAttention` returns by default and most callers drop.

    The op never holds them; whoever does use them gets a ModelError that says so.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def _refuse(self, *args: object, **kwargs: object) -> Any:
        raise ModelError(
            "the op never holds the attention weights",
            where=self._name,
            found="need_weights=True (the default), and a use of what it returns",
            fix="exclude the module with a pattern and `enable: false`",
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._refuse()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return cls("nn.MultiheadAttention")._refuse()

    __getitem__ = __iter__ = __len__ = __add__ = __radd__ = __mul__ = __rmul__ = __matmul__ = __sub__ = _refuse
    __truediv__ = __lt__ = __gt__ = __neg__ = _refuse


def _multihead_forward(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, NoWeights | None]:
    """`nn.MultiheadAttention.forward` by the op."""
    layer = layer_of(module)
    assert layer is not None
    dropout = module.dropout if module.training else 0.0
    _require(layer, dropout == 0.0, "dropout in attention", f"dropout={dropout}", "call model.eval()")
    _require(layer, not query.is_nested, "nested tensors", "a nested query", "pass padded tensors and a padding mask")
    _require(
        layer, not is_causal or attn_mask is not None, "is_causal without its mask", "attn_mask=None",
        "nn.MultiheadAttention takes is_causal as a hint about attn_mask: pass both",
    )  # fmt: skip
    same_tokens = query is key
    batched = query.dim() == 3
    if not batched:
        query, key, value = (x.unsqueeze(0) for x in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    elif not module.batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))

    q, k, v = (
        torch.nn.functional.linear(x, weight, bias).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
        for x, weight, bias in zip((query, key, value), *_projections(module), strict=True)
    )
    seen = _multihead_visibility(module, q, k, key_padding_mask, attn_mask, is_causal, same_tokens)
    out = module.out_proj(_run(layer, q, k, v, None, seen).transpose(1, 2).flatten(2))
    weights = NoWeights(layer.name) if need_weights else None
    if not batched:
        return out.squeeze(0), weights
    return out if module.batch_first else out.transpose(0, 1), weights


def _projections(module: nn.MultiheadAttention) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """Weights and biases of q, k and v."""
    if module._qkv_same_embed_dim:
        weights = module.in_proj_weight.chunk(3)
    else:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    biases = (None, None, None) if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    return weights, biases


def _multihead_visibility(
    module: nn.MultiheadAttention, q: Tensor, k: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None,
    is_causal: bool, same_tokens: bool,
) -> Visibility:  # fmt: skip
    """What the masks of `nn.MultiheadAttention` hide; its boolean masks say True where a key is hidden."""
    if is_causal and key_padding_mask is None:  # only then does PyTorch, too, trust the hint instead of the mask
        return Visibility(is_causal=True, q_start=_upper_left(q, k))
    bias = None
    if attn_mask is not None:
        if attn_mask.dim() == 3:
            attn_mask = attn_mask.unflatten(0, (-1, module.num_heads))
        bias = _four_dimensions(~attn_mask if attn_mask.dtype == torch.bool else attn_mask, q.dtype)
    if key_padding_mask is None:
        return Visibility(bias=bias)
    if key_padding_mask.dtype == torch.bool:
        visible = ~key_padding_mask
    else:  # nn.TransformerEncoder makes boolean masks additive on the way
        visible = key_padding_mask > torch.finfo(key_padding_mask.dtype).min / 2
        if torch.compiler.is_compiling() or bool((visible & (key_padding_mask != 0)).any()):
            bias = merged(bias, key_padding_mask[:, None, None, :].to(q.dtype))
    return with_padding(Visibility(bias=bias), visible, q.shape[2], 0, rows_too=same_tokens)


def _run(layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor, scale: float | None, seen: Visibility) -> Tensor:
    return layer.run(
        AttentionCall(
            q, k, v, scale=float(q.shape[-1] ** -0.5 if scale is None else scale), is_causal=seen.is_causal,
            bias=seen.bias, kv_lengths=seen.kv_lengths, q_start=seen.q_start, q_lengths=seen.q_lengths,
        )
    )  # fmt: skip


def _four_dimensions(mask: Tensor, dtype: torch.dtype) -> Tensor:
    mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
    return mask if mask.dtype == torch.bool else mask.to(dtype)


def _upper_left(q: Tensor, k: Tensor) -> Tensor | None:
    """Row 0 at key 0, as PyTorch aligns; the op's default says the same where there are as many rows as keys."""
    if statically_known_true(q.shape[2] == k.shape[2]):
        return None
    return torch.zeros(q.shape[0], dtype=torch.int32, device=q.device)


def _require(layer: AttentionLayer, condition: bool, what: str, found: str, fix: str) -> None:
    if not condition:
        raise ModelError(what, where=f"{layer.name} ({layer.class_name})", found=found, fix=fix)
