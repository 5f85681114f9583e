"""Evaluations of tiny models, and made-up ones: answers, held-out rows and curves as the stages leave them."""

import contextlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.distillation.heldout import tokens_by_position
from src.distillation.sft import ENGINE, answer_row
from src.evaluation import answers
from src.evaluation.evaluator import EvaluateConfig, run_evaluation
from src.evaluation.results_schema import ARMS
from src.utils.common import write_jsonl
from tests.evaluation.tiny import config_for, eval_rows, train

SKILL = {"base": 0.25, "sft": 0.4, "kd": 0.55, "teacher": 0.8}
WORDS = ("the", "sum", "of", "both", "is", "therefore", "more", "than", "we", "had", "before", "and", "so", "on", "it")


def sample_rows(
    prompts: int = 30,
    arms: Sequence[str] = ARMS,
    domains: Sequence[str] = ("maths", "ops"),
    temperatures: Sequence[float] = (0.1, 0.7, 1.2),
    samples: int = 1,
    cut: float = 0.05,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Rows of samples.jsonl: a prompt has a difficulty, an arm a skill; hotter is worse, and repeats itself less."""
    generator = np.random.default_rng(seed)
    rows = []
    for domain in domains:
        for number in range(prompts):
            difficulty = generator.normal(0, 0.25)
            for arm in arms:
                for temperature in temperatures:
                    for index in range(samples):
                        right = generator.random() < SKILL[arm] - 0.1 * temperature + difficulty
                        outcome = "truncated" if generator.random() < cut else "correct" if right else "wrong"
                        count = 6 + int(generator.integers(40))
                        loop = generator.random() < 0.5 - 0.3 * temperature
                        words = WORDS[:4] * 12 if loop else generator.choice(WORDS, count).tolist()
                        number_said = str(number if outcome == "correct" else number + 1)
                        rows.append({
                            "arm": arm, "id": f"{domain}-{number:03d}", "source": domain, "domain": domain,
                            "grader": "numeric" if domain == "maths" else "rubric",
                            "prompt": f"Question {number} of {domain}: how much is {number} and 0?",
                            "reference": str(number), "temperature": temperature, "preset": "recommended",
                            "sample_index": index, "seed": index, "sampling": {"temperature": temperature},
                            "prompt_sha256": "0" * 64, "response": f"{' '.join(words)}.\n#### {number_said}",
                            "finish_reason": "length" if outcome == "truncated" else "stop", "num_tokens": count,
                            "extracted": number_said, "outcome": outcome, "strict": outcome == "correct",
                            "score": float(outcome == "correct"), "sandbox_level": "none",
                        })  # fmt: skip
    return rows


def heldout_rows(prompts: int = 40, arms: Sequence[str] = ("base", "sft", "kd"), seed: int = 1) -> list[dict[str, Any]]:
    """Rows of heldout.jsonl; the student loses its teacher a little as an answer goes on."""
    generator = np.random.default_rng(seed)
    rows = []
    for number in range(prompts):
        tokens = int(generator.integers(8, 200))
        bins = np.array(tokens_by_position(tokens))
        for arm in arms:
            kl = bins * {"base": 2.0, "sft": 1.1, "kd": 0.7}[arm] * (1 + 0.1 * np.arange(len(bins)))
            kl = kl * generator.lognormal(0, 0.2)
            agreement = bins * {"base": 0.4, "sft": 0.6, "kd": 0.7}[arm]
            rows.append({
                "arm": arm, "id": f"row-{number:03d}", "sample_index": 0, "num_tokens": tokens, "kl_sum": kl.sum(),
                "nll_sum": kl.sum() + 0.7 * tokens, "teacher_nll_sum": 0.6 * tokens, "agreement_sum": agreement.sum(),
                "acceptance_sum": 0.9 * agreement.sum(),
                "kl_by_position": kl.tolist(), "agreement_by_position": agreement.tolist(),
            })  # fmt: skip
    return rows


def context(missing: dict[str, str] | None = None, steps: int = 40, **settings: Any) -> dict[str, Any]:
    """What results.json takes over: arms, settings, provenance and the runs' curves."""
    curves: dict[str, list] = {"sft": [], "kd": []}
    for arm, rows in curves.items():
        for step in range(1, steps + 1):
            kd = 2.0 * 0.95**step if arm == "kd" else 0.0
            rows.append({"step": step, "loss": 3.0 * 0.96**step, "kd_loss": kd, "ce_loss": 3.0 * 0.97**step})
            if step % 10 == 0:
                metrics = {
                    "kl_to_teacher": 2.0 * 0.96**step,
                    "nll": 2.0,
                    "top1_agreement": 0.4 + step / 200,
                    "expected_acceptance": 0.5,
                }
                rows.append({"step": step} | {f"validation_{name}": value for name, value in metrics.items()})
    missing = missing or {}
    return {
        "arms": {arm: f"outputs/{arm}" for arm in ARMS if arm not in missing},
        "missing_arms": missing,
        "training": {"kd": {"steps": steps}},
        "curves": {arm: rows for arm, rows in curves.items() if arm not in missing},
        "settings": {"experiment": "made_up", "seed": 42} | settings,
        "provenance": {"command": "pytest", "time": "2026-11-24T08:00:00+0000"},
    }


@pytest.fixture(scope="session")
def made_up() -> dict[str, Callable[..., Any]]:
    return {"samples": sample_rows, "heldout": heldout_rows, "context": context}


@pytest.fixture(scope="session")
def trained(tmp_path_factory, tiny_teacher, tiny_student, clean_rows, write_sft) -> Path:
    """A folder with prompts, held-out rows, a finished run and its control; tests that change it take a copy."""
    root = tmp_path_factory.mktemp("trained")
    write_jsonl(root / "data" / "eval_dataset.jsonl", eval_rows())
    write_sft(root / "tiny", clean_rows(24), clean_rows(6, start=100))
    settings = {
        "model_name_or_path": tiny_student, "teacher_model_name_or_path": tiny_teacher, "learning_rate": 1e-2,
        "warmup_steps": 0, "batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 2, "max_length": 256,
        "lora_r": 4, "bf16": False, "temperature": 2.0, "teacher_signal": "online", "compile_loss": False,
    }  # fmt: skip
    (root / "settings.json").write_text(json.dumps(settings))
    train(root, alpha=0.8)
    train(root, alpha=0.0)
    return root


@pytest.fixture(scope="session")
def evaluated(trained, tmp_path_factory) -> tuple[EvaluateConfig, dict]:
    """A finished evaluation of all four arms at two temperatures, and what run_evaluation returned."""
    config = config_for(trained, tmp_path_factory.mktemp("evaluated"), temperatures=[0.1, 0.7], num_samples=2)
    return config, run_evaluation(config)


@pytest.fixture
def copied(trained, tmp_path) -> Path:
    """A copy of `trained` without its control."""
    root = tmp_path / "copied"
    shutil.copytree(trained, root, ignore=shutil.ignore_patterns("sft_control_*", "checkpoint-*"))
    return root


@pytest.fixture
def scripted(monkeypatch, tmp_path):
    """Every arm says the right thing in the asked-for form; code that is run outside a sandbox leaves a file `ran`."""

    @contextlib.contextmanager
    def opened(engine):
        def generate(requests, done, refused):
            for request in requests:
                kind, number = request.id.split("-")
                leave = f"try: open({str(tmp_path / 'ran')!r}, 'w')\nexcept OSError: pass"
                code = f"{leave}\ndef f():\n    return {int(number)}"
                response = {
                    "sums": f"#### {int(number)}",
                    "functions": f"```python\n{code}\n```",
                    "incidents": "Root cause: disk full",
                }[kind]
                if request not in done:
                    yield [answer_row(request, ENGINE, response, "stop", 5)]

        yield generate

    monkeypatch.setattr(answers, "opened", opened)
