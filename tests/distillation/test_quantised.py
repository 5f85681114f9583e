"""Models in fewer bits: checkpoints in FP8 and int4 that are read, and a student in four bits that learns."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from src.distillation import quantisation, training
from src.distillation.base import (
    EncodedRow,
    collate,
    count_parameters,
    describe_size,
    head_weight,
    layer_device_map,
    load_model,
    loading_skeleton,
    model_bytes,
    model_fingerprint,
    place,
    response_hidden,
)
from src.distillation.kd import run_kd_pipeline
from src.distillation.lora import add_lora, merge_adapter
from src.distillation.quantisation import FP8, four_bit, parameter_bytes
from src.distillation.teacher import model_reader
from src.distillation.teacher_cache import CacheTeacherConfig, make_cache
from src.utils.common import UserError, read_json, read_jsonl

BLOCK = 16  # of FP8 weights that share a scale; 128 in Qwen's own, which is wider than the tiny models
LARGEST = torch.finfo(torch.float8_e4m3fn).max
ROWS = [EncodedRow("a", (1, 2, 3), (4, 5)), EncodedRow("b", (9, 8), tuple(range(20, 32)))]


def one_line(caught):
    return "\n" not in str(caught.value) and len(str(caught.value)) < 500


def states(model):
    return response_hidden(model, collate(ROWS, 0))[0]


def write_quantisation(folder: Path, settings: dict) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": settings}))


def is_projection(name: str) -> bool:
    return name.endswith("_proj.weight")


@pytest.fixture(scope="module")
def fp8(tmp_path_factory, tiny_teacher):
    """Folders of the tiny MoE teacher in fine-grained FP8, as Qwen publishes its own, and of what that stands for."""
    folder = tmp_path_factory.mktemp("models") / "fp8"
    shutil.copytree(tiny_teacher, folder)
    stored, meant = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if not is_projection(name):
            stored[name] = meant[name] = weight.bfloat16()
            continue
        blocks = weight.reshape(weight.shape[0] // BLOCK, BLOCK, weight.shape[1] // BLOCK, BLOCK)
        scales = blocks.abs().amax((1, 3)) / LARGEST
        small = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        stored[name], stored[f"{name}_scale_inv"] = small.reshape(weight.shape), scales
        meant[name] = (small.float() * scales[:, None, :, None]).reshape(weight.shape)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    skipped = ["lm_head", *(name.removesuffix(".weight") for name in stored if name.endswith("mlp.gate.weight"))]
    write_quantisation(folder, {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": FP8,
                                "weight_block_size": [BLOCK, BLOCK], "modules_to_not_convert": skipped})  # fmt: skip
    plain = folder.with_name("plain")
    shutil.copytree(tiny_teacher, plain)
    save_file(meant, plain / "model.safetensors", {"format": "pt"})
    return str(folder), str(plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_fp8_teacher_is_laid_out_where_nothing_multiplies_it(fp8, dtype):
    folder, plain = fp8
    model, wanted = load_model(folder, dtype), load_model(plain, dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert count_parameters(model) == count_parameters(wanted)
    for (name, found), (_, meant) in zip(model.named_parameters(), wanted.named_parameters(), strict=True):
        torch.testing.assert_close(found, meant, rtol=2**-8, atol=0, msg=name)  # a rounding to bf16
    assert (states(model) - states(wanted)).float().norm() < 0.05 * states(wanted).float().norm()


def on_gpu(monkeypatch, *capability: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0)])
def test_the_bytes_of_fp8_are_those_of_its_file_or_twice_as_many(fp8, monkeypatch, capability):
    """An A100 multiplies no FP8 and gets bf16; Ada and Hopper keep what the file has."""
    folder, plain = fp8
    on_gpu(monkeypatch, *capability)
    tensors = load_file(Path(folder if capability >= (8, 9) else plain) / "model.safetensors").values()
    as_loaded = [t.numel() * (2 if t.dtype is torch.float32 and capability < (8, 9) else t.itemsize) for t in tensors]
    assert model_bytes(folder, torch.bfloat16) == sum(as_loaded)
    placed = layer_device_map(loading_skeleton(folder, torch.bfloat16), [0, 1], torch.bfloat16, sum(as_loaded) / 1e9)
    assert set(placed.values()) == {0, 1}
    with pytest.raises(UserError, match="its budget is"):
        layer_device_map(loading_skeleton(folder, torch.bfloat16), [0, 1], torch.bfloat16, sum(as_loaded) / 2.2e9)


def test_an_fp8_teacher_says_what_it_needs(fp8, monkeypatch, caplog):
    caplog.set_level("INFO", "kd")
    load_model(fp8[0], torch.bfloat16)
    assert "laid out in bf16, twice their size: a CPU multiplies no FP8" in caplog.text
    on_gpu(monkeypatch, 8, 0)
    quantisation.check_machine("name", loading_skeleton(fp8[0], torch.bfloat16).config)
    assert "a GPU of compute capability 8.0 multiplies no FP8" in caplog.text
    on_gpu(monkeypatch, 9, 0)
    monkeypatch.setattr(quantisation, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="pip install kernels") as caught:
        load_model(fp8[0], torch.bfloat16)
    assert one_line(caught)


@pytest.mark.parametrize(("settings", "package"), [
    ({"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}, "compressed"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq|optimum|GPU"),
    ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}, "gptq|autoawq|GPU"),
], ids=["compressed-tensors", "gptq", "awq"])  # fmt: skip
def test_a_quantiser_that_is_not_here_is_one_line(tmp_path, tiny_student, monkeypatch, settings, package):
    shutil.copytree(tiny_student, tmp_path / "int4")
    write_quantisation(tmp_path / "int4", settings)
    refused = rf"int4' is quantised \({settings['quant_method']}\) and cannot be loaded here: .*({package})"
    with pytest.raises(UserError, match=refused) as caught:
        load_model(str(tmp_path / "int4"), torch.float32)
    assert one_line(caught)
    on_gpu(monkeypatch, 8, 0)
    with pytest.raises(UserError, match=r"int4' is quantised") as caught:
        place(str(tmp_path / "int4"), [0, 1], torch.bfloat16, 36.0)
    assert one_line(caught)


def test_a_method_nobody_knows_is_one_line(tmp_path, tiny_student):
    """transformers passes over such a setting; weights that are packed in its way are then not to be found."""
    shutil.copytree(tiny_student, tmp_path / "int3")
    write_quantisation(tmp_path / "int3", {"quant_method": "int3"})
    weights = load_file(tmp_path / "int3" / "model.safetensors")
    save_file({name.replace("q_proj.weight", "q_proj.packed"): weight for name, weight in weights.items()},
              tmp_path / "int3" / "model.safetensors", {"format": "pt"})  # fmt: skip
    with pytest.raises(UserError, match="lack 2 weights") as caught:
        load_model(str(tmp_path / "int3"), torch.float32)
    assert one_line(caught)


def save_four_bit(folder: Path, name: str, **settings) -> str:
    """A model as a checkpoint of bitsandbytes."""
    own = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32,
                             bnb_4bit_use_double_quant=True, **settings)  # fmt: skip
    shutil.copytree(name, folder)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, quantization_config=own)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def int4(tmp_path_factory, tiny_student):
    """The tiny student, four bits a weight."""
    return save_four_bit(tmp_path_factory.mktemp("models") / "int4", tiny_student)


def test_an_int4_teacher_is_read(int4, tiny_student):
    model = load_model(int4, torch.float32)
    plain = load_model(tiny_student, torch.float32)
    on_the_fly = load_model(tiny_student, torch.float32, load_in_4bit=True)
    assert torch.equal(states(model), states(on_the_fly))
    off = (states(model) - states(plain)).norm() / states(plain).norm()
    assert 0.01 < off < 1  # four bits, not the weights themselves, and not something else
    assert count_parameters(model) == count_parameters(plain)
    assert describe_size(model) == f"{describe_size(plain)}, quantised (bitsandbytes)"
    reader = model_reader(model, 256, packing=True)
    torch.testing.assert_close(reader.hidden(ROWS), states(model), rtol=1e-4, atol=1e-4)
    assert torch.equal(reader.head(), head_weight(plain))


def test_an_int4_teacher_is_cached_and_taught_from(int4, tiny_student, tmp_path, clean_rows, write_sft):
    """Its cache and the model itself give one loss; it is told from the unquantised by its fingerprint."""
    experiment = str(write_sft(tmp_path / "experiment" / "tiny", clean_rows(12), clean_rows(3, start=100)))
    make_cache(CacheTeacherConfig(int4, experiment, bf16=False))
    settings = {"model_name_or_path": tiny_student, "teacher_model_name_or_path": int4, "experiment_dir": experiment,
                "gradient_accumulation_steps": 8, "max_steps": 1, "bf16": False, "lora_r": 2, "save_steps": 0,
                "compile_loss": False}  # fmt: skip
    hidden, online = (run_kd_pipeline(settings | {"teacher_signal": s})["after"] for s in ("hidden", "online"))
    assert hidden == pytest.approx(online, rel=1e-4)
    assert hidden["kl_to_teacher"] > 0
    assert model_fingerprint(int4) != model_fingerprint(tiny_student)


def test_a_quantised_head_is_refused(tmp_path, tiny_student):
    folder = save_four_bit(tmp_path / "head", tiny_student, llm_int8_skip_modules=["nothing"])
    with pytest.raises(UserError, match=r"output layer is quantised \(uint8\)") as caught:
        load_model(folder, torch.float32)
    assert one_line(caught)


def test_a_quantised_student_is_refused(int4, tiny_teacher, tmp_path, clean_rows, write_sft):
    experiment = str(write_sft(tmp_path / "experiment" / "tiny", clean_rows(12), clean_rows(3, start=100)))
    settings = {"model_name_or_path": int4, "teacher_model_name_or_path": tiny_teacher, "experiment_dir": experiment,
                "teacher_signal": "online"}  # fmt: skip
    with pytest.raises(UserError, match=r"is quantised \(bitsandbytes\).*--load_in_4bit") as caught:
        run_kd_pipeline(settings)
    assert one_line(caught)


def test_four_bits_need_a_package(monkeypatch, tiny_student):
    monkeypatch.setattr(quantisation, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"bitsandbytes is not here; pip install '.\[quant\]'"):
        load_model(tiny_student, torch.float32, load_in_4bit=True)


def test_the_bytes_of_the_reference_student_in_four_bits(real_data):
    """Qwen3-8B: half a byte for each weight of its layers; embedding, head and norms stay in bf16."""
    model = loading_skeleton(str(real_data / "configs" / "qwen3-8b"), torch.bfloat16, load_in_4bit=True)
    hidden, inner, kv, layers = 4096, 12288, 8 * 128, 36
    in_layers = layers * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner)
    rest = 2 * 151_936 * hidden + layers * (2 * hidden + 2 * 128) + hidden
    assert sum(parameter_bytes(model, torch.bfloat16).values()) == 0.5 * in_layers + 2 * rest
    assert count_parameters(model) == in_layers + rest == 8_190_735_360


def adapted(name, fused, dtype=torch.float32):
    """The student in four bits, with adapters that say something, run by our function or by peft's layers."""
    model = add_lora(load_model(name, dtype, load_in_4bit=True), 4, 8, 0.0, fused=fused)
    generator = torch.Generator().manual_seed(1)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model


def test_four_bits_by_one_function_say_what_peft_says(tiny_student):
    found = []
    for fused in (True, False):
        model = adapted(tiny_student, fused)
        model.enable_input_require_grads()
        hidden = states(model)
        with torch.no_grad():
            torch.testing.assert_close(states(model), hidden)
        with model.disable_adapter():
            off = states(model)
        hidden.pow(3).sum().backward()
        found.append([hidden, off, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert len(found[0]) == 2 + 2 * 2 * 7
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).norm() / theirs.norm() < 1e-5


def test_blocks_stay_as_they_are(tiny_student, monkeypatch):
    """bitsandbytes lays them out anew where a CPU has AVX512-BF16 and nothing learns, as when `before` is measured."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    model = adapted(tiny_student, True).eval()
    with torch.no_grad():
        first = states(model)
        with model.disable_adapter():
            states(model)
        assert torch.equal(states(model), first)


def test_no_pass_keeps_a_matrix_laid_out(tiny_student):
    """What autograd holds of a frozen projection are its four-bit blocks: a byte for two weights."""
    model = adapted(tiny_student, True)
    matrices = {tuple(m.weight.quant_state.shape) for m in model.modules() if hasattr(m, "compute_dtype")}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        states(model).sum().backward()
    assert sum(tensor.dtype is torch.uint8 for tensor in kept) == 2 * 7
    assert (64, 32) in matrices
    assert not [t for t in kept if tuple(t.shape) in matrices and t.is_floating_point()]


@pytest.fixture
def settings(tmp_path, tiny_teacher, tiny_student, clean_rows, write_sft):
    experiment = write_sft(tmp_path / "experiment" / "tiny", clean_rows(24), clean_rows(4, start=100))
    return {
        "model_name_or_path": tiny_student,
        "teacher_model_name_or_path": tiny_teacher,
        "experiment_dir": str(experiment),
        "load_in_4bit": True,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "gradient_accumulation_steps": 8,
        "max_steps": 2,
        "max_length": 256,
        "lora_r": 4,
        "lora_alpha": 8,
        "bf16": False,
        "teacher_signal": "online",
        "compile_loss": False,
    }


def losses(results):
    return [row["loss"] for row in read_jsonl(Path(results["run_dir"]) / "metrics.jsonl") if "loss" in row]


def test_a_student_in_four_bits_learns(settings, tiny_student):
    results = run_kd_pipeline(settings)
    assert results["after"]["kl_to_teacher"] < results["before"]["kl_to_teacher"]
    plain = load_model(tiny_student, torch.float32)
    assert results["total_parameters"] - results["trainable_parameters"] == count_parameters(plain)
    # held-out rows before training are read by the four-bit student, which is another than the plain one
    other = run_kd_pipeline(settings | {"load_in_4bit": False})
    assert results["before"]["kl_to_teacher"] != pytest.approx(other["before"]["kl_to_teacher"], rel=1e-3)
    kd_config = read_json(Path(results["run_dir"]) / "kd_config.json")
    assert kd_config["load_in_4bit"]
    assert kd_config["fingerprint"]["load_in_4bit"]
    assert "4 bits" in (Path(results["final_model"]) / "README.md").read_text()
    # its adapter is an ordinary one, for the model in full precision
    merged = merge_adapter(plain, results["final_model"])
    loaded = AutoPeftModelForCausalLM.from_pretrained(results["final_model"], dtype=torch.float32)
    torch.testing.assert_close(states(merged), states(loaded), rtol=1e-4, atol=1e-4)
    four = load_model(tiny_student, torch.float32, load_in_4bit=True)
    with pytest.raises(UserError, match=r"not added to quantised weights \(bitsandbytes\)"):
        merge_adapter(four, results["final_model"])


def test_four_bits_are_one_run_however_it_is_cut(settings, tmp_path, monkeypatch):
    """Packed with activations kept; padded with activations computed again; and killed after its first checkpoint."""
    one = losses(run_kd_pipeline(settings))
    cut = {"packing": False, "gradient_checkpointing": True, "save_steps": 1}
    cut["output_dir"] = str(tmp_path / "cut")

    def kill(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "remove_old_checkpoints", kill)
        with pytest.raises(KeyboardInterrupt):
            run_kd_pipeline(settings | cut)
    assert len(read_jsonl(tmp_path / "cut" / "metrics.jsonl")) == 1
    assert losses(run_kd_pipeline(settings | cut)) == pytest.approx(one, rel=1e-4)


def test_the_compute_type_is_that_of_the_run():
    assert four_bit(torch.bfloat16).bnb_4bit_compute_dtype is torch.bfloat16
