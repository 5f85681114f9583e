"""Weights in fewer bits: checkpoints that are stored so (FP8, int4), and a student that is loaded in four bits.

transformers' quantisers do the work. Here is what has to be known around them: what a checkpoint says of itself,
whether this machine can have it, and how many bytes its weights take.
"""

import functools
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import get_hf_quantizer

from src.utils.common import UserError, logger

FP8 = "fp8"  # transformers' word for weights in FP8 with a scale for each block of them
FP8_CAPABILITY = (8, 9)  # of the first GPUs that multiply FP8 (Ada, Hopper); older ones get the weights as bf16
PLAIN = (torch.float32, torch.bfloat16, torch.float16)


def method_of(config: PreTrainedConfig) -> str | None:
    """How a checkpoint's weights are stored (`fp8`, `compressed-tensors`, `gptq`, ...); None where they are plain."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    # a dict as config.json has it, or an object that transformers made of it
    method = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
    return str(getattr(method, "value", method or "unknown"))  # an enum of transformers, or a plain word


def four_bit(dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4 with doubly quantised scales, products in `dtype`: QLoRA's (Dettmers et al. 2023, section 3).

    Only linear layers are: the experts of a mixture are stacked matrices, which bitsandbytes leaves as they are.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise UserError("--load_in_4bit: the package bitsandbytes is not here; pip install '.[quant]'")
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def check_machine(name: str, config: PreTrainedConfig) -> None:
    """Say what becomes of FP8 weights where nothing multiplies them, and refuse them where only a package is missing.

    transformers asks for its kernels in the first forward pass, when all the weights have been loaded.

    Raises:
        UserError: the GPU multiplies FP8, but the kernels for it are not here.
    """
    if method_of(config) != FP8:
        return
    # (8, 9) of Ada, (9, 0) of Hopper, (8, 0) of an A100
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    if capability is None or capability < FP8_CAPABILITY:
        where = "a CPU" if capability is None else f"a GPU of compute capability {'.'.join(map(str, capability))}"
        logger.info("%s: FP8 weights are laid out in bf16, twice their size: %s multiplies no FP8", name, where)
    elif find_spec("kernels") is None:
        raise UserError(
            f"model {name!r} is stored in FP8, whose kernels transformers takes from the package kernels; "
            "pip install kernels, or name the model in bf16"
        )


def cannot_load_quantised(name: str, method: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]  # one line
    return UserError(
        f"model {name!r} is quantised ({method}) and cannot be loaded here: {reason}; do what that says, or name the "
        "model without quantisation"
    )


def add_quantiser(model: PreTrainedModel, config: PreTrainedConfig, own: BitsAndBytesConfig | None) -> None:
    """Put the layers that loading would make into a model without weights, so that their bytes can be counted.

    Args:
        model: on the meta device.
        config: of its checkpoint.
        own: how plain weights are to be quantised while they are loaded, if they are.

    Raises:
        ImportError, ValueError, RuntimeError: the quantiser cannot work here; transformers says why.
    """
    nowhere = {"": "cpu"}  # without a place, bitsandbytes' would ask for the current GPU
    # None for plain weights
    quantiser, _, _ = get_hf_quantizer(config, own, device_map=nowhere, weights_only=True, user_agent={})
    if quantiser is not None:
        quantiser.preprocess_model(model=model, dtype=model.dtype, device_map=None, checkpoint_files=None)
        model.hf_quantizer = quantiser


def parameter_bytes(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, float]:
    """Bytes of each parameter once it is loaded: in `dtype`, or as its quantiser keeps it (see `add_quantiser`).

    The scales of 4-bit blocks are not among them: 0.127 bits a weight (Dettmers et al. 2023, section 3).
    """
    quantiser = getattr(model, "hf_quantizer", None)
    sizes = {}
    for name, parameter in model.named_parameters():
        each = dtype.itemsize if quantiser is None else quantiser.param_element_size(model, name, parameter)
        sizes[name] = parameter.numel() * each
    return sizes


def elements(parameter: nn.Parameter) -> int:
    """How many numbers a parameter stands for: bitsandbytes packs two into a byte."""
    state = getattr(parameter, "quant_state", None)
    # of a packed matrix: its shape as it was
    return parameter.numel() if state is None else state.shape.numel()


def unpacked(packed: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    """The matrix that four-bit blocks stand for; `state`, bitsandbytes' QuantState, has its shape and scales."""
    return _dequantize()(packed, state).to(dtype)


@functools.cache
def _dequantize() -> Any:
    from bitsandbytes.functional import dequantize_4bit  # optional; found once, not in every layer

    return dequantize_4bit


def check_head(name: str, model: PreTrainedModel) -> None:
    """Refuse an output layer that is not a plain matrix: the loss walks over its columns itself.

    Raises:
        UserError: it is quantised, or has a bias.
    """
    head = model.get_output_embeddings()
    # a quantised layer may keep its numbers under other names, or packed into bytes
    weight = getattr(head, "weight", None)
    if weight is None or weight.dtype not in PLAIN:
        kind = type(head).__name__ if weight is None else str(weight.dtype).removeprefix("torch.")
        raise UserError(
            f"model {name!r}: its output layer is quantised ({kind}), which the loss cannot walk over; name a "
            "checkpoint that keeps lm_head as it was"
        )
    if getattr(head, "bias", None) is not None:
        raise UserError(f"model {name!r} has a bias on its output layer, which the distillation loss does not know")
