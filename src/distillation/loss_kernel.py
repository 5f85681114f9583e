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
BLOCK = 2048  # logits that a program looks at together; with 8 warps 75 registers a thread, 3 programs on an SM


@triton.jit
def _expm1(x):
    """exp(x) - 1 for x <= 0, exact near 0 (Kahan): the rounding of exp(x) is divided out by its logarithm."""
    u = tl.exp(x)
    # log(u) is 0 where exp(x) rounds to 1: log(2) stands in, for a quotient that is not taken
    near = (u - 1.0) * x / tl.log(tl.where(u == 1.0, 2.0, u))
    # x is near 0, or so far below that exp(x) is lost beside 1, or between
    return tl.where(u == 1.0, x, tl.where(u - 1.0 == -1.0, -1.0, near))


@triton.jit
def _log1p(y):
    """log(1 + y) for y > -1, exact near 0, by the same trick."""
    u = 1.0 + y
    # the rounding of 1 + y is divided out: log(u) y / (u - 1), which is y itself where u rounds to 1
    return tl.where(u == 1.0, y, tl.log(u) * y / tl.where(u == 1.0, 1.0, u - 1.0))


@triton.jit
def _mapped(z, scale, softcap, CAPPED: tl.constexpr):
    """`losses.LogitMap`: scale * z, or softcap * tanh(scale * z / softcap)."""
    z = z * scale
    if CAPPED:
        # tanh(x) = 2 sigmoid(2x) - 1
        z = softcap * (2.0 * tl.sigmoid(2.0 * z / softcap) - 1.0)
    return z


@triton.jit
def _logits(row_start, columns, vocab_size, scale, softcap, CAPPED: tl.constexpr):
    """A block of a row's logits in fp32; -inf beyond the vocabulary, whatever stands there."""
    inside = columns < vocab_size  # [BLOCK]; the last block may reach beyond
    z = tl.load(row_start + columns, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, _mapped(z, scale, softcap, CAPPED), float("-inf"))


@triton.jit
def _log_mixture(d, beta):
    """log(m / p) and log(m / q) for d = log q - log p and m = beta p + (1 - beta) q; see `losses._log_ratios`."""
    behind = _log1p((1.0 - beta) * _expm1(tl.minimum(d, 0.0)))  # log(m / p) where q <= p
    ahead = _log1p(beta * _expm1(tl.minimum(-d, 0.0)))  # log(m / q) where q > p
    return tl.where(d <= 0, behind, ahead + d), tl.where(d <= 0, behind - d, ahead)


@triton.jit
def _softmax_sums(row, vocab_size, temperature, scale, softcap, CAPPED: tl.constexpr, BLOCK: tl.constexpr):
    """The largest logit z of a row, and the sums of exp(z - largest) and exp((z - largest) / temperature)."""
    # the first block multiplies these sums by exp(-inf - new) = 0
    top, sum_1, sum_t = float("-inf"), 0.0, 0.0
    for start in range(0, vocab_size, BLOCK):
        z = _logits(row, start + tl.arange(0, BLOCK), vocab_size, scale, softcap, CAPPED)
        new = tl.maximum(top, tl.max(z, 0))
        # what was summed before had another largest
        sum_1 = sum_1 * tl.exp(top - new) + tl.sum(tl.exp(z - new), 0)
        sum_t = sum_t * tl.exp((top - new) / temperature) + tl.sum(tl.exp((z - new) / temperature), 0)
        top = new
    return top, sum_1, sum_t


@triton.jit
def _log_softmax(row, columns, vocab_size, top, temperature, log_sum, scale, softcap, CAPPED: tl.constexpr):
    """A block of a row's logits, and of its log-softmax at a temperature (0 beyond the vocabulary)."""
    z = _logits(row, columns, vocab_size, scale, softcap, CAPPED)
    return z, tl.where(columns < vocab_size, (z - top) / temperature - log_sum, 0.0)


@triton.jit
def _divergence_first(log_q, log_p, inside, beta, KIND: tl.constexpr):
    """A block's part of what the gradient needs beforehand: KL(q || p), or KL(q || m); and of KL(p || m)."""
    if KIND == 2:
        # reverse KL: KL(q || p)
        own = tl.sum(tl.where(inside, tl.exp(log_q) * (log_q - log_p), 0.0), 0)
        other = 0.0
    else:
        # JSD: KL(q || m), and KL(p || m) for its value
        log_mp, log_mq = _log_mixture(log_q - log_p, beta)
        own = -tl.sum(tl.where(inside, tl.exp(log_q) * log_mq, 0.0), 0)
        other = -tl.sum(tl.where(inside, tl.exp(log_p) * log_mp, 0.0), 0)
    return own, other


@triton.jit
def _divergence_gradient(log_q, log_p, own, beta, KIND: tl.constexpr):
    """The gradient of the divergence by z / T; see `losses._divergence_and_gradient`."""
    q, d = tl.exp(log_q), log_q - log_p
    if KIND == 1:  # forward KL: q - p
        found = q - tl.exp(log_p)
    elif KIND == 2:  # reverse KL: q (log(q / p) - KL(q || p))
        found = q * (d - own)
    else:
        # JSD: (1 - beta) q (log(q / m) - KL(q || m)), the parts that go through m cancel
        _, log_mq = _log_mixture(d, beta)
        found = (1.0 - beta) * q * (-log_mq - own)
    return found


@triton.jit
def _kernel(
    student, teacher, labels, gradient, kd_out, ce_out, student_stride, teacher_stride, gradient_stride, vocab_size,
    width, temperature, teacher_temperature, alpha, beta, s_scale, s_softcap, t_scale, t_softcap,
    KIND: tl.constexpr, S_CAPPED: tl.constexpr, T_CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # student and teacher: [rows, width] fp32; gradient: [rows, width]; labels, kd_out, ce_out: [rows]; KIND: see KINDS
    # a program's row, in 64 bits: row * stride may need them
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    gradient += row * gradient_stride
    label = tl.load(labels + row)
    steps = tl.arange(0, BLOCK)

    # 1. the sums of the softmaxes: the student's at 1 and at T, the teacher's at its temperature
    top_q, sum_1, sum_q = _softmax_sums(student, vocab_size, temperature, s_scale, s_softcap, S_CAPPED, BLOCK)
    # of exp(z - top), so that log-softmax is z - top - log_1 at T = 1 and (z - top) / T - log_sum_q at T
    log_1, log_sum_q = tl.log(sum_1), tl.log(sum_q)
    top_p, log_sum_p = 0.0, 0.0
    if KIND != 0:
        top_p, _, sum_p = _softmax_sums(teacher, vocab_size, teacher_temperature, t_scale, t_softcap, T_CAPPED, BLOCK)
        log_sum_p = tl.log(sum_p)

    # 2. the divergences whose value is part of their gradient
    own, kd, ce = 0.0, 0.0, 0.0
    if KIND >= 2:
        for start in range(0, vocab_size, BLOCK):
            c = start + steps
            z, log_q = _log_softmax(student, c, vocab_size, top_q, temperature, log_sum_q, s_scale, s_softcap, S_CAPPED)
            _t, log_p = _log_softmax(
                teacher, c, vocab_size, top_p, teacher_temperature, log_sum_p, t_scale, t_softcap, T_CAPPED
            )
            own_part, other = _divergence_first(log_q, log_p, c < vocab_size, beta, KIND)
            own += own_part
            kd += beta * other
        # JSD: beta KL(p || m) + (1 - beta) KL(q || m)
        kd = own if KIND == 2 else kd + (1.0 - beta) * own

    # 3. the gradient by the raw logits, and the sums that need no second look
    # up to the width: columns of padding get a gradient of 0 written
    for start in range(0, width, BLOCK):
        c = start + steps
        inside = c < vocab_size
        z, log_q = _log_softmax(student, c, vocab_size, top_q, temperature, log_sum_q, s_scale, s_softcap, S_CAPPED)
        hit = c == label
        log_q1 = z - top_q - log_1
        ce -= tl.sum(tl.where(hit, log_q1, 0.0), 0)
        # cross-entropy at T = 1: softmax(z) - onehot(label)
        g = (1.0 - alpha) * (tl.exp(log_q1) - tl.where(hit, 1.0, 0.0))
        if KIND != 0:
            _t, log_p = _log_softmax(
                teacher, c, vocab_size, top_p, teacher_temperature, log_sum_p, t_scale, t_softcap, T_CAPPED
            )
            if KIND == 1:
                kd += tl.sum(tl.where(inside, tl.exp(log_p) * (log_p - log_q), 0.0), 0)
            # alpha * T^2 * (1 / T)
            g += alpha * temperature * _divergence_gradient(log_q, log_p, own, beta, KIND)
        # back through the student's map, see `losses.LogitMap.slope`
        slope = s_scale
        if S_CAPPED:
            slope = s_scale * (1.0 - (z / s_softcap) * (z / s_softcap))
        # chosen and not multiplied by 0: beyond the vocabulary z is -inf, and 0 times a slope of that NaN
        g = tl.where(inside, g * slope, 0.0)
        tl.store(gradient + c, g.to(gradient.dtype.element_ty), mask=c < width)
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
    # a pointer must be given; KIND 0 does not read it
    teacher = student_CW if teacher_CW is None else teacher_CW
    block = min(BLOCK, triton.next_power_of_2(width))  # tl.arange wants a power of two
    with torch.cuda.device_of(student_CW):  # Triton launches on the current GPU, whatever its tensors are on
        _kernel[(rows,)](  # a program a row
            student_CW,
            teacher,
            labels_C,
            gradient,
            kd,
            ce,
            student_CW.stride(0),
            teacher.stride(0),
            gradient.stride(0),
            vocab_size,
            width,
            temperature,
            teacher_temperature,
            alpha,
            beta,
            student_map[0],
            # a number must be given; without a cap it is not read
            student_map[1] or 1.0,
            teacher_map[0],
            teacher_map[1] or 1.0,
            KIND=KINDS["none" if teacher_CW is None else kind],
            S_CAPPED=student_map[1] is not None,
            T_CAPPED=teacher_map[1] is not None,
            BLOCK=block,
            num_warps=8,
        )
    return gradient, kd, ce
