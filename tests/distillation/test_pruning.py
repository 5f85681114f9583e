import pytest
import torch

from src.distillation.base import load_model
from src.distillation.pruning import block_influence, layers_to_keep, prune_layers
from src.utils.common import UserError

TEXTS = ["short", "a text that is a good deal longer than the others", "middling, this one", "naïve"]
IDLE = 1  # the layer that passes its input on


@pytest.fixture(params=["qwen3", "qwen3_moe", "tied"])
def model(request, make_model):
    """Four layers, one of them idle: nothing it computes is written back."""
    model = make_model(request.param == "qwen3_moe", layers=4, tie_word_embeddings=request.param == "tied")
    layer = model.model.layers[IDLE]
    down = layer.mlp.experts.down_proj if request.param == "qwen3_moe" else layer.mlp.down_proj.weight
    for weight in (layer.self_attn.o_proj.weight, down):
        weight.data.zero_()
    return model


@pytest.fixture
def ids():
    torch.manual_seed(0)
    return torch.randint(256, (2, 20))


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_an_idle_layer_has_no_influence_and_goes_first(model, make_tokenizer):
    influence = block_influence(model, make_tokenizer(), TEXTS)
    assert len(influence) == 4
    assert abs(influence[IDLE]) < 1e-6
    assert min(value for index, value in enumerate(influence) if index != IDLE) > 1e-3
    assert layers_to_keep(influence, 3) == [0, 2, 3]


@torch.no_grad()
def test_influence_is_the_mean_over_real_tokens(model, make_tokenizer):
    """Against transformers' own hidden states of each text alone; neither padding nor the batch size counts."""
    tokenizer = make_tokenizer()
    cosines = [[] for _ in range(3)]  # of the last layer transformers gives the output after the final norm
    for text in TEXTS:
        states = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states
        for index, found in enumerate(cosines):
            found += torch.cosine_similarity(states[index], states[index + 1], dim=-1)[0].tolist()
    for batch_size in (1, 3, 8):
        influence = block_influence(model, tokenizer, TEXTS, batch_size)
        assert influence[:3] == pytest.approx([1 - sum(found) / len(found) for found in cosines], abs=1e-5)


@pytest.mark.parametrize("texts", [[], [""], ["a text", ""]], ids=str)
def test_no_text_has_no_influence_on_it(model, make_tokenizer, texts):
    """The mean over no token is no number, by which the first layers would be kept."""
    with pytest.raises(UserError, match="measured on calibration texts: name some, none of them empty"):
        block_influence(model, make_tokenizer(), texts)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_states_that_are_not_finite_are_refused(model, make_tokenizer, value):
    model.model.layers[2].post_attention_layernorm.weight.data.fill_(value)
    with pytest.raises(UserError, match=r"layer 2: its influence is nan, for its states are not finite"):
        block_influence(model, make_tokenizer(), TEXTS)


def test_block_influence_leaves_no_hooks(model, make_tokenizer):
    block_influence(model, make_tokenizer(), TEXTS)
    assert not any(layer._forward_hooks for layer in model.model.layers)


@pytest.mark.parametrize(
    ("influence", "keep", "expected"), [([0.5, 0.1, 0.3, 0.2], 2, [0, 2]), ([0.1, 0.4], 2, [0, 1]), ([1, 3, 2], 1, [1])]
)
def test_layers_to_keep(influence, keep, expected):
    assert layers_to_keep(influence, keep) == expected


def test_dropping_idle_layers_changes_nothing(model, ids):
    before = logits(model, ids)
    pruned = prune_layers(model, [0, 2, 3])
    torch.testing.assert_close(logits(pruned, ids), before)
    assert not torch.allclose(logits(prune_layers(model, [0, 1, 2]), ids), before, atol=1e-2)


def test_the_original_is_left_alone(model, ids):
    before = logits(model, ids)
    pruned = prune_layers(model, [0, 3])
    pruned.model.layers[0].self_attn.q_proj.weight.data.zero_()
    assert model.config.num_hidden_layers == len(model.model.layers) == 4
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3]
    assert torch.equal(logits(model, ids), before)


def test_saved_and_loaded_again(model, ids, tmp_path):
    pruned = prune_layers(model, [0, 2, 3])
    assert pruned.config.num_hidden_layers == 3
    pruned.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), torch.float32)
    assert len(loaded.model.layers) == 3
    assert torch.equal(logits(loaded, ids), logits(pruned, ids))


def test_the_cache_works_after_pruning(model, ids):
    """A layer that kept its old number would write into another layer's cache, or past its end."""
    pruned = prune_layers(model, [0, 3])
    with torch.no_grad():
        first = pruned(input_ids=ids[:, :-1], use_cache=True)
        last = pruned(input_ids=ids[:, -1:], past_key_values=first.past_key_values).logits[:, -1]
    torch.testing.assert_close(last, logits(pruned, ids)[:, -1])


def test_kinds_of_layers_follow(make_model):
    """A model with windows in its upper layers: the config's list of kinds loses the same entries."""
    model = make_model(layers=4, use_sliding_window=True, sliding_window=4, max_window_layers=2)
    kinds = model.config.layer_types
    assert kinds == ["full_attention"] * 2 + ["sliding_attention"] * 2
    pruned = prune_layers(model, [0, 3])
    assert pruned.config.layer_types == ["full_attention", "sliding_attention"]
    assert model.config.layer_types == kinds
