"""What a profile's `serve` becomes: a command line, an environment, an address; what it may not say."""

import doctest
import json
import shlex
from types import SimpleNamespace

import pytest
import torch

from src.distillation import serving
from src.distillation.serving import (
    PlannedServer,
    Serve,
    answering,
    lora_rank,
    read_serve,
    serve_command,
    stored_bits,
    students_server,
    teacher_server,
    typed_command,
    with_open_port,
)
from src.utils.common import UserError, write_json

SIX = (0, 1, 2, 3, 4, 5)


@pytest.fixture(autouse=True)
def bfloat16(monkeypatch):
    """Whatever the processor here has."""
    monkeypatch.setattr(serving, "compute_dtype", lambda: torch.bfloat16)


def serve(**said) -> Serve:
    return read_serve(json.dumps({"gpu_memory_gb": 36} | said))


def test_the_reference_teacher_on_six_gpus(real_data):
    """Qwen3-30B-A3B has 4 KV heads: tensor parallel 2 x data parallel 3, not 6."""
    teacher = str(real_data / "configs" / "qwen3-30b-a3b-instruct-2507")
    planned = teacher_server(serve(arguments={"max_model_len": 4096, "enable-expert-parallel": True}), teacher, SIX)
    assert shlex.join(planned.words) == (
        f"vllm serve {teacher} --host 127.0.0.1 --port 8000 --tensor-parallel-size 2 --data-parallel-size 3 "
        "--dtype bfloat16 --max-model-len 4096 --generation-config vllm --seed 0 --enable-expert-parallel"
    )
    assert (planned.answers_for, planned.base_url) == ("teacher", "http://127.0.0.1:8000/v1")
    assert planned.environment == {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5"}


def test_the_reference_student_with_its_adapters_on_two_gpus(real_data):
    """Rank 64 before the adapters are there; 16 GB fit on one GPU, so each is a replica."""
    student = str(real_data / "configs" / "qwen3-8b")
    planned = students_server(serve(port=9000), student, {"sft": "runs/sft", "kd": "runs/kd"}, (6, 7), rank=64)
    assert shlex.join(planned.words) == (
        f"vllm serve {student} --host 127.0.0.1 --port 9000 --tensor-parallel-size 1 --data-parallel-size 2 "
        "--dtype bfloat16 --max-model-len auto --generation-config vllm --seed 0 "
        "--enable-lora --max-lora-rank 64 --lora-modules sft=runs/sft kd=runs/kd"
    )
    assert planned.environment == {"CUDA_VISIBLE_DEVICES": "6,7"}


def test_sglang_is_told_the_same_in_its_own_words(real_data):
    student = str(real_data / "configs" / "qwen3-8b")
    arguments = {"enable-metrics": True, "log-requests": False}
    said = serve(command="'/opt/sgl env/bin/sglang'", port=9000, arguments=arguments)
    assert shlex.join(serve_command(said, student, (6, 7), {"kd": "runs/kd"}, 64)) == (
        f"'/opt/sgl env/bin/python' -m sglang.launch_server --model-path {student} --host 127.0.0.1 --port 9000 "
        "--tp-size 1 --dp-size 2 --dtype bfloat16 --sampling-defaults openai --random-seed 0 "
        "--enable-lora --max-lora-rank 64 --lora-paths kd=runs/kd --enable-metrics"
    )
    assert serve_command(serve(command="sglang"), student, (6, 7))[:3] == ["python", "-m", "sglang.launch_server"]


def test_a_program_by_its_path_gets_derived_flags_too(tiny_teacher):
    words = serve_command(serve(command="/opt/env/bin/vllm"), tiny_teacher, ())
    assert words[:3] == ["/opt/env/bin/vllm", "serve", tiny_teacher]
    assert words[words.index("--max-num-batched-tokens") + 1] == "16384", "on a CPU"


def test_arguments_stand_over_derived_flags_and_can_take_them_away(tiny_teacher):
    arguments = {"--dtype": "float32", "seed": None, "enable_prefix_caching": False, "hf-overrides": {"a": [1]}}
    words = serve_command(serve(arguments=arguments), tiny_teacher, ())
    assert words[words.index("--dtype") + 1] == "float32"
    assert words.count("--dtype") == 1
    assert "--seed" not in words
    assert "--no-enable-prefix-caching" in words
    assert json.loads(words[words.index("--hf-overrides") + 1]) == {"a": [1]}


@pytest.mark.parametrize(
    ("said", "devices", "sizes"),
    [
        ({}, (), ["1", "1"]),
        ({"tensor_parallel": 4, "data_parallel": 2}, range(8), ["4", "2"]),
        ({"tensor_parallel": 4}, range(8), ["4", "2"]),
        ({"data_parallel": 2}, range(8), ["4", "2"]),
        ({"devices": [4, 5]}, range(4), ["1", "2"]),
    ],
)
def test_sizes_as_said_and_as_they_follow(tiny_teacher, said, devices, sizes):
    words = serve_command(serve(**said), tiny_teacher, serve(**said).devices or tuple(devices))
    flags = ("--tensor-parallel-size", "--data-parallel-size")
    assert [words[words.index(flag) + 1] for flag in flags] == sizes


@pytest.mark.parametrize(("tensor", "data"), [(4, None), (2, 2), (9, None), (None, 4)])
def test_sizes_that_leave_gpus_idle_are_refused(tiny_teacher, tensor, data):
    with pytest.raises(UserError, match=r"do not use 6 GPUs; make their product 6"):
        serve_command(serve(tensor_parallel=tensor, data_parallel=data), tiny_teacher, SIX)


def test_pipeline_stages_where_the_heads_do_not_divide(tiny_teacher, monkeypatch):
    """Four heads, two KV heads and three layers on six GPUs that only together hold the weights: 2 x 3 stages."""
    monkeypatch.setattr(serving, "count_parameters", lambda model: 100_000_000_000)
    words = shlex.join(serve_command(serve(), tiny_teacher, SIX))
    assert "--tensor-parallel-size 2 --data-parallel-size 1 " in words
    assert "--pipeline-parallel-size 3" in words


@pytest.mark.parametrize(
    ("quantization", "bits"),
    [
        (None, None),
        ({"quant_method": "fp8", "fmt": "e4m3"}, 8),
        ({"quant_method": "gptq", "bits": 4}, 4),
        ({"quant_method": "awq", "bits": 4}, 4),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 8}}}}, 8),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4),
        ({"quant_method": "new"}, None),
    ],
)
def test_what_a_weight_takes_in_a_quantised_checkpoint(quantization, bits):
    assert stored_bits(SimpleNamespace(quantization_config=quantization)) == bits


def test_a_quantised_stand_in_takes_fewer_gpus(real_data, tmp_path):
    """61 GB of bf16 need two GPUs of 36 GB, 31 GB of FP8 one."""
    teacher = real_data / "configs" / "qwen3-30b-a3b-instruct-2507"
    config = json.loads((teacher / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    write_json(tmp_path / "config.json", config)
    words = teacher_server(serve(model=str(tmp_path)), str(teacher), SIX).words
    assert words[:3] == ("vllm", "serve", str(tmp_path))
    assert words[words.index("--data-parallel-size") + 1] == "6"


@pytest.mark.parametrize(
    ("program", "more"), [("vllm", ["--tokenizer-revision", "v1"]), ("sglang", [])], ids=["vllm", "sglang"]
)
def test_a_pinned_model_is_served_at_its_revision_under_its_whole_name(program, more):
    words = serve_command(Serve(program), "owner/name@v1", [])
    assert "owner/name" in words
    start = words.index("--revision")
    assert words[start : start + 4 + len(more)] == [
        "--revision", "v1", "--served-model-name", "owner/name@v1", *more
    ]  # fmt: skip


def test_the_largest_rank_of_the_adapters_is_made_room_for(tmp_path):
    adapters = {}
    for name, rank in (("sft", 4), ("kd", 20)):
        write_json(tmp_path / name / "adapter_config.json", {"r": rank})
        adapters[name] = str(tmp_path / name)
    assert lora_rank(adapters) == 32
    write_json(tmp_path / "kd" / "adapter_config.json", {"r": 600})
    with pytest.raises(UserError, match=r"kd: vLLM takes adapters up to rank 512, this has 600"):
        lora_rank(adapters)


def test_devices_count_among_those_that_are_visible(monkeypatch):
    server = PlannedServer("teacher", ("vllm",), (0, 2), "http://127.0.0.1:8000/v1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "9,8,7")
    assert server.environment == {"CUDA_VISIBLE_DEVICES": "9,7"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "9,8")
    with pytest.raises(UserError, match="GPU 2 is named, CUDA_VISIBLE_DEVICES shows 2"):
        _ = server.environment


def test_a_whole_command_line_is_run_as_it_stands():
    said = read_serve(json.dumps({"command": "run -m {teacher} 'a b' --at={port}", "port": 9000}))
    assert said.program == "other"
    assert typed_command(said, {"teacher": "my teacher"}) == ["run", "-m", "my teacher", "a b", "--at=9000"]
    typed = read_serve('{"command": "vllm serve {teacher} --port 8000"}')
    assert (typed.program, typed_command(typed, {"teacher": "t"})[-1]) == ("other", "8000")
    with pytest.raises(UserError, match=r"names \{teacher\}, which there is not here"):
        typed_command(said, {})


def test_port_0_takes_a_free_one():
    said = serve(port=0)
    ports = {with_open_port(said).port for _ in range(3)}
    assert 0 not in ports
    assert with_open_port(serve(port=9000)).port == 9000


def test_no_server_is_asked_for():
    assert read_serve("") is read_serve(" ") is None
    assert read_serve("{}") == Serve()


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("vllm", "serve must be a mapping such as {command: vllm}"),
        ("[1]", "serve must be a mapping"),
        ('{"tensor_paralel": 2}', "unknown key 'tensor_paralel'; did you mean tensor_parallel?"),
        ('{"command": ""}', "command must be vllm, sglang, the path of one of them, or a whole command line, got ''"),
        ('{"command": "run \'x"}', "No closing quotation"),
        ('{"model": 7}', "model must be a folder or hub id"),
        ('{"devices": [0, 0]}', "devices must be a list of GPU numbers, each once"),
        ('{"devices": [true]}', "devices must be a list"),
        ('{"devices": 2}', "devices must be a list"),
        ('{"gpu_memory_gb": 0}', "gpu_memory_gb must be a number above 0"),
        ('{"tensor_parallel": 0}', "tensor_parallel must be a whole number from 1"),
        ('{"data_parallel": true}', "data_parallel must be a whole number from 1"),
        ('{"port": 70000}', "port must be a port from 1 to 65535, or 0 for a free one"),
        ('{"arguments": []}', "arguments must be a mapping"),
        ('{"arguments": {"port": 1}}', "arguments may not hold port; say serve: {port: ...}"),
        ('{"arguments": {"tensor_parallel_size": 1}}', "say serve: {tensor_parallel: ...}"),
        ('{"arguments": {"--api-key": "x"}}', "no key belongs into a profile; export VLLM_API_KEY"),
        ('{"command": "run {teacher}", "tensor_parallel": 2}', "put tensor_parallel into it, or take it out"),
        ('{"command": "run {teacher}", "arguments": {"a": 1}}', "put arguments into it"),
        ('{"command": "run {teacher}", "port": 0}', "write {port} where the command line wants it"),
    ],
)  # fmt: skip
def test_what_serve_may_not_say(said, words):
    with pytest.raises(UserError) as caught:
        read_serve(said)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_flags_that_change_an_answer_are_told_apart():
    said = serve(arguments={"quantization": "fp8", "max_num_seqs": 8, "kv_cache_dtype": "fp8"})
    assert answering(said) == {"quantization": "fp8", "kv-cache-dtype": "fp8"}


def test_the_examples_in_the_docstrings():
    assert doctest.testmod(serving).failed == 0


def test_an_adapter_is_not_served_as_a_model(tmp_path):
    """With sizes that are said nothing of the model would be read; a stand-in for the teacher is a model too."""
    write_json(tmp_path / "adapter_config.json", {"base_model_name_or_path": "base/model"})
    said = {"tensor_parallel": 1, "data_parallel": 1, "devices": [0]}
    with pytest.raises(UserError, match="is an adapter of 'base/model', not a model"):
        serve_command(serve(**said), str(tmp_path), (0,))
    with pytest.raises(UserError, match="is an adapter of 'base/model', not a model"):
        teacher_server(serve(**said, model=str(tmp_path)), "some/teacher", (0,))
