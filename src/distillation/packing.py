"""Rows laid end to end in one sequence, each attending to itself alone: a forward pass without padding.

What several rows begin alike with (the template, a system message, the whole prompt of several answers) is run once and
read by all of them, as in Wang & Hegde (2024, arXiv:2410.20305): a causal model's states there are the same in every
row, and its gradient is the sum of theirs. Everything in a transformer but attention treats positions one by one, so a
packed pass costs what its tokens cost. The attention function below runs torch's fused causal kernel once a row, on any
device; short rows on a CPU take plain products instead, whose backward costs half of that kernel's.
"""

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from src.distillation.base import IGNORED, EncodedRow, causal_lm, collate, response_hidden
from src.utils.common import UserError

ATTENTION = "packed_sdpa"
SHORT = 512  # on a CPU the fused kernel wins on longer rows only
MULTIPLE = 32  # a pack's length is filled up to a multiple of this, so that few shapes occur
LEAST = 8  # tokens that rows must begin alike with for these to be worth a segment of their own


class Segment(NamedTuple):
    """Tokens `start` to `end` of a row, read after those of the segment `parent` (-1: none)."""

    row: int
    start: int
    end: int
    parent: int


def segments(rows: Sequence[EncodedRow]) -> list[Segment]:
    """The rows as a trie: beginnings that prompts share, and of every row the rest, in the order of the rows.

    A row's own segment keeps at least the last token of its prompt, whose state predicts the first of the response.
    """
    prompts = [row.prompt_ids[:-1] for row in rows]
    shared: list[list[tuple[int, int, int]]] = [[] for _ in rows]  # of each row: (the first row that has it, from, to)

    groups = [(list(range(len(rows))), 0, 0)]  # rows, where their next segment starts, how far they are known alike
    while groups:
        group, start, same = groups.pop()
        first, last = min(prompts[index] for index in group), max(prompts[index] for index in group)
        while same < len(first) and first[same] == last[same]:  # then it is the same in all between them
            same += 1
        if same - start >= LEAST and len(group) > 1:
            for index in group:
                shared[index].append((group[0], start, same))
            start = same
        going_on = defaultdict(list)
        for index in group:
            if len(prompts[index]) > same:
                going_on[prompts[index][same]].append(index)
        groups += [(part, start, same) for part in going_on.values() if len(part) > 1]
    found: list[Segment] = []
    place: dict[tuple[int, int, int], int] = {}
    for index, row in enumerate(rows):
        parent = -1
        for beginning in shared[index]:
            if beginning not in place:
                place[beginning] = len(found)
                found.append(Segment(*beginning, parent))
            parent = place[beginning]
        found.append(Segment(index, found[parent].end if parent >= 0 else 0, len(row), parent))
    return found


class _ShortRows(torch.autograd.Function):
    """Causal attention within each row by plain products: `[1, heads, L, width]` in, `[1, L, heads, width]` out.

    Key and value may have fewer heads, each shared by consecutive query heads (Ainslie et al. 2023). The softmax is in
    fp32; its probabilities are kept for the backward, `heads x length^2` a row.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: list[int], chains: list[list[int]],
                scale: float) -> Tensor:  # fmt: skip
        out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
        kept = []
        pieces = zip(_grouped(query, len(key[0]), lengths), _joined(key, lengths, chains),
                     _joined(value, lengths, chains), out[0].split(lengths), strict=True)  # fmt: skip
        for q, k, v, into in pieces:
            scores = torch.bmm(q, k.mT).float().mul_(scale).view(-1, len(into), k.shape[1])
            scores += torch.full(scores.shape[1:], -math.inf).triu_(1 + k.shape[1] - len(into))
            p = scores.softmax(-1).to(q.dtype).view(len(k), -1, k.shape[1])
            kept.append(p)
            into.copy_(torch.bmm(p, v).view(-1, len(into), v.shape[2]).transpose(0, 1))
        ctx.save_for_backward(query, key, value, *kept)
        ctx.lengths, ctx.chains, ctx.scale = lengths, chains, scale
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        g_query = torch.empty_like(query)
        # in fp32: what rows share gets a part from each of them
        g_key, g_value = (torch.zeros_like(states, dtype=torch.float32) for states in (key, value))
        gqs, gks, gvs = (states[0].split(ctx.lengths, 1) for states in (g_query, g_key, g_value))
        heads = len(key[0])
        pieces = zip(ctx.chains, gqs, _grouped(query, heads, ctx.lengths), _joined(key, ctx.lengths, ctx.chains),
                     _joined(value, ctx.lengths, ctx.chains), _grouped(gradient.transpose(1, 2), heads, ctx.lengths),
                     kept, strict=True)  # fmt: skip
        for chain, gq, q, k, v, go, p in pieces:
            p_float, gp = p.float(), torch.bmm(go, v.mT).float()
            gp -= (p_float * gp).sum(-1, keepdim=True)
            gs = gp.mul_(p_float).mul_(ctx.scale).to(q.dtype)
            gq.copy_(torch.bmm(gs, k).view_as(gq))
            own = [ctx.lengths[index] for index in chain]
            for into, found in ((gks, torch.bmm(gs.mT, q)), (gvs, torch.bmm(p.mT, go))):
                for index, part in zip(chain, found.split(own, 1), strict=True):
                    into[index].add_(part)
        return g_query, g_key.to(key.dtype), g_value.to(value.dtype), None, None, None


def _grouped(states: Tensor, heads: int, lengths: list[int]) -> list[Tensor]:
    """Each segment's `[key heads, heads of the group x length, width]` of a query, or of what is shaped like one."""
    return [segment.reshape(heads, -1, segment.shape[-1]) for segment in states[0].split(lengths, 1)]


def _joined(states: Tensor, lengths: list[int], chains: list[list[int]]) -> list[Tensor]:
    """Of each segment the keys or values of all that it reads, itself last, `[key heads, length, width]`."""
    split = states[0].split(lengths, 1)
    return [split[chain[0]] if len(chain) == 1 else torch.cat([split[i] for i in chain], 1) for chain in chains]


def chains_of(parents: Sequence[int]) -> list[list[int]]:
    """Of each segment those that it reads, the first of the row first, itself last."""
    chains: list[list[int]] = []
    for index, parent in enumerate(parents):
        chains.append([*(chains[parent] if parent >= 0 else []), index])
    return chains


@torch.compiler.disable  # a compiled layer would be compiled again for every list of lengths
def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    segment_lengths: Tensor, segment_parents: Tensor, dropout: float = 0.0, scaling: float | None = None,
    sliding_window: int | None = None, softcap: float | None = None, s_aux: Tensor | None = None, **_: object,
) -> tuple[Tensor, None]:  # fmt: skip
    """Causal attention within each row, made of the `segment_lengths` `[segments]` that follow their
    `segment_parents`; the interface is that of transformers.

    Raises:
        UserError: the model caps its attention scores or has attention sinks, which torch's fused kernel does not know.
    """
    if softcap is not None or s_aux is not None:
        raise UserError("this model's attention has a soft-cap or sinks, so its rows cannot be packed; --no_packing")
    lengths, chains = segment_lengths.tolist(), chains_of(segment_parents.tolist())
    longest = max(sum(lengths[index] for index in chain) for chain in chains)
    window = sliding_window is not None and longest > sliding_window
    if query.device.type == "cpu" and longest <= SHORT and not (dropout or window):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return _ShortRows.apply(query.to(value.dtype), key.to(value.dtype), value, lengths, chains, scale), None
    split, parts = [states.split(lengths, 2) for states in (query, key, value)], []
    for chain in chains:  # with the queries of what it shares too: fused kernels know whole rows only
        q, k, v = (torch.cat([states[index] for index in chain], 2) for states in split)
        mask, length = None, q.shape[2]
        if sliding_window is not None and length > sliding_window:
            steps = torch.arange(length, device=q.device)
            back = steps[:, None] - steps
            mask = (back >= 0) & (back < sliding_window)
        out = scaled_dot_product_attention(
            q, k, v, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        parts.append(out[:, :, length - lengths[chain[-1]] :])
    return torch.cat(parts, 2).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, packed_attention)


def pack(rows: Sequence[EncodedRow], pad_id: int, multiple: int = MULTIPLE) -> dict[str, object]:
    """Rows end to end, shared beginnings once: `input_ids`, `position_ids`, `labels`, each `[1, L]`, and of every
    segment `segment_lengths`, `segment_parents`.

    What fills L up to `multiple` is one more segment, of padding.
    """
    found = segments(rows)
    tokens = [(*row.prompt_ids, *row.response_ids) for row in rows]
    marked = [(*[IGNORED] * len(row.prompt_ids), *row.response_ids) for row in rows]
    fill = -sum(end - start for _, start, end, _ in found) % multiple
    ids, labels = ([t for row, start, end, _ in found for t in of[row][start:end]] for of in (tokens, marked))
    spans = [(start, end) for _, start, end, _ in found] + [(0, fill)] * bool(fill)
    return {
        "input_ids": torch.tensor([ids + [pad_id] * fill]),
        "position_ids": torch.cat([torch.arange(start, end) for start, end in spans])[None],
        "labels": torch.tensor([labels + [IGNORED] * fill]),
        "segment_lengths": [end - start for start, end in spans],
        "segment_parents": [segment.parent for segment in found] + [-1] * bool(fill),
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
