"""LoRA adapters, each run with its projection as one function.

peft's own forward scales and adds in passes over `[tokens, outputs]`, forward and backward; here the products add up in
place.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from src.distillation.base import LORA_TARGETS
from src.utils.common import UserError


def _products(flat: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> list[Tensor]:
    """x W^T + b + scale (x A^T) B^T (Hu et al. 2021, equation 3), and x A^T."""
    out = torch.nn.functional.linear(flat, weight, bias)
    inner = flat @ a.T
    return [out.addmm_(inner, b.T, alpha=scale), inner]


def _gradient(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` for an fp32 parameter: on a GPU in fp32 at once; a CPU rounds to the factors' type first."""
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left, right, out_dtype=torch.float32)
    return left @ right


class _AdaptedLinear(torch.autograd.Function):
    """`_products` with no gradient for W and b, which are frozen; A and B are fp32, their copies in the products' type
    do the work."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        a_copy: Tensor,
        b_copy: Tensor,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        out, inner = _products(flat, weight, bias, a_copy, b_copy, scale)
        ctx.save_for_backward(flat, weight, a_copy, b_copy, inner)
        ctx.scale = scale
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight, a, b, inner = ctx.saved_tensors
        g = gradient.reshape(-1, gradient.shape[-1])
        g_inner = (g @ b).mul_(ctx.scale)
        g_x = None
        if ctx.needs_input_grad[0]:
            g_x = (g @ weight).addmm_(g_inner, a).view(*gradient.shape[:-1], -1)
        g_a, g_b = _gradient(g_inner.T, flat), _gradient(g.T, inner).mul_(ctx.scale)
        return g_x, None, None, g_a, g_b, None, None, None


class _FusedLinear(Linear):
    """peft's layer, run as the one function wherever that says the same: one adapter on, with a plain A and B in this
    layer (no DoRA, no bias), not merged, no dropout."""

    # A and B of the active adapter in the products' type, while `adapters_cast` holds them
    copies: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        names = [name for name in self.active_adapters if name in self.lora_A]
        plain = self.disable_adapters or self.merged or len(names) != 1 or arguments or keywords
        plain = plain or names[0] in self.lora_variant or self.lora_bias.get(names[0])
        if plain or (self.training and getattr(self.lora_dropout[names[0]], "p", 0) > 0):
            return super().forward(x, *arguments, **keywords)
        device, base, name = x.device.type, self.base_layer, names[0]
        dtype = base.weight.dtype
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):  # the meta device has none
            dtype = torch.get_autocast_dtype(device)
        bias = None if base.bias is None else base.bias.to(dtype)
        a, b, scale = self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        copies = self.copies or (a.detach().to(dtype), b.detach().to(dtype))
        if torch.is_grad_enabled():
            return _AdaptedLinear.apply(x.to(dtype), base.weight.to(dtype), bias, a, b, scale, *copies)
        flat = x.to(dtype).reshape(-1, x.shape[-1])  # without autograd's function: a decoding step is short
        out, _ = _products(flat, base.weight.to(dtype), bias, *copies, scale)
        return out.view(*x.shape[:-1], -1)


@contextlib.contextmanager
def adapters_cast(model: PeftModel, dtype: torch.dtype) -> Iterator[None]:
    """Within it the adapters do not change, so that each is cast to the products' type once for all passes.

    Not for sharded adapters, which exist as a whole only while their layer runs.
    """
    layers = [module for module in model.modules() if isinstance(module, _FusedLinear)]
    try:
        for layer in layers:
            names = [name for name in layer.active_adapters if name in layer.lora_A]
            if len(names) == 1 and not isinstance(layer.lora_A[names[0]].weight, DTensor):
                weights = layer.lora_A[names[0]].weight, layer.lora_B[names[0]].weight
                layer.copies = tuple(weight.detach().to(dtype) for weight in weights)
        yield
    finally:
        for layer in layers:
            layer.copies = None


def add_lora(
    model: PreTrainedModel,
    r: int,
    alpha: int,
    dropout: float,
    targets: Sequence[str] = LORA_TARGETS,
    fused: bool = True,
) -> PeftModel:
    """Freeze the model and add fp32 LoRA adapters (Hu et al. 2021) to the named projections of every layer.

    Args:
        fused: run each as one function; otherwise as peft does.

    Raises:
        UserError: the model has no module of one of those names.
    """
    missing = [t for t in targets if not any(n == t or n.endswith(f".{t}") for n, _ in model.named_modules())]
    if missing:
        raise UserError(f"lora_target_modules: the student has no module named {', '.join(missing)}")
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    if any(head == t or head.endswith(f".{t}") for t in targets):
        raise UserError(f"lora_target_modules: {head} is the output layer, whose adapter the loss would not see")
    config = LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets), bias="none", task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, config)
    for module in adapted.modules():
        if isinstance(module, Linear):
            module.cast_input_dtype_enabled = False  # autocast casts; peft would go to fp32 and back in every layer
    if fused:
        fuse(adapted)
    return adapted


def fuse(model: PeftModel) -> None:
    """Run each adapter with its projection as one function from now on, products in the type of the projection."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.__class__ = _FusedLinear


def merge_adapter(model: PreTrainedModel, folder: str) -> PreTrainedModel:
    """The model with a saved adapter added into its weights: to answer with, at the speed of the model itself.

    The products of the two factors are formed in fp32 and rounded once, to the type of the weights.

    Raises:
        UserError: the adapter cannot be read, or is for another model.
    """
    try:
        adapted = PeftModel.from_pretrained(model, folder)
    except SafetensorError as error:
        raise UserError(f"{folder}: its weights cannot be read ({error}); train it again with --overwrite") from error
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"{folder} does not fit on {model.name_or_path}: {reason}; name its student with --base"
        ) from error
    return adapted.merge_and_unload().eval()
