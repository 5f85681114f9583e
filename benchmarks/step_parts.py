"""What a training step is made of: our own time by part, and the time its matrix products alone would take."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from benchmarks import harness
from src.distillation import training
from src.distillation.base import compute_dtype, load_model_config, meta_model


@contextlib.contextmanager
def parts_of_a_step(skip: int) -> Iterator[Counter[str]]:
    """Seconds a step in each part of our trainer, after `skip` steps; `rest` is batches, clipping and the log.

    The objective's forward forms the gradient of the hidden states too, so `backward` is that of the student's body. On
    a GPU every part waits for what it has queued; a step that waits once, at its end, takes less than they add up to.
    """
    # spent: up to now; kept: up to the end of the last step; ends: of every step
    spent: Counter[str] = Counter()
    kept: Counter[str] = Counter()
    ends: list[float] = []

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            start = harness.now()
            try:
                return function(*arguments, **keywords)
            finally:
                spent[part] += harness.now() - start

        return call

    # the start is taken off and the end added: what is left is the time between the two
    def before_update(*_: Any) -> None:
        spent["optimizer"] -= harness.now()

    def after_update(*_: Any) -> None:
        ends.append(harness.now())
        spent["optimizer"] += ends[-1]
        # the steps before were to warm up
        if len(ends) == skip:
            spent.clear()
        kept.clear()
        kept.update(spent)  # what comes after the last step, held-out rows, is no part of one

    with contextlib.ExitStack() as stack:
        # 1. the trainer's own functions, each with a clock around it until all is done
        for owner, name, part in (
            (training, "_beliefs", "teacher"), (training, "response_hidden", "student_forward"),
            (training, "kd_loss", "loss"), (Accelerator, "backward", "backward"),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(owner, name, timed(part, getattr(owner, name))))
        # 2. the update has no function of ours: torch's hooks, for all optimisers
        stack.callback(register_optimizer_step_pre_hook(before_update).remove)
        stack.callback(register_optimizer_step_post_hook(after_update).remove)
        yield kept
    # 3. means over the timed steps; the rest is what no part has
    steps = len(ends) - skip
    for part in kept:
        kept[part] /= steps
    kept["rest"] = (ends[-1] - ends[skip - 1]) / steps - sum(kept.values())


Product = tuple[int, int, int, int]  # products at once, and [m, k] @ [k, n]


def products_of(weight: torch.Tensor, tokens: int, per_token: int, lora_r: int, backward: bool) -> Counter[Product]:
    """The products of one weight: y [tokens, n] = x [tokens, k] W^T, of an adapter beside it, and their gradients.

    Args:
        weight: `[n, k]`; or experts, `[experts, n, k]`, of which a token visits `per_token`, all of them equally often.
        lora_r: rank of the adapter, 0 for none.
    """
    found: Counter[Product] = Counter()
    *stacked, n, k = weight.shape
    batch = 1
    if stacked:
        # 2 tokens that visit 8 each reach 16 experts at most, with a token each
        batch = min(*stacked, tokens * per_token)
        tokens = round(tokens * per_token / batch)
    found[batch, tokens, k, n] += 1
    # x A^T, and times B^T
    if lora_r:
        found[1, tokens, k, lora_r] += 1
        found[1, tokens, lora_r, n] += 1
    # the gradient of x; W is frozen and has none
    if backward:
        found[batch, tokens, n, k] += 1
    if backward and lora_r:
        found[1, tokens, n, lora_r] += 1  # through B, its gradient; through A, its gradient
        found[1, n, tokens, lora_r] += 1
        found[1, tokens, lora_r, k] += 1
        found[1, lora_r, tokens, k] += 1
    return found


def body_products(name: str, tokens: int, length: int, lora_r: int, backward: bool) -> Counter[Product]:
    """The products of a model's decoder for `tokens` tokens in rows of `length`: how often each occurs.

    Attention is counted in full squares: the kernel here skips at most half of them. Frozen weights get no gradient.
    """
    # on the meta device: shapes without weights
    model, config = meta_model(name), load_model_config(name)
    found: Counter[Product] = Counter()
    for module in model.get_decoder().modules():
        if isinstance(module, torch.nn.Embedding):  # looked up, not multiplied
            continue
        # a mixture's router and experts are parameters of modules of their own, which get no adapter
        rank = lora_r if isinstance(module, torch.nn.Linear) else 0
        for weight in module.parameters(recurse=False):
            # norms and biases multiply nothing
            if weight.dim() > 1:
                per_token = config.num_experts_per_tok if weight.dim() == 3 else 1
                found += products_of(weight, tokens, per_token, rank, backward)
    # attention: a product a head and row, [length, width] each
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    # as many squares as the tokens fill
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
        # plain matrices, as a projection's are
        left, right = left[0], right[0]
    # the same numbers, column after column in memory
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
    # 1. a step's tokens: of all, those that are computed; of the answers, every one
    dtype, profile = compute_dtype(harness.device()), job["profile"]
    tokens = round(job["tokens"] * (1 - job["shared"]) / job["steps"])
    answers = round(job["answers"] / job["steps"])
    length = round(job["tokens"] / job["rows"])
    # 2. the loss: the student's logits and their gradient by its states; the teacher's logits
    student = load_model_config(profile["model_name_or_path"])
    teacher = load_model_config(profile["teacher_model_name_or_path"])
    head: Counter[Product] = Counter()
    head[1, answers, student.hidden_size, student.vocab_size] += 1
    head[1, answers, student.vocab_size, student.hidden_size] += 1
    beliefs = Counter({(1, answers, teacher.hidden_size, teacher.vocab_size): 1})
    # 3. the bodies: of the student with adapters, forward and backward; of the teacher, forward alone
    body = body_products(profile["model_name_or_path"], tokens, length, job["lora_r"], backward=True)
    online = body_products(profile["teacher_model_name_or_path"], tokens, length, 0, backward=False)
    # 4. what each way to train multiplies
    work = {"sft": body + head, "hidden": body + head + beliefs, "online": body + head + beliefs + online}
    # the largest of them has the products of all, so each is measured once
    took = {product: product_seconds(product, dtype) for product in work["online"]}
    found: dict[str, Any] = {"dtype": str(dtype), "tokens": tokens, "answer_tokens": answers, "length": length}
    for name, products in work.items():
        # a product of [m, k] and [k, n] has m k n multiplications and as many additions
        flops = sum(2 * b * m * k * n * count for (b, m, k, n), count in products.items())
        seconds = sum(took[product] * count for product, count in products.items())
        found[name] = {"seconds": seconds, "tflop": flops / 1e12, "gflop_per_second": flops / seconds / 1e9}
    # `seconds` is what every worker's result has
    return {"seconds": found["hidden"]["seconds"], "floor": found}
