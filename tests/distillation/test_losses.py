import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from src.distillation import losses
from src.distillation.filters import cut_to_candidates
from src.distillation.losses import (
    DIVERGENCES,
    LogitMap,
    Stated,
    TopK,
    bounded_stats,
    chunk_tokens,
    divergence,
    heldout_stats,
    kd_loss,
    plain_kd_loss,
    shared_head,
)
from src.distillation.sft import Sampling, sample_tokens
from src.planning.trace import LiveBytes

N, V, H, G = 37, 61, 16, 24  # tokens, vocabulary, student width, teacher width
EIGHT_A_CHUNK = 4 * losses.CHUNK_TENSORS * V * 8

objectives = pytest.mark.parametrize(
    "objective",
    [
        {"kind": kind, "temperature": temperature, "alpha": alpha, "beta": 0.3}
        for kind in DIVERGENCES
        for temperature in (1.0, 2.5, 4.0)
        for alpha in (0.0, 0.5, 1.0)
    ],
    ids=lambda o: f"{o['kind']}-T{o['temperature']:g}-alpha{o['alpha']:g}",
)


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    """37 tokens in chunks of 8: five of them, the last one short."""
    monkeypatch.setattr(losses, "CHUNK_BYTES", EIGHT_A_CHUNK)
    assert chunk_tokens(V) == 8


def make_case(n=N, v=V, h=H, g=G, seed=0):
    """Student hidden and head, teacher hidden and head, labels; logits of about +-3."""
    torch.manual_seed(seed)
    return (
        torch.randn(n, h, requires_grad=True),
        (torch.randn(v, h) * 3 / h**0.5).requires_grad_(),
        torch.randn(n, g),
        torch.randn(v, g) * 3 / g**0.5,
        torch.randint(v, (n,)),
    )


def plain(student_NH, student_VH, teacher_NG, teacher_VG, labels_N, **objective):
    return plain_kd_loss(student_NH @ student_VH.T, teacher_NG @ teacher_VG.T, labels_N, **objective)


def log_probabilities(logits_NV):
    """Row-wise log-softmax in float64 numpy."""
    shifted = logits_NV - logits_NV.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def numpy_divergence(log_p, log_q, kind, beta):
    """As the papers write them, without any care for rounding: `[N, V] -> [N]` in float64."""
    p, q = np.exp(log_p), np.exp(log_q)
    if kind == "forward_kl":
        return (p * (log_p - log_q)).sum(-1)
    if kind == "reverse_kl":
        return (q * (log_q - log_p)).sum(-1)
    log_m = np.log(beta * p + (1 - beta) * q)
    return beta * (p * (log_p - log_m)).sum(-1) + (1 - beta) * (q * (log_q - log_m)).sum(-1)


def numpy_loss(student_logits, teacher_logits, labels, kind, temperature, alpha, beta):
    log_q, log_p = log_probabilities(student_logits / temperature), log_probabilities(teacher_logits / temperature)
    kd = numpy_divergence(log_p, log_q, kind, beta).sum()
    ce = -log_probabilities(student_logits)[np.arange(len(labels)), labels].sum()
    return alpha * temperature**2 * kd + (1 - alpha) * ce


def as_float64(tensor):
    return tensor.detach().double().numpy()


def distance(actual, expected):
    """Relative distance in norm."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("beta", [0.01, 0.5, 0.9])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_divergence_is_exactly_zero_at_equality(kind, beta, scale):
    """A "KL" that is a cross-entropy would show the teacher's entropy here."""
    torch.manual_seed(0)
    log_p = torch.log_softmax(torch.randn(5, V) * scale, -1)
    assert (divergence(log_p, log_p.clone(), kind, beta) == 0).all()


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_gradient_is_zero_where_student_and_teacher_agree(kind, temperature):
    hidden, head, _, _, labels = make_case()
    sums = kd_loss(hidden, head, hidden.detach(), head.detach(), labels, temperature=temperature, alpha=1.0, kind=kind)
    sums.loss.backward()
    assert sums.kd == 0
    assert hidden.grad.abs().max() < 1e-6


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("beta", [1e-6, 0.01, 0.5, 0.99, 1 - 1e-6])
@pytest.mark.parametrize("size", [50.0, 1e4])
def test_extreme_logits_stay_finite(kind, beta, size):
    """Teacher and student are certain of different tokens; at 1e4 every other probability is 0 in fp32."""
    logits_p, logits_q = torch.zeros(2, V), torch.zeros(2, V, requires_grad=True)
    logits_p[:, 3] = size
    log_q = torch.log_softmax(logits_q + size * torch.eye(V)[[5, 6]], -1)
    value = divergence(torch.log_softmax(logits_p, -1), log_q, kind, beta)
    value.sum().backward()
    assert value.isfinite().all()
    assert (value > 0).all()
    assert logits_q.grad.isfinite().all()
    one = torch.eye(V) * size
    fast = kd_loss(
        one[[5, 6]].requires_grad_(), torch.eye(V), one[[3, 3]], torch.eye(V), torch.tensor([3, 3]),
        temperature=1.0, alpha=1.0, kind=kind, beta=beta,
    )  # fmt: skip
    torch.testing.assert_close(fast.loss, value.sum().detach())


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.8])
def test_divergence_is_the_papers(kind, beta):
    """Against float64 numpy: KL by its definition, jsd as GKD's equation 1 with m = beta p + (1 - beta) q."""
    torch.manual_seed(0)
    log_p, log_q = torch.log_softmax(torch.randn(2, 50, V) * 3, -1)
    expected = numpy_divergence(as_float64(log_p), as_float64(log_q), kind, beta)
    np.testing.assert_allclose(divergence(log_p, log_q, kind, beta).numpy(), expected, rtol=1e-5)


def test_directions_are_not_mixed_up():
    """p on one token, q on two: KL(p || q) = log 2, and KL(q || p) pays for the token p does not have."""
    log_p, log_q = torch.log(torch.tensor([[[1.0, 1e-6]], [[0.5, 0.5]]]))
    assert divergence(log_p, log_q, "forward_kl").item() == pytest.approx(0.6931, abs=1e-3)
    assert divergence(log_p, log_q, "reverse_kl").item() == pytest.approx(-0.6931 + 0.5 * 13.8155, abs=1e-3)


@objectives
def test_fast_equals_plain(objective):
    """Values within 1e-6; gradients, sums of 61 or 37 fp32 products in another order, within 2e-6."""
    fast_case, plain_case = make_case(), make_case()
    fast, reference = kd_loss(*fast_case, **objective), plain(*plain_case, **objective)
    for name in ("loss", "ce"):
        assert getattr(fast, name).item() == pytest.approx(getattr(reference, name).item(), rel=1e-6), name
    if objective["alpha"] > 0:
        assert fast.kd.item() == pytest.approx(reference.kd.item(), rel=1e-6)
    fast.loss.backward()
    reference.loss.backward()
    for ours, theirs in zip(fast_case[:2], plain_case[:2], strict=True):
        assert distance(ours.grad, theirs.grad) < 2e-6


@objectives
def test_plain_equals_numpy(objective):
    """Value and gradient of the reference against central differences of an independent float64 loss."""
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 11, requires_grad=True), torch.randn(3, 11)
    labels = torch.tensor([0, 4, 10])
    result = plain_kd_loss(student * 2, teacher * 2, labels, **objective)
    result.loss.backward()
    at = as_float64(student)

    def value(logits):
        return numpy_loss(2 * logits, 2 * as_float64(teacher), labels.numpy(), **objective)

    assert result.loss.item() == pytest.approx(value(at), rel=1e-6)
    numeric = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        step = np.zeros_like(at)
        step[index] = 1e-5
        numeric[index] = (value(at + step) - value(at - step)) / 2e-5
    np.testing.assert_allclose(student.grad.numpy(), numeric, rtol=1e-5, atol=1e-6 * np.abs(numeric).max())


@pytest.mark.parametrize("loss", [plain, kd_loss])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_temperature_squared_is_in_the_gradient_too(loss, kind):
    """Finite difference / analytic of the same function at T = 4; T^2 in the value alone would make it 16."""
    hidden, *rest = make_case()
    objective = {"temperature": 4.0, "alpha": 1.0, "kind": kind}
    loss(hidden, *rest, **objective).loss.backward()
    direction = hidden.grad / hidden.grad.norm()
    step = 0.02
    with torch.no_grad():
        up, down = (loss(hidden + sign * step * direction, *rest, **objective).loss for sign in (1, -1))
    assert ((up - down) / (2 * step) / hidden.grad.norm()).item() == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_temperature_keeps_the_size_of_the_gradient(kind):
    """What T^2 is for (Hinton 2015): without it the gradient at T = 40 would be 1600 times smaller than at T = 1."""
    norms = []
    for temperature in (1.0, 40.0):
        hidden, *rest = make_case()
        kd_loss(hidden, *rest, temperature=temperature, alpha=1.0, kind=kind).loss.backward()
        norms.append(hidden.grad.norm().item())
    assert 0.1 < norms[1] / norms[0] < 10


@pytest.mark.parametrize("teacher", ["given", "absent"])
def test_alpha_zero_is_cross_entropy(teacher):
    hidden, head, *theirs, labels = make_case()
    theirs = theirs if teacher == "given" else [None, None]
    sums = kd_loss(hidden, head, *theirs, labels, temperature=4.0, alpha=0.0)
    expected = torch.nn.functional.cross_entropy(hidden @ head.T, labels, reduction="sum")
    assert sums.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert sums.loss == sums.ce
    assert sums.kd == 0
    gradients = [torch.autograd.grad(value, (hidden, head), retain_graph=True) for value in (sums.loss, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        assert distance(ours, theirs) < 2e-6


@pytest.mark.parametrize("teacher", ["given", "absent"])
def test_no_tokens_give_zeros(teacher):
    """A micro-batch without response tokens must not spoil the step: MiniLLM's NaN."""
    hidden, head, teacher_hidden, teacher_head, labels = make_case()
    nobody = torch.zeros(N, dtype=torch.bool)
    theirs = (teacher_hidden[nobody], teacher_head) if teacher == "given" else (None, None)
    sums = kd_loss(hidden[nobody], head, *theirs, labels[nobody], temperature=2.0, alpha=0.5)
    sums.loss.backward()
    assert [value.item() for value in sums] == [0, 0, 0]
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(head.grad, torch.zeros_like(head))


def test_gradient_scales_with_what_follows():
    """The caller divides by the tokens of the step; the gradient formed in the forward pass must follow."""
    hidden, head, *rest = make_case()
    sums = kd_loss(hidden, head, *rest, temperature=2.0, alpha=0.5)
    whole, divided = (
        torch.autograd.grad(loss, (hidden, head), retain_graph=True) for loss in (sums.loss, sums.loss / 7)
    )
    torch.testing.assert_close(divided, tuple(gradient / 7 for gradient in whole))
    assert not sums.kd.requires_grad
    assert not sums.ce.requires_grad


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_padded_columns_change_nothing(kind):
    """Rows of the heads beyond the shared vocabulary, cut by the caller or left for a GPU's products: no share of the
    softmax, no gradient. Liger's fault: it gives padded columns a logit of 0."""
    hidden, head, teacher_hidden, teacher_head, labels = make_case()
    objective = {"temperature": 2.0, "alpha": 0.5, "kind": kind}
    expected = kd_loss(hidden, head, teacher_hidden, teacher_head, labels, **objective)
    [gradient] = torch.autograd.grad(expected.loss, hidden)
    padded = torch.cat([head.detach(), torch.randn(7, H) * 100]).requires_grad_()
    teacher_padded = torch.cat([teacher_head, torch.randn(7, G) * 100])
    sums = kd_loss(hidden, padded[:V], teacher_hidden, teacher_padded[:V], labels, **objective)
    assert torch.equal(torch.stack(sums), torch.stack(expected))
    wide = kd_loss(hidden, padded, teacher_hidden, teacher_padded, labels, **objective, vocab_size=V)
    torch.testing.assert_close(torch.stack(wide), torch.stack(expected), rtol=1e-6, atol=0)
    own, heads = torch.autograd.grad(wide.loss, (hidden, padded))
    torch.testing.assert_close(own, gradient, rtol=1e-5, atol=1e-6)
    assert (heads[V:] == 0).all()
    assert (heads[:V] != 0).any()
    ours = heldout_stats(hidden, padded, teacher_hidden, teacher_padded, labels, vocab_size=V)
    for found, wanted in zip(ours, heldout_stats(hidden, head, teacher_hidden, teacher_head, labels), strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_gpu_gets_a_head_that_its_tensor_cores_can_load(monkeypatch):
    """Rows that are stored are used as they are; else zeros are added. A CPU gets the cut."""
    weight = torch.randn(200, 3)
    assert shared_head(weight, 141).data_ptr() == weight.data_ptr()
    assert shared_head(weight, 141).shape == (141, 3)

    class OnGpu(Tensor):
        is_cuda = True

    stored, few = (weight[:rows].as_subclass(OnGpu) for rows in (200, 141))
    assert shared_head(stored, 70).shape == (128, 3)
    assert torch.equal(shared_head(stored, 70), weight[:128])
    filled = shared_head(few, 141)
    assert filled.shape == (256, 3)
    assert torch.equal(filled[:141], weight[:141])
    assert (filled[141:] == 0).all()


class Allocations(TorchDispatchMode):
    """Records the shapes of all tensors made inside it; views of a tensor that was there before do not count."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        there = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.shapes |= {tuple(t.shape) for t in made if t.untyped_storage().data_ptr() not in there}
        return result


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("head_needs_gradient", [False, True])
def test_no_logits_of_all_tokens_are_allocated(kind, head_needs_gradient):
    """The largest tensor is one chunk's logits; with a frozen head no `[V, H]` gradient is formed either."""
    tokens, chunk = 400, 8
    hidden, head, *rest = make_case(n=tokens, h=4)
    head.requires_grad_(head_needs_gradient)
    with Allocations() as seen:
        kd_loss(hidden, head, *rest, temperature=2.0, alpha=0.5, kind=kind).loss.backward()
    assert (chunk, V) in seen.shapes
    others = seen.shapes - {(tokens, 4), (V, 4)}  # the gradients of hidden states and head
    assert max(torch.Size(shape).numel() for shape in others) <= chunk * V
    assert (hidden.grad.shape, head.grad is None) == (hidden.shape, not head_needs_gradient)
    assert ((V, 4) in seen.shapes) == head_needs_gradient


def test_chunks_follow_the_budget(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_BYTES", 256 * 2**20)
    assert chunk_tokens(151_669) * 151_669 * 4 * losses.CHUNK_TENSORS <= 256 * 2**20
    assert chunk_tokens(151_669) > 50
    assert chunk_tokens(10**9) == 8


@objectives
def test_bf16_heads(objective):
    """bf16 weights and states against fp32 softmaxes of the same products: values 1e-5, gradients (in bf16) 1 %."""
    case = make_case()
    low = [t.detach().bfloat16() for t in case[:4]]
    low[0].requires_grad_()
    fast = kd_loss(*low, case[4], **objective)
    logits, teacher_logits = (low[0] @ low[1].T).detach().float().requires_grad_(), (low[2] @ low[3].T).float()
    reference = plain_kd_loss(logits, teacher_logits, case[4], **objective)
    assert fast.loss.dtype == torch.float32
    assert fast.loss.item() == pytest.approx(reference.loss.item(), rel=1e-5)
    fast.loss.backward()
    reference.loss.backward()
    assert distance(low[0].grad, logits.grad.double() @ low[1].double()) < 0.01


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.5, 4.0])
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_autocast_leaves_the_softmax_in_fp32(kind, temperature, alpha):
    """Only the products are in bf16. Where the student is near its teacher, q - p is small: softmaxes in bf16 would put
    the gradient off by 2.5 % (T = 1) to 9 % (T = 4) and the value by up to half; rounding in the products costs 0.3 %.
    """
    hidden, head, _, _, labels = make_case()
    head = head.detach()
    teacher_hidden = hidden.detach() + 0.1 * torch.randn(N, H)
    objective = {"kind": kind, "temperature": temperature, "alpha": alpha, "beta": 0.3}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast = kd_loss(hidden, head, teacher_hidden, head, labels, **objective)
        fast.loss.backward()
        logits, teacher_logits = hidden @ head.T, teacher_hidden @ head.T
    assert logits.dtype == torch.bfloat16
    logits = logits.detach().float().requires_grad_()
    reference = plain_kd_loss(logits, teacher_logits.float(), labels, **objective)
    reference.loss.backward()
    assert fast.loss.dtype == fast.kd.dtype == hidden.grad.dtype == torch.float32
    assert fast.loss.item() == pytest.approx(reference.loss.item(), rel=1e-5)
    assert fast.kd.item() == pytest.approx(reference.kd.item(), rel=1e-5)
    assert distance(hidden.grad, logits.grad.double() @ head.double()) < 0.006


def test_heldout_stats_equal_numpy():
    hidden, head, _, _, labels = make_case()
    teacher_hidden, teacher_head = hidden + 0.5 * torch.randn(N, H), head + 0.1 * torch.randn(V, H)
    stats = heldout_stats(hidden, head, teacher_hidden, teacher_head, labels)
    logits_q, logits_p = as_float64(hidden @ head.T), as_float64(teacher_hidden @ teacher_head.T)
    log_q, log_p = log_probabilities(logits_q), log_probabilities(logits_p)
    rows = np.arange(N)
    expected = {
        "kl_to_teacher": numpy_divergence(log_p, log_q, "forward_kl", 0.5),
        "nll": -log_q[rows, labels],
        "teacher_nll": -log_p[rows, labels],
        "top1_agreement": logits_q.argmax(-1) == logits_p.argmax(-1),
    }
    for name, column in expected.items():
        np.testing.assert_allclose(getattr(stats, name).numpy(), column, rtol=1e-5, err_msg=name)
    assert 0 < stats.top1_agreement.mean() < 1


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_compiled_equals_plain(kind, temperature):
    """The same sums and gradients to fp32 rounding, with a last chunk that must be filled up."""
    if not losses.compiler_works("cpu"):
        pytest.skip("no compiler here")
    objective = {"kind": kind, "temperature": temperature, "alpha": 0.7, "beta": 0.3, "student_map": LogitMap(0.5, 4.0)}
    cases = make_case(), make_case()
    sums = [kd_loss(*case, **objective, compiled=c) for case, c in zip(cases, (True, False), strict=True)]
    for ours, theirs in zip(*sums, strict=True):
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
        if ours.requires_grad:
            ours.backward()
            theirs.backward()
    for ours, theirs in zip(cases[0][:2], cases[1][:2], strict=True):
        assert distance(ours.grad, theirs.grad) < 2e-6


def test_without_a_compiler_the_log_says_so():
    code = (
        "import logging; logging.basicConfig(level=logging.INFO)\n"
        "from src.distillation.losses import compiler_works; print(compiler_works('cpu'), compiler_works('cpu'))"
    )
    environment = {**os.environ, "CXX": "no-such-compiler", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == ["False", "False"]
    assert done.stderr.count("no compiled loss kernel") == 1


@pytest.mark.parametrize("own_map", [LogitMap(2.0), LogitMap(1.0, 2.0), LogitMap(0.25, 3.0)])
def test_logit_maps_are_in_value_and_gradient(own_map):
    """Scale (Cohere, Granite) and soft-cap (Gemma 2) against autograd through the same formula."""
    objective = {"temperature": 2.5, "alpha": 0.6}
    fast_case, plain_case = make_case(), make_case()
    fast = kd_loss(*fast_case, **objective, student_map=own_map, teacher_map=LogitMap(1.0, 5.0))
    student = plain_case[0] @ plain_case[1].T * own_map.scale
    if own_map.softcap:
        student = own_map.softcap * torch.tanh(student / own_map.softcap)
    teacher = 5 * torch.tanh(plain_case[2] @ plain_case[3].T / 5)
    reference = plain_kd_loss(student, teacher, plain_case[4], **objective)
    assert fast.loss.item() == pytest.approx(reference.loss.item(), rel=1e-6)
    fast.loss.backward()
    reference.loss.backward()
    for ours, theirs in zip(fast_case[:2], plain_case[:2], strict=True):
        assert distance(ours.grad, theirs.grad) < 2e-6
    stats = heldout_stats(*[t.detach() for t in make_case()], own_map, LogitMap(1.0, 5.0))
    own_nll = -torch.log_softmax(student, -1).gather(1, plain_case[4][:, None]).sum()
    assert stats.nll.sum().item() == pytest.approx(own_nll.item(), rel=1e-6)


def top_k(teacher_logits, k, temperature):
    log_p = torch.log_softmax(teacher_logits, -1)
    kept, ids = log_p.topk(k)
    return TopK(ids, kept, (log_p / temperature).logsumexp(-1))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("k", [1, 8, V - 1])
def test_topk_is_the_divergence_of_the_bucketed_distributions(k, temperature):
    """Value by the definition over K + 1 outcomes, gradient by autograd; with V - 1 kept it is the exact objective."""
    case, other = make_case(), make_case()
    teacher = top_k(case[2] @ case[3].T, k, temperature)
    fast = kd_loss(case[0], case[1], teacher, None, case[4], temperature=temperature, alpha=0.6)
    p = torch.softmax(other[2] @ other[3].T / temperature, -1)
    q = torch.softmax(other[0] @ other[1].T / temperature, -1)
    in_top = torch.zeros_like(p).scatter(1, teacher.ids_NK, 1.0)
    buckets = [torch.cat([x.gather(1, teacher.ids_NK), (x * (1 - in_top)).sum(-1, keepdim=True)], 1) for x in (p, q)]
    kd = (buckets[0] * (buckets[0].log() - buckets[1].log())).sum()
    ce = -torch.log_softmax(other[0] @ other[1].T, -1).gather(1, other[4][:, None]).sum()
    assert fast.kd.item() == pytest.approx(kd.item(), rel=1e-4)
    fast.loss.backward()
    (0.6 * temperature**2 * kd + 0.4 * ce).backward()
    assert distance(case[0].grad, other[0].grad) < 1e-4
    if k == V - 1:
        exact = plain(*make_case(), temperature=temperature, alpha=0.6)
        assert fast.loss.item() == pytest.approx(exact.loss.item(), rel=1e-4)


def test_topk_of_a_student_that_leaves_the_rest_nothing():
    """exp(-129) is 0 in fp32, and what is divided by it no number: the gradient is that of fp64 all the same."""
    torch.manual_seed(0)
    student = torch.randn(6, 50, dtype=torch.float64)
    student[:, :4] += 20  # at T = 0.1 some exp(-200) are left for the other 46
    teacher = top_k(torch.randn(6, 50, dtype=torch.float64), 4, 0.1)
    teacher = teacher._replace(ids_NK=torch.arange(4).expand(6, 4))
    found = []
    for dtype in (torch.float32, torch.float64):
        log_q = torch.log_softmax(student.to(dtype) / 0.1, -1)
        found.append(losses._topk_divergence_and_gradient(teacher, 0.1, log_q)[1])
    assert found[0].isfinite().all()
    torch.testing.assert_close(found[0].double(), found[1].double(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("k", [1, 8, V - 1])
def test_what_a_top_k_tells_of_a_student_is_exact_or_a_bound(k):
    """KL and expected acceptance never more than they are; by their definition over K + 1 outcomes, and over K."""
    student, own_head, theirs, head, labels = (tensor.detach() for tensor in make_case())
    exact = heldout_stats(student, own_head, theirs, head, labels)
    log_p = torch.log_softmax(theirs @ head.T, -1)
    top = top_k(theirs @ head.T, k, 1.0)
    found = bounded_stats(student, own_head, Stated(top, log_p.gather(1, labels[:, None])[:, 0]), labels)
    for name in ("nll", "teacher_nll", "top1_agreement"):
        torch.testing.assert_close(getattr(found, name), getattr(exact, name), atol=1e-5, rtol=1e-5)
    whole = [torch.softmax(x.double() @ w.double().T, -1) for x, w in ((theirs, head), (student, own_head))]
    p, q = (distribution.gather(1, top.ids_NK) for distribution in whole)
    rest = [distribution.scatter(1, top.ids_NK, 0.0).sum(-1) for distribution in whole]
    kl = (p * (p / q).log()).sum(-1) + rest[0] * (rest[0] / rest[1]).log()
    torch.testing.assert_close(found.kl_to_teacher.double(), kl, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(found.expected_acceptance.double(), torch.minimum(p, q).sum(-1), atol=1e-5, rtol=1e-4)
    assert (found.kl_to_teacher <= exact.kl_to_teacher + 1e-5).all()
    assert (found.expected_acceptance <= exact.expected_acceptance + 1e-6).all()
    if k == V - 1:
        torch.testing.assert_close(found.kl_to_teacher, exact.kl_to_teacher, atol=1e-4, rtol=1e-3)
    else:
        assert found.kl_to_teacher.mean() < 0.95 * exact.kl_to_teacher.mean()


def test_topk_gives_the_forward_kl_only():
    case = make_case()
    with pytest.raises(ValueError, match="top-k"):
        kd_loss(case[0], case[1], top_k(case[2] @ case[3].T, 4, 1.0), None, case[4], temperature=1, alpha=1, kind="jsd")


own_temperatures = pytest.mark.parametrize(("temperature", "own"), [(1.0, 0.2), (2.5, 1.0), (2.5, 4.0)])


@pytest.mark.parametrize("kind", DIVERGENCES)
@own_temperatures
def test_the_teachers_own_temperature(kind, temperature, own):
    """Fast against plain, and both against a float64 formula with two temperatures."""
    objective = {"kind": kind, "temperature": temperature, "alpha": 0.6, "beta": 0.3, "teacher_temperature": own}
    fast_case, plain_case = make_case(), make_case()
    fast, reference = kd_loss(*fast_case, **objective), plain(*plain_case, **objective)
    student, teacher = (as_float64(make_case()[i] @ make_case()[i + 1].T) for i in (0, 2))
    log_p, log_q = log_probabilities(teacher / own), log_probabilities(student / temperature)
    assert fast.kd.item() == pytest.approx(numpy_divergence(log_p, log_q, kind, 0.3).sum(), rel=1e-5)
    assert fast.loss.item() == pytest.approx(reference.loss.item(), rel=1e-6)
    fast.loss.backward()
    reference.loss.backward()
    for ours, theirs in zip(fast_case[:2], plain_case[:2], strict=True):
        assert distance(ours.grad, theirs.grad) < 2e-6


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_student_at_the_teachers_own_distribution_has_nothing_to_learn(kind):
    """Student logits = teacher logits / 0.2 at T = 1: value and gradient are 0, which they are not without it."""
    hidden, head, _, _, labels = make_case()
    teacher = hidden.detach() * 0.2
    objective = {"temperature": 1.0, "alpha": 1.0, "kind": kind}
    sums = kd_loss(hidden, head, teacher, head.detach(), labels, **objective, teacher_temperature=0.2)
    sums.loss.backward()
    assert abs(sums.kd.item()) < 1e-4
    assert hidden.grad.abs().max() < 1e-5
    assert kd_loss(hidden, head, teacher, head.detach(), labels, **objective).kd > 1


def test_equal_temperatures_are_the_default():
    objective = {"temperature": 2.5, "alpha": 0.6}
    cases = make_case(), make_case()
    default = kd_loss(*cases[0], **objective)
    said = kd_loss(*cases[1], **objective, teacher_temperature=2.5)
    assert [value.item() for value in default] == [value.item() for value in said]
    default.loss.backward()
    said.loss.backward()
    assert torch.equal(cases[0][0].grad, cases[1][0].grad)


def test_a_top_k_teachers_own_temperature():
    """All tokens but one kept: the exact objective with the teacher's temperature."""
    case = make_case()
    teacher = top_k(case[2] @ case[3].T, V - 1, 0.5)
    objective = {"temperature": 1.0, "alpha": 0.6, "teacher_temperature": 0.5}
    kept = kd_loss(case[0], case[1], teacher, None, case[4], **objective)
    assert kept.loss.item() == pytest.approx(plain(*make_case(), **objective).loss.item(), rel=1e-4)


@own_temperatures
def test_compiled_with_the_teachers_own_temperature(temperature, own):
    if not losses.compiler_works("cpu"):
        pytest.skip("no compiler here")
    objective = {"temperature": temperature, "alpha": 0.7, "teacher_temperature": own}
    sums = [kd_loss(*make_case(), **objective, compiled=compiled).loss.item() for compiled in (True, False)]
    assert sums[0] == pytest.approx(sums[1], rel=1e-6)


cuts = pytest.mark.parametrize(("k", "mass"), [(1, 1.0), (8, 1.0), (0, 0.7), (8, 0.8), (V, 0.999)])


def as_sampled(logits_NV, temperature, k, mass):
    """p' = p * 1[kept] / sum_kept p, a row at a time in float64: the k largest, down to where `mass` is crossed."""
    cut_NV = np.zeros_like(logits_NV)
    for logits_V, cut_V in zip(logits_NV, cut_NV, strict=True):
        order = np.argsort(-logits_V)[: k or None]
        p_K = np.exp((logits_V[order] - logits_V.max()) / temperature)
        p_K /= p_K.sum()
        before = 0.0
        for token, p in zip(order, p_K, strict=True):
            if before < mass:
                cut_V[token] = p
            before += p
    return cut_NV / cut_NV.sum(-1, keepdims=True)


@cuts
def test_the_target_is_what_sampling_draws(k, mass):
    """A grid of uniform numbers through the sampler: the same tokens, each as often as p' says to one in the grid.

    One row has ties, as logits in bf16 often have, also across the border.
    """
    logits = make_case(n=4)[2] @ make_case()[3].T
    logits[3] = (logits[3] / 2).round()
    uniform = (torch.arange(5000) + 0.5) / 5000
    target = torch.softmax(cut_to_candidates(logits.clone(), 0.7, k, mass) / 0.7, -1)
    for row in range(4):
        drawn = sample_tokens(logits[row].expand(5000, -1), uniform, Sampling(0.7, mass, k, 1))
        seen = torch.bincount(drawn, minlength=V) / 5000
        assert (seen - target[row]).abs().max() <= 1.01 / 5000
        assert not seen[target[row] == 0].any()
        assert (seen[target[row] > 1 / 5000] > 0).all()


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
@cuts
def test_a_teacher_cut_as_its_sampling_is_the_formula(kind, k, mass):
    """Fast against plain, and both against float64 numpy; student and teacher with maps, T and the teacher's own T."""
    objective = {"kind": kind, "temperature": 1.5, "alpha": 0.6, "beta": 0.3, "teacher_temperature": 0.7}
    objective |= {"teacher_top_k": k, "teacher_top_p": mass}
    fast_case, plain_case = make_case(), make_case()
    fast = kd_loss(*fast_case, **objective, teacher_map=LogitMap(1.0, 5.0))
    teacher = 5 * torch.tanh(plain_case[2] @ plain_case[3].T / 5)
    reference = plain_kd_loss(plain_case[0] @ plain_case[1].T, teacher, plain_case[4], **objective)
    p = as_sampled(as_float64(teacher), 0.7, k, mass)
    q = np.exp(log_probabilities(as_float64(plain_case[0] @ plain_case[1].T) / 1.5))
    if kind == "forward_kl":
        kd = (p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum()
    else:
        m = 0.3 * p + 0.7 * q
        kd = 0.3 * (p[p > 0] * np.log(p[p > 0] / m[p > 0])).sum() + 0.7 * (q * np.log(q / m)).sum()
    assert reference.kd.item() == pytest.approx(kd, rel=1e-5)
    assert fast.kd.item() == pytest.approx(kd, rel=1e-5)
    assert fast.loss.item() == pytest.approx(reference.loss.item(), rel=1e-6)
    fast.loss.backward()
    reference.loss.backward()
    for ours, theirs in zip(fast_case[:2], plain_case[:2], strict=True):
        assert distance(ours.grad, theirs.grad) < 2e-6


@cuts
def test_distilling_is_what_training_on_all_its_samples_would_be(k, mass):
    """Over labels drawn from p', the mean gradient of the cross-entropy is the gradient of KL(p' || q) at T = 1."""
    hidden, head, theirs, their_head, _ = make_case(n=5)
    cut = {"teacher_temperature": 0.7, "teacher_top_k": k, "teacher_top_p": mass}
    p = as_sampled(as_float64(theirs @ their_head.T), 0.7, k, mass)
    mean = torch.zeros_like(hidden)
    for label in range(V):
        for row in np.flatnonzero(p[:, label]):
            own = hidden[row : row + 1]
            ce = kd_loss(own, head, None, None, torch.tensor([label]), temperature=1.0, alpha=0.0).loss
            mean += torch.autograd.grad(ce * p[row, label], hidden)[0]
    kd = kd_loss(hidden, head, theirs, their_head, torch.zeros(5, dtype=torch.long), temperature=1.0, alpha=1.0, **cut)
    assert distance(torch.autograd.grad(kd.loss, hidden)[0], mean) < 2e-6


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_a_student_that_is_the_cut_teacher_has_nothing_to_learn(kind):
    """Student logits = log p' (EXCLUDED where p' = 0): D and its gradient are 0."""
    _, _, theirs, their_head, labels = make_case()
    cut = {"teacher_temperature": 0.7, "teacher_top_k": 8, "teacher_top_p": 0.8}
    logits = cut_to_candidates(theirs @ their_head.T, 0.7, 8, 0.8) / 0.7
    logits.requires_grad_()
    sums = kd_loss(logits, torch.eye(V), theirs, their_head, labels, temperature=1.0, alpha=1.0, kind=kind, **cut)
    assert abs(sums.kd.item()) < 1e-5
    assert torch.autograd.grad(sums.loss, logits)[0].abs().max() < 1e-6


@pytest.mark.parametrize(("kind", "k"), [*((kind, 0) for kind in DIVERGENCES), ("forward_kl", V), ("jsd", 2 * V)])
def test_filters_that_leave_all_change_nothing(kind, k):
    """Bit for bit: off, or a top_k of the whole vocabulary."""
    cases = make_case(), make_case()
    objective = {"temperature": 2.5, "alpha": 0.6, "kind": kind, "beta": 0.3}
    default = kd_loss(*cases[0], **objective)
    said = kd_loss(*cases[1], **objective, teacher_top_k=k, teacher_top_p=1.0)
    assert [value.item() for value in default] == [value.item() for value in said]
    gradients = [torch.autograd.grad(sums.loss, case[:2]) for sums, case in zip((default, said), cases, strict=True)]
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("k", "mass"), [(0, 0.9), (20, 0.9), (20, 1.0)])
def test_cutting_fits_where_the_gradient_will_be(k, mass):
    """A chunk of the kernel's is reckoned with both models' logits and the gradient, and it has to do with that.

    Sorted at once it would be 25 bytes an entry.
    """
    logits = torch.empty(832, 50_000, device="meta")
    with LiveBytes([logits]) as live:
        cut_to_candidates(logits, 0.7, k, mass)
    assert 0 < live.peak / logits.numel() <= losses.KERNEL_BYTES - 2 * 4


@pytest.mark.parametrize("rows", [0, 1, 23, 50])
def test_cutting_in_parts_is_cutting_row_by_row(rows):
    logits = torch.randn(rows, V)
    one_by_one = [cut_to_candidates(row.clone(), 0.7, 0, 0.8) for row in logits.split(1) if len(row)]
    expected = torch.cat([logits[:0], *one_by_one])
    assert torch.equal(cut_to_candidates(logits, 0.7, 0, 0.8), expected)


def test_padded_columns_are_no_candidates():
    """They would be the most probable tokens of all."""
    hidden, head, theirs, their_head, labels = make_case()
    objective = {"temperature": 1.0, "alpha": 0.5, "teacher_top_k": 8, "teacher_top_p": 0.8}
    expected = kd_loss(hidden, head, theirs, their_head, labels, **objective)
    padded = torch.cat([head.detach(), torch.randn(7, H) * 100])
    their_padded = torch.cat([their_head, torch.randn(7, G) * 100])
    wide = kd_loss(hidden, padded, theirs, their_padded, labels, **objective, vocab_size=V)
    torch.testing.assert_close(torch.stack(wide), torch.stack(expected), rtol=1e-6, atol=0)


def test_a_cut_teacher_in_bf16():
    """The cut goes by the product's own logits; softmaxes are in fp32."""
    hidden, head, theirs, their_head, labels = (t.detach() for t in make_case())
    low = [t.bfloat16() for t in (hidden, head, theirs, their_head)]
    objective = {"temperature": 1.0, "alpha": 0.6, "kind": "jsd", "teacher_top_k": 8, "teacher_top_p": 0.8}
    fast = kd_loss(*low, labels, **objective)
    reference = plain_kd_loss((low[0] @ low[1].T).float(), (low[2] @ low[3].T).float(), labels, **objective)
    assert fast.loss.item() == pytest.approx(reference.loss.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_compiled_with_a_cut_teacher(kind):
    if not losses.compiler_works("cpu"):
        pytest.skip("no compiler here")
    objective = {"temperature": 1.0, "alpha": 0.7, "kind": kind, "teacher_temperature": 0.5}
    objective |= {"teacher_top_k": 8, "teacher_top_p": 0.8, "teacher_map": LogitMap(0.5, 4.0)}
    cases = make_case(), make_case()
    sums = [kd_loss(*case, **objective, compiled=c) for case, c in zip(cases, (True, False), strict=True)]
    assert sums[0].loss.item() == pytest.approx(sums[1].loss.item(), rel=1e-6)
    gradients = [torch.autograd.grad(own.loss, case[0])[0] for own, case in zip(sums, cases, strict=True)]
    assert distance(*gradients) < 2e-6


def test_what_cannot_be_cut_is_refused():
    """A reverse KL would be infinite; a top-k teacher has no more to cut. Without a teacher nothing is asked."""
    case, cut = make_case(), {"temperature": 1.0, "teacher_top_k": 4}
    with pytest.raises(ValueError, match="forward_kl or jsd"):
        kd_loss(*case, **cut, alpha=0.5, kind="reverse_kl")
    with pytest.raises(ValueError, match="whole distribution"):
        kd_loss(case[0], case[1], top_k(case[2] @ case[3].T, 8, 1.0), None, case[4], **cut, alpha=0.5)
    control = kd_loss(*case, **cut, alpha=0.0, kind="reverse_kl")
    assert control.loss.item() == kd_loss(*case, temperature=1.0, alpha=0.0).loss.item()
