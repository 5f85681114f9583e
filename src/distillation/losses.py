"""The distillation objective: pure tensors in, tensors out.

    loss = alpha * T^2 * D(teacher_T, student_T) + (1 - alpha) * CE(labels, student at T = 1)

summed over response tokens; the caller divides once by the number of tokens in the optimisation step. `plain_kd_loss`
says it in full logits and leaves the gradient to autograd: it is the reference. `kd_loss` says the same a chunk of
tokens at a time and forms the gradient of the student's hidden state in the same pass, so that no `[tokens, vocab]`
tensor exists and each projection is made once: three matrix products where the head is frozen.

T^2 keeps the meaning of alpha as T changes (Hinton et al. 2015, section 2). `reverse_kl` is MiniLLM's direction (Gu et
al. 2024, equation 1), `jsd` the generalised Jensen-Shannon divergence of GKD (Agarwal et al. 2024, equation 1).

The teacher's softmax may have a temperature of its own, `teacher_temperature` (default T), and be cut to its most
probable tokens as sampling cuts it, `teacher_top_k` and `teacher_top_p`:

    p' = p * 1[kept] / sum_kept p

At T = 1, and with all three as the teacher's answers were sampled, the target is the distribution that the text was
drawn from: the gradient of the divergence is then what that of the cross-entropy is on average over such labels. This
is exact for an engine that filters in the order of `filters.candidates` (vLLM does, SGLang and llama.cpp do not), and
for all answers that were given; those that cleaning keeps are of that distribution given that they were kept.

Shape letters: N response tokens, C tokens of one chunk, V shared vocabulary, H student width, G teacher width, K kept
tokens.
"""

import functools
import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from src.distillation.filters import cut_to_candidates

logger = logging.getLogger("kd")

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
CHUNK_BYTES = 256 * 2**20  # what the [C, V] tensors of one chunk may take together on a CPU
CHUNK_TENSORS = 8  # how many of them are alive at the peak; a compiled kernel holds a quarter of that
KERNEL_BYTES = 10  # of one [C, V] entry on a GPU: two fp32 logits and a bf16 gradient
ALIGNED = 128  # columns; tensor cores cannot load bf16 rows of an odd length


class LossSums(NamedTuple):
    """Sums over N tokens: `loss` is differentiable, the other two are for the log. `kd` is D at T, without T^2."""

    loss: Tensor
    kd: Tensor
    ce: Tensor


class LogitMap(NamedTuple):
    """What a model does to its logits after the projection: `softcap * tanh(scale * z / softcap)`, or `scale * z`."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits.float() if self.scale == 1 else logits.float() * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def slope(self, mapped: Tensor) -> Tensor | float:
        """The derivative of the map, from its result."""
        return self.scale if self.softcap is None else self.scale * (1 - (mapped / self.softcap) ** 2)


IDENTITY = LogitMap()


class TopK(NamedTuple):
    """A teacher's K most probable tokens, and all others as one bucket.

    ids_NK: token ids; log_p_NK: their log-probabilities at T = 1.
    log_sum_N: `log sum_j exp(log_p_j / T)` over the whole vocabulary, at the teacher's temperature (0 at T = 1).
    """

    ids_NK: Tensor
    log_p_NK: Tensor
    log_sum_N: Tensor

    def part(self, rows: slice) -> "TopK":
        return TopK(*(tensor[rows] for tensor in self))


class Stated(NamedTuple):
    """What a server states of its teacher at T = 1: the top k, and the log-probability of each label `[N]`."""

    top: TopK
    label_log_p_N: Tensor


class HeldoutStats(NamedTuple):
    """Per-token measures at T = 1, each `[N]` fp32: nats for the first three, 0 or 1 for the fourth.

    expected_acceptance: sum_v min(p_v, q_v), the chance that the teacher accepts a token that the student drafts for it
        in speculative decoding (Leviathan et al. 2023, theorem 3.5); 1 minus the total variation distance.
    """

    kl_to_teacher: Tensor
    nll: Tensor
    teacher_nll: Tensor
    top1_agreement: Tensor
    expected_acceptance: Tensor


def chunk_tokens(vocab_size: int, compiled: bool = False, device: torch.device | str = "cpu") -> int:
    """How many tokens a chunk holds.

    On a GPU its tensors may take a 64th of the card's memory, 1.2 GiB at most: larger ones gain nothing. It is not a
    share of what is free, so that the same card cuts the same run alike, whatever else it holds.

    A CPU's compiled kernel takes chunks of one size alone and the last is filled up, so that a large one would waste
    work: products are as fast with 128 rows as with more. Plain torch on a CPU takes 96 at most: at V = 49,152 more
    cost up to a third (measured; learn.md's log).
    """
    device = torch.device(device)
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        budget = min(memory // 64, int(1.2 * 2**30))
        # 1.2 GiB at V = 151,936: 848 tokens by the kernel, 265 by plain torch
        tokens = budget // (vocab_size * (KERNEL_BYTES if compiled else 4 * CHUNK_TENSORS))
        return max(64, tokens // 64 * 64)
    # on a CPU at V = 49,152 and 151,936: 96 and 55 tokens by plain torch, 128 and 128 by the compiled kernel
    if not compiled:
        return max(8, min(CHUNK_BYTES // (4 * CHUNK_TENSORS * vocab_size), 96))
    # a quarter of the 4 bytes x CHUNK_TENSORS above
    return max(8, min(CHUNK_BYTES // (CHUNK_TENSORS * vocab_size), 128))


def shared_head(weight_VH: Tensor, vocab_size: int) -> Tensor:
    """An output matrix cut to the shared vocabulary; on a GPU to the next width that its tensor cores can load.

    Qwen3 stores 151,936 rows for 151,669 tokens. Cut to the odd number, products run at a seventh of the rate; so up to
    127 rows more are kept, or zeros added where none are stored, and `kd_loss` is told where the vocabulary ends.

    Args:
        weight_VH: all rows that are stored, `[at least vocab_size, H]`.

    Returns:
        `[vocab_size, H]`, on a GPU `[next multiple of 128, H]`; a view wherever there is one.
    """
    if not weight_VH.is_cuda:
        return weight_VH[:vocab_size]
    width = -(-vocab_size // ALIGNED) * ALIGNED  # rounded up: 151,669 -> 151,680
    if len(weight_VH) >= width:
        return weight_VH[:width]
    return _fill(weight_VH[:vocab_size], width)  # a copy, with zeros below the last token's row


def _log_ratios(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """`log(m/p)` and `log(m/q)` for the mixture m = beta p + (1 - beta) q, exactly 0 where p = q, finite everywhere."""
    d = log_q - log_p
    # m/p = beta + (1 - beta) exp(d), so log(m/p) = log1p((1 - beta) expm1(d)): no digits are lost where d is near 0,
    # and nothing overflows where d <= 0. The other side likewise from -d.
    # Clamped, not only chosen below: an infinity in the branch that `where` does not take makes its gradient NaN.
    from_p = torch.log1p((1 - beta) * torch.expm1(d.clamp(max=0)))
    from_q = torch.log1p(beta * torch.expm1(-d.clamp(min=0)))
    behind = d <= 0  # where the student gives a token no more than the teacher does
    # each side from the one that is exact there: log(m/p) - log(m/q) = d
    return torch.where(behind, from_p, from_q + d), torch.where(behind, from_p - d, from_q)


def divergence(log_p: Tensor, log_q: Tensor, kind: str, beta: float = 0.5) -> Tensor:
    """D(teacher, student) per token in nats, `[N, V], [N, V] -> [N]`; 0 where the two agree.

    Args:
        log_p: the teacher's log-probabilities at temperature T.
        log_q: the student's.
        kind: `forward_kl` KL(p || q), `reverse_kl` KL(q || p) or `jsd`, beta KL(p || m) + (1 - beta) KL(q || m).
        beta: the weight of p in the mixture m; `jsd` only, from 1e-6 to 1 - 1e-6.
    """
    if kind == "forward_kl":
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    if kind == "reverse_kl":
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    # KL(p || m) = -sum p log(m/p), and likewise for q
    log_mp, log_mq = _log_ratios(log_p, log_q, beta)
    return -(beta * log_p.exp() * log_mp + (1 - beta) * log_q.exp() * log_mq).sum(-1)


def _divergence_and_gradient(log_p: Tensor, log_q: Tensor, kind: str, beta: float) -> tuple[Tensor, Tensor]:
    """`divergence`, and its gradient by the student's logits divided by T: `[N], [N, V]`."""
    q = log_q.exp()
    if kind == "forward_kl":  # d/dz of -sum p log q is q - p
        p = log_p.exp()
        return (p * (log_p - log_q)).sum(-1), q - p
    if kind == "reverse_kl":  # q also weighs, so that the gradient is centred on the divergence itself
        ratio = log_q - log_p
        value = (q * ratio).sum(-1)
        return value, q * (ratio - value[:, None])
    log_mp, log_mq = _log_ratios(log_p, log_q, beta)
    # the parts of the gradient that go through m cancel, sum m' = 0: it is (1 - beta) times that of KL(q || m), m fixed
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
    teacher_temperature: float | None = None,
    teacher_top_k: int = 0,
    teacher_top_p: float = 1.0,
) -> LossSums:
    """The objective as the formula reads, with full logits and autograd. The reference for `kd_loss`."""
    # 1. cross-entropy with the labels, at T = 1
    student = student_logits_NV.float()
    ce = -log_softmax(student, -1).gather(1, labels_N[:, None]).sum()
    if alpha == 0 or teacher_logits_NV is None:
        return LossSums((1 - alpha) * ce, torch.zeros_like(ce), ce.detach())
    # 2. the target: the teacher at its own temperature, cut to what its sampling could draw
    own_T = teacher_temperature or temperature
    # a copy: the cut overwrites its argument, and `float` of fp32 logits is the caller's own tensor
    teacher = cut_to_candidates(teacher_logits_NV.float().clone(), own_T, teacher_top_k, teacher_top_p)
    log_p = log_softmax(teacher / own_T, -1)
    # 3. the divergence at T
    log_q = log_softmax(student / temperature, -1)
    kd = divergence(log_p, log_q, kind, beta).sum()
    return LossSums(alpha * temperature**2 * kd + (1 - alpha) * ce, kd.detach(), ce.detach())


class _Buckets(NamedTuple):
    """Teacher and student over the teacher's K tokens and one bucket for the rest, and the forward KL of the two.

    p_NK, rest_p_N: the teacher's probabilities; log_q_top_NK, log_rest_q_N: the student's, as logarithms.
    """

    p_NK: Tensor
    rest_p_N: Tensor
    log_q_top_NK: Tensor
    log_rest_q_N: Tensor
    kl_N: Tensor


def _in_buckets(teacher: TopK, temperature: float, log_q_NV: Tensor) -> _Buckets:
    """`temperature` is that of the teacher; the student comes softened."""
    # kept at T = 1: softened by T, and normalised by the sum over the whole vocabulary that was kept with them
    log_p = teacher.log_p_NK.float() / temperature - teacher.log_sum_N.float()[:, None]
    p = log_p.exp()
    rest_p = (1 - p.sum(-1)).clamp(min=1e-7)  # half precision may round the kept ones to 1 and more
    log_q_top = log_q_NV.gather(1, teacher.ids_NK)
    # [N], the student's mass outside the K tokens: a sum of the others, not 1 minus the K, which would lose its digits
    log_rest_q = log_q_NV.scatter(1, teacher.ids_NK, -torch.inf).logsumexp(-1)
    # K terms, and the bucket's
    kl = (p * (log_p - log_q_top)).sum(-1) + rest_p * (rest_p.log() - log_rest_q)
    return _Buckets(p, rest_p, log_q_top, log_rest_q, kl)


def _topk_divergence_and_gradient(teacher: TopK, temperature: float, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Forward KL over K tokens and one bucket for the rest, and its gradient by the logits over T: `[N], [N, V]`.

    The teacher does not say how its rest is spread, so the gradient spreads it as the student does.
    """
    found = _in_buckets(teacher, temperature, log_q)
    # outside the K: q - p' with p' = rest_p * q / rest_q, the teacher's rest spread as the student's; by logarithms,
    # for rest_q is 0 in fp32 where a sharp student leaves the rest less than exp(-103)
    spread = (found.rest_p_N.log() - found.log_rest_q_N)[:, None]
    grad = (log_q + spread).exp_().neg_().add_(log_q.exp())
    # at the K, in the place of that: q - p, as with a whole distribution
    return found.kl_N, grad.scatter_(1, teacher.ids_NK, found.log_q_top_NK.exp() - found.p_NK)


class _Objective(NamedTuple):
    """The settings of `kd_loss`, constants of its compiled kernel."""

    temperature: float
    teacher_temperature: float
    alpha: float
    kind: str
    beta: float
    student_map: LogitMap
    teacher_map: LogitMap
    dtype: torch.dtype  # of the products
    vocab_size: int
    teacher_top_k: int = 0
    teacher_top_p: float = 1.0

    @property
    def cuts_teacher(self) -> bool:
        return self.teacher_top_k > 0 or self.teacher_top_p < 1


def _as_sampled(teacher_CW: Tensor, o: _Objective) -> Tensor:
    """The teacher's logits after its map, cut to what sampling could have drawn; overwritten where there is no map.

    It is done before the chunk's kernel, none of whose three forms knows of it.
    """
    mapped = teacher_CW if o.teacher_map == IDENTITY else o.teacher_map(teacher_CW)
    # padding is no candidate: only a view of the shared columns is looked at
    cut_to_candidates(mapped[:, : o.vocab_size], o.teacher_temperature, o.teacher_top_k, o.teacher_top_p)
    return mapped


def _chunk(
    student_CV: Tensor, teacher_CV: Tensor | TopK | None, labels_C: Tensor, counted_C: Tensor | None, o: _Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """A chunk's gradient by the student's raw logits `[C, V]`, and its sums of D and CE.

    Args:
        student_CV: raw logits, as the product gave them, overwritten with the gradient; `teacher_CV` likewise, or its
            top k, or None.
        counted_C: fp32, 1 for a token and 0 for what only fills the chunk up; None where all count.
    """
    # cross-entropy at T = 1: its gradient is softmax(z) - onehot(label)
    student = o.student_map(student_CV)  # fp32 from here on
    log_q1 = log_softmax(student, -1)
    ce = -log_q1.gather(1, labels_C[:, None])[:, 0]
    grad = log_q1.exp().mul_(1 - o.alpha)
    if torch.compiler.is_compiling():  # a comparison is fused into the kernel, a scatter would leave it
        # [C, V], true at each token's label
        hit = torch.arange(student.shape[1], device=student.device) == labels_C[:, None]
        grad = torch.where(hit, grad - (1 - o.alpha), grad)
    else:
        grad.scatter_add_(1, labels_C[:, None], torch.full_like(grad[:, :1], o.alpha - 1))
    # the divergence at T: its gradient is by z / T, hence one T of the T^2 below
    kd = torch.zeros_like(ce)
    if teacher_CV is not None:
        log_q = log_q1 if o.temperature == 1 else log_softmax(student / o.temperature, -1)
        if isinstance(teacher_CV, TopK):
            kd, kd_grad = _topk_divergence_and_gradient(teacher_CV, o.teacher_temperature, log_q)
        else:
            log_p = log_softmax(o.teacher_map(teacher_CV) / o.teacher_temperature, -1)
            kd, kd_grad = _divergence_and_gradient(log_p, log_q, o.kind, o.beta)
        grad.add_(kd_grad, alpha=o.alpha * o.temperature)  # alpha * T^2 * (1 / T)
    # back through what the model does to its logits
    if o.student_map != IDENTITY:
        grad = grad * o.student_map.slope(student)
    # what fills the chunk up has no gradient and no part in the sums
    if counted_C is not None:
        grad, kd, ce = grad * counted_C[:, None], kd * counted_C, ce * counted_C
    # into the logits' own memory, and rounded to their type
    return student_CV.copy_(grad), kd.sum(), ce.sum()


def _plain_middle(student_CW: Tensor, teacher_CW: Tensor | TopK | None, labels_C: Tensor, o: _Objective) -> Any:
    """`_chunk` of logits that may be wider than the vocabulary."""
    if student_CW.shape[1] == o.vocab_size:
        return _chunk(student_CW, teacher_CW, labels_C, None, o)
    teacher = teacher_CW[:, : o.vocab_size] if isinstance(teacher_CW, Tensor) else teacher_CW
    # a view: the gradient is written into `student_CW` itself
    _, kd, ce = _chunk(student_CW[:, : o.vocab_size], teacher, labels_C, None, o)
    student_CW[:, o.vocab_size :] = 0  # these have a gradient of 0, and logits no more
    return student_CW, kd, ce


@functools.cache
def _compiled_chunk() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return torch.compile(_chunk, dynamic=False)


def _compiled_middle(student_CV: Tensor, teacher_CV: Tensor | None, labels_C: Tensor, o: _Objective) -> Any:
    """`_chunk` as one kernel by Inductor; it wants every chunk of one shape, so that the last is filled up."""
    rows, size = len(labels_C), chunk_tokens(o.vocab_size, True)
    # [size], 1 for a token and then 0; this path is a CPU's alone
    counted = _fill(torch.ones(rows), size)
    teacher = None if teacher_CV is None else _fill(teacher_CV, size)
    grad, kd, ce = _compiled_chunk()(_fill(student_CV, size), teacher, _fill(labels_C, size), counted, o)
    return grad[:rows], kd, ce


def _kernel_middle(student_CW: Tensor, teacher_CW: Tensor | None, labels_C: Tensor, o: _Objective) -> Any:
    """`_chunk` as one Triton kernel, which never reads the columns beyond the vocabulary."""
    from src.distillation.loss_kernel import logits_to_gradient

    grad, kd, ce = logits_to_gradient(
        student_CW,
        teacher_CW,
        labels_C,
        o.vocab_size,
        o.dtype,
        temperature=o.temperature,
        teacher_temperature=o.teacher_temperature,
        alpha=o.alpha,
        kind=o.kind,
        beta=o.beta,
        student_map=o.student_map,
        teacher_map=o.teacher_map,
    )
    return grad, kd.sum(), ce.sum()


@functools.cache
def compiler_works(device_type: str, kind: str = "forward_kl") -> bool:
    """Whether there is a compiled kernel for this kind of device here: Inductor's on a CPU, our own by Triton on a GPU.

    Said once in the log where there is none.
    """
    try:
        if device_type == "cuda":
            _try_kernel(kind)
        else:
            torch.compile(lambda x: x.exp().sum(-1))(torch.ones(2, 2, device=device_type))
    except Exception as error:  # compilers fail in every way: no gcc, no headers, no room on the card, their own faults
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        logger.info("no compiled loss kernel (%s); plain torch does the same, slower", reason.strip()[:120])
        return False
    return True


def _try_kernel(kind: str) -> None:
    """Compare the Triton kernel with plain torch on a few logits.

    Raises:
        RuntimeError: its gradient is another.
    """
    # 1,000 tokens and 24 columns of padding, which must get a gradient of 0
    logits = [torch.randn(4, 1024, device="cuda") for _ in range(2)]
    labels = torch.tensor([0, 7, 900, 999], device="cuda")
    o = _Objective(2.0, 2.0, 0.8, kind, 0.5, IDENTITY, IDENTITY, torch.float32, 1000)
    # the kernel first: plain torch overwrites its logits
    found, *_ = _kernel_middle(*logits, labels, o)
    wanted, *_ = _plain_middle(*logits, labels, o)
    if not torch.allclose(found, wanted, atol=1e-5):
        raise RuntimeError("the Triton kernel's gradient is not that of plain torch")


def product(a: Tensor, b: Tensor, buffer: Tensor | None = None) -> Tensor:
    """`a @ b`, in the buffer's rows if there is one; on CUDA half-precision factors give an fp32 result (a CPU has no
    such product)."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b, out=None if buffer is None else buffer[: len(a)])


def _fill(tensor: Tensor, rows: int) -> Tensor:
    """`tensor` with zero rows added up to `rows`; itself where it has them."""
    if len(tensor) == rows:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:])])


class _ChunkedKD(torch.autograd.Function):
    """`kd_loss`, its gradients formed in the forward pass: a chunk's logits are gone before the next one's exist."""

    @staticmethod
    def forward(ctx, student_NH, student_WH, teacher, teacher_WG, labels_N, o, compiled):
        tokens, device = len(labels_N), student_NH.device
        # what lies between the products: plain torch, or one kernel
        middle = _plain_middle
        if compiled:
            middle = _kernel_middle if device.type == "cuda" else _compiled_middle
        student_head = student_WH.to(o.dtype)  # no copy where it has that type
        teacher_head = None if teacher_WG is None else teacher_WG.to(o.dtype)
        grad_hidden = torch.empty_like(student_NH) if ctx.needs_input_grad[0] else None
        # with LoRA the head is frozen: no [V, H] gradient, which for Qwen3-8B would be 1.2 GB
        grad_head = torch.zeros_like(student_WH, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        sums = torch.zeros(2, device=device)
        size = chunk_tokens(o.vocab_size, compiled, device)
        cut = teacher_head is not None and o.cuts_teacher
        inside = o._replace(teacher_map=IDENTITY) if cut else o  # the map is done before the cut
        # 100 tokens in chunks of at most 96 are 50 and 50, not 96 and 4
        if tokens and middle is not _compiled_middle:  # of one size, so that no product is a sliver of a few rows
            size = math.ceil(tokens / math.ceil(tokens / size))
        # a CPU's allocator gives memory this large back each time, and takes a tenth of the time to get it again
        buffers = [None, None]
        if device.type == "cpu":
            buffers = [torch.empty(min(size, max(tokens, 1)), len(student_WH), dtype=o.dtype) for _ in buffers]
        for start in range(0, tokens, size):
            part = slice(start, start + size)
            # 1. logits of both models
            hidden_CH = student_NH[part].to(o.dtype)
            student_CW = product(hidden_CH, student_head.T, buffers[0])
            # a top k needs no product
            beliefs = teacher.part(part) if isinstance(teacher, TopK) else None
            if teacher_head is not None:
                beliefs = product(teacher[part].to(o.dtype), teacher_head.T, buffers[1])
                beliefs = _as_sampled(beliefs, o) if cut else beliefs
            # 2. both terms, and their gradient by the student's logits
            grad_CW, *chunk_sums = middle(student_CW, beliefs, labels_N[part], inside)
            sums += torch.stack(chunk_sums)
            # 3. the gradient of the hidden state, and of the head if that learns
            # plain torch on a GPU leaves fp32, as its logits are
            grad_CW = grad_CW.to(o.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = product(grad_CW, student_head)
            if grad_head is not None:
                grad_head += product(grad_CW.T, hidden_CH)  # [V, C] @ [C, H], added up in fp32
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.head_dtype = student_WH.dtype
        kd_sum, ce_sum = sums.unbind()
        ctx.mark_non_differentiable(kd_sum, ce_sum)  # for the log alone
        return o.alpha * o.temperature**2 * kd_sum + (1 - o.alpha) * ce_sum, kd_sum, ce_sum

    @staticmethod
    def backward(ctx, grad_loss, *_):
        # both were formed for a loss of weight 1; the chain rule is one factor
        grad_hidden, grad_head = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad_loss,
            None if grad_head is None else (grad_head * grad_loss).to(ctx.head_dtype),
            *[None] * 5,  # teacher, its head, labels, settings, compiled
        )


def kd_loss(
    student_hidden_NH: Tensor,
    student_head_VH: Tensor,
    teacher_hidden_NG: Tensor | TopK | None,
    teacher_head_VG: Tensor | None,
    labels_N: Tensor,
    *,
    temperature: float,
    alpha: float,
    kind: str = "forward_kl",
    beta: float = 0.5,
    student_map: LogitMap = IDENTITY,
    teacher_map: LogitMap = IDENTITY,
    compiled: bool = False,
    teacher_temperature: float | None = None,
    teacher_top_k: int = 0,
    teacher_top_p: float = 1.0,
    vocab_size: int | None = None,
) -> LossSums:
    """The objective, summed over N response tokens, never holding more than a chunk of logits.

    Products run in the type autocast asks for, or else the head's; softmaxes and sums in fp32. Without a teacher, or
    with alpha = 0, only the cross-entropy is computed. N = 0 gives zeros with a zero gradient.

    Args:
        student_hidden_NH: final hidden states (after the last norm) at the positions that predict `labels_N`.
        student_head_VH: the output matrix, see `shared_head`; its gradient is formed only if it needs one.
        teacher_hidden_NG: the teacher's hidden states at the same response positions, which never receive a gradient;
            or its top k (forward KL only, and then `teacher_head_VG` is None).
        teacher_head_VG: the teacher's output matrix, as wide as the student's.
        labels_N: the response token ids.
        temperature: T > 0, of both softmaxes; its square weighs the divergence.
        alpha: the weight of the divergence, in [0, 1].
        kind: one of `DIVERGENCES`.
        beta: see `divergence`.
        student_map: what the student does to its logits; `teacher_map` likewise.
        compiled: run what lies between the products as one compiled kernel; the caller has asked `compiler_works`.
        teacher_temperature: of the teacher's softmax alone, where it is not T.
        teacher_top_k: how many of the teacher's tokens are kept (0: all), by its logits at its temperature.
        teacher_top_p: the mass that is kept of those (1: all); see `filters.candidates`.
        vocab_size: logits beyond it have no part in any softmax and no gradient (default: all rows of the head).

    Raises:
        ValueError: a top-k teacher with another divergence than the forward KL, or cut further; or a reverse KL to a
            teacher that is cut, which is infinite.

    Example:
        >>> hidden, head = torch.randn(6, 8, requires_grad=True), torch.randn(50, 8)
        >>> teacher_hidden, teacher_head = torch.randn(6, 16), torch.randn(50, 16)
        >>> labels = torch.randint(50, (6,))
        >>> sums = kd_loss(hidden, head, teacher_hidden, teacher_head, labels, temperature=2.0, alpha=0.8)
        >>> (sums.loss / 6).backward()  # hidden.grad is [6, 8]
    """
    # 1. what is known of the teacher: its states, its top k, or nothing
    topk = isinstance(teacher_hidden_NG, TopK)
    if topk and kind != "forward_kl":
        raise ValueError(f"{kind} needs the whole distribution; a top-k teacher gives the forward KL only")
    # whichever of these holds, there is no divergence, and no product is made for it
    if teacher_hidden_NG is None or (teacher_head_VG is None and not topk) or alpha == 0:
        teacher_hidden_NG = teacher_head_VG = None
    elif (teacher_top_k or teacher_top_p < 1) and (topk or kind == "reverse_kl"):
        raise ValueError("teacher_top_k and teacher_top_p need the whole distribution, and forward_kl or jsd")
    # 2. the type of the products: autocast's where it is on, else the head's
    device_type = student_hidden_NH.device.type
    autocast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if autocast else student_head_VH.dtype
    # 3. the sums, and with them the gradient, a chunk at a time
    objective = _Objective(
        temperature,
        teacher_temperature or temperature,
        alpha,
        kind,
        beta,
        student_map,
        teacher_map,
        dtype,
        vocab_size or len(student_head_VH),
        teacher_top_k,
        teacher_top_p,
    )
    with torch.autocast(device_type, enabled=False):  # types are chosen here, product by product
        return LossSums(
            *_ChunkedKD.apply(
                student_hidden_NH,
                student_head_VH,
                teacher_hidden_NG,
                teacher_head_VG,
                labels_N,
                objective,
                compiled and not topk,  # neither kernel reads a top k
            )
        )


@torch.no_grad()
def heldout_stats(
    student_hidden_NH: Tensor,
    student_head_VH: Tensor,
    teacher_hidden_NG: Tensor,
    teacher_head_VG: Tensor,
    labels_N: Tensor,
    student_map: LogitMap = IDENTITY,
    teacher_map: LogitMap = IDENTITY,
    vocab_size: int | None = None,
) -> HeldoutStats:
    """How the student compares with the teacher at every response token, at T = 1; arguments as for `kd_loss`."""
    parts = []
    vocab_size = vocab_size or len(student_head_VH)
    size = chunk_tokens(vocab_size, device=student_hidden_NH.device)
    for start in range(0, len(labels_N), size):
        part = slice(start, start + size)
        logits_q = product(student_hidden_NH[part].to(student_head_VH.dtype), student_head_VH.T)[:, :vocab_size]
        logits_p = product(teacher_hidden_NG[part].to(teacher_head_VG.dtype), teacher_head_VG.T)[:, :vocab_size]
        log_q, log_p = log_softmax(student_map(logits_q), -1), log_softmax(teacher_map(logits_p), -1)
        labels = labels_N[part, None]  # [C, 1], to gather with
        parts.append(
            (
                divergence(log_p, log_q, "forward_kl"),
                -log_q.gather(1, labels)[:, 0],
                -log_p.gather(1, labels)[:, 0],
                # raw logits tell as well which is the largest: a map keeps their order
                (logits_q.argmax(-1) == logits_p.argmax(-1)).float(),
                # sum_v min(p_v, q_v)
                torch.minimum(log_p, log_q).exp().sum(-1),
            )
        )
    # five [C] of every chunk -> five [N]
    return HeldoutStats(*(torch.cat(column) for column in zip(*parts, strict=True)))


@torch.no_grad()
def bounded_stats(
    student_hidden_NH: Tensor,
    student_head_VH: Tensor,
    teacher: Stated,
    labels_N: Tensor,
    student_map: LogitMap = IDENTITY,
    vocab_size: int | None = None,
) -> HeldoutStats:
    """`heldout_stats` of a teacher of which the top k is all that is known.

    Its NLL and its most probable token are known exactly. The KL is that of the top k and the rest as one bucket, which
    is at most the KL over all tokens (log sum inequality; Cover and Thomas 2006, theorem 2.7.1). The expected
    acceptance is the sum of min(p, q) over the top k alone, which is at most that over all tokens; with the bucket it
    would be a bound from above, and flatter the student.
    """
    parts = []
    vocab_size = vocab_size or len(student_head_VH)
    size = chunk_tokens(vocab_size, device=student_hidden_NH.device)
    for start in range(0, len(labels_N), size):
        part = slice(start, start + size)
        top = teacher.top.part(part)
        logits = product(student_hidden_NH[part].to(student_head_VH.dtype), student_head_VH.T)[:, :vocab_size]
        log_q = log_softmax(student_map(logits), -1)
        # at T = 1, where the kept log-probabilities need no new sum (`log_sum_N` is 0)
        found = _in_buckets(top, 1.0, log_q)
        most_probable = top.ids_NK.gather(1, top.log_p_NK.argmax(-1, keepdim=True))[:, 0]  # [C]
        parts.append(
            (
                found.kl_N,
                -log_q.gather(1, labels_N[part, None])[:, 0],
                -teacher.label_log_p_N[part],
                (logits.argmax(-1) == most_probable).float(),
                torch.minimum(found.p_NK, found.log_q_top_NK.exp()).sum(-1),
            )
        )
    return HeldoutStats(*(torch.cat(column) for column in zip(*parts, strict=True)))
