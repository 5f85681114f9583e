"""Operations as the planner counts them, against those that torch counts while the engine's own code runs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from src.distillation.base import LORA_TARGETS, EncodedRow, response_hidden
from src.distillation.lora import add_lora
from src.distillation.losses import kd_loss
from src.distillation.packing import ATTENTION, pack
from src.planning import flops
from src.planning.shapes import lora_weights, read_shapes

LENGTHS = [40, 24, 64]
RANK = 8
SIZES = {"hidden_size": 96, "layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 24}


@pytest.fixture(scope="module", params=["dense", "experts"])
def folder(request, tmp_path_factory, make_model, make_tokenizer, save_model):
    """A model of either kind, wide enough that its products are what counts."""
    place = tmp_path_factory.mktemp("models") / request.param
    return save_model(place, make_model(request.param == "experts", **SIZES), make_tokenizer())


@pytest.fixture
def model(folder, load):
    return load(folder)


@pytest.fixture(scope="module")
def load():
    from src.distillation.base import load_model

    def loaded(folder):
        model = load_model(folder, torch.float32)
        if model.config.model_type == "qwen3_moe":
            model.set_experts_implementation("eager")  # a product an expert, which torch counts
        return model

    return loaded


def added_in_place(_, left, right, *__, **___):
    """Shapes of `addmm_`, as the adapters' products are added up; torch counts its sisters and forgets it."""
    return 2 * left[0] * left[1] * right[1]


def counted(work):
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added_in_place}) as counter:
        work()
    return counter.get_total_flops()


def packed(lengths=LENGTHS):
    rows = [EncodedRow(str(n), (n,) * (length // 2), (n,) * (length - length // 2)) for n, length in enumerate(lengths)]
    return pack(rows, pad_id=0, multiple=1)


def test_a_forward_pass(folder, model):
    model.set_attn_implementation(ATTENTION)
    with torch.no_grad():
        found = counted(lambda: response_hidden(model, packed()))
    assert flops.body_forward(read_shapes(folder), LENGTHS) == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_forward_and_backward_with_frozen_weights(folder, model, checkpointing):
    """No gradient of a frozen matrix is formed: with them it would be half as much again."""
    targets = [name for name in LORA_TARGETS if any(n.endswith(f".{name}") for n, _ in model.named_modules())]
    adapted = add_lora(model, RANK, RANK, 0.0, targets)
    model.set_attn_implementation(ATTENTION)
    if checkpointing:
        adapted.activation_checkpointing_enable({"use_reentrant": False})
        adapted.enable_input_require_grads()
    adapted.train()
    found = counted(lambda: response_hidden(adapted, packed())[0].sum().backward())
    adapters, first = lora_weights(folder, RANK, targets)
    assert adapters == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    planned = flops.body_training(read_shapes(folder), LENGTHS, adapters, first, checkpointing)
    assert planned == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize("taught", [False, True])
def test_the_loss(folder, taught):
    student = read_shapes(folder)
    hidden = torch.randn(50, student.hidden, requires_grad=True)
    teacher = (torch.randn(50, student.hidden), torch.randn(student.vocab, student.hidden)) if taught else (None, None)
    head, labels = torch.randn(student.vocab, student.hidden), torch.zeros(50, dtype=torch.long)
    alpha = 0.5 if taught else 0.0
    found = counted(lambda: kd_loss(hidden, head, *teacher, labels, temperature=2.0, alpha=alpha).loss.backward())
    assert flops.loss(student, student if taught else None, 50, student.vocab) == pytest.approx(found, rel=0.02)


@torch.no_grad()
def test_decoding(folder, model):
    """Every step reads all keys before it; the head runs once a row and step."""
    model.set_attn_implementation("eager")
    rows, start, tokens = 3, 20, 8
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.zeros(rows, start, dtype=torch.long), past_key_values=cache)

    def decode():
        for _ in range(tokens):
            model(input_ids=torch.zeros(rows, 1, dtype=torch.long), past_key_values=cache)

    assert flops.decoding(read_shapes(folder), rows, start, tokens) == pytest.approx(counted(decode), rel=0.02)


def test_experts_that_some_tokens_choose(folder):
    """Against drawing: `tokens` times `experts_per_token` different ones of all."""
    shapes = read_shapes(folder)
    if not shapes.experts:
        assert flops.distinct_experts(shapes, 5) == 0
        assert flops.read_weights(shapes, 5) == shapes.layer_weights + shapes.hidden * shapes.vocab
        return
    generator = torch.Generator().manual_seed(0)
    for tokens in (1, 3, 20):
        seen = []
        for _ in range(2000):
            chosen = [
                torch.randperm(shapes.experts, generator=generator)[: shapes.experts_per_token] for _ in range(tokens)
            ]
            seen.append(len(torch.cat(chosen).unique()))
        assert flops.distinct_experts(shapes, tokens) == pytest.approx(sum(seen) / len(seen), rel=0.02)
    one = flops.read_weights(shapes, 1)
    assert one == pytest.approx(shapes.active_weights + shapes.hidden * shapes.vocab)
