"""The commands of the docs that ask lm-evaluation-harness, as they stand there, on tiny models and a tiny task."""

import json
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from src.utils.common import ROOT, read_json, read_jsonl, write_jsonl
from tests.evaluation.tiny import run_of

ROWS = [{"question": f"What is {i} + {i * i}?", "answer": f"#### {i + i * i}"} for i in range(5)]


def commands() -> list[str]:
    """The lines of docs/evaluation.md that begin with `lm_eval`, each with what continues it."""
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8").replace("\\\n", "")
    return [" ".join(line.split()) for line in re.findall(r"^lm_eval .*", text, flags=re.MULTILINE)]


@pytest.fixture
def task_file(tmp_path) -> Path:
    """A task of the harness: a YAML file (JSON is YAML) and its rows."""
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    task = {
        "task": "tiny_sums", "dataset_path": "json", "test_split": "test", "output_type": "loglikelihood",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}", "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "tiny_sums.yaml").write_text(json.dumps(task))
    return tmp_path / "tiny_sums.yaml"


def asked(command: str, folder: Path, names: dict[str, str]) -> tuple[dict, list[dict]]:
    """Run a command in a folder, offline, with its names replaced: the harness's results and its samples."""
    for name, ours in names.items():
        command = command.replace(name, ours)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    done = subprocess.run(
        shlex.split(command), cwd=folder, env=os.environ | offline | {"PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    output = folder / shlex.split(command)[-1]
    [results], [samples] = (list(output.glob(f"*/{name}_*.json*")) for name in ("results", "samples"))
    return read_json(results), read_jsonl(samples)


def test_the_two_commands_differ_in_the_adapter_alone():
    base, distilled = commands()
    assert distilled.replace(",peft=R/final_model", "").replace("/distilled", "/base") == base


@pytest.mark.slow
def test_the_harness_judges_the_student_with_its_adapter(trained, hybrid_student, tmp_path, task_file):
    """The student's weights under a hybrid template, so that the words for thinking show whether it was told of."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (requirements-dev.txt)")
    names = {"outputs/models/smollm2-135m-20-layers": hybrid_student, "peft=R": f"peft={run_of(trained)}",
             "gsm8k": str(task_file)}  # fmt: skip
    with ThreadPoolExecutor(2) as pool:  # most of the harness's time is one process that reads its thousands of tasks
        found = list(pool.map(lambda command: asked(command, tmp_path, names), commands()))
    likelihoods = []
    for results, samples in found:
        assert 0 <= results["results"]["tiny_sums"]["acc,none"] <= 1
        assert len(samples) == len(ROWS)
        for sample in samples:
            prompt = f"<|im_start|>user\n{sample['doc']['question']}<|im_end|>\n<|im_start|>assistant\n"
            said = sample["arguments"]["gen_args_0"]
            assert said["arg_0"] == f"{prompt}<think>\n\n</think>\n\n"
            assert said["arg_1"] == sample["doc"]["answer"]
        likelihoods.append(sum(float(sample["filtered_resps"][0][0]) for sample in samples))
    base, distilled = likelihoods
    assert distilled > 0.95 * base, "it was trained on such rows"
