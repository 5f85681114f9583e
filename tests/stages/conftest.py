"""The scripts of stages 1 and 2 on tiny models, from flags to files."""

import importlib.util
import logging
import sys
from pathlib import Path

import pytest
import torch
import yaml

from src.utils import common
from src.utils.common import ROOT, run_cli, write_jsonl


@pytest.fixture(scope="session")
def scripts():
    """Name of a script -> its module, loaded by path."""
    modules = {}
    for path in (ROOT / "scripts").glob("*.py"):
        name = path.stem
        spec = importlib.util.spec_from_file_location(f"script_{name}", path)
        sys.modules[spec.name] = modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[name])
    return modules


@pytest.fixture
def run(scripts, monkeypatch, capsys):
    """`run(name, *arguments)`: the script's exit code, standard output and standard error."""

    def run(name: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"scripts/{name}.py", *map(str, arguments)])
        monkeypatch.setattr(common.logger, "handlers", [])
        monkeypatch.setattr(common.logger, "propagate", True)
        monkeypatch.setattr(common.logger, "level", logging.INFO)
        capsys.readouterr()
        try:
            run_cli(scripts[name].main)
        except SystemExit as end:
            return (end.code, *capsys.readouterr())
        return (0, *capsys.readouterr())

    return run


@pytest.fixture
def succeeds(run):
    def succeeds(name: str, *arguments: str) -> str:
        """All that the script printed."""
        code, out, err = run(name, *arguments)
        assert code == 0, err
        return out + err

    return succeeds


@pytest.fixture
def fails(run):
    def fails(name: str, *arguments: str) -> str:
        """The one line that the script ended with."""
        code, _, err = run(name, *arguments)
        assert code == 2
        lines = err.splitlines()
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:], err
        assert "Traceback" not in err
        return lines[-1]

    return fails


@pytest.fixture(scope="session")
def teacher_that_ends(tmp_path_factory, make_model, make_tokenizer, save_model) -> str:
    """A tiny MoE teacher that speaks nonsense but ends its turn after a few dozen tokens."""
    model = make_model(moe=True, seed=1, vocab_size=320, hidden_size=48, layers=3)
    with torch.no_grad():
        model.lm_head.weight[258] *= 4  # <|im_end|>
        model.lm_head.weight[259:] = 0  # think tags and padded logits
    return save_model(tmp_path_factory.mktemp("teacher") / "ends", model, make_tokenizer())


@pytest.fixture
def humaneval_file(tmp_path) -> Path:
    """Eight problems in HumanEval's form."""
    path = tmp_path / "HumanEval.jsonl"
    names = ("add", "halve", "reverse", "largest", "is_even", "join_all", "count_vowels", "squares")
    write_jsonl(path, [
        {
            "task_id": f"HumanEval/{number}",
            "prompt": f'def {name}(x):\n    """Do what the name {name} says, case {number}."""\n',
            "canonical_solution": "    return x\n",
            "test": f"def check(candidate):\n    assert candidate({number}) == {number}\n",
            "entry_point": name,
        }
        for number, name in enumerate(names)
    ])  # fmt: skip
    return path


@pytest.fixture
def profile(tmp_path, teacher_that_ends, tiny_student, humaneval_file):
    """`profile(**download_settings)`: a profile's path; its data come from a pack and the HumanEval file."""

    def make(**download: object) -> Path:
        download = download or {
            "domains": ["maths"], "domain_train_rows": [14], "domain_eval_rows": [5],
            "humaneval_path": str(humaneval_file), "humaneval_train_rows": 4, "humaneval_eval_rows": 3,
        }  # fmt: skip
        path = tmp_path / "profile.yaml"
        sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": 20, "max_new_tokens": 32, "batch_size": 8}
        training = {"max_steps": 2, "batch_size": 2, "gradient_accumulation_steps": 2, "warmup_steps": 0, "lora_r": 4,
                    "temperature": 2.0, "max_length": 1500, "validation_fraction": 0.2, "bf16": False,
                    "teacher_signal": "online", "compile_loss": False}  # fmt: skip
        path.write_text(yaml.safe_dump({
            "data_dir": str(tmp_path / "data"), "experiment_dir": str(tmp_path / "experiment" / "tiny"),
            "teacher_model_name_or_path": teacher_that_ends, "model_name_or_path": tiny_student, "seed": 7,
            "download_datasets": download, "generate_sft_data": sampling, "fix_sft_data": {"select": "all"},
            "run_improved_kd": training,
        }))  # fmt: skip
        return path

    return make


@pytest.fixture
def answered(succeeds, profile, tmp_path) -> tuple[Path, Path]:
    """The profile and its folder sft/ after stages 1 and 2."""
    path = profile()
    succeeds("download_datasets", "--config", path)
    succeeds("generate_sft_data", "--config", path)
    return path, tmp_path / "experiment" / "tiny" / "sft"
