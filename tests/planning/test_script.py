"""scripts/plan_hardware.py: its flags, its output, its one line where something is wrong."""

import json
import runpy

import pytest
import yaml

from src.utils.common import ROOT

SCRIPT = str(ROOT / "scripts" / "plan_hardware.py")


@pytest.fixture
def run(monkeypatch, capsys):
    def called(*arguments):
        monkeypatch.setattr("sys.argv", [SCRIPT, *map(str, arguments)])
        code = 0
        try:
            runpy.run_path(SCRIPT, run_name="__main__")
        except SystemExit as ended:
            code = ended.code
        out, err = capsys.readouterr()
        return code, out, err

    return called


@pytest.fixture
def profile(tmp_path):
    """Of models that are nowhere."""
    path = tmp_path / "profile.yaml"
    path.write_text(yaml.safe_dump({
        "teacher_model_name_or_path": "/nowhere/teacher", "model_name_or_path": "/nowhere/student",
        "download_datasets": {"gsm8k_train_rows": 200, "gsm8k_eval_rows": 10},
        "run_improved_kd": {"max_steps": 5, "lora_r": 4, "max_length": 512},
    }))  # fmt: skip
    return path


def test_configurations_are_given_as_folders(run, profile, tiny_models):
    folders = ["--teacher_config", tiny_models.teacher, "--student_config", tiny_models.student]
    code, out, _ = run("--config", profile, *folders, "--gpus", "2x24", "--json")
    said = json.loads(out)
    assert code == 0
    assert said["hardware"] == "2 x A10, 24 GB each"
    assert [model["name"] for model in said["models"]] == [tiny_models.teacher, tiny_models.student]
    code, out, _ = run("--config", profile, *folders, "--gpus", "2x24", "--answer_tokens", 33)
    assert code == 0
    assert "33 of answer" in out
    assert "together: disk" in out


def test_the_shipped_embedded_profile_on_this_machine(run):
    code, out, _ = run("--config", ROOT / "configs" / "embedded.yaml", "--json")
    assert code == 0
    said = json.loads(out)
    assert said["fits"] is True
    assert said["hours"][1] < 24
    [use] = next(stage for stage in said["stages"] if stage["stage"] == "run_improved_kd (kd)")["uses"]
    assert 1 < use["memory"]["peak"] < 4, "GB; the run itself takes 2.1 of them"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpus", "8"], "--gpus 8: expected how many and of how many GB"),
        (["--gpus", "1x40"], "'/nowhere/teacher' cannot be loaded"),
        (["--detect"], "--detect: torch finds no GPU"),
        (["--gpu", "8x40"], "unrecognized arguments: --gpu"),
        (["--gpus", "1x40", "--detect"], "not allowed with argument"),
        (["--hardware", "nothing-like-it"], "no such overlay"),
        (["--prompt_tokens", "-5"], "--prompt_tokens -5: a number above 0 is wanted"),
        (["--prompt_tokens", "0"], "--prompt_tokens 0: a number above 0 is wanted"),
        (["--answer_tokens", "nan"], "--answer_tokens nan: a number above 0 is wanted"),
    ],
)
def test_a_mistake_is_one_line(run, profile, arguments, said):
    code, out, err = run("--config", profile, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert said in err
    assert len(err.splitlines()) == 1
