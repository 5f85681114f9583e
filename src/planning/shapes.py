"""What a model is, read off its configuration on the meta device: no weight is loaded or fetched."""

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from src.distillation.base import config_folder, load_model_config


@dataclass(frozen=True)
class Shapes:
    """Sizes of a causal language model. `weights` are numbers, not bytes.

    layer_weights: matrices of all layers; `active_weights` those of them that one token is multiplied with.
    expert_weights: the part of layer_weights that is experts.
    first_inputs: matrices of the first layer that read its input (q, k, v): without trainable weights before them
        nobody wants their input's gradient.
    widest: the largest matrix outside experts, weights.
    stored: the type that its files hold.
    """

    name: str
    layers: int
    hidden: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    weights: int
    layer_weights: int
    active_weights: int
    expert_weights: int
    experts: int
    experts_per_token: int
    first_inputs: int
    widest: int
    tied: bool
    stored: torch.dtype = torch.bfloat16

    def kv_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of a token's keys and values in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * dtype.itemsize


def open_meta(name: str, dtype: torch.dtype = torch.bfloat16, layers: int | None = None) -> PreTrainedModel:
    """The model on the meta device, frozen weights of `dtype`, of so many layers if so wanted.

    Raises:
        UserError: its configuration cannot be had.
    """
    # a folder of this repository may stand in for a model that is not here: its configuration is enough
    config = load_model_config(config_folder(name))
    if layers is not None:
        text = config.get_text_config()
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            # sliding and full layers in their turn, as many as there are layers
            text.layer_types = (text.layer_types * layers)[:layers]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def read_shapes(name: str) -> Shapes:
    """The shapes of a model by its folder or hub id.

    Raises:
        UserError: its configuration cannot be had.
    """
    model = open_meta(name)
    config, layers = model.config.get_text_config(), model.get_decoder().layers
    # families have their own words for it; 0 for a dense model
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 0
    per_token = getattr(config, "num_experts_per_tok", None) or 0
    heads = config.num_attention_heads
    # norms and biases multiply nothing
    matrices = [(n, p) for n, p in layers.named_parameters() if p.dim() >= 2]
    # experts are stacked in one tensor, [experts, outputs, inputs]
    expert_weights = sum(p.numel() for _, p in matrices if p.dim() == 3 and p.shape[0] == experts)
    layer_weights = sum(p.numel() for _, p in matrices)
    first = [p.numel() for n, p in matrices if _reads_first(n.removesuffix(".weight"))]
    return Shapes(
        name=name,
        layers=len(layers),
        hidden=config.hidden_size,
        vocab=model.get_output_embeddings().weight.shape[0],
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        weights=sum(p.numel() for p in model.parameters()),
        layer_weights=layer_weights,
        active_weights=layer_weights - expert_weights + (expert_weights * per_token // experts if experts else 0),
        expert_weights=expert_weights,
        experts=experts,
        experts_per_token=per_token,
        first_inputs=sum(first),
        widest=max(p.numel() for _, p in matrices if p.dim() == 2),
        tied=model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        stored=load_model_config(config_folder(name)).dtype or torch.bfloat16,
    )


def _reads_first(path: str) -> bool:
    """Whether a module of the layers reads what the first layer is given: "0.self_attn.q_proj"."""
    return path.startswith("0.") and path.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj")


def lora_weights(name: str, rank: int, targets: list[str]) -> tuple[int, int]:
    """Trainable weights of adapters on these projections, and those of them on the first layer's q, k and v."""
    total = first = 0
    for path, module in open_meta(name).get_decoder().layers.named_modules():
        if path.rpartition(".")[2] in targets and isinstance(module, torch.nn.Linear):
            # A: [rank, inputs], B: [outputs, rank]
            own = rank * (module.in_features + module.out_features)
            total += own
            first += own if _reads_first(path) else 0
    return total, first
