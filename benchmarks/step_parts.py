"""What a training step is made of: our own time by part, and the time its matrix products alone would take."""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from benchmarks import harness
from src.distillation import training
from src.distillation.base import compute_dtype, load_model_config, meta_model


@contextlib.contextmanager
def parts_of_a_step(skip: int) -> Iterator[Counter[str]]:
    """Seconds a step in each part of our trainer, after `skip` steps; `rest` is batches, clipping and the log.

    The objective's forward forms the gradient of the hidden states too, so `backward` is that of the student's body.
    """
    from accelerate import Accelerator

    spent: Counter[str] = Counter()
    kept: Counter[str] = Counter()
    ends: list[float] = []

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                spent[part] += time.perf_counter() - start

        return call

    def before_update(*_: Any) -> None:
        spent["optimizer"] -= time.perf_counter()

    def after_update(*_: Any) -> None:
        ends.append(time.perf_counter())
        spent["optimizer"] += ends[-1]
        if len(ends) == skip:
            spent.clear()
        kept.clear()
        kept.update(spent)  # what comes after the last step, held-out rows, is no part of one

    places = {}
    for owner, name, part in (
        (training, "_beliefs", "teacher"), (training, "response_hidden", "student_forward"),
        (training, "kd_loss", "loss"), (Accelerator, "backward", "backward"),
    ):  # fmt: skip
        places[owner, name] = timed(part, getattr(owner, name))
    originals = {place: getattr(*place) for place in places}
    hooks = [register_optimizer_step_pre_hook(before_update), register_optimizer_step_post_hook(after_update)]
    for place, replacement in places.items():
        setattr(*place, replacement)
    try:
        yield kept
    finally:
        for place, original in originals.items():
            setattr(*place, original)
        for hook in hooks:
            hook.remove()
    steps = len(ends) - skip
    for part in kept:
        kept[part] /= steps
    kept["rest"] = (ends[-1] - ends[skip - 1]) / steps - sum(kept.values())


Product = tuple[int, int, int, int]  # products at once, and [m, k] @ [k, n]


def body_products(name: str, tokens: int, length: int, lora_r: int, backward: bool) -> Counter[Product]:
    """The products of a model's decoder for `tokens` tokens in rows of `length`: how often each occurs.

    Attention is counted in full squares: the kernel here skips at most half of them. Frozen weights get no gradient.
    """
    model, config = meta_model(name), load_model_config(name)
    found: Counter[Product] = Counter()
    for module in model.get_decoder().modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        n, k = module.weight.shape
        found[1, tokens, k, n] += 1
        if lora_r:
            found[1, tokens, k, lora_r] += 1
            found[1, tokens, lora_r, n] += 1
        if backward:
            found[1, tokens, n, k] += 1
            found[1, tokens, n, lora_r] += 1  # through B, its gradient; through A, its gradient
            found[1, n, tokens, lora_r] += 1
            found[1, tokens, lora_r, k] += 1
            found[1, lora_r, tokens, k] += 1
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    batch = heads * tokens // length
    found[batch, length, width, length] += layers * (2 if backward else 1)  # scores; gradient of the probabilities
    found[batch, length, length, width] += layers * (4 if backward else 1)  # values; gradients of q, k and v
    return found


def product_seconds(product: Product, dtype: torch.dtype) -> float:
    """One product in its best layout, into memory that is there."""
    batch, m, k, n = product
    on = harness.device()
    left, right = torch.randn(batch, m, k, device=on).to(dtype), torch.randn(batch, k, n, device=on).to(dtype)
    if batch == 1:
        left, right = left[0], right[0]
    turned = right.mT.contiguous().mT
    best = float("inf")
    for other in (right, turned):
        out = left @ other
        runs = 3 if m * k * n * batch > 1e9 else 20

        def call(other: torch.Tensor = other, out: torch.Tensor = out) -> None:
            torch.matmul(left, other, out=out)

        best = min(best, harness.best_seconds(call, runs))
    return best


def step_floor(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds and FLOPs of a step's products alone, with the rate at which this machine does them.

    Everything at once: a step's tokens in one product each, which is the best a machine can hope for; tokens that rows
    begin alike with are counted once, as our packs run them.
    """
    dtype, profile = compute_dtype(harness.device()), job["profile"]
    tokens = round(job["tokens"] * (1 - job["shared"]) / job["steps"])
    answers = round(job["answers"] / job["steps"])
    length = round(job["tokens"] / job["rows"])
    student = load_model_config(profile["model_name_or_path"])
    teacher = load_model_config(profile["teacher_model_name_or_path"])
    head: Counter[Product] = Counter()
    head[1, answers, student.hidden_size, student.vocab_size] += 1
    head[1, answers, student.vocab_size, student.hidden_size] += 1
    beliefs = Counter({(1, answers, teacher.hidden_size, teacher.vocab_size): 1})
    body = body_products(profile["model_name_or_path"], tokens, length, job["lora_r"], backward=True)
    online = body_products(profile["teacher_model_name_or_path"], tokens, length, 0, backward=False)
    work = {"sft": body + head, "hidden": body + head + beliefs, "online": body + head + beliefs + online}
    took = {product: product_seconds(product, dtype) for product in work["online"]}
    found: dict[str, Any] = {"dtype": str(dtype), "tokens": tokens, "answer_tokens": answers, "length": length}
    for name, products in work.items():
        flops = sum(2 * b * m * k * n * count for (b, m, k, n), count in products.items())
        seconds = sum(took[product] * count for product, count in products.items())
        found[name] = {"seconds": seconds, "tflop": flops / 1e12, "gflop_per_second": flops / seconds / 1e9}
    return {"seconds": found["hidden"]["seconds"], "floor": found}
