"""Models and tokenizers from disk, what is refused there, and where their layers go."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from accelerate.utils.modeling import check_device_map
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from src.distillation.base import (
    count_parameters,
    layer_device_map,
    load_model,
    load_tokenizer,
    logit_map,
    model_fingerprint,
    place,
)
from src.utils.common import ROOT, UserError

PAD, END, TOKENS = 256, 258, 261  # of the tiny tokenizer


def load_fp32(name):
    return load_model(name, torch.float32)


def one_line(caught):
    return "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_load_model(tiny_teacher, tiny_student):
    model = load_model(tiny_student, torch.bfloat16)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert load_fp32(tiny_teacher).config.model_type == "qwen3_moe"


def test_load_tokenizer_sets_a_pad_token(tmp_path, make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token == "<|im_end|>"


@pytest.mark.parametrize("load", [load_fp32, load_tokenizer, model_fingerprint])
@pytest.mark.parametrize("name", ["outputs/models/nowhere", "nobody/nothing"])
def test_a_missing_model_is_one_line(load, name):
    with pytest.raises(UserError, match=name) as caught:
        load(name)
    assert one_line(caught)


def test_a_tokenizer_without_chat_template_is_one_line(tmp_path, make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no chat template") as caught:
        load_tokenizer(str(tmp_path))
    assert one_line(caught)


def cut_short(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def lose_a_layer(folder):
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if ".layers.1." not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def lose_the_weights(folder):
    (folder / "model.safetensors").unlink()


def break_the_config(folder):
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize("damage", [cut_short, lose_a_layer, lose_the_weights, break_the_config])
def test_a_damaged_model_is_refused_in_one_line(tmp_path, tiny_student, damage):
    """A download that stopped half-way, or a checkpoint without some weights: those would be random ones."""
    shutil.copytree(tiny_student, tmp_path / "damaged")
    damage(tmp_path / "damaged")
    with pytest.raises(UserError, match="damaged") as caught:
        load_fp32(str(tmp_path / "damaged"))
    assert one_line(caught)


def test_what_a_model_does_to_its_logits():
    """Gemma 2's soft-cap and Granite's divisor, against the models' own logits."""
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}  # fmt: skip
    torch.manual_seed(0)
    for model in (
        Gemma2ForCausalLM(Gemma2Config(**sizes, final_logit_softcapping=0.05, attn_implementation="eager")),
        GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=8.0)),
    ):
        ids = torch.arange(1, 12)[None]
        hidden = model.get_decoder()(input_ids=ids).last_hidden_state
        raw = hidden @ model.get_output_embeddings().weight.T
        expected = model(input_ids=ids).logits
        assert not torch.allclose(raw, expected)
        torch.testing.assert_close(logit_map(model)(raw), expected)


def test_a_bias_on_the_output_layer_is_refused(tmp_path):
    config = PhiConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, eos_token_id=1,
        bos_token_id=1,
    )  # fmt: skip
    PhiForCausalLM(config).save_pretrained(tmp_path / "biased")
    with pytest.raises(UserError, match="bias"):
        load_fp32(str(tmp_path / "biased"))


def test_the_fingerprint_of_a_hub_model_is_its_commit(tmp_path, tiny_student):
    """Read off the cache of the hub, with no network: branch main of owner/name is at this commit."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub" / "models--owner--name"
    shutil.copytree(tiny_student, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    ask = "from src.distillation.base import model_fingerprint; print(model_fingerprint('owner/name'))"
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == f"owner/name@{commit}", done.stderr


def change_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] += 0.01
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def change_the_template(folder):
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text() + " ")


def add_a_readme(folder):
    (folder / "README.md").write_text("hello")


@pytest.mark.parametrize(
    ("change", "other"), [(change_a_weight, True), (change_the_template, True), (add_a_readme, False)]
)
def test_model_fingerprint(tmp_path, tiny_student, change, other):
    """It follows what the model is, not where it lies."""
    folder = tmp_path / "copy"
    shutil.copytree(tiny_student, folder)
    before = model_fingerprint(str(folder))
    assert before == model_fingerprint(tiny_student)
    change(folder)
    assert (model_fingerprint(str(folder)) != before) == other


@pytest.fixture(scope="module")
def skeletons(real_data):
    """The reference teacher and student with their true configs and no memory."""
    configs = [
        AutoConfig.from_pretrained(real_data / "configs" / name) for name in ("qwen3-30b-a3b-instruct-2507", "qwen3-8b")
    ]
    with torch.device("meta"):
        return [AutoModelForCausalLM.from_config(config) for config in configs]


def held_bytes(model, device_map, bytes_each=2):
    """Bytes per device, by looking up each parameter's longest prefix in the map."""
    held = {}
    for name, parameter in model.named_parameters():
        prefix = max((key for key in device_map if f"{name}.".startswith(f"{key}.")), key=len)
        held[device_map[prefix]] = held.get(device_map[prefix], 0) + parameter.numel() * bytes_each
    return held


def test_reference_sizes(skeletons):
    assert [count_parameters(model) for model in skeletons] == [30_532_122_624, 8_190_735_360]


@pytest.mark.parametrize(("which", "devices"), [(0, [0, 1, 2, 3, 4, 5]), (1, [6, 7])], ids=["teacher", "student"])
def test_reference_placement(skeletons, which, devices):
    """Each GPU holds layers, about the same number of bytes, and less than its budget of 36 GB."""
    model = skeletons[which]
    placed = layer_device_map(model, devices, torch.bfloat16, 36.0)
    check_device_map(model, placed)
    layers = {device for name, device in placed.items() if ".layers." in name}
    held = held_bytes(model, placed)
    assert layers == set(held) == set(devices)
    assert sum(held.values()) == 2 * count_parameters(model)
    assert max(held.values()) <= 36e9
    assert max(held.values()) / min(held.values()) <= 1.35


def test_a_placement_beyond_the_budget_is_refused(skeletons):
    """61 GB on two GPUs: half of it, 30.5 GB, fits 36 and not 30."""
    layer_device_map(skeletons[0], [0, 1], torch.bfloat16, 36.0)
    with pytest.raises(UserError, match=r"GPU 0 would hold 30\.\d GB of weights, its budget is 30\.0 GB") as caught:
        layer_device_map(skeletons[0], [0, 1], torch.bfloat16, 30.0)
    assert one_line(caught)


def test_the_budget_counts_the_type_the_weights_are_loaded_in(skeletons):
    """A GPU without bf16 (V100, T4) loads in fp32: twice the bytes, although the skeleton's own type is bf16."""
    with pytest.raises(UserError, match=r"GPU 0 would hold 61\.\d GB"):
        layer_device_map(skeletons[0], [0, 1], torch.float32, 36.0)


@pytest.mark.parametrize("layers", [2, 5, 9])
@pytest.mark.parametrize("gpus", [2, 3, 4, 7])
@pytest.mark.parametrize("vocab_size", [288, 20_000])
def test_every_gpu_gets_something(make_model, layers, gpus, vocab_size):
    """Layers stay in order and no GPU is empty, even where the embedding alone is a GPU's share; more GPUs than layers
    are refused.
    """
    with torch.device("meta"):
        model = make_model(vocab_size=vocab_size, layers=layers)
    devices = [10 + index for index in range(gpus)]
    if gpus > layers:
        with pytest.raises(UserError, match=f"{layers} layers cannot be spread over {gpus} GPUs"):
            layer_device_map(model, devices, torch.bfloat16, 36.0)
        return
    placed = layer_device_map(model, devices, torch.bfloat16, 36.0)
    check_device_map(model, placed)
    assert list(placed.values()) == sorted(placed.values())
    assert set(held_bytes(model, placed)) == set(devices)


def test_place_without_a_gpu(monkeypatch, tiny_student):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert place(tiny_student, [], torch.float32, 36.0) is None
    with pytest.raises(UserError, match=r"GPUs \[0, 1\], but this machine has none") as caught:
        place(tiny_student, [0, 1], torch.float32, 36.0)
    assert one_line(caught)


def test_place_names_an_absent_gpu(monkeypatch, tiny_student):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert place(tiny_student, [1], torch.float32, 36.0) == {"": 1}
    assert place(tiny_student, [], torch.float32, 36.0) == {"": 0}
    assert set(place(tiny_student, [0, 1], torch.float32, 36.0).values()) == {0, 1}
    with pytest.raises(UserError, match="GPU 6 is named but this machine has 2"):
        place(tiny_student, [0, 6], torch.float32, 36.0)
