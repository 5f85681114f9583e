"""The distillation loss alone, forward and backward to the student's hidden states, against its peers and its matmuls.

    python benchmarks/kd_loss.py --output benchmarks/results/kd_loss_bf16.json
    python benchmarks/kd_loss.py --output benchmarks/results/kd_loss_fp32.json --dtype float32
    python benchmarks/kd_loss.py --output benchmarks/results/kd_loss_growth.json --growth

Forward KL at temperature T with a frozen head, from the same seeded states. All get the output matrices as a model
stores them, V rows; only ours leaves those beyond the vocabulary out of its softmax, as in a run. Every contender's
gradient and loss are held against fp64 from the same (rounded) states, over as many rows as it takes.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness
from benchmarks.kd_reference import inputs, project, reference, rows
from src.distillation.losses import kd_loss, shared_head

Loss = Callable[..., Tensor]  # (student_NH, student_head_VH, teacher_NH, teacher_head_VH, labels_N, T, alpha) -> mean
SHAPE = {"V": 151_936, "vocab_size": 151_936, "H": 1_024, "N": 2_048}
ON_GPU = {"V": 151_936, "vocab_size": 151_669, "H": 4_096, "N": 8_192}  # Qwen3-8B: rows that it stores, and its tokens
QUICK = {"V": 1_024, "vocab_size": 1_000, "H": 64, "N": 96}
TEMPERATURE = 2.0
ACCURACY_TEMPERATURES = (1.0, 2.5, 4.0)


def ours(vocab_size: int, compiled: bool) -> Loss:
    def loss(student, student_head, teacher, teacher_head, labels, temperature, alpha):
        # as a run reads the stored rows: cut, on a GPU to a width that its products like; a view, nothing is copied
        heads = [shared_head(head, vocab_size) for head in (student_head, teacher_head)]
        sums = kd_loss(
            student, heads[0], teacher, heads[1], labels, temperature=temperature, alpha=alpha, kind="forward_kl",
            compiled=compiled, vocab_size=vocab_size,
        )  # fmt: skip
        return sums.loss / len(labels)

    return loss


def plain_torch(student, student_head, teacher, teacher_head, labels, temperature, alpha):
    """Full logits, softmaxes in fp32, autograd."""
    # [N, V] in the dtype of the states
    logits = student @ student_head.T
    log_q = F.log_softmax(logits.float() / temperature, -1)
    with torch.no_grad():
        log_p = F.log_softmax((teacher @ teacher_head.T).float() / temperature, -1)
    # batchmean: the sum over V, divided by N
    kd = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * temperature**2
    # alpha = 1, as the peers have it: no cross-entropy is computed
    return kd if alpha == 1 else alpha * kd + (1 - alpha) * F.cross_entropy(logits.float(), labels)


def trl_chunked() -> Loss:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss(student, student_head, teacher, teacher_head, labels, temperature, alpha):
        # the two None are biases, 0.0 is its beta: the forward KL
        divergence, _ = ChunkedDivergenceFunction.apply(
            student, student_head, None, teacher, teacher_head, None, 0.0, temperature
        )
        return divergence.mean() * temperature**2  # it leaves T^2 to the caller

    return loss


def liger(compiled: bool) -> Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    def loss(student, student_head, teacher, teacher_head, labels, temperature, alpha):
        # beta 0: the forward KL; with weight_hard_loss 0 it computes no cross-entropy
        function = LigerFusedLinearJSDLoss(
            weight_hard_loss=1 - alpha, weight_soft_loss=alpha, beta=0.0, temperature=temperature, compiled=compiled
        )
        return function(student, student_head, teacher, teacher_head, labels) * temperature**2  # likewise

    return loss


def torchtune() -> Loss:
    # the file alone: the package refuses to be imported without torchao, which this loss does not use
    from importlib.metadata import distribution
    from runpy import run_path

    path = distribution("torchtune").locate_file("torchtune/modules/loss/kd_losses.py")
    function = run_path(str(path))["ForwardKLWithChunkedOutputLoss"]()

    def loss(student, student_head, teacher, teacher_head, labels, temperature, alpha):
        # it wants the logits of both models cut along the tokens, [1, N / chunks, V] each
        chunks = function.num_output_chunks
        with torch.no_grad():
            teacher_logits = [chunk @ teacher_head.T for chunk in teacher[None].chunk(chunks, dim=1)]
        return function([chunk @ student_head.T for chunk in student[None].chunk(chunks, dim=1)], teacher_logits,
                        labels[None])  # fmt: skip

    return loss


# name -> the maker of its loss, which is told how many of the stored rows are tokens
CONTENDERS: dict[str, Callable[[int], Loss]] = {
    "ours": lambda vocab_size: ours(vocab_size, compiled=True),
    "ours_plain": lambda vocab_size: ours(vocab_size, compiled=False),
    "ours_with_ce": lambda vocab_size: ours(vocab_size, compiled=True),
    "plain_torch": lambda _: plain_torch,
    "trl_chunked": lambda _: trl_chunked(),
    "liger": lambda _: liger(compiled=True),
    "liger_eager": lambda _: liger(compiled=False),
    "torchtune": lambda _: torchtune(),
}
OURS = ("ours", "ours_plain", "ours_with_ce")
RIVALS = {"trl_chunked", "liger", "liger_eager", "torchtune"}  # run in the peers' environment
ALPHA = {"ours_with_ce": 0.8}  # the others: 1, divergence alone
ONLY_AT_1 = ("torchtune",)  # it has no temperature
NOTES = {
    "torchtune": "T = 1; its loss is the cross-entropy to the teacher, above the divergence by the teacher's entropy",
    "trl_chunked": "multiplies in fp32 on a CPU, whatever the dtype",
    "liger": "forms the frozen head's gradient as well",
    "liger_eager": "forms the frozen head's gradient as well",
}


def width_of(name: str, job: dict[str, Any]) -> int:
    """Over how many of the stored rows a contender's softmax goes."""
    return job["vocab_size"] if name in OURS else job["V"]


def make_references(job: dict[str, Any]) -> dict[str, Any]:
    """For every case its fp64 gradient and loss on the chosen rows, saved as `job["reference"]`."""
    student, student_head, teacher, teacher_head, labels = inputs(job)
    # the tokens that are held against fp64, [R]
    chosen = rows(len(labels))
    student_RV, teacher_RV = project(student[chosen], student_head), project(teacher[chosen], teacher_head)
    # at every temperature the divergence alone, and as `ours_with_ce` weighs it; key: "2.0 0.8 151669"
    found = {}
    for width in {width_of(name, job) for name in CONTENDERS}:
        logits, head = (student_RV[:, :width], teacher_RV[:, :width]), student_head[:width]
        for t in (TEMPERATURE, *ACCURACY_TEMPERATURES):
            for alpha in (1.0, *ALPHA.values()):
                found[f"{t} {alpha} {width}"] = reference(*logits, head, labels[chosen], t, alpha)
    torch.save(found, job["reference"])
    return {"seconds": 0.0}


def floor(job: dict[str, Any]) -> dict[str, Any]:
    """The three products alone, each in its best layout and chunk, into memory that is there: seconds for N tokens."""
    student, head = inputs(job)[:2]
    head = shared_head(head, job["vocab_size"])  # the rows that have to be read
    tokens, vocab = len(student), len(head)
    best = {"logits": float("inf"), "grad": float("inf")}

    def try_(product: str, left: Tensor, right: Tensor, chunk: int) -> None:
        # made before the clock runs: the product then writes into memory that is there
        out = torch.mm(left, right)
        seconds = harness.best_seconds(lambda: torch.mm(left, right, out=out), 3)
        # seconds of one chunk -> of all tokens
        best[product] = min(best[product], seconds * tokens / chunk)

    sizes = (1024, 2048, 4096) if student.is_cuda else (64, 128, 256, 512, 1024)
    # few tokens (--quick) make several sizes one
    for chunk in sorted({min(size, tokens) for size in sizes}):
        states, grad = student[:chunk], torch.randn(chunk, vocab, device=student.device).to(student.dtype)
        # logits [chunk, V], as states times head and as head times states
        try_("logits", states, head.T, chunk)
        try_("logits", head, states.T, chunk)
        # the states' gradient [chunk, H], likewise
        try_("grad", grad, head, chunk)
        try_("grad", head.T, grad.T.contiguous(), chunk)
    # logits of the student and of the teacher; the gradient is the student's alone
    return {"seconds": 2 * best["logits"] + best["grad"], "seconds_of_products": best}


def measure(name: str, job: dict[str, Any]) -> dict[str, Any]:
    if name == "reference":
        return make_references(job)
    if name == "floor":
        return floor(job)
    loss, alpha, width = CONTENDERS[name](job["vocab_size"]), ALPHA.get(name, 1.0), width_of(name, job)
    temperature = 1.0 if name in ONLY_AT_1 else TEMPERATURE

    def call(states: tuple[Tensor, ...], temperature: float, loss: Loss = loss) -> tuple[float, Tensor]:
        # a leaf of its own for each call, so that gradients do not add up
        student = states[0].detach().requires_grad_()
        value = loss(student, *states[1:], temperature, alpha)
        value.backward()
        return value.item(), student.grad

    # 1. a tiny case: imports, and whether there is a compiler
    tiny = CONTENDERS[name](QUICK["vocab_size"])
    call(inputs(job | QUICK), temperature, tiny)  # libraries, and a compiler's, are not what is measured
    # what was compiled for it is forgotten, so that the true sizes are compiled as in a run of their own
    torch.compiler.reset()
    # 2. the inputs, and the work once untimed; what it compiles is no part of the peak either
    states = inputs(job)
    resident = harness.resident_mb()
    value, grad = call(states, temperature)
    # gives free blocks back, so that the peak begins from what is in use
    harness.resident_mb()
    harness.forget_peak()
    # 3. under the clock
    seconds = harness.best_seconds(lambda: call(states, temperature), 2)
    result = {"seconds": seconds, "peak_mb": harness.peak_mb() - resident, "loss": value, "temperature": temperature,
              "alpha": alpha, "vocab_size": width, "note": NOTES.get(name), "grad_rel_error": None}  # fmt: skip
    # `growth` measures time and memory alone
    if "reference" not in job:
        return result
    # 4. the gradient against fp64; the loss is a mean over N tokens, the reference a sum
    saved, chosen = torch.load(job["reference"]), rows(job["N"])
    wanted, _ = saved[f"{temperature} {alpha} {width}"]
    result["grad_rel_error"] = harness.relative_error(grad[chosen].double() * job["N"], wanted)
    # at other temperatures on the chosen tokens alone: the truth is known there
    few = (states[0][chosen], states[1], states[2][chosen], states[3], states[4][chosen])
    result["accuracy"] = []
    for other in (1.0,) if name in ONLY_AT_1 else ACCURACY_TEMPERATURES:
        value, grad = call(few, other)
        wanted, wanted_value = saved[f"{other} {alpha} {width}"]
        error = harness.relative_error(grad.double() * len(chosen), wanted)
        result["accuracy"].append(
            {"temperature": other, "grad_rel_error": error, "loss": value, "loss_fp64": wanted_value}
        )
    return result


def growth(job: dict[str, Any], quick: bool, repeats: int) -> list[dict[str, Any]]:
    """Ours alone over tokens and vocabulary, best of some rounds each."""
    tokens = (96, 192) if quick else (512, 1_024, 2_048, 4_096, 8_192)
    vocabularies = (1_000, 2_000) if quick else (32_000, 65_536, 151_936)
    # tokens at the full vocabulary, then smaller vocabularies at one number of tokens (2,048; quick: 96)
    sizes = [(n, vocabularies[-1]) for n in tokens] + [(tokens[-2 if quick else 2], v) for v in vocabularies[:-1]]
    table = []
    for n, vocab in sizes:
        sized = job | {"N": n, "V": vocab, "vocab_size": vocab}
        found = harness.best_of([harness.run_worker(sys.executable, "ours", sized) for _ in range(repeats)])
        kept = {key: found[key] for key in ("seconds", "peak_mb", "absent", "failed_rounds") if key in found}
        # by this much memory would grow with the tokens if one more [N, H] tensor were kept
        states_mb = n * job["H"] * getattr(torch, job["dtype"]).itemsize / 2**20
        table.append({"name": f"N {n:,}, V {vocab:,}", "N": n, "V": vocab, **kept, "one_NH_tensor_mb": states_mb})
        if "seconds" in kept:
            # seconds / (N V), in ns: constant where time is linear in both
            table[-1]["ns_per_logit"] = kept["seconds"] / n / vocab * 1e9
    return table


def parent(arguments: argparse.Namespace) -> None:
    whole = ON_GPU if harness.device() == "cuda" else SHAPE
    job = {**(QUICK if arguments.quick else whole), "dtype": arguments.dtype, "seed": 0, "device": harness.device()}
    report: dict[str, Any] = {"shapes": job | {"temperature": TEMPERATURE}, "results": []}
    before = harness.machine()
    # ours over N and V, without peers
    if arguments.growth:
        if arguments.only:
            raise harness.UserError("--growth measures ours alone: leave out --only")
        report["growth"] = growth(job, arguments.quick, arguments.repeats)
        columns = {"seconds": ".2f", "peak_mb": ".0f", "one_NH_tensor_mb": ".1f", "ns_per_logit": ".2f"}
        harness.print_table(report["growth"], columns)
        harness.write_report(arguments.output, report, before)
        return
    names = ["floor", *(arguments.only or CONTENDERS)]
    rivals = harness.rivals_python() if set(names) & RIVALS else ""
    with tempfile.TemporaryDirectory() as folder:
        job["reference"] = str(Path(folder) / "reference.pt")
        # the truth once for all contenders, in a process of its own
        made = harness.run_worker(sys.executable, "reference", job)
        if "absent" in made:
            raise harness.UserError(f"the fp64 reference failed: {made['absent']}")
        pythons = {name: rivals if name in RIVALS else sys.executable for name in names}
        # the floor takes its turn among them, and comes first
        bottom, *results = harness.round_robin(pythons, lambda _: job, arguments.repeats)
    report |= {"results": results, "floor_seconds": bottom.get("seconds"), "floor": bottom}
    floors = {} if "absent" in bottom else dict.fromkeys(OURS, bottom["seconds"])
    report["ratios"] = harness.ratios(results, OURS, floors)
    # accuracy is a list; the table wants a column for each temperature
    for result in results:
        result |= {f"error_at_{each['temperature']:g}": each["grad_rel_error"] for each in result.get("accuracy", [])}
    print(f"floor: {bottom['absent']}" if "absent" in bottom else f"floor: {bottom['seconds']:.2f} s")
    columns = {"seconds": ".2f", "peak_mb": ".0f", "loss": ".4f", "grad_rel_error": ".2e"}
    harness.print_table(results, columns | {f"error_at_{each:g}": ".2e" for each in ACCURACY_TEMPERATURES})
    harness.write_report(arguments.output, report, before)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--growth", action="store_true", help="ours over N = 512 to 8,192 and V = 32k to 152k")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=tuple(CONTENDERS), help="these contenders alone")
    harness.main(parser, parent, measure)
