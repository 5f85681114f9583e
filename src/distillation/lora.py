"""LoRA adapters, each run with its projection as one function.

peft's own forward scales and adds in passes over `[tokens, outputs]`, forward and backward; here the products add up in
place.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear, LoraLayer
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from src.distillation.base import LORA_TARGETS
from src.distillation.quantisation import method_of, unpacked
from src.utils.common import UserError


def _products(flat: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> list[Tensor]:
    """x W^T + b + scale (x A^T) B^T (Hu et al. 2021, equation 3), and x A^T."""
    # flat [N, in], weight [out, in], a [r, in], b [out, r]
    out = torch.nn.functional.linear(flat, weight, bias)
    inner = flat @ a.T  # [N, r], which the gradient of B needs again
    return [out.addmm_(inner, b.T, alpha=scale), inner]


def _gradient(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` for an fp32 parameter: on a GPU in fp32 at once; a CPU rounds to the factors' type first."""
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left, right, out_dtype=torch.float32)
    return left @ right


def _matrix(weight: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    """A projection's weight as the products read it; `state` is that of four-bit blocks, None for a plain matrix."""
    return weight.to(dtype) if state is None else unpacked(weight, state, dtype)


class _AdaptedLinear(torch.autograd.Function):
    """`_products` with no gradient for W and b, which are frozen; A and B are fp32, their copies in the products' type
    do the work. Four-bit blocks are laid out as a matrix in either pass, and not kept between them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        state: Any,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        a_copy: Tensor,
        b_copy: Tensor,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        out, inner = _products(flat, _matrix(weight, state, x.dtype), bias, a_copy, b_copy, scale)
        ctx.save_for_backward(flat, weight, a_copy, b_copy, inner)
        ctx.scale, ctx.state = scale, state
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight, a, b, inner = ctx.saved_tensors
        # with s the scale: gx = g W + s (g B) A, gA = s (g B)^T x, gB = s g^T (x A^T)
        g = gradient.reshape(-1, gradient.shape[-1])
        g_inner = (g @ b).mul_(ctx.scale)
        g_x = None
        if ctx.needs_input_grad[0]:  # nobody asks in the first layer, behind a frozen embedding
            matrix = _matrix(weight, ctx.state, g.dtype)
            g_x = (g @ matrix).addmm_(g_inner, a).view(*gradient.shape[:-1], -1)
        g_a, g_b = _gradient(g_inner.T, flat), _gradient(g.T, inner).mul_(ctx.scale)
        return g_x, None, None, None, g_a, g_b, None, None, None  # for x, A and B


class _Fused:
    """Before a layer of peft's among a class's bases: runs it as the one function wherever that says the same: one
    adapter on, with a plain A and B in this layer (no DoRA, no bias), not merged, no dropout."""

    # A and B of the active adapter in the products' type, while `adapters_cast` holds them
    copies: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        # 1. whatever is not one plain adapter is peft's affair; an adapter may be on other layers only
        names = [name for name in self.active_adapters if name in self.lora_A]
        plain = self.disable_adapters or self.merged or len(names) != 1 or arguments or keywords
        plain = plain or names[0] in self.lora_variant or self.lora_bias.get(names[0])
        if plain or (self.training and getattr(self.lora_dropout[names[0]], "p", 0) > 0):
            return super().forward(x, *arguments, **keywords)
        # 2. the type of the products: autocast's where it is on, else the weights'
        device, base, name = x.device.type, self.base_layer, names[0]
        state = getattr(base.weight, "quant_state", None)
        dtype = base.weight.dtype if state is None else base.compute_dtype
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):  # the meta device has none
            dtype = torch.get_autocast_dtype(device)
        # 3. what the products read; blocks of four bits are laid out later, not kept as a matrix
        weight = base.weight.to(dtype) if state is None else base.weight
        bias = None if base.bias is None else base.bias.to(dtype)
        a, b, scale = self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        copies = self.copies or (a.detach().to(dtype), b.detach().to(dtype))  # see `adapters_cast`
        if torch.is_grad_enabled():
            return _AdaptedLinear.apply(x.to(dtype), weight, state, bias, a, b, scale, *copies)
        flat = x.to(dtype).reshape(-1, x.shape[-1])  # without autograd's function: a decoding step is short
        out, _ = _products(flat, _matrix(weight, state, dtype), bias, *copies, scale)
        return out.view(*x.shape[:-1], -1)


@functools.cache
def _fused_class(kind: type[LoraLayer]) -> type[LoraLayer]:
    """A layer of peft's, for a plain projection or one in four bits, that runs as one function."""
    return type(f"Fused{kind.__name__}", (_Fused, kind), {})


def _has_matrix(module: torch.nn.Module) -> bool:
    """Whether this is an adapter on a plain projection, or on one whose four-bit blocks can be laid out as such."""
    if isinstance(module, Linear):
        return True
    # peft's own class for it exists only where bitsandbytes does
    return isinstance(module, LoraLayer) and hasattr(getattr(module.get_base_layer(), "weight", None), "quant_state")


@contextlib.contextmanager
def adapters_cast(model: PeftModel, dtype: torch.dtype) -> Iterator[None]:
    """Within it the adapters do not change, so that each is cast to the products' type once for all passes.

    Not for sharded adapters, which exist as a whole only while their layer runs.
    """
    layers = [module for module in model.modules() if isinstance(module, _Fused)]
    try:
        for layer in layers:
            # as `forward` chooses its adapter
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
    revision: str | None = None,
) -> PeftModel:
    """Freeze the model and add fp32 LoRA adapters (Hu et al. 2021) to the named projections of every layer.

    Args:
        fused: run each as one function; otherwise as peft does.
        revision: of the model on the hub, which a saved adapter then names.

    Raises:
        UserError: the model has no module of one of those names.
    """

    # 1. names: "q_proj" fits "model.layers.0.self_attn.q_proj", not "my_q_proj"
    def fits(name: str, target: str) -> bool:
        return name == target or name.endswith(f".{target}")

    names = [name for name, _ in model.named_modules()]
    missing = [target for target in targets if not any(fits(name, target) for name in names)]
    if missing:
        raise UserError(f"lora_target_modules: the student has no module named {', '.join(missing)}")
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    if any(fits(head, target) for target in targets):
        raise UserError(f"lora_target_modules: {head} is the output layer, whose adapter the loss would not see")
    # 2. the adapters
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(targets),
        bias="none",
        task_type="CAUSAL_LM",
        revision=revision,
    )
    adapted = get_peft_model(model, config)
    for module in adapted.modules():
        if _has_matrix(module):
            module.cast_input_dtype_enabled = False  # autocast casts; peft would go to fp32 and back in every layer
    if fused:
        fuse(adapted)
    return adapted


def fuse(model: PeftModel) -> None:
    """Run each adapter with its projection as one function from now on, products in the type of the projection."""
    for module in model.modules():
        if _has_matrix(module):
            # in place, so that names, weights and saved files stay peft's
            module.__class__ = _fused_class(type(module))
            if not isinstance(module, Linear):  # four bits
                # with AVX512-BF16 bitsandbytes would turn its blocks, in place, into what only itself can read
                module.get_base_layer().support_avx512bf16_for_cpu = False


def merge_adapter(model: PreTrainedModel, folder: str) -> PreTrainedModel:
    """The model with a saved adapter added into its weights: to answer with, at the speed of the model itself.

    The products of the two factors are formed in fp32 and rounded once, to the type of the weights.

    Raises:
        UserError: the adapter cannot be read, or is for another model, or the model is quantised.
    """
    if method := method_of(model.config):
        raise UserError(
            f"{folder}: an adapter is not added to quantised weights ({method}), which would round it away; name its "
            "student in bf16 with --base"
        )
    try:
        adapted = PeftModel.from_pretrained(model, folder)
    except SafetensorError as error:
        raise UserError(f"{folder}: its weights cannot be read ({error}); train it again with --overwrite") from error
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"{folder} does not fit on {model.name_or_path}: {reason}; name its student with --base"
        ) from error
    # W + scale B A, and the plain model is left
    return adapted.merge_and_unload().eval()
