"""Arms behind servers that the stage starts: each model is asked by its name, and nothing is left running."""

import json

import pytest

from src.distillation.server import answers
from src.evaluation.evaluator import run_evaluation
from src.utils.common import read_json, read_jsonl
from tests.distillation.test_engines import free_port
from tests.distillation.test_server import alive
from tests.evaluation.tiny import config_for, refused
from tests.stub_server import starts, write_stub


@pytest.fixture
def served(trained, tmp_path):
    """`served(serve=None, **settings)`: an evaluation whose `serve` starts a stub of vLLM."""
    pytest.importorskip("openai", reason="the client openai is not installed (requirements-dev.txt)")

    def make(serve=None, **settings):
        program = {"command": str(write_stub(tmp_path)), "port": free_port()}
        return config_for(
            trained, tmp_path / "out", serve=json.dumps(serve or program), **{"temperatures": [0.1, 0.7]} | settings
        )

    return make


def said_by(folder):
    """Arm -> what it said."""
    said = {}
    for row in read_jsonl(folder / "answers.jsonl"):
        said.setdefault(row["arm"], set()).add(row["response"])
    return said


def test_every_arm_is_asked_by_its_name_at_its_own_server(served, tmp_path):
    arms = run_evaluation(served())["arms"]
    names = {"base": arms["base"], "sft": "sft", "kd": "kd", "teacher": arms["teacher"]}
    assert said_by(tmp_path / "out") == {
        arm: {f"{name} at {t} from 20" for t in (0.1, 0.7)} for arm, name in names.items()
    }
    students, teacher = starts(tmp_path)
    assert students["words"][:2] == ["serve", arms["base"]]
    lora = students["words"].index("--enable-lora")
    assert students["words"][lora:] == [
        "--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"sft={arms['sft']}", f"kd={arms['kd']}",
    ]  # fmt: skip
    assert teacher["words"][:2] == ["serve", arms["teacher"]]
    assert "--enable-lora" not in teacher["words"]
    assert not alive(students["pid"])
    assert not alive(teacher["pid"])


def test_what_stands_in_for_the_teacher_is_asked_and_recorded(served, tmp_path, tiny_student):
    program = {"command": str(write_stub(tmp_path)), "port": 0, "model": tiny_student}
    config = served(program, arms=["teacher"])
    results = run_evaluation(config)
    assert said_by(tmp_path / "out") == {"teacher": {f"{tiny_student} at {t} from 20" for t in (0.1, 0.7)}}
    assert results["settings"]["answers_as_teacher"]
    assert read_json(tmp_path / "out" / "step_answers.json")["fingerprint"]["engine"] == "openai"
    config.serve = json.dumps(program | {"model": ""})
    refused(config, "was made with answers_as_teacher")


def test_a_whole_command_line_answers_as_every_arm_it_names(served, tmp_path):
    program = write_stub(tmp_path, "start")
    line = f"{program} serve {{base}} --lora-modules sft={{sft}} kd={{kd}} {{teacher}}=x --port {{port}}"
    arms = run_evaluation(served({"command": line, "port": 0}, temperatures=[0.7]))["arms"]
    assert said_by(tmp_path / "out").keys() == {"base", "sft", "kd", "teacher"}
    [start] = starts(tmp_path)
    assert start["words"][1] == arms["base"]
    assert f"kd={arms['kd']}" in start["words"]


def test_a_teacher_that_runs_elsewhere_is_not_started(served, tmp_path):
    config = served(teacher_base_url=f"http://127.0.0.1:{free_port()}/v1", arms=["teacher"], tries=1)
    refused(config, f"{config.teacher_base_url}: no answer to row")
    assert starts(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"engine": "transformers"}, "engine transformers answers in this process, serve starts a server; keep one"),
        (
            {"serve": '{"command": "run {base} {sft} {kd}"}'},
            r"does not name \{teacher\}; name it, say another",
        ),
        ({"serve": '{"command": "run {teacher}"}'}, r"does not name \{base\}"),
        ({"serve": '{"comand": "vllm"}'}, "serve: unknown key 'comand'; did you mean command?"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_is_started(served, tmp_path, changes, words):
    config = served()
    for name, value in changes.items():
        setattr(config, name, value)
    refused(config, words)
    assert starts(tmp_path) == []
    assert not answers(f"http://127.0.0.1:{json.loads(served().serve)['port']}/v1")
