"""Rows laid end to end in one sequence, each attending to itself alone: a forward pass without padding.

Everything in a transformer but attention treats positions one by one, so a packed pass costs what its tokens cost. The
attention function below runs torch's fused causal kernel once a row, on any device; short rows on a CPU take plain
products instead, whose backward costs half of that kernel's.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from src.distillation.base import IGNORED, EncodedRow, causal_lm, collate, response_hidden
from src.utils.common import UserError

ATTENTION = "packed_sdpa"
SHORT = 512  # on a CPU the fused kernel wins on longer rows only
MULTIPLE = 32  # a pack's length is filled up to a multiple of this, so that few shapes occur


class _ShortRows(torch.autograd.Function):
    """Causal attention within each row by plain products: `[1, heads, L, width]` in, `[1, L, heads, width]` out.

    Key and value may have fewer heads, each shared by consecutive query heads (Ainslie et al. 2023). The softmax is in
    fp32; its probabilities are kept for the backward, `heads x length^2` a row.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
        out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
        kept = []
        for q, k, v, into in zip(*_rows(lengths, query, key, value), out[0].split(list(lengths)), strict=True):
            length = k.shape[1]
            scores = torch.bmm(q, k.mT).float().mul_(scale).view(-1, length, length)
            scores += torch.full((length, length), -math.inf).triu_(1)
            p = scores.softmax(-1).to(q.dtype).view(len(k), -1, length)
            kept.append(p)
            into.copy_(torch.bmm(p, v).view(-1, *v.shape[1:]).transpose(0, 1))
        ctx.save_for_backward(query, key, value, *kept)
        ctx.lengths, ctx.scale = lengths, scale
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        gradients = [torch.empty_like(states) for states in (query, key, value)]
        rows = zip(*_rows(ctx.lengths, query, key, value, gradient.transpose(1, 2)), kept, strict=True)
        into = zip(*(states[0].split(list(ctx.lengths), 1) for states in gradients), strict=True)
        for (q, k, v, go, p), (gq, gk, gv) in zip(rows, into, strict=True):
            gv.copy_(torch.bmm(p.mT, go))
            p_float, gp = p.float(), torch.bmm(go, v.mT).float()
            gp -= (p_float * gp).sum(-1, keepdim=True)
            gs = gp.mul_(p_float).mul_(ctx.scale).to(q.dtype)
            gq.copy_(torch.bmm(gs, k).view_as(gq))
            gk.copy_(torch.bmm(gs.mT, q))
        return *gradients, None, None


def _rows(lengths: Sequence[int], query: Tensor, key: Tensor, value: Tensor, *like_query: Tensor) -> list[list[Tensor]]:
    """Each row's `[key heads, heads of the group x length, width]`: of the query, key, value and what follows."""
    return [[row.reshape(key.shape[1], -1, row.shape[-1]) for row in states[0].split(list(lengths), 1)]
            for states in (query, key, value, *like_query)]  # fmt: skip


@torch.compiler.disable  # a compiled layer would be compiled again for every list of lengths
def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    sequence_lengths: Tensor, dropout: float = 0.0, scaling: float | None = None,
    sliding_window: int | None = None, softcap: float | None = None, s_aux: Tensor | None = None, **_: object,
) -> tuple[Tensor, None]:  # fmt: skip
    """Causal attention within each of the `sequence_lengths` `[rows]`; the interface is that of transformers.

    Raises:
        UserError: the model caps its attention scores or has attention sinks, which torch's fused kernel does not know.
    """
    if softcap is not None or s_aux is not None:
        raise UserError("this model's attention has a soft-cap or sinks, so its rows cannot be packed; --no_packing")
    lengths = sequence_lengths.tolist()
    window = sliding_window is not None and max(lengths) > sliding_window
    if query.device.type == "cpu" and max(lengths) <= SHORT and not (dropout or window):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return _ShortRows.apply(query.to(value.dtype), key.to(value.dtype), value, lengths, scale), None
    parts = []
    for q, k, v in zip(*(states.split(lengths, 2) for states in (query, key, value)), strict=True):
        mask, length = None, q.shape[2]
        if sliding_window is not None and length > sliding_window:
            steps = torch.arange(length, device=q.device)
            back = steps[:, None] - steps
            mask = (back >= 0) & (back < sliding_window)
        parts.append(
            scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
            )
        )
    return torch.cat(parts, 2).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, packed_attention)


def pack(rows: Sequence[EncodedRow], pad_id: int, multiple: int = MULTIPLE) -> dict[str, object]:
    """Rows end to end: `input_ids`, `position_ids`, `labels`, each `[1, L]`, and `sequence_lengths`.

    What fills L up to `multiple` is one more sequence, of padding.
    """
    lengths = [len(row) for row in rows]
    if fill := -sum(lengths) % multiple:
        lengths.append(fill)
    ids = [token for row in rows for token in (*row.prompt_ids, *row.response_ids)] + [pad_id] * fill
    labels = [t for row in rows for t in (*[IGNORED] * len(row.prompt_ids), *row.response_ids)] + [IGNORED] * fill
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "labels": torch.tensor([labels]),
        "sequence_lengths": lengths,
    }


def batch_of(rows: Sequence[EncodedRow], pad_id: int, packing: bool) -> dict[str, object]:
    """What `response_hidden` reads: the rows packed, or padded to the longest."""
    return pack(rows, pad_id) if packing else collate(rows, pad_id)


@contextlib.contextmanager
def attention_of_packs(model: nn.Module, packing: bool) -> Iterator[None]:
    """Within it the model reads packed batches (or, with packing off, whatever it read before)."""
    lm = causal_lm(model)
    before = lm.config._attn_implementation
    if packing:
        try:
            lm.set_attn_implementation(ATTENTION)
        except ValueError as error:
            raise UserError(
                f"{type(lm).__name__} cannot read packed rows ({str(error)[:120]}...); --no_packing"
            ) from error
    try:
        yield
    finally:
        lm.set_attn_implementation(before)


@torch.no_grad()
def check_packing(model: PreTrainedModel, rows: Sequence[EncodedRow], pad_id: int) -> None:
    """Try two rows packed together against each packed alone, and that against the model's own attention.

    Raises:
        UserError: the states differ by more than rounding, so this model mixes rows elsewhere than in its attention, or
            attends in a way of its own.
    """
    pair = sorted(rows, key=len)[:2]
    own = torch.cat([response_hidden(model, collate([row], pad_id))[0] for row in pair]).float()
    with attention_of_packs(model, True):
        alone = torch.cat([response_hidden(model, pack([row], pad_id))[0] for row in pair]).float()
        together = response_hidden(model, pack(pair, pad_id))[0].float()
    mixed = ((together - alone).norm() / alone.norm()).item()
    other = ((alone - own).norm() / own.norm()).item()  # two kernels in bf16: 0.01, and 0.06 with tiny random weights
    if not (mixed < 0.05 and other < 0.15):
        raise UserError(
            f"packed rows are not kept apart by this model (its states are off by {max(mixed, other):.0%}); "
            "pass --no_packing"
        )
