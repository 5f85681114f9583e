"""Models and tokenizers from disk, what is refused there, and where their layers go."""

import shutil

import pytest
import torch
from accelerate.hooks import attach_align_device_hook_on_blocks
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
    encode_row,
    head_device,
    layer_device_map,
    load_model,
    load_tokenizer,
    loading_skeleton,
    logit_map,
    model_fingerprint,
    place,
)
from src.distillation.gpu import memory_of
from src.distillation.packing import check_packing
from src.distillation.quantisation import parameter_bytes
from src.distillation.teacher import model_reader
from src.utils.common import UserError

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_run_as_grouped_products(tiny_teacher, clean_rows, monkeypatch, dtype):
    """Two products a layer, whatever the number of experts, where transformers' plain loop has two for each expert."""
    model = load_model(tiny_teacher, dtype)
    tokenizer = load_tokenizer(tiny_teacher)
    rows = [encode_row(tokenizer, row, END) for row in clean_rows(3)]
    reader, calls, product = model_reader(model, PAD, packing=True), [], torch.nn.functional.grouped_mm
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "grouped_mm", lambda *a, **k: (calls.append(1), product(*a, **k))[1])
        grouped = reader.hidden(rows)
        assert len(calls) == 2 * model.config.num_hidden_layers
        model.set_experts_implementation("eager")
        one_by_one = reader.hidden(rows)
        assert len(calls) == 2 * model.config.num_hidden_layers
    error = (grouped - one_by_one).float().norm() / one_by_one.float().norm()
    assert error < (1e-5 if dtype is torch.float32 else 0.05)


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


def held_by(model, placed, bytes_each=2):
    """Gigabytes on each GPU, and in CPU memory."""
    return {device: held / 1e9 for device, held in held_bytes(model, placed, bytes_each).items()}


def test_layers_beyond_the_budget_stay_in_cpu_memory(skeletons):
    """Qwen3-30B-A3B on one GPU of 40 GB, budget 36: 61 GB are too many by those layers that are then left over."""
    teacher = skeletons[0]
    layer = 2 * count_parameters(teacher.model.layers[0]) / 1e9
    ends = 2 * 2 * 151_936 * 2048 / 1e9 + 2 * 2048 / 1e9  # embedding, head, last norm
    assert ends + 48 * layer == pytest.approx(2 * 30_532_122_624 / 1e9)
    resident = int((36.0 - layer - ends) / layer)  # one layer more always passes through
    placed = layer_device_map(teacher, [0], torch.bfloat16, 36.0, cpu_offload=True)
    check_device_map(teacher, placed)
    assert [placed[f"model.layers.{i}"] for i in range(48)] == [0] * resident + ["cpu"] * (48 - resident)
    assert placed["model.embed_tokens"] == placed["model.norm"] == placed["lm_head"] == 0
    assert held_by(teacher, placed) == pytest.approx({0: ends + resident * layer, "cpu": (48 - resident) * layer})
    assert 36.0 - layer < ends + (resident + 1) * layer


def test_several_gpus_are_filled_before_cpu_memory(skeletons):
    teacher = skeletons[0]
    placed = layer_device_map(teacher, [2, 3], torch.bfloat16, 24.0, cpu_offload=True)
    check_device_map(teacher, placed)
    where = [placed[f"model.layers.{i}"] for i in range(48)]
    assert where == sorted(where, key=[2, 3, "cpu"].index)
    held = held_by(teacher, placed)
    layer = 2 * count_parameters(teacher.model.layers[0]) / 1e9
    for gpu in (2, 3):
        assert 24.0 - 2 * layer < held[gpu] <= 24.0 - layer
    assert placed["model.embed_tokens"] == 2
    assert placed["lm_head"] == placed["model.norm"] == 3


def test_what_fits_is_not_streamed(skeletons):
    """The setting is no wish: with room for all layers they are spread as without it."""
    for devices in ([0, 1], [0, 1, 2, 3, 4, 5]):
        wanted = layer_device_map(skeletons[0], devices, torch.bfloat16, 36.0)
        assert layer_device_map(skeletons[0], devices, torch.bfloat16, 36.0, cpu_offload=True) == wanted


def test_no_room_for_a_single_layer(skeletons):
    with pytest.raises(UserError, match=r"GPU 0 would hold 2\.5 GB, its budget is 2\.0 GB, with no layer") as caught:
        layer_device_map(skeletons[0], [0], torch.bfloat16, 2.0, cpu_offload=True)
    assert one_line(caught)


def test_place_says_what_is_streamed(monkeypatch, tiny_student, caplog):
    skeleton = loading_skeleton(tiny_student, torch.float32, load_in_4bit=True)  # before there seems to be a GPU
    in_4bit = sum(parameter_bytes(skeleton, torch.float32).values()) / 1e9
    caplog.set_level("INFO", "kd")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    whole = 4 * count_parameters(load_fp32(tiny_student)) / 1e9
    assert set(place(tiny_student, [1], torch.float32, whole, cpu_offload=True).values()) == {1}
    assert "CPU memory" not in caplog.text
    placed = place(tiny_student, [], torch.float32, 0.9 * whole, cpu_offload=True)
    assert [placed[f"model.layers.{i}"] for i in range(2)] == ["cpu", "cpu"]
    assert "2 layers stay in CPU memory" in caplog.text
    with pytest.raises(UserError, match="4-bit weights of bitsandbytes cannot be kept in CPU memory") as caught:
        place(tiny_student, [0], torch.float32, 0.98 * in_4bit, cpu_offload=True, load_in_4bit=True)
    assert one_line(caught)


def streamed(name):
    """The model as accelerate lays it out where some layers stay in CPU memory, the CPU standing for the GPU."""
    model = load_fp32(name)
    placed = layer_device_map(model, [0], torch.float32, 1e-9 * 4 * count_parameters(model) - 1e-6, cpu_offload=True)
    stays = {module: device == "cpu" for module, device in placed.items()}
    assert 0 < sum(stays.values()) < len(stays)
    weights = {key: value for key, value in model.state_dict().items() if any(key.startswith(m) for m in stays)}
    attach_align_device_hook_on_blocks(
        model, execution_device=dict.fromkeys(["", *stays], "cpu"), offload=stays, weights_map=weights
    )
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    return model


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("moe", [True, False])
def test_streamed_layers_say_the_same_bit_for_bit(tiny_teacher, tiny_student, clean_rows, packing, moe):
    """Through what reads a teacher: packed attention, hidden states, the head and where it is."""
    name = tiny_teacher if moe else tiny_student
    tokenizer = load_tokenizer(name)
    rows = [encode_row(tokenizer, row, END) for row in clean_rows(5)]
    found = []
    for model in (load_fp32(name), streamed(name)):
        if packing:
            check_packing(model, rows, PAD)
        reader = model_reader(model, PAD, packing).cut(TOKENS)
        cpu = torch.device("cpu")
        assert head_device(model) == cpu
        found.append((reader.hidden(rows), reader.hidden(rows[:2]), reader.head_on(cpu)))
        assert memory_of(model) is None  # no GPU here; weights on the meta device are none of its
    for plain, through in zip(*found, strict=True):
        assert torch.equal(plain, through)
