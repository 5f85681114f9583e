"""A student cut out of the teacher: whole decoder layers are dropped, the least influential ones first."""

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from src.distillation.base import causal_lm
from src.utils.common import UserError


@torch.no_grad()
def block_influence(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], batch_size: int = 8
) -> list[float]:
    """How much each decoder layer turns its input: the mean over tokens of 1 - cos(input, output), one number a layer.

    ShortGPT (Men et al. 2024, equation 1). A layer near 0 passes its input on almost unchanged.

    Args:
        texts: calibration texts as the model reads them (with the chat template in).
        batch_size: texts in one forward pass.

    Raises:
        UserError: there is no text, an empty one, or a layer's states are not finite.
    """
    if not texts or not all(texts):
        raise UserError("the influence of layers is measured on calibration texts: name some, none of them empty")
    layers = causal_lm(model).get_decoder().layers
    sums = torch.zeros(len(layers), dtype=torch.float64)  # over all tokens of all texts
    tokens = 0
    mask: Tensor  # of the batch that runs, for the hooks

    def measure(index: int):
        def hook(_: nn.Module, arguments: tuple, keywords: dict, output: Tensor | tuple) -> None:
            # a model may call its layers with the states in place or by name, and a layer may give a tuple
            before = arguments[0] if arguments else keywords["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            cosine = torch.cosine_similarity(before.float(), after.float(), dim=-1)
            # [B, L] -> the tokens that are no padding
            sums[index] += (1 - cosine)[mask].double().sum().cpu()

        return hook

    handles = [layer.register_forward_hook(measure(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        for start in range(0, len(texts), batch_size):
            # the texts have the template's special tokens already
            batch = tokenizer(
                list(texts[start : start + batch_size]), return_tensors="pt", padding=True, add_special_tokens=False
            ).to(model.device)
            mask = batch["attention_mask"].bool()
            tokens += int(mask.sum())
            causal_lm(model).get_decoder()(**batch, use_cache=False)  # without the head: nobody reads logits
    finally:
        for handle in handles:
            handle.remove()
    influence = (sums / tokens).tolist()
    for index, value in enumerate(influence):
        if not math.isfinite(value):
            raise UserError(f"layer {index}: its influence is {value}, for its states are not finite; check the model")
    return influence


def layers_to_keep(influence: Sequence[float], keep: int) -> list[int]:
    """Indices of the `keep` most influential layers, in their order."""
    ranked = sorted(range(len(influence)), key=lambda index: -influence[index])
    return sorted(ranked[:keep])


def prune_layers(model: PreTrainedModel, keep: Sequence[int]) -> PreTrainedModel:
    """A copy of the model with only the decoder layers `keep`, its config adjusted.

    Raises:
        UserError: the model's mixture-of-experts layers are chosen by layer number, which pruning would shift.
    """
    if getattr(model.config, "mlp_only_layers", None) or getattr(model.config, "decoder_sparse_step", 1) != 1:
        raise UserError("a model whose expert layers are chosen by their number cannot be pruned by depth")
    pruned = copy.deepcopy(model)
    decoder = pruned.get_decoder()
    decoder.layers = nn.ModuleList(decoder.layers[index] for index in keep)
    for position, layer in enumerate(decoder.layers):
        # where a layer's keys and values go in the cache, which has a place for each that is left
        layer.self_attn.layer_idx = position
    pruned.config.num_hidden_layers = len(decoder.layers)
    if getattr(pruned.config, "layer_types", None):
        # sliding or full attention, by layer
        pruned.config.layer_types = [pruned.config.layer_types[index] for index in keep]
    return pruned
