"""Rows laid end to end in one sequence, each attending to itself alone: a forward pass without padding.

What several rows begin alike with (the template, a system message, the whole prompt of several answers) is run once and
read by all of them, as in Wang & Hegde (2024, arXiv:2410.20305): a causal model's states there are the same in every
row, and its gradient is the sum of theirs. Everything in a transformer but attention treats positions one by one, so a
packed pass costs what its tokens cost. Attention itself is one call of torch's varlen kernel where a GPU has it; short
rows on a CPU take plain products, whose backward costs half of the fused kernel's; else that kernel runs once a row.
"""

import contextlib
import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from src.distillation.base import IGNORED, EncodedRow, causal_lm, collate, response_hidden, send
from src.utils.common import UserError, logger

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
    # 1. beginnings: groups of rows that are alike so far, cut where they part
    #
    #    a  <s>user  What is 2 + 2?  4          <s>user What is  is shared by all,
    #    b  <s>user  What is 2 + 3?  5          2 +  by a and b, the rest is each row's own
    #    c  <s>user  What is it?     A question
    prompts = [row.prompt_ids[:-1] for row in rows]  # the last token predicts the answer: always the row's own
    shared: list[list[tuple[int, int, int]]] = [[] for _ in rows]  # of each row: (the first row that has it, from, to)

    groups = [(list(range(len(rows))), 0, 0)]  # rows, where their next segment starts, how far they are known alike
    while groups:
        group, start, same = groups.pop()
        # of sorted sequences the first and the last differ most: what these two share, all share
        first, last = min(prompts[index] for index in group), max(prompts[index] for index in group)
        # `last` has a token there: one that is a beginning of `first` would sort before it
        while same < len(first) and first[same] == last[same]:  # then it is the same in all between them
            same += 1
        if same - start >= LEAST and len(group) > 1:  # shorter ones cost more to handle than to run again
            for index in group:
                shared[index].append((group[0], start, same))
            start = same
        going_on = defaultdict(list)  # the next token -> rows that have it, a group of their own
        for index in group:
            if len(prompts[index]) > same:
                going_on[prompts[index][same]].append(index)
        groups += [(part, start, same) for part in going_on.values() if len(part) > 1]
    # 2. the segments in the order of the rows, a shared one before the first row that has it
    found: list[Segment] = []
    place: dict[tuple[int, int, int], int] = {}
    for index, row in enumerate(rows):
        parent = -1
        # from the first of the row on, each the parent of the next
        for beginning in shared[index]:
            if beginning not in place:
                place[beginning] = len(found)
                found.append(Segment(*beginning, parent))  # of the first row that has it, from, to
            parent = place[beginning]
        # the row's own rest, from where the last beginning that it shares ends
        found.append(Segment(index, found[parent].end if parent >= 0 else 0, len(row), parent))
    return found


class _Places(NamedTuple):
    """Where varlen attention finds each segment's queries and keys, on one device."""

    query_ends: Tensor  # [segments + 1] int32, running sums of the lengths
    key_ends: Tensor
    longest_query: int
    longest_key: int
    keys: Tensor | None  # the position of every key in the pack; None where each segment reads itself alone


@dataclass(frozen=True)
class Layout:
    """The segments of a pack, prepared once for all layers: their lengths, and which one each follows (-1: none).

    <------ shared beginning ------><-- row a --><---- row b ---->
    lengths = [9, 4, 5]             parents = [-1, 0, 0]            chains = [[0], [0, 1], [0, 2]]
    """

    lengths: list[int]
    parents: list[int]

    @functools.cached_property
    def chains(self) -> list[list[int]]:
        """Of each segment those that it reads, the first of the row first, itself last."""
        chains: list[list[int]] = []
        for index, parent in enumerate(self.parents):
            before = chains[parent] if parent >= 0 else []
            chains.append([*before, index])
        return chains

    @functools.cached_property
    def longest(self) -> int:
        """Tokens of the longest row, what it shares included."""
        return max(sum(self.lengths[index] for index in chain) for chain in self.chains)

    @functools.cached_property
    def _on_devices(self) -> dict[torch.device, _Places]:
        return {}

    def on(self, device: torch.device) -> _Places:
        """For varlen attention; made once a device."""
        if device not in self._on_devices:
            self._on_devices[device] = self._places(device)
        return self._on_devices[device]

    def _places(self, device: torch.device) -> _Places:
        # lengths 9 4 5, chains [[0], [0, 1], [0, 2]]: query_ends 0 9 13 18, key_lengths 9 13 14, key_ends 0 9 22 36
        # keys are 0..8, then 0..8 9..12, then 0..8 13..17
        starts = [0, *itertools.accumulate(self.lengths)]  # of the segments in the pack
        key_lengths = [sum(self.lengths[index] for index in chain) for chain in self.chains]
        keys = None
        if max(self.parents) >= 0:  # shared keys stand once in the pack and once for each segment that reads them
            spans = [range(starts[i], starts[i + 1]) for chain in self.chains for i in chain]
            keys = send(torch.tensor([position for span in spans for position in span]), device)
        ends = []
        for lengths in (self.lengths, key_lengths):
            ends.append(send(torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32), device))
        return _Places(*ends, max(self.lengths), max(key_lengths), keys)


class _ShortRows(torch.autograd.Function):
    """Causal attention within each row by plain products: `[1, heads, L, width]` in, `[1, L, heads, width]` out.

    Key and value may have fewer heads, each shared by consecutive query heads (Ainslie et al. 2023). The softmax is in
    fp32; its probabilities are kept for the backward, `heads x length^2` a row.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
        out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
        kept = []  # probabilities, for the backward pass
        # a segment at a time: q [key heads, group x length, width], k and v [key heads, keys, width],
        # out [length, heads, width]; `group` query heads share a key head
        pieces = zip(
            _grouped(query, len(key[0]), layout),
            _joined(key, layout),
            _joined(value, layout),
            out[0].split(layout.lengths),
            strict=True,
        )
        for q, k, v, into in pieces:
            # heads of a group lie below each other, so that one product serves all that share a key head
            scores = torch.bmm(q, k.mT).float().mul_(scale).view(-1, len(into), k.shape[1])
            # [heads, length, keys]
            scores += _future(len(into), k.shape[1])
            # and back: [key heads, group x length, keys]
            p = scores.softmax(-1).to(q.dtype).view(len(k), -1, k.shape[1])
            kept.append(p)
            into.copy_(torch.bmm(p, v).view(-1, len(into), v.shape[2]).transpose(0, 1))
        ctx.save_for_backward(query, key, value, *kept)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        layout, heads = ctx.layout, key.shape[1]
        g_query = torch.empty_like(query)
        # in fp32: what rows share gets a part from each of them
        g_key, g_value = (torch.zeros_like(states, dtype=torch.float32) for states in (key, value))
        # of each segment a view [heads, length, width], which is written in place
        gqs, gks, gvs = (states[0].split(layout.lengths, 1) for states in (g_query, g_key, g_value))
        pieces = zip(
            layout.chains,
            gqs,
            _grouped(query, heads, layout),
            _joined(key, layout),
            _joined(value, layout),
            _grouped(gradient.transpose(1, 2), heads, layout),
            kept,
            strict=True,
        )
        for chain, gq, q, k, v, go, p in pieces:
            # softmax backwards: gs = p * (gp - sum(p * gp)), gp the gradient of the probabilities
            p_float, gp = p.float(), torch.bmm(go, v.mT).float()
            gp -= (p_float * gp).sum(-1, keepdim=True)
            # by q k^T: the scores are scale times that
            gs = gp.mul_(p_float).mul_(ctx.scale).to(q.dtype)
            gq.copy_(torch.bmm(gs, k).view_as(gq))
            # keys and values were joined of several segments: each gets its part back
            own = [layout.lengths[index] for index in chain]
            for into, found in ((gks, torch.bmm(gs.mT, q)), (gvs, torch.bmm(p.mT, go))):
                for index, part in zip(chain, found.split(own, 1), strict=True):
                    into[index].add_(part)
        return g_query, g_key.to(key.dtype), g_value.to(value.dtype), None, None


@functools.lru_cache(maxsize=32)  # the same in every layer; 1 MiB at most
def _future(queries: int, keys: int) -> Tensor:
    """-inf where a key comes after its query, the last query being the last key's own; else 0."""
    # 2 queries of 3 keys: [[0, 0, -inf], [0, 0, 0]]
    return torch.full((queries, keys), -math.inf).triu_(1 + keys - queries)


def _grouped(states: Tensor, heads: int, layout: Layout) -> list[Tensor]:
    """Each segment's `[key heads, heads of the group x length, width]` of a query, or of what is shaped like one."""
    return [segment.reshape(heads, -1, segment.shape[-1]) for segment in states[0].split(layout.lengths, 1)]


def _joined(states: Tensor, layout: Layout) -> list[Tensor]:
    """Of each segment the keys or values of all that it reads, itself last, `[key heads, length, width]`."""
    split = states[0].split(layout.lengths, 1)
    joined = []
    for chain in layout.chains:
        joined.append(split[chain[0]] if len(chain) == 1 else torch.cat([split[i] for i in chain], 1))
    return joined


class _Gathered(torch.autograd.Function):
    """`states[positions]`, its gradient summed in fp32: what rows share gets a part from each of them."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(positions)
        ctx.shape = states.shape
        return states.index_select(0, positions)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        [positions] = ctx.saved_tensors
        summed = gradient.new_zeros(ctx.shape, dtype=torch.float32)
        return summed.index_add_(0, positions, gradient.float()).to(gradient.dtype), None


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float | None, window: int | None
) -> Tensor:
    """All segments in one call: each one's own tokens ask, what it shares and its own tokens answer.

    The causal mask is aligned at the ends (bottom right), so that the last query sees every key.
    """
    from torch.nn.attention.varlen import varlen_attn  # torch 2.10 and later

    places = layout.on(query.device)
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))  # [L, heads, width]
    # not two calls merged by their log-sum-exp, which has no gradient there
    if places.keys is not None:
        k, v = _Gathered.apply(k, places.keys), _Gathered.apply(v, places.keys)
    back = -1 if window is None else window - 1  # keys before a query's own, which a window counts too; -1: all
    return varlen_attn(
        q,
        k,
        v,
        places.query_ends,
        places.key_ends,
        places.longest_query,
        places.longest_key,
        scale=scale,
        window_size=(back, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )[None]


def _varlen_error(device: torch.device, dtype: torch.dtype, width: int) -> float:
    """How far it is from one call a row, relative; outputs and gradients of rows that share a beginning."""
    generator = torch.Generator(device).manual_seed(0)
    layout = Layout([40, 24, 33], [-1, 0, 0])  # two rows, which begin with the same 40 tokens
    # query, key and value: a key head serves two query heads
    shapes = [(1, heads, sum(layout.lengths), width) for heads in (4, 2, 2)]
    # whoever asks first may be measuring (no gradients), under autocast, or within a checkpoint, which would take
    # what is saved here for its own
    own_hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with torch.enable_grad(), torch.autocast(device.type, enabled=False), own_hooks:
        states = [torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_() for shape in shapes]
        found, wanted = (attend(*states, layout, None, None).float() for attend in (_varlen, _row_by_row))
        weights = torch.randn(found.shape, generator=generator, device=device)
        gradients = [torch.autograd.grad((out * weights).sum(), states) for out in (found, wanted)]
    pairs = [(found.detach(), wanted.detach()), *zip(*gradients, strict=True)]
    distances = [(one.float() - other.float()).norm() / other.float().norm() for one, other in pairs]
    return torch.stack(distances).max().item()  # NaN where one of them is; Python's `max` may pass over it


@functools.cache
def varlen_works(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether torch's varlen attention gives on this device what one SDPA call a row gives, gradients too.

    Tried once, on rows that share a beginning; said in the log where it does not.
    """
    try:
        off = _varlen_error(device, dtype, width)
    except (ImportError, RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        logger.info("no varlen attention (%s); a call a row does the same, slower", str(error).split("\n")[0][:120])
        return False
    works = off <= 0.02  # rounding in bf16 is 0.005; NaN is no `<=`
    if not works:
        logger.info("varlen attention is off by %.0f %% here; a call a row instead, slower", 100 * off)
    return works


def _row_by_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scale: float | None,
    window: int | None,
    dropout: float = 0.0,
) -> Tensor:
    """One call of torch's fused kernel a segment, on any device."""
    split = [states.split(layout.lengths, 2) for states in (query, key, value)]
    parts = []
    for chain in layout.chains:  # with the queries of what it shares too: fused kernels know whole rows only
        q, k, v = (torch.cat([states[index] for index in chain], 2) for states in split)
        mask, length = None, q.shape[2]
        if window is not None and length > window:
            steps = torch.arange(length, device=q.device)
            # [length, length]: how many tokens each key stands before a query
            back = steps[:, None] - steps
            mask = (back >= 0) & (back < window)
        out = scaled_dot_product_attention(
            q, k, v, mask, dropout, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        # the outputs of what it shares come from that segment's own call
        parts.append(out[:, :, length - layout.lengths[chain[-1]] :])
    return torch.cat(parts, 2).transpose(1, 2).contiguous()


@torch.compiler.disable  # a compiled layer would be compiled again for every list of lengths
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Causal attention within each row of a pack, `[1, heads, L, width]` in, `[1, L, heads, width]` out; the interface
    is that of transformers.

    Raises:
        UserError: the model caps its attention scores or has attention sinks, which torch's fused kernel does not know.
    """
    if softcap is not None or s_aux is not None:
        raise UserError("this model's attention has a soft-cap or sinks, so its rows cannot be packed; --no_packing")
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves what RoPE has touched in fp32
    # a window that no row is longer than cuts nothing off
    window = sliding_window if sliding_window is not None and layout.longest > sliding_window else None
    alike = query.shape[-1] == value.shape[-1]  # not with multi-head latent attention, whose values are narrower
    # 1. one call for all rows, where a GPU has it
    half = value.is_cuda and value.dtype in (torch.bfloat16, torch.float16)
    if half and alike and not dropout and varlen_works(value.device, value.dtype, value.shape[-1]):
        return _varlen(query, key, value, layout, scaling, window), None
    # 2. plain products for short rows on a CPU
    if value.device.type == "cpu" and alike and layout.longest <= SHORT and not dropout and window is None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return _ShortRows.apply(query, key, value, layout, scale), None
    # 3. a call a row, which knows dropout and windows too
    return _row_by_row(query, key, value, layout, scaling, window, dropout), None


AttentionInterface.register(ATTENTION, packed_attention)


def pack(rows: Sequence[EncodedRow], pad_id: int, multiple: int = MULTIPLE) -> dict[str, Any]:
    """Rows end to end, shared beginnings once: `input_ids`, `position_ids`, `labels`, each `[1, L]`, and `layout`.

    What fills L up to `multiple` is one more segment, of padding.
    """
    ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    lengths: list[int] = []
    parents: list[int] = []
    # a row's own segment begins with a token of its prompt, so what predicts across a border has no label
    for segment in segments(rows):
        row, span = rows[segment.row], slice(segment.start, segment.end)
        ids += (*row.prompt_ids, *row.response_ids)[span]
        labels += (*[IGNORED] * len(row.prompt_ids), *row.response_ids)[span]
        positions += range(segment.start, segment.end)
        lengths.append(segment.end - segment.start)
        parents.append(segment.parent)
    fill = -len(ids) % multiple  # 70 tokens to a multiple of 32: 26
    if fill:
        ids += [pad_id] * fill
        labels += [IGNORED] * fill
        positions += range(fill)
        lengths.append(fill)
        parents.append(-1)  # it reads itself, and nobody reads it
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "labels": torch.tensor([labels]),
        "layout": Layout(lengths, parents),
    }


def batch_of(rows: Sequence[EncodedRow], pad_id: int, packing: bool) -> dict[str, Any]:
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
    pair = sorted(rows, key=len)[:2]  # the cheapest
    own = torch.cat([response_hidden(model, collate([row], pad_id))[0] for row in pair]).float()
    with attention_of_packs(model, True):
        alone = torch.cat([response_hidden(model, pack([row], pad_id))[0] for row in pair]).float()
        together = response_hidden(model, pack(pair, pad_id))[0].float()
    # relative: rows seen by each other, and our attention against the model's own
    mixed = ((together - alone).norm() / alone.norm()).item()
    other = ((alone - own).norm() / own.norm()).item()  # two kernels in bf16: 0.01, and 0.06 with tiny random weights
    if not (mixed < 0.05 and other < 0.15):
        raise UserError(
            f"packed rows are not kept apart by this model (its states are off by {max(mixed, other):.0%}); "
            "pass --no_packing"
        )
