"""The filters of sampling, top-k and top-p: which tokens can be drawn, and with what probability.

Answers are drawn through them (`sft.sample_tokens`), and a teacher's logits are cut by them (`losses.kd_loss`), so that
what a student is taught is what such text was drawn from; a server may filter otherwise (see `losses`). Shapes: B rows
of V logits, of which K are looked at.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

EXCLUDED = -1e30  # a logit of probability exactly 0; finite at T > 1e-8, for 0 * log 0 would be NaN in a divergence
# Of a 24th of the rows a sort for top-p alone fits into the 2 bytes an entry that losses.KERNEL_BYTES has beside both
# models' logits: it takes 25, and 44 while CUDA sorts (two buffers of pairs, keys; ATen/native/cuda/SortStable.cu).
SORT_PARTS = 24


class Candidates(NamedTuple):
    """Tokens that may be drawn, `[B, K]` each, in the order in which they fill up the mass.

    ids: None where all V are candidates, in their own order.
    probabilities: the softmax over the candidates, and 0 for those that top-p leaves out; what is left is not
        normalised again.
    """

    ids: Tensor | None
    logits: Tensor
    probabilities: Tensor


def candidates(logits_BV: Tensor, temperature: float, top_k: int, top_p: float) -> Candidates:
    """Temperature, then top-k, then top-p of what is left, in vLLM's order; the token that crosses top_p stays in.

    With top_k set, everything after it costs k candidates and not the vocabulary; with top_p alone a row is sorted.

    Args:
        temperature: T > 0.
        top_k: how many stay; 0: all.
        top_p: the mass that stays (nucleus; Holtzman et al. 2020, equation 2); 1: all.
    """
    logits, ids = logits_BV, None
    if top_k:
        logits, ids = logits_BV.topk(min(top_k, logits_BV.shape[-1]), dim=-1)
    elif top_p < 1:
        logits, ids = logits_BV.sort(dim=-1, descending=True)
    probabilities = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        # 0.5 0.3 0.2 with top_p 0.7: the mass before each is 0, 0.5, 0.8, so that two stay; the first always does
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0)
    return Candidates(ids, logits, probabilities)


def cut_to_candidates(logits_BV: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """The logits, overwritten with EXCLUDED for every token that cannot be drawn.

    Their softmax at `temperature` is then `p' = p * 1[kept] / sum_kept p`.

    Example:
        >>> cut_to_candidates(torch.tensor([[1.0, 3.0, 2.0]]), 1.0, 2, 1.0)
        tensor([[-1.0000e+30,  3.0000e+00,  2.0000e+00]])
    """
    # 1. a sort takes several times the memory of its rows, so it is done a few rows at a time
    sorts = top_p < 1 and not top_k
    rows = math.ceil(len(logits_BV) / SORT_PARTS) if sorts else len(logits_BV)
    for part_BV in logits_BV.split(max(1, rows)):
        # 2. every logit is replaced, then those of the candidates are put back where they were
        kept = candidates(part_BV, temperature, top_k, top_p)
        if kept.ids is not None:
            logits = torch.where(kept.probabilities > 0, kept.logits, EXCLUDED)
            part_BV.fill_(EXCLUDED).scatter_(1, kept.ids, logits)
    return logits_BV
