"""The distillation objective: pure tensors in, tensors out.

    loss = alpha * T^2 * D(teacher_T, student_T) + (1 - alpha) * CE(labels, student at T = 1)

summed over response tokens; the caller divides once by the number of tokens in the optimisation step. `plain_kd_loss`
says it in full logits and leaves the gradient to autograd: it is the reference. `kd_loss` says the same a chunk of
tokens at a time and forms the gradient of the student's hidden state in the same pass, so that no `[tokens, vocab]`
tensor exists and each projection is made once.

T^2 keeps the meaning of alpha as T changes (Hinton et al. 2015, section 2). `reverse_kl` is MiniLLM's direction (Gu et
al. 2024, equation 1), `jsd` the generalised Jensen-Shannon divergence of GKD (Agarwal et al. 2024, equation 1).

Shape letters: N response tokens, V shared vocabulary, H student width, G teacher width.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
CHUNK_BYTES = 256 * 2**20  # what one chunk's fp32 [chunk, vocab] tensors may take together
CHUNK_TENSORS = 8  # how many of them are alive at the peak


class LossSums(NamedTuple):
    """Sums over N tokens: `loss` is differentiable, the other two are for the log. `kd` is D at T, without T^2."""

    loss: Tensor
    kd: Tensor
    ce: Tensor


class HeldoutStats(NamedTuple):
    """Per-token measures at T = 1, each `[N]` fp32: nats for the first three, 0 or 1 for the last."""

    kl_to_teacher: Tensor
    nll: Tensor
    teacher_nll: Tensor
    top1_agreement: Tensor


def chunk_tokens(vocab_size: int) -> int:
    """How many tokens a chunk holds for `CHUNK_BYTES`."""
    return max(8, CHUNK_BYTES // (4 * CHUNK_TENSORS * vocab_size))


def _log_ratios(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """`log(m/p)` and `log(m/q)` for the mixture m = beta p + (1 - beta) q, exactly 0 where p = q, finite everywhere."""
    d = log_q - log_p
    from_p = torch.log1p((1 - beta) * torch.expm1(d.clamp(max=0)))
    from_q = torch.log1p(beta * torch.expm1(-d.clamp(min=0)))
    behind = d <= 0
    return torch.where(behind, from_p, from_q + d), torch.where(behind, from_p - d, from_q)


def divergence(log_p: Tensor, log_q: Tensor, kind: str, beta: float = 0.5) -> Tensor:
    """D(teacher, student) per token in nats, `[N, V], [N, V] -> [N]`; 0 where the two agree.

    Args:
        log_p: the teacher's log-probabilities at temperature T.
        log_q: the student's.
        kind: `forward_kl` KL(p || q), `reverse_kl` KL(q || p) or `jsd`, beta KL(p || m) + (1 - beta) KL(q || m).
        beta: the weight of p in the mixture m; `jsd` only, strictly inside (0, 1).
    """
    if kind == "forward_kl":
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    if kind == "reverse_kl":
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    log_mp, log_mq = _log_ratios(log_p, log_q, beta)
    return -(beta * log_p.exp() * log_mp + (1 - beta) * log_q.exp() * log_mq).sum(-1)


def _divergence_and_gradient(log_p: Tensor, log_q: Tensor, kind: str, beta: float) -> tuple[Tensor, Tensor]:
    """`divergence`, and its gradient by the student's logits divided by T: `[N], [N, V]`."""
    q = log_q.exp()
    if kind == "forward_kl":
        p = log_p.exp()
        return (p * (log_p - log_q)).sum(-1), q - p
    if kind == "reverse_kl":
        ratio = log_q - log_p
        value = (q * ratio).sum(-1)
        return value, q * (ratio - value[:, None])
    log_mp, log_mq = _log_ratios(log_p, log_q, beta)
    kl_qm = -(q * log_mq).sum(-1)
    value = -beta * (log_p.exp() * log_mp).sum(-1) + (1 - beta) * kl_qm
    return value, (1 - beta) * q * (-log_mq - kl_qm[:, None])


def plain_kd_loss(
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor | None,
    labels_N: Tensor,
    *,
    temperature: float,
    alpha: float,
    kind: str = "forward_kl",
    beta: float = 0.5,
) -> LossSums:
    """The objective as the formula reads, with full logits and autograd. The reference for `kd_loss`."""
    student = student_logits_NV.float()
    ce = -log_softmax(student, -1).gather(1, labels_N[:, None]).sum()
    if alpha == 0 or teacher_logits_NV is None:
        return LossSums((1 - alpha) * ce, torch.zeros_like(ce), ce.detach())
    log_p = log_softmax(teacher_logits_NV.float() / temperature, -1)
    log_q = log_softmax(student / temperature, -1)
    kd = divergence(log_p, log_q, kind, beta).sum()
    return LossSums(alpha * temperature**2 * kd + (1 - alpha) * ce, kd.detach(), ce.detach())


class _ChunkedKD(torch.autograd.Function):
    """`kd_loss`, its gradients formed in the forward pass: a chunk's logits are gone before the next one's exist."""

    @staticmethod
    def forward(ctx, student_NH, student_VH, teacher_NG, teacher_VG, labels_N, temperature, alpha, kind, beta, dtype):
        student_head = student_VH.to(dtype)
        teacher_head = None if teacher_VG is None else teacher_VG.to(dtype)
        grad_hidden = torch.empty_like(student_NH) if ctx.needs_input_grad[0] else None
        grad_head = torch.zeros_like(student_VH, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        kd_sum = student_NH.new_zeros((), dtype=torch.float32)
        ce_sum = torch.zeros_like(kd_sum)
        size = chunk_tokens(len(student_VH))
        for start in range(0, len(labels_N), size):
            part = slice(start, start + size)
            hidden = student_NH[part].to(dtype)
            logits = (hidden @ student_head.T).float()
            log_q = log_softmax(logits, -1)
            labels = labels_N[part, None]
            ce_sum -= log_q.gather(1, labels).sum()
            grad = log_q.exp().scatter_add_(1, labels, torch.full_like(labels, -1, dtype=torch.float32))
            grad *= 1 - alpha
            if teacher_head is not None:
                log_p = log_softmax((teacher_NG[part].to(dtype) @ teacher_head.T).float() / temperature, -1)
                log_q = log_softmax(logits / temperature, -1)
                value, kd_grad = _divergence_and_gradient(log_p, log_q, kind, beta)
                kd_sum += value.sum()
                grad += kd_grad.mul_(alpha * temperature)  # alpha * T^2 * (1 / T)
            if grad_hidden is not None:
                grad_hidden[part] = grad.to(dtype) @ student_head
            if grad_head is not None:
                grad_head += (grad.to(dtype).T @ hidden).float()
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.head_dtype = student_VH.dtype
        ctx.mark_non_differentiable(kd_sum, ce_sum)
        return alpha * temperature**2 * kd_sum + (1 - alpha) * ce_sum, kd_sum, ce_sum

    @staticmethod
    def backward(ctx, grad_loss, *_):
        grad_hidden, grad_head = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad_loss,
            None if grad_head is None else (grad_head * grad_loss).to(ctx.head_dtype),
            *[None] * 8,
        )


def kd_loss(
    student_hidden_NH: Tensor,
    student_head_VH: Tensor,
    teacher_hidden_NG: Tensor | None,
    teacher_head_VG: Tensor | None,
    labels_N: Tensor,
    *,
    temperature: float,
    alpha: float,
    kind: str = "forward_kl",
    beta: float = 0.5,
) -> LossSums:
    """The objective, summed over N response tokens, never holding more than a chunk of logits.

    Products run in the type autocast asks for, or else the head's; softmaxes and sums in fp32. Without a teacher, or
    with alpha = 0, only the cross-entropy is computed. N = 0 gives zeros with a zero gradient.

    Args:
        student_hidden_NH: final hidden states (after the last norm) at the positions that predict `labels_N`.
        student_head_VH: the output matrix cut to the shared vocabulary; its gradient is formed only if it needs one.
        teacher_hidden_NG: the teacher's hidden states at the same response positions; never receives a gradient.
        teacher_head_VG: the teacher's output matrix cut to the shared vocabulary.
        labels_N: the response token ids.
        temperature: T > 0, of both softmaxes.
        alpha: the weight of the divergence, in [0, 1].
        kind: one of `DIVERGENCES`.
        beta: see `divergence`.
    """
    if teacher_hidden_NG is None or teacher_head_VG is None or alpha == 0:
        teacher_hidden_NG = teacher_head_VG = None
    device_type = student_hidden_NH.device.type
    autocast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if autocast else student_head_VH.dtype
    with torch.autocast(device_type, enabled=False):
        return LossSums(
            *_ChunkedKD.apply(
                student_hidden_NH, student_head_VH, teacher_hidden_NG, teacher_head_VG, labels_N,
                temperature, alpha, kind, beta, dtype,
            )
        )  # fmt: skip


@torch.no_grad()
def heldout_stats(
    student_hidden_NH: Tensor,
    student_head_VH: Tensor,
    teacher_hidden_NG: Tensor,
    teacher_head_VG: Tensor,
    labels_N: Tensor,
) -> HeldoutStats:
    """Forward KL to the teacher, negative log-likelihoods and top-1 agreement per response token, at T = 1."""
    parts = []
    size = chunk_tokens(len(student_head_VH))
    for start in range(0, len(labels_N), size):
        part = slice(start, start + size)
        logits_q = student_hidden_NH[part].to(student_head_VH.dtype) @ student_head_VH.T
        logits_p = teacher_hidden_NG[part].to(teacher_head_VG.dtype) @ teacher_head_VG.T
        log_q, log_p = log_softmax(logits_q.float(), -1), log_softmax(logits_p.float(), -1)
        labels = labels_N[part, None]
        parts.append(
            (
                divergence(log_p, log_q, "forward_kl"),
                -log_q.gather(1, labels)[:, 0],
                -log_p.gather(1, labels)[:, 0],
                (logits_q.argmax(-1) == logits_p.argmax(-1)).float(),
            )
        )
    return HeldoutStats(*(torch.cat(column) for column in zip(*parts, strict=True)))
