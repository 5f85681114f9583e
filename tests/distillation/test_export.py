"""An exported folder is the student: its weights by the formula, its logits, where it stops; a wrong merge is found."""

import json
import shutil
import stat
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, pipeline

from src.distillation import engines, export
from src.distillation.base import encode_row, end_of_turn_id, load_model, load_tokenizer
from src.distillation.engines import Engine, opened
from src.distillation.export import (
    Student,
    answer_logits,
    base_licence,
    check_export,
    computed_in_fp32,
    find_converter,
    generation_settings,
    is_hybrid,
    require_room,
    write_gguf,
    write_merged,
)
from src.distillation.lora import add_lora
from src.distillation.openai_engine import Server
from src.distillation.server import running
from src.distillation.sft import Sampling, make_requests
from src.utils.common import UserError, read_json
from tests.distillation.test_engines import ROWS as QUESTIONS
from tests.distillation.test_engines import VLLM, free_port
from tests.reading import tensors

TEXT_END, TURN_END = 256, 258  # <|endoftext|>, <|im_end|>


def train_nothing(base: str, folder: Path, seed: int = 1, strength: float = 0.1) -> str:
    """An adapter on the base that says something, saved as training saves it."""
    model = add_lora(load_model(base, torch.float32), 4, 8, 0.0)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * strength
    model.save_pretrained(folder)
    load_tokenizer(base).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory, ending_teacher) -> str:
    """A student in bf16 that ends its turns and, like a base model, is said to stop at the end of a text only."""
    folder = tmp_path_factory.mktemp("export") / "base"
    shutil.copytree(ending_teacher, folder)
    model = AutoModelForCausalLM.from_pretrained(ending_teacher, dtype=torch.bfloat16)
    model.generation_config = GenerationConfig(eos_token_id=TEXT_END)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> str:
    return train_nothing(base, tmp_path_factory.mktemp("export") / "adapter", strength=0.05)


@pytest.fixture(scope="module")
def student(base, adapter) -> Student:
    return Student(base, adapter, torch.bfloat16)


@pytest.fixture(scope="module")
def rows(clean_rows):
    return clean_rows(3)


@pytest.fixture(scope="module")
def written(student, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "written"
    write_merged(student, folder, None)
    return folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_are_the_formula_rounded_once(base, adapter, dtype, tmp_path):
    write_merged(Student(base, adapter, dtype), tmp_path / "out", None)
    found, before, factors = tensors(tmp_path / "out"), tensors(base), tensors(adapter)
    assert found.keys() == before.keys()
    adapted = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in factors}
    for name, weight in found.items():
        module = name.removesuffix(".weight")
        wanted = before[name].float()
        if module in adapted:
            a, b = (factors[f"base_model.model.{module}.lora_{letter}.weight"] for letter in "AB")
            wanted = wanted + 8 / 4 * b @ a
        assert weight.dtype == dtype
        torch.testing.assert_close(weight, wanted.to(dtype), rtol=1e-6, atol=1e-7)
    assert len(adapted) == 14
    assert read_json(tmp_path / "out" / "config.json")["dtype"] == str(dtype).removeprefix("torch.")


def test_big_weights_are_cut_into_files(student, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "SHARD", "50KB")
    write_merged(student, tmp_path / "out", None)
    assert len(set(read_json(tmp_path / "out" / "model.safetensors.index.json")["weight_map"].values())) > 2
    assert check_export(student, tmp_path / "out", rows).passed


def test_others_may_read_the_weights(written):
    assert {stat.S_IMODE(path.stat().st_mode) for path in written.iterdir()} == {
        stat.S_IMODE((written / "config.json").stat().st_mode)
    }


def test_the_right_merge_passes(student, written, rows):
    check = check_export(student, written, rows)
    assert check.error == pytest.approx(check.rounding, rel=0.05)
    assert check.effect > 20 * check.error > 0
    assert check.tells
    assert (check.rows, check.agreement) == (3, pytest.approx(1, abs=0.05))
    assert check.tokens == sum(
        len(encode_row(load_tokenizer(student.base), row, TURN_END).response_ids) for row in rows
    )


def test_its_figures_are_those_of_fp32_copies(student, written, rows):
    """The same measured with whole models in fp32, which a large one would not leave the memory for."""
    tokenizer = load_tokenizer(student.base)
    adapted = PeftModel.from_pretrained(load_model(student.base, torch.bfloat16).float(), student.adapter).eval()
    copy = load_model(str(written), torch.bfloat16).float()
    differences = []
    for row in rows:
        encoded = encode_row(tokenizer, row, end_of_turn_id(tokenizer))
        ids, start = torch.tensor([encoded.prompt_ids + encoded.response_ids]), len(encoded.prompt_ids)
        with torch.no_grad():
            difference = copy(input_ids=ids).logits - adapted(input_ids=ids).logits
        differences.append(difference[0, start - 1 : -1])
    expected = torch.cat(differences).pow(2).mean().sqrt()
    assert check_export(student, written, rows).error == pytest.approx(float(expected), rel=1e-3)


def test_an_fp32_export_is_a_thousand_times_closer(base, adapter, written, rows, tmp_path):
    exact = Student(base, adapter, torch.float32)
    write_merged(exact, tmp_path / "out", None)
    coarse = check_export(Student(base, adapter, torch.bfloat16), written, rows)
    assert check_export(exact, tmp_path / "out", rows).error < coarse.error / 1000


def test_fp32_is_computed_with_the_stored_weights(base, rows):
    tokenizer, model = load_tokenizer(base), load_model(base, torch.bfloat16)
    row = encode_row(tokenizer, rows[0], TURN_END)
    coarse = answer_logits(model, row)
    with computed_in_fp32(model):
        found = answer_logits(model, row)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(found, answer_logits(load_model(base, torch.bfloat16).float(), row), rtol=0, atol=0)
    torch.testing.assert_close(answer_logits(model, row), coarse, rtol=0, atol=0)
    assert not torch.equal(found, coarse)


def rescaled(merge, model, folder, tmp_path):
    """The scale alpha / r left out."""
    copy = tmp_path / "rescaled"
    shutil.copytree(folder, copy)
    config = read_json(copy / "adapter_config.json")
    (copy / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": config["r"]}))
    return merge(model, str(copy))


def another(merge, model, folder, tmp_path):
    return merge(model, train_nothing(model.name_or_path, tmp_path / "another", seed=2, strength=0.05))


def not_merged(merge, model, folder, tmp_path):
    return model


def transposed(merge, model, folder, tmp_path):
    before = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    merged = merge(model, folder)
    weight = merged.model.layers[0].self_attn.q_proj.weight
    weight.data = before + (weight.data - before).T
    return merged


@pytest.mark.parametrize("wrong", [rescaled, another, not_merged, transposed])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_wrong_merge_is_refused(student, rows, tmp_path, monkeypatch, wrong, dtype):
    student, merge = replace(student, dtype=dtype), export.merge_adapter
    monkeypatch.setattr(export, "merge_adapter", lambda model, folder: wrong(merge, model, folder, tmp_path))
    write_merged(student, tmp_path / "out", None)
    with pytest.raises(UserError, match="the merged model is not the student: logits differ") as caught:
        check_export(student, tmp_path / "out", rows)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_file_that_was_written_wrong_is_refused(student, written, rows, tmp_path, value):
    shutil.copytree(written, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.down_proj.weight"][:, 0] = value
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(UserError, match="is not the student"):
        check_export(student, tmp_path / "out", rows)


def test_a_weak_adapter_passes_and_is_told(base, rows, tmp_path):
    """Half of it would hide in the rounding of bf16, and not in that of fp32."""
    weak = train_nothing(base, tmp_path / "weak", strength=1e-3)
    told = {}
    for dtype in (torch.bfloat16, torch.float32):
        student = Student(base, weak, dtype)
        write_merged(student, tmp_path / str(dtype), None)
        told[dtype] = check_export(student, tmp_path / str(dtype), rows).tells
    assert told == {torch.bfloat16: False, torch.float32: True}


@pytest.mark.parametrize(("name", "words"), [
    ("tokenizer.json", "the written tokenizer reads held-out rows otherwise"),
    ("generation_config.json", "stops at"),
])  # fmt: skip
def test_words_and_stops_are_checked(student, written, rows, tmp_path, name, words):
    shutil.copytree(written, tmp_path / "out")
    path = tmp_path / "out" / name
    text = path.read_text()
    broken = text.replace('"a":64', '"a":65').replace('"a": 64', '"a": 65').replace(str(TURN_END), str(TEXT_END))
    assert broken != text
    path.write_text(broken)
    with pytest.raises(UserError, match=words):
        check_export(student, tmp_path / "out", rows)


def test_it_stops_at_the_end_of_turn_and_where_the_base_did(student, written, base):
    assert read_json(Path(base) / "generation_config.json")["eos_token_id"] == TEXT_END
    for name in ("generation_config.json", "config.json"):
        assert read_json(written / name)["eos_token_id"] == [TEXT_END, TURN_END]
    assert load_tokenizer(str(written)).chat_template == load_tokenizer(student.adapter).chat_template


def test_a_pipeline_stops_by_the_folder_alone(written, base):
    """Nothing is passed but the folder; the base itself runs on behind the end of its turn."""
    limit = 24
    for model, runs_on in ((str(written), False), (base, True)):
        answer = pipeline("text-generation", model=model, device="cpu")
        found = []
        for number in range(6):
            question = [{"role": "user", "content": f"Count: {'one two three ' * (number % 5)}{number}"}]
            prompt = answer.tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
            [ids] = answer(prompt, max_new_tokens=limit, return_tensors=True)
            found.append(list(ids["generated_token_ids"])[len(answer.tokenizer(prompt)["input_ids"]) :])
        assert any(TURN_END in ids[:-1] for ids in found) is runs_on
        assert any(len(ids) < limit and ids[-1] == TURN_END for ids in found) is not runs_on


def test_sampling_defaults(make_tokenizer):
    own = GenerationConfig(eos_token_id=7, do_sample=True, temperature=0.6, top_p=0.95, repetition_penalty=1.1)
    tokenizer = make_tokenizer()
    none = generation_settings(tokenizer, own, None).to_diff_dict()
    greedy = generation_settings(tokenizer, own, Sampling(0.0)).to_diff_dict()
    assert none == greedy == {name: none[name] for name in ("eos_token_id", "pad_token_id", "transformers_version")}
    assert none["eos_token_id"] == [7, TURN_END]
    drawn = generation_settings(tokenizer, own, Sampling(0.1, 0.8, 20))
    assert (drawn.do_sample, drawn.temperature, drawn.top_p, drawn.top_k) == (True, 0.1, 0.8, 20)
    assert (drawn.repetition_penalty, drawn.max_new_tokens) == (None, None)


def test_a_hybrid_template_is_known(make_tokenizer):
    assert (is_hybrid(make_tokenizer(True)), is_hybrid(make_tokenizer())) == (True, False)


def test_qwen3s_template_is_hybrid(real_data):
    assert is_hybrid(load_tokenizer(str(real_data / "tokenizers" / "qwen3")))


def test_a_full_disk_is_told_first(base, tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=50_100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(UserError, match="the exported model needs"):
        require_room(base, torch.bfloat16, tmp_path, 1)


def test_a_quantised_base_is_refused(student, tmp_path, monkeypatch):
    model = load_model(student.base, torch.bfloat16)
    model.config.quantization_config = {"quant_method": "fp8"}
    monkeypatch.setattr(export, "load_model", lambda *_: model)
    with pytest.raises(UserError, match="its weights are quantised; name the model that it was made from"):
        write_merged(student, tmp_path / "out", None)


@pytest.mark.parametrize(("card", "said"), [
    ("---\nlicense: apache-2.0\nlanguage: [en]\n---\n# Hi", {"license": "apache-2.0"}),
    ("---\nlicense: other\nlicense_name: x\nlicense_link: LICENSE\n---\n",
     {"license": "other", "license_name": "x", "license_link": "LICENSE"}),
    ("---\nlicense: [mit]\n---\n", {}), ("---\nlicense_link: LICENSE\n---\n", {}),
    ("---\nlicense: {\n---\n", {}), ("# none", {}), (None, {}),
])  # fmt: skip
def test_the_licence_of_the_base_model(tmp_path, card, said):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert base_licence(str(tmp_path)) == said


def test_the_licence_of_a_hub_model_that_is_not_here():
    assert base_licence("nobody/nothing@0123456") == {}


@pytest.fixture
def asked_and_local(base, adapter, monkeypatch):
    """Greedy requests, and what the evaluation's own engine answers with the adapter merged, in the servers' fp32."""
    monkeypatch.setattr(engines, "compute_dtype", lambda: torch.float32)
    requests = make_requests(QUESTIONS, 1, 7, Sampling(0.0, 1.0, 0, 16))
    with opened(Engine("transformers", base, batch_size=4, adapter=adapter)) as ask:
        return requests, texts(ask(requests, frozenset()))


def texts(parts) -> dict[str, tuple[str, str]]:
    return {row["id"]: (row["response"].strip(), row["finish_reason"]) for part in parts for row in part}


@pytest.mark.slow
def test_transformers_serve_answers_as_the_evaluation_does(base, adapter, asked_and_local, tmp_path):
    """It is told no end token: it stops by what is in the folder."""
    pytest.importorskip("fastapi")
    folder = str(tmp_path / "out")
    write_merged(Student(base, adapter, torch.float32), Path(folder), None)
    port = free_port()
    url = f"http://127.0.0.1:{port}/v1"
    program = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", program, "serve", folder, "--port", str(port), "--host", "127.0.0.1",
               "--device", "cpu", "--dtype", "float32"]  # fmt: skip
    requests, local = asked_and_local
    with running(command, url, tmp_path / "server.log"):
        place = Server(url, folder, "plain", concurrency=4, timeout=60)
        with opened(Engine("openai", folder, server=place)) as ask:
            served = texts(ask(requests, frozenset()))
    assert {reason for _, reason in local.values()} == {"stop", "length"}
    assert served == local


@pytest.mark.vllm
@pytest.mark.skipif(not VLLM, reason="KD_VLLM_PYTHON does not name a Python with vLLM")
def test_vllm_serves_the_folder(base, adapter, asked_and_local, tmp_path):
    """As it stands: other kernels round otherwise, so that greedy text may part at a near-tie."""
    folder = str(tmp_path / "out")
    write_merged(Student(base, adapter, torch.float32), Path(folder), None)
    port = free_port()
    url = f"http://127.0.0.1:{port}/v1"
    command = [VLLM, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--port", str(port),
               "--host", "127.0.0.1", "--max-model-len", "512", "--dtype", "float32",
               "--gpu-memory-utilization", "0.3"]  # fmt: skip
    requests, local = asked_and_local
    with running(command, url, tmp_path / "server.log"):
        place = Server(url, folder, "plain", concurrency=8, timeout=120)
        with opened(Engine("openai", folder, server=place)) as ask:
            served = texts(ask(requests, frozenset()))
    assert sum(served[name] == local[name] for name in local) >= 0.7 * len(local)
    assert "stop" in {reason for _, reason in served.values()}


# as llama.cpp's takes its words; what it writes is said by the file `wanted.json` beside it
CONVERTER = """
import argparse, json, pathlib, sys
parser = argparse.ArgumentParser()
parser.add_argument("model")
for flag in ("--outfile", "--outtype", "--model-name", "--metadata"):
    parser.add_argument(flag, required=True)
asked = parser.parse_args()
wanted = json.loads(pathlib.Path(__file__).with_name("wanted.json").read_text())
if wanted.get("fail"):
    sys.exit("noise\\nBPE pre-tokenizer was not recognized")
if wanted.get("junk"):
    pathlib.Path(asked.outfile).write_bytes(b"GG" * 99)
    sys.exit()
import gguf
writer = gguf.GGUFWriter(asked.outfile, "qwen3")
writer.add_name(f"{asked.model_name} {asked.outtype}")
said = json.loads(pathlib.Path(asked.metadata).read_text())
if finetune := said.get("general.finetune", asked.model):
    writer.add_finetune(finetune)
template = pathlib.Path(asked.model, "chat_template.jinja").read_text()
writer.add_eos_token_id(wanted["eos"])
writer.add_chat_template(template)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""


@pytest.fixture
def converter(tmp_path):
    """`converter(**what it does)`: the folder of a llama.cpp whose converter does that."""

    def make(**wanted) -> Path:
        folder = tmp_path / "llama.cpp"
        folder.mkdir()
        (folder / export.CONVERTER).write_text(CONVERTER)
        (folder / "wanted.json").write_text(json.dumps(wanted))
        return find_converter(str(folder))

    return make


@pytest.mark.parametrize(("dtype", "word"), [(torch.bfloat16, "bf16"), (torch.float32, "f32")])
def test_llama_cpp_is_asked_for_the_same_weights(written, converter, tmp_path, dtype, word):
    shutil.copytree(written, tmp_path / "out")
    path = write_gguf(converter(eos=TURN_END), tmp_path / "out", "my model", dtype)
    assert path == tmp_path / "out" / "my model.gguf"
    fields = gguf.GGUFReader(path).fields
    assert fields["general.name"].contents() == f"my model {word}"
    assert "general.finetune" not in fields


@pytest.mark.parametrize(("does", "words"), [
    ({"fail": True}, "failed: BPE pre-tokenizer was not recognized; mend that, or export without --gguf"),
    ({"junk": True}, "wrote no GGUF file"),
    ({"eos": TEXT_END}, "its file has tokenizer.ggml.eos_token_id = '256', the student '258'"),
])  # fmt: skip
def test_a_conversion_that_went_wrong(written, converter, tmp_path, does, words):
    shutil.copytree(written, tmp_path / "out")
    with pytest.raises(UserError, match=words) as caught:
        write_gguf(converter(**does), tmp_path / "out", "model", torch.bfloat16)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", ["", "missing", "."])
def test_without_llama_cpp_there_is_one_clear_line(tmp_path, place):
    with pytest.raises(UserError, match=r"git clone https://github.com/ggml-org/llama.cpp and pass --llama_cpp"):
        find_converter(place and str(tmp_path / place))
