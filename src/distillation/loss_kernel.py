"""What lies between the products of the distillation loss, as one Triton kernel: logits in, their gradient out.

A program reads one token's two rows of fp32 logits in blocks: once for the sums of the softmaxes, which are kept online
(Milakov & Gimelshein 2018), and once more for the divergence and the gradient, which it writes in the products' type.
Where the gradient needs the divergence's own value (reverse KL, JSD) the rows are read a third time between the two.
`losses.py` says in plain torch what every line here must give. With TRITON_INTERPRET=1 it runs on a CPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

KINDS = {"none": 0, "forward_kl": 1, "reverse_kl": 2, "jsd": 3}
BLOCK = 4096  # logits that a program looks at together


@triton.jit
def _expm1(x):
    """exp(x) - 1 for x <= 0, exact near 0 (Kahan): the rounding of exp(x) is divided out by its logarithm."""
    u = tl.exp(x)
    near = (u - 1.0) * x / tl.log(tl.where(u == 1.0, 2.0, u))
    return tl.where(u == 1.0, x, tl.where(u - 1.0 == -1.0, -1.0, near))


@triton.jit
def _log1p(y):
    """log(1 + y) for y > -1, exact near 0, by the same trick."""
    u = 1.0 + y
    return tl.where(u == 1.0, y, tl.log(u) * y / tl.where(u == 1.0, 1.0, u - 1.0))


@triton.jit
def _mapped(z, scale, softcap, CAPPED: tl.constexpr):
    """`losses.LogitMap`: scale * z, or softcap * tanh(scale * z / softcap)."""
    z = z * scale
    if CAPPED:
        z = softcap * (2.0 * tl.sigmoid(2.0 * z / softcap) - 1.0)
    return z


@triton.jit
def _logits(row_start, columns, vocab_size, scale, softcap, CAPPED: tl.constexpr):
    """A block of a row's logits in fp32; -inf beyond the vocabulary, whatever stands there."""
    inside = columns < vocab_size
    z = tl.load(row_start + columns, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, _mapped(z, scale, softcap, CAPPED), float("-inf"))


@triton.jit
def _log_ratio(d, beta):
    """log(m / p) for d = log q - log p <= 0 and m = beta p + (1 - beta) q; see `losses._log_ratios`."""
    return _log1p((1.0 - beta) * _expm1(d))


@triton.jit
def _kernel(
    student, teacher, labels, gradient, kd_out, ce_out, student_stride, teacher_stride, gradient_stride, vocab_size,
    width, temperature, teacher_temperature, alpha, beta, student_scale, student_softcap, teacher_scale,
    teacher_softcap, KIND: tl.constexpr, STUDENT_CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    gradient += row * gradient_stride
    label = tl.load(labels + row)
    steps = tl.arange(0, BLOCK)

    # 1. the largest logit of each model, and the sums of exp((z - largest) / temperature)
    top_q, top_p = float("-inf"), float("-inf")
    sum_1, sum_q, sum_p = 0.0, 0.0, 0.0  # the student's at 1, the student's at T, the teacher's
    for start in range(0, vocab_size, BLOCK):
        columns = start + steps
        z = _logits(student, columns, vocab_size, student_scale, student_softcap, STUDENT_CAPPED)
        new = tl.maximum(top_q, tl.max(z, 0))
        sum_1 = sum_1 * tl.exp(top_q - new) + tl.sum(tl.exp(z - new), 0)
        if KIND != 0:
            sum_q = sum_q * tl.exp((top_q - new) / temperature) + tl.sum(tl.exp((z - new) / temperature), 0)
            t = _logits(teacher, columns, vocab_size, teacher_scale, teacher_softcap, TEACHER_CAPPED)
            new_p = tl.maximum(top_p, tl.max(t, 0))
            sum_p = sum_p * tl.exp((top_p - new_p) / teacher_temperature)
            sum_p += tl.sum(tl.exp((t - new_p) / teacher_temperature), 0)
            top_p = new_p
        top_q = new
    log_1, log_q_sum, log_p_sum = tl.log(sum_1), 0.0, 0.0
    if KIND != 0:
        log_q_sum, log_p_sum = tl.log(sum_q), tl.log(sum_p)

    # 2. what the gradient needs of the divergence beforehand: KL(q || p), or KL(q || m)
    own = 0.0
    kd = 0.0
    if KIND >= 2:
        for start in range(0, vocab_size, BLOCK):
            columns = start + steps
            inside = columns < vocab_size
            z = _logits(student, columns, vocab_size, student_scale, student_softcap, STUDENT_CAPPED)
            t = _logits(teacher, columns, vocab_size, teacher_scale, teacher_softcap, TEACHER_CAPPED)
            log_q = tl.where(inside, (z - top_q) / temperature - log_q_sum, 0.0)
            log_p = tl.where(inside, (t - top_p) / teacher_temperature - log_p_sum, 0.0)
            q, p, d = tl.exp(log_q), tl.exp(log_p), log_q - log_p
            if KIND == 2:
                own += tl.sum(tl.where(inside, q * d, 0.0), 0)
            else:
                behind = _log_ratio(tl.minimum(d, 0.0), beta)  # log(m / p) where q <= p
                ahead = _log_ratio(tl.minimum(-d, 0.0), 1.0 - beta)  # log(m / q) where q > p
                log_mp = tl.where(d <= 0, behind, ahead + d)
                log_mq = tl.where(d <= 0, behind - d, ahead)
                own -= tl.sum(tl.where(inside, q * log_mq, 0.0), 0)
                kd -= beta * tl.sum(tl.where(inside, p * log_mp, 0.0), 0)
        kd = own if KIND == 2 else kd + (1.0 - beta) * own

    # 3. the gradient by the raw logits, and the sums that need no second look
    ce = 0.0
    for start in range(0, width, BLOCK):
        columns = start + steps
        inside = columns < vocab_size
        z = _logits(student, columns, vocab_size, student_scale, student_softcap, STUDENT_CAPPED)
        hit = columns == label
        log_q1 = z - top_q - log_1
        ce -= tl.sum(tl.where(hit, log_q1, 0.0), 0)
        g = (1.0 - alpha) * (tl.exp(log_q1) - tl.where(hit, 1.0, 0.0))
        if KIND != 0:
            t = _logits(teacher, columns, vocab_size, teacher_scale, teacher_softcap, TEACHER_CAPPED)
            log_q = tl.where(inside, (z - top_q) / temperature - log_q_sum, 0.0)
            log_p = tl.where(inside, (t - top_p) / teacher_temperature - log_p_sum, 0.0)
            q, p, d = tl.exp(log_q), tl.exp(log_p), log_q - log_p
            if KIND == 1:
                kd -= tl.sum(tl.where(inside, p * d, 0.0), 0)
                g_kd = q - p
            elif KIND == 2:
                g_kd = q * (d - own)
            else:
                behind = _log_ratio(tl.minimum(d, 0.0), beta)
                ahead = _log_ratio(tl.minimum(-d, 0.0), 1.0 - beta)
                log_mq = tl.where(d <= 0, behind - d, ahead)
                g_kd = (1.0 - beta) * q * (-log_mq - own)
            g += alpha * temperature * g_kd  # alpha * T^2 * (1 / T)
        slope = student_scale
        if STUDENT_CAPPED:
            inner = z / student_softcap
            slope = student_scale * (1.0 - inner * inner)
        g = tl.where(inside, g * slope, 0.0)
        tl.store(gradient + columns, g.to(gradient.dtype.element_ty), mask=columns < width)
    tl.store(kd_out + row, kd)
    tl.store(ce_out + row, ce)


def logits_to_gradient(
    student_CW: Tensor,
    teacher_CW: Tensor | None,
    labels_C: Tensor,
    vocab_size: int,
    dtype: torch.dtype,
    *,
    temperature: float,
    teacher_temperature: float,
    alpha: float,
    kind: str,
    beta: float,
    student_map: tuple[float, float | None] = (1.0, None),
    teacher_map: tuple[float, float | None] = (1.0, None),
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the objective by the student's raw logits, and D and CE of every token.

    Args:
        student_CW: raw logits, rows contiguous; columns from `vocab_size` on are not looked at.
        teacher_CW: likewise, or None for the cross-entropy alone.
        labels_C: token ids.
        dtype: of the gradient.
        student_map: scale and soft-cap, see `losses.LogitMap`; the rest as for `losses.kd_loss`.

    Returns:
        `[C, W]` in `dtype`, 0 beyond the vocabulary; `[C]` and `[C]` in fp32.
    """
    rows, width = student_CW.shape
    gradient = torch.empty(rows, width, dtype=dtype, device=student_CW.device)
    kd, ce = (torch.empty(rows, dtype=torch.float32, device=student_CW.device) for _ in range(2))
    teacher = student_CW if teacher_CW is None else teacher_CW
    block = min(BLOCK, triton.next_power_of_2(width))
    _kernel[(rows,)](
        student_CW, teacher, labels_C, gradient, kd, ce, student_CW.stride(0), teacher.stride(0), gradient.stride(0),
        vocab_size, width, temperature, teacher_temperature, alpha, beta, student_map[0], student_map[1] or 1.0,
        teacher_map[0], teacher_map[1] or 1.0, KIND=KINDS["none" if teacher_CW is None else kind],
        STUDENT_CAPPED=student_map[1] is not None, TEACHER_CAPPED=teacher_map[1] is not None, BLOCK=block,
        num_warps=8,
    )  # fmt: skip
    return gradient, kd, ce
