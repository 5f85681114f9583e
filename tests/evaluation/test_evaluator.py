"""Four arms of tiny models: numbers come from the stored rows, an interruption changes nothing, gaps are named."""

import contextlib
import importlib.util
import json
import math
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

from src.distillation.base import prompt_text
from src.distillation.heldout import tokens_by_position
from src.distillation.kd import run_kd_pipeline
from src.distillation.sft import ENGINE
from src.evaluation import evaluator
from src.evaluation.evaluator import MODES, EvaluateConfig, resolve_arms, run_evaluation, select_rows
from src.evaluation.graders import OUTCOMES
from src.evaluation.outside import judge_outside
from src.evaluation.report import write_reports
from src.evaluation.results import ARMS, CONTEXT, heldout_section, make_results, rebuild
from src.evaluation.sandbox import Sandbox
from src.evaluation.schema import SCHEMA_VERSION, write_results
from src.evaluation.verdict import NO_CONTROL
from src.utils import common
from src.utils.common import UserError, read_json, read_jsonl, write_jsonl

ROOT = Path(__file__).resolve().parents[2]
SAMPLE_FIELDS = {
    "arm", "id", "source", "domain", "grader", "prompt", "reference", "temperature", "preset", "sample_index", "seed",
    "sampling", "prompt_sha256", "response", "finish_reason", "num_tokens", "extracted", "outcome", "strict", "score",
    "sandbox_level",
}  # fmt: skip
HELDOUT_FIELDS = {
    "arm", "id", "sample_index", "num_tokens", "kl_sum", "nll_sum", "teacher_nll_sum", "agreement_sum",
    "kl_by_position", "agreement_by_position",
}  # fmt: skip


def eval_rows() -> list[dict[str, str]]:
    """12 prompts: 6 sums, 3 functions, 3 incidents."""
    rows = []
    for i in range(12):
        kind = ("sums", "functions", "sums", "incidents")[i % 4]
        rows.append({"id": f"{kind}-{i:02d}", "source": kind, "split": "eval", "system": "", "reference": str(i)})
        if kind == "sums":
            rows[-1] |= {"domain": "maths", "prompt": f"What is {i} + 0?", "grader": "numeric", "grader_args": "{}"}
        elif kind == "functions":
            arguments = {"setup": "", "tests": f"assert f() == {i}", "entry_point": "f"}
            rows[-1] |= {"domain": "code", "prompt": f"Write f, which returns {i}.", "grader": "python_tests"}
            rows[-1]["grader_args"] = json.dumps(arguments)
        else:
            arguments = {"groups": [{"name": "root_cause", "any": ["disk full"]}], "pass_mark": 1.0}
            rows[-1] |= {"domain": "ops", "prompt": f"Alert {i}: writes fail.", "grader": "rubric"}
            rows[-1]["grader_args"] = json.dumps(arguments)
    return rows


def train(root: Path, **settings) -> dict:
    return run_kd_pipeline(read_json(root / "settings.json") | {"experiment_dir": str(root / "tiny")} | settings)


@pytest.fixture(scope="module")
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


def config_for(root: Path, output: Path, **settings) -> EvaluateConfig:
    small = {"mode": "quick", "temperatures": [0.7], "max_new_tokens": 8, "batch_size": 4, "max_length": 256}
    return EvaluateConfig(
        data_dir=str(root / "data"), experiment_dir=str(root / "tiny"), output_dir=str(output), **(small | settings)
    )


@pytest.fixture(scope="module")
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


def run_of(root: Path) -> Path:
    [folder] = root.glob("gpu_optimized_kd_*")
    return folder


def stored(config: EvaluateConfig, name: str) -> list[dict]:
    return read_jsonl(Path(config.output_dir) / f"{name}.jsonl")


def as_set(path: Path) -> set[str]:
    return {json.dumps(row, sort_keys=True) for row in read_jsonl(path)}


def refused(config: EvaluateConfig, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        run_evaluation(config)
    assert "\n" not in str(caught.value)


# --- what an evaluation leaves ---------------------------------------------------------------------------------------


def test_every_answer_is_stored_once_with_all_its_fields(evaluated):
    config, _ = evaluated
    samples = stored(config, "samples")
    keys = {(row["arm"], row["id"], row["temperature"], row["preset"], row["sample_index"]) for row in samples}
    assert len(keys) == len(samples) == 4 * 10 * 2 * 2
    for row in samples:
        assert row.keys() == SAMPLE_FIELDS
        assert row["outcome"] in OUTCOMES
        assert row["num_tokens"] <= 8
        assert row["sampling"] == {"temperature": row["temperature"], "top_p": 0.8, "top_k": 20, "max_new_tokens": 8}
    assert {row["arm"] for row in samples} == set(ARMS)


def test_arms_answer_the_same_prompts_with_the_same_seeds(evaluated):
    config, _ = evaluated
    by_arm = {arm: {} for arm in ARMS}
    for row in stored(config, "samples"):
        key = (row["id"], row["temperature"], row["sample_index"])
        by_arm[row["arm"]][key] = (row["seed"], row["prompt_sha256"])
    assert by_arm["base"] == by_arm["sft"] == by_arm["kd"] == by_arm["teacher"]
    seeds = [seed for seed, _ in by_arm["base"].values()]
    assert len(set(seeds)) == len(seeds)


def test_held_out_rows_are_scored_for_every_student_arm(evaluated):
    config, results = evaluated
    rows = stored(config, "heldout")
    assert all(row.keys() == HELDOUT_FIELDS for row in rows)
    assert sorted((row["arm"], row["id"]) for row in rows) == sorted(
        (arm, f"sum-{i:05d}") for arm in ("base", "sft", "kd") for i in range(100, 106)
    )
    held = results["heldout"]
    assert held["rows"] == 6
    assert held["arms"]["teacher"]["kl_to_teacher"] == 0


def test_the_held_out_numbers_are_those_of_training(trained, evaluated):
    """Two ways to one number: the evaluation loads the adapter from disk, training had it in memory.

    The evaluation computes in bf16 where the processor does, this training in fp32.
    """
    _, results = evaluated
    run = read_json(run_of(trained) / "kd_results.json")
    for arm, name in (("base", "before"), ("kd", "after"), ("teacher", "teacher")):
        assert results["heldout"]["arms"][arm] == pytest.approx(run[name], rel=5e-3, abs=1e-6)
    assert results["training"]["kd"] == run
    assert results["training"]["sft"]["arm"] == "sft"


def test_the_distilled_student_is_closer_to_the_teacher(evaluated):
    _, results = evaluated
    difference = next(
        d for d in results["heldout"]["differences"] if (d["a"], d["b"], d["metric"]) == ("kd", "base", "kl_to_teacher")
    )
    assert difference["difference"] < 0
    assert difference["real"] is True
    low, high = difference["interval"]
    assert low <= difference["difference"] <= high < 0
    assert 0 < results["heldout"]["gap_recovered"]["kd"]["kl_to_teacher"]["value"] < 1
    assert "the distilled student against the untrained student: closer" in results["verdict"]
    assert "against its SFT control" in results["verdict"]
    assert "a claim that distillation beats SFT needs several" in results["verdict"]
    assert NO_CONTROL not in results["verdict"].lower()


def test_rows_are_the_sum_of_outcomes(evaluated):
    config, results = evaluated
    samples, scores = stored(config, "samples"), results["graded"]["scores"]
    assert sum(score["answers"] for score in scores) == len(samples)
    assert len(scores) == 4 * 3 * 2, "arms x domains x temperatures"
    for score in scores:
        assert score["outcomes"].keys() == set(OUTCOMES)
        assert sum(score["outcomes"].values()) == score["answers"]
    cut = sum(row["outcome"] == "truncated" for row in samples)
    assert results["graded"]["cap_hit_rate"] == cut / len(samples)
    for comparison in results["graded"]["comparisons"]:
        low, high = comparison["interval"]
        assert low <= comparison["difference"] <= high


def test_results_and_reports_are_made_from_the_stored_files_alone(evaluated, tmp_path):
    config, results = evaluated
    folder = Path(config.output_dir)
    written = read_json(folder / "results.json")
    assert written == json.loads(json.dumps(results))
    write_results(tmp_path / "results.json", rebuild(folder))
    write_reports(tmp_path, read_json(tmp_path / "results.json"), stored(config, "samples"))
    for name in ("results.json", "report.md", "report.html"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    assert written["schema_version"] == SCHEMA_VERSION
    for arm in ("sft", "kd"):
        assert [row["step"] for row in written["curves"][arm] if "ce_loss" in row] == [1, 2]
    assert written["settings"]["experiment"] == "tiny"
    assert written["settings"]["prompts"] == 10


def test_the_order_of_the_stored_rows_is_of_no_account(evaluated):
    config, results = evaluated
    context = {name: results[name] for name in CONTEXT}
    turned = make_results(stored(config, "samples")[::-1], stored(config, "heldout")[::-1], context, config.seed)
    assert turned == results


def test_the_report_shows_the_numbers_and_no_model_text(evaluated):
    config, results = evaluated
    text = (Path(config.output_dir) / "report.md").read_text(encoding="utf-8")
    assert results["headline"] in text
    assert results["verdict"].removeprefix(results["headline"]).strip() in text
    for arm, what in results["arms"].items():
        assert f"{results['heldout']['arms'][arm]['nll']:.4f}" in text
        assert f"`{what}`" in text
    for row in stored(config, "samples"):
        for said in (row["response"], row["extracted"]):
            assert len(said.strip()) < 4 or said.strip() not in text
    header, *rest = [line for line in text.splitlines() if line.startswith("|")]
    assert header.startswith("| arm |")
    assert rest
    assert not list(Path(config.output_dir).glob(".*"))


def test_several_answers_to_a_prompt_are_one_unit():
    """Sums per prompt, not the last answer alone: 2 prompts with 2 answers each, of 10 and 30 tokens."""
    sums = {"teacher_nll_sum": 0.0, "agreement_sum": 0.0, "nll_sum": 0.0}
    rows = [
        {"arm": arm, "id": row_id, "sample_index": index, "num_tokens": tokens, "kl_sum": kl * tokens}
        | sums
        | dict.fromkeys(("kl_by_position", "agreement_by_position"), [0.0] * len(tokens_by_position(tokens)))
        for arm, kl in (("base", 2.0), ("kd", 0.5))
        for row_id in ("a", "b")
        for index, tokens in ((0, 10), (1, 30))
    ]
    held = heldout_section(rows, seed=0)
    assert (held["rows"], held["prompts"], held["response_tokens"]) == (4, 2, 80)
    assert held["arms"]["kd"]["kl_to_teacher"] == 0.5
    assert held["differences"][0]["interval"] == [-1.5, -1.5]
    assert held["gap_recovered"]["kd"]["kl_to_teacher"] == {"value": 0.75, "interval": [0.75, 0.75]}


# --- scripted answers: grading ---------------------------------------------------------------------------------------


@pytest.fixture
def scripted(monkeypatch, tmp_path):
    """Every arm says the right thing in the asked-for form; code that is run outside a sandbox leaves a file `ran`."""

    def generate(model, tokenizer, requests, sampling, batch_size, done=frozenset()):
        for request, own in zip(requests, sampling, strict=True):
            kind, number = request.id.split("-")
            leave = f"try: open({str(tmp_path / 'ran')!r}, 'w')\nexcept OSError: pass"
            code = f"{leave}\ndef f():\n    return {int(number)}"
            response = {
                "sums": f"#### {int(number)}",
                "functions": f"```python\n{code}\n```",
                "incidents": "Root cause: disk full",
            }[kind]
            if request not in done:
                yield [{
                    "id": request.id, "sample_index": request.sample_index, "prompt": request.prompt,
                    "response": response, "finish_reason": "stop", "num_tokens": 5, "engine": ENGINE,
                    "sampling": vars(own), "seed": request.seed,
                }]  # fmt: skip

    monkeypatch.setattr(evaluator, "generate", generate)


def test_rows_without_a_grader_are_held_out_text_only(copied, tmp_path, scripted):
    data = copied / "data" / "eval_dataset.jsonl"
    rows = [row | ({"grader": "none"} if row["source"] != "sums" else {}) for row in read_jsonl(data)]
    write_jsonl(data, rows)
    graded = run_evaluation(config_for(copied, tmp_path / "some", heldout=False))["graded"]["scores"]
    assert {(score["domain"], score["answers"]) for score in graded} == {("maths", 6)}
    write_jsonl(data, [row | {"grader": "none"} for row in rows])
    config = config_for(copied, tmp_path / "none")
    results = run_evaluation(config)
    assert "graded" not in results
    assert results["heldout"]["rows"] == 6
    assert run_evaluation(config) == results, "finished, though no answer is stored"


def test_right_answers_are_right(trained, tmp_path, scripted, sandbox):
    results = run_evaluation(config_for(trained, tmp_path / "out", heldout=False))
    for score in results["graded"]["scores"]:
        assert score["outcomes"]["correct"] == score["answers"] > 0
        assert (score["accuracy"], score["mean_score"], score["strict_accuracy"]) == (1.0, 1.0, 1.0)
    assert {row["sandbox_level"] for row in read_jsonl(tmp_path / "out" / "samples.jsonl")} == {"namespaces"}
    assert not (tmp_path / "ran").exists()


def test_code_is_not_executed_where_the_host_does_not_isolate(trained, tmp_path, scripted, monkeypatch):
    allowed = []
    monkeypatch.setattr(evaluator, "open_sandbox", lambda allow: allowed.append(allow) or Sandbox("rlimits"))
    results = run_evaluation(config_for(trained, tmp_path / "out", heldout=False))
    for score in results["graded"]["scores"]:
        if score["domain"] == "code":
            assert score["outcomes"]["not_executed"] == score["answers"] > 0
            assert score["accuracy"] is score["interval"] is score["mean_score"] is None
        else:
            assert score["outcomes"]["correct"] == score["answers"] > 0
            assert (score["accuracy"], score["interval"][1], score["mean_score"]) == (1.0, 1.0, 1.0)
            assert score["strict_accuracy"] == 1.0
    assert {comparison["domain"] for comparison in results["graded"]["comparisons"]} == {"maths", "ops"}
    for comparison in results["graded"]["comparisons"]:
        assert (comparison["difference"], comparison["interval"]) == (0.0, [0.0, 0.0])
        assert (comparison["won"], comparison["lost"], comparison["decision"]) == (0, 0, "not shown")
    assert not (tmp_path / "ran").exists()
    for row in read_jsonl(tmp_path / "out" / "samples.jsonl"):
        if row["domain"] == "code":
            assert (row["outcome"], row["score"], row["sandbox_level"]) == ("not_executed", None, "none")
            assert row["extracted"].startswith("try:")
    assert allowed == [False]
    assert "Not executed, and so without accuracy: answers of code." in results["verdict"]
    report = (tmp_path / "out" / "report.md").read_text()
    assert "not executed" in report
    assert "return" not in report
    assert "heldout" not in results
    assert not (tmp_path / "out" / "heldout.jsonl").exists()


# --- arms ------------------------------------------------------------------------------------------------------------


def test_without_a_control_nothing_is_shown_about_distillation(copied, tmp_path, scripted):
    results = run_evaluation(config_for(copied, tmp_path / "out"))
    assert "nothing is shown about distillation itself" in results["verdict"]
    assert "The arm sft is missing: no finished control of this experiment" in results["verdict"]
    assert "SFT control" not in results["verdict"]
    assert results["arms"].keys() == {"base", "kd", "teacher"}
    assert "SFT control: missing, no finished control" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize("change", [{"max_steps": 1}, {"learning_rate": 2e-2}, {"seed": 7}], ids=str)
def test_a_control_with_other_settings_is_not_taken(copied, change):
    train(copied, alpha=0.0, **change)
    arms = resolve_arms(config_for(copied, copied / "out"))
    assert "sft" not in arms.found
    assert "1 finished controls differ in rows or settings" in arms.missing["sft"]
    control = train(copied, alpha=0.0)
    assert resolve_arms(config_for(copied, copied / "out")).found["sft"] == control["final_model"]


@pytest.mark.parametrize("change", [{"temperature": 4.0}, {"divergence": "reverse_kl"}], ids=str)
def test_a_control_that_differs_in_the_objective_alone_is_taken(copied, change):
    control = train(copied, alpha=0.0, **change)
    assert resolve_arms(config_for(copied, copied / "out")).found["sft"] == control["final_model"]


def test_runs_of_another_experiment_or_unfinished_ones_are_passed_over(copied):
    for name, keep, experiment in (("99990101_000000", True, "other"), ("99990102_000000", False, "tiny")):
        newer = copied / f"gpu_optimized_kd_{name}"
        shutil.copytree(run_of(copied) if keep else next(copied.glob("gpu_optimized_kd_2*")), newer)
        config = read_json(newer / "kd_config.json") | {"experiment": experiment}
        (newer / "kd_config.json").write_text(json.dumps(config))
        if not keep:
            (newer / "kd_results.json").unlink()
    found = resolve_arms(config_for(copied, copied / "out")).found["kd"]
    assert Path(found).parent.name.startswith("gpu_optimized_kd_2")


def test_a_model_path_is_a_run_or_its_final_model(trained, tmp_path):
    run = run_of(trained)
    found = [
        resolve_arms(config_for(trained, tmp_path, model_path=str(path))).found for path in (run, run / "final_model")
    ]
    assert found[0] == found[1]
    assert found[0]["kd"] == str(run / "final_model")
    assert found[0].keys() == set(ARMS)


@pytest.mark.parametrize("flag", ["model_path", "sft_model_path"])
def test_a_wrong_model_path_is_one_line(trained, tmp_path, flag):
    refused(
        config_for(trained, tmp_path / "out", **{flag: str(tmp_path / "no" / "run")}),
        rf"--{flag} .*/no/run: no adapter_config\.json there; name a run folder or its final_model",
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("settings", "words"), [
    ({"arms": ["kd", "student"]}, "arms: unknown 'student'; there are base, sft, kd, teacher"),
    ({"presets": ["greedy"]}, "presets: unknown 'greedy'; there are raw, recommended"),
    ({"data_dir": "no/such"}, r"eval_dataset\.jsonl: no such file; run scripts/download_datasets\.py"),
    ({"experiment_dir": "no/such"}, "no finished run of such; run scripts/run_improved_kd.py, or pass --model_path"),
    ({"temperatures": [0.7, -1.0]}, "temperature must be 0"),
    ({"temperatures": [float("nan")]}, "temperature must be 0"),
])  # fmt: skip
def test_wrong_settings_are_one_line(trained, tmp_path, settings, words):
    refused(replace(config_for(trained, tmp_path / "out", heldout=False), **settings), words)
    assert not (tmp_path / "out").exists()


def test_arms_that_are_not_asked_for_are_named(trained, tmp_path, scripted):
    results = run_evaluation(config_for(trained, tmp_path / "out", arms=["base", "kd"]))
    assert results["missing_arms"] == {"sft": "not asked for", "teacher": "not asked for"}
    assert "heldout" not in results, "without the teacher there is nothing to compare its text with"
    assert {row["arm"] for row in read_jsonl(tmp_path / "out" / "samples.jsonl")} == {"base", "kd"}


def test_an_adapter_of_another_student_is_refused(copied, tmp_path, make_model, make_tokenizer, save_model):
    other = save_model(tmp_path / "wide", make_model(hidden_size=48), make_tokenizer())
    refused(
        config_for(copied, tmp_path / "out", base=other),
        r"final_model does not fit on .*wide: .*; name its student with --base",
    )


# --- interruptions ---------------------------------------------------------------------------------------------------


def interrupted(config: EvaluateConfig, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Evaluate until `after` answers are graded."""
    calls, real = [], evaluator.grade_all

    def stop(answers, *rest):
        calls.extend(answers)
        if len(calls) > after:
            raise KeyboardInterrupt
        return real(answers, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(evaluator, "grade_all", stop)
        with pytest.raises(KeyboardInterrupt):
            run_evaluation(config)


def test_an_interrupted_evaluation_ends_as_an_uninterrupted_one(evaluated, tmp_path, monkeypatch):
    whole, results = evaluated
    config = replace(whole, output_dir=str(tmp_path / "out"))
    interrupted(config, monkeypatch, after=30)
    assert not (tmp_path / "out" / "results.json").exists()
    again = run_evaluation(config)
    for name in ("samples", "heldout"):
        assert as_set(tmp_path / "out" / f"{name}.jsonl") == as_set(Path(whole.output_dir) / f"{name}.jsonl")
    assert again["graded"] == results["graded"]
    assert again["verdict"] == results["verdict"]


def test_a_torn_line_is_cut_and_its_answer_given_again(evaluated, tmp_path):
    whole, results = evaluated
    shutil.copytree(whole.output_dir, tmp_path / "out")
    config = replace(whole, output_dir=str(tmp_path / "out"))
    for name, lines in (("samples", 47), ("heldout", 18)):
        path = tmp_path / "out" / f"{name}.jsonl"
        kept = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(kept[: lines - 1]) + kept[lines - 1][:60])
    (tmp_path / "out" / "results.json").unlink()
    marker = tmp_path / "out" / "evaluation.json"
    marker.write_text(json.dumps(read_json(marker) | {"finished": False}))
    assert run_evaluation(config)["graded"] == results["graded"]
    assert as_set(tmp_path / "out" / "samples.jsonl") == as_set(Path(whole.output_dir) / "samples.jsonl")
    assert len(read_jsonl(tmp_path / "out" / "heldout.jsonl")) == 18


def test_a_held_out_row_that_is_too_long_does_not_stop_a_resumed_evaluation(
    copied, tmp_path, scripted, monkeypatch, clean_rows, write_sft
):
    rows = clean_rows(30, start=100)
    rows[0]["messages"][1]["content"] = "long " * 100
    write_sft(copied / "tiny", clean_rows(24), rows)
    config = config_for(copied, tmp_path / "out")
    interrupted(config, monkeypatch, after=0)
    assert run_evaluation(config)["heldout"]["rows"] == 29


def test_a_finished_evaluation_is_returned(evaluated, monkeypatch):
    config, results = evaluated
    monkeypatch.setattr(evaluator, "load_model", lambda *_: pytest.fail("evaluated again"))
    assert run_evaluation(config) == json.loads(json.dumps(results))


@pytest.mark.parametrize(("change", "words"), [
    ({"temperatures": [0.7]}, r"temperatures = \[0\.1, 0\.7\], this run has \[0\.7\]"),
    ({"mode": "medium"}, "mode = 'quick', this run has 'medium'"),
    ({"max_new_tokens": 9}, "max_new_tokens = 8, this run has 9"),
    ({"seed": 1}, "seed = 42, this run has 1"),
    ({"arms": ["base", "kd"]}, "arms = "),
])  # fmt: skip
def test_other_settings_in_the_same_folder_are_refused_by_the_field(evaluated, change, words):
    config, _ = evaluated
    before = (Path(config.output_dir) / "samples.jsonl").read_bytes()
    refused(replace(config, **change), f"{re.escape(config.output_dir)} was made with {words}.*--overwrite")
    assert (Path(config.output_dir) / "samples.jsonl").read_bytes() == before


def test_other_gpus_may_finish_what_these_began(evaluated):
    """Where the models lie is no part of what was asked for."""
    config, results = evaluated
    moved = replace(config, teacher_devices=[4], student_devices=[5], gpu_memory_gb=70.0)
    assert run_evaluation(moved) == json.loads(json.dumps(results))


def test_other_prompts_in_the_same_folder_are_refused(trained, tmp_path, scripted):
    config = config_for(trained, tmp_path / "out", heldout=False)
    run_evaluation(config)
    write_jsonl(tmp_path / "data" / "eval_dataset.jsonl", eval_rows()[:-1])
    refused(replace(config, data_dir=str(tmp_path / "data")), "was made with data = ")


def test_overwrite_evaluates_again(trained, tmp_path, scripted):
    config = config_for(trained, tmp_path / "out", heldout=False)
    run_evaluation(config)
    run_evaluation(replace(config, temperatures=[1.2], overwrite=True))
    assert {row["temperature"] for row in read_jsonl(tmp_path / "out" / "samples.jsonl")} == {1.2}


# --- prompts and sampling --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [{"a": 200, "b": 100, "c": 50}, {"a": 3, "b": 400}, {"a": 5}])
def test_selected_rows_are_nested_and_balanced(sizes):
    rows = [{"id": f"{(i * 7919) % 1000:03d}", "source": source} for source, n in sizes.items() for i in range(n)]
    chosen = {mode: select_rows(rows, count) for mode, count in MODES.items()}
    assert chosen["full"][: len(chosen["medium"])] == chosen["medium"]
    assert chosen["medium"][: len(chosen["quick"])] == chosen["quick"]
    assert select_rows(rows[::-1], 50) == chosen["medium"], "the order of the file is of no account"
    for mode, count in MODES.items():
        assert len(chosen[mode]) == min(count, len(rows))
        taken = {source: sum(row["source"] == source for row in chosen[mode]) for source in sizes}
        open_ended = [number for source, number in taken.items() if number < sizes[source]]
        assert not open_ended or max(open_ended) - min(open_ended) <= 1
        assert all(number >= min(open_ended) - 1 for number in open_ended)


def test_temperature_0_is_greedy(trained, tmp_path):
    config = config_for(trained, tmp_path / "out", temperatures=[0.0], num_samples=2, presets=["raw", "recommended"],
                        heldout=False, arms=["base", "kd"])  # fmt: skip
    results = run_evaluation(config)
    assert {score["preset"] for score in results["graded"]["scores"]} == {"raw"}, "one cell: no preset changes it"
    said: dict[tuple, set] = {}
    for row in read_jsonl(tmp_path / "out" / "samples.jsonl"):
        assert row["sampling"]["temperature"] == 0.0
        said.setdefault((row["arm"], row["id"]), set()).add(row["response"])
    assert len(said) == 20
    assert all(len(responses) == 1 for responses in said.values())


# --- not yet as it should be -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arms", [["base"], ["teacher"], ["base", "teacher"]], ids=str)
def test_arms_without_an_adapter(trained, tmp_path, scripted, arms):
    results = run_evaluation(config_for(trained, tmp_path / "out", arms=arms, heldout=False))
    assert set(results["arms"]) == set(arms)


@pytest.mark.parametrize(
    ("change", "field"), [({"alpha": 0.0, "max_steps": 1}, "max_steps"), ({"alpha": 0.5}, "alpha")]
)
def test_a_named_control_that_differs_is_not_called_the_same(copied, tmp_path, scripted, change, field):
    """Either refused by the field, or said in the verdict; not "its SFT control (same rows, same steps)"."""
    named = train(copied, output_dir=str(tmp_path / "named"), **change)
    config = config_for(copied, tmp_path / "out", sft_model_path=named["run_dir"])
    try:
        verdict = run_evaluation(config)["verdict"]
    except UserError as error:
        verdict = str(error)
    assert field in verdict
    assert "same rows, same steps" not in verdict


@pytest.mark.parametrize("change", [{"temperatures": [0.7, 0.7]}, {"presets": ["raw", "raw"]}], ids=str)
def test_a_cell_named_twice_is_refused(trained, tmp_path, change):
    refused(config_for(trained, tmp_path / "out", heldout=False, **change), "is named twice")


@pytest.mark.parametrize(
    "change", [{"batch_size": 0}, {"num_samples": 0}, {"temperatures": []}, {"presets": []}, {"arms": []}], ids=str
)
def test_sizes_below_one_are_refused(trained, tmp_path, change):
    refused(config_for(trained, tmp_path / "out", **({"heldout": False} | change)), next(iter(change)))


# --- the commands ----------------------------------------------------------------------------------------------------


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(f"script_{Path(name).stem}", ROOT / name)
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # dataclasses look there
    spec.loader.exec_module(script)
    return script


def run_script(monkeypatch, *arguments: object) -> int:
    """The exit code of scripts/evaluate_distillation.py."""
    script = load_script("scripts/evaluate_distillation.py")
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, arguments)])
    for name, value in (("handlers", []), ("propagate", True), ("level", common.logger.level)):
        monkeypatch.setattr(common.logger, name, value)  # put back what run_cli changes
    try:
        common.run_cli(script.main)
    except SystemExit as end:
        return end.code
    return 0


@pytest.fixture
def shipped(trained, tmp_path, monkeypatch) -> Path:
    """Two shipped profiles: that of `trained`, and one of an experiment without a run; the working folder is empty."""
    (tmp_path / "configs").mkdir()
    for name, root in (("tiny", trained), ("zz_other", tmp_path)):
        folders = {"data_dir": str(root / "data"), "experiment_dir": str(root / name)}
        own = {"mode": "quick", "temperatures": [0.1, 1.2], "max_new_tokens": 8, "max_length": 256}
        (tmp_path / "configs" / f"{name}.yaml").write_text(json.dumps(folders | {"evaluate_distillation": own}))
    monkeypatch.setattr(evaluator, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_model_path_is_enough_for_the_script(trained, shipped, scripted, monkeypatch):
    """Profile, base, teacher, control and held-out rows are those of the run's experiment."""
    arguments = ("--model_path", run_of(trained) / "final_model", "--output_dir", "out")
    assert run_script(monkeypatch, *arguments) == 0
    results = read_json(shipped / "out" / "results.json")
    assert (results["arms"].keys(), results["missing_arms"]) == (set(ARMS), {})
    assert results["heldout"]["rows"] == 6
    assert {score["temperature"] for score in results["graded"]["scores"]} == {0.1, 1.2}


def test_a_run_of_no_shipped_profile_asks_for_one(trained, shipped, monkeypatch, capsys):
    (shipped / "configs" / "tiny.yaml").unlink()
    assert run_script(monkeypatch, "--model_path", run_of(trained), "--output_dir", "out") == 2
    assert "is of no shipped profile's experiment; name its profile with --config" in capsys.readouterr().err
    with pytest.raises(UserError, match="no finished run of a shipped profile"):
        load_script("test_kd_inference_v2.py").test_model()


@pytest.mark.parametrize("model_path", [None, "run"])
def test_test_model_compares_at_one_temperature(trained, shipped, scripted, model_path):
    if model_path:
        model_path = str(run_of(trained))
    results = load_script("test_kd_inference_v2.py").test_model(temperature=0.7, mode="quick", model_path=model_path)
    assert results["output_dir"].startswith("outputs/inference_test/tiny/")
    assert {(s["arm"], s["temperature"]) for s in results["graded"]["scores"]} == {("base", 0.7), ("kd", 0.7)}
    assert {(c["a"], c["b"]) for c in results["graded"]["comparisons"]} == {("kd", "base")}
    assert results["missing_arms"] == {"sft": "not asked for", "teacher": "not asked for"}
    assert "The arm sft is missing: not asked for." in results["verdict"]
    stored = read_json(Path(results["output_dir"]) / "results.json")
    assert stored == {name: value for name, value in results.items() if name != "output_dir"}
    with pytest.raises(UserError, match="mode"):
        load_script("test_kd_inference_v2.py").test_model(mode="hasty")


def test_raw_and_recommended_state_every_sampling_field(trained, tmp_path, scripted):
    run_evaluation(config_for(trained, tmp_path / "out", heldout=False, arms=["kd"], presets=["raw", "recommended"]))
    found = {row["preset"]: row["sampling"] for row in read_jsonl(tmp_path / "out" / "samples.jsonl")}
    stated = {"temperature": 0.7, "max_new_tokens": 8}
    assert found == {"raw": {"top_p": 1.0, "top_k": 0} | stated, "recommended": {"top_p": 0.8, "top_k": 20} | stated}


# --- the outside judge -----------------------------------------------------------------------------------------------


@pytest.fixture
def task_file(tmp_path, monkeypatch) -> Path:
    """A task of lm-evaluation-harness: a YAML file and its rows."""
    rows = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(5)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    task = {
        "task": "tiny_sums", "dataset_path": "json", "test_split": "test", "output_type": "loglikelihood",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}", "target_delimiter": "",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "tiny_sums.yaml").write_text(json.dumps(task))
    return tmp_path / "tiny_sums.yaml"


def evaluate_script(config: EvaluateConfig, monkeypatch, *arguments: object) -> int:
    said = [f"--{name}={getattr(config, name)}" for name in ("data_dir", "experiment_dir", "output_dir", "mode")]
    return run_script(monkeypatch, *said, "--no_heldout", "--temperatures", "0.7", *arguments)


def test_the_harness_judges_the_student_with_its_adapter(trained, tmp_path, scripted, monkeypatch, task_file):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (requirements-dev.txt)")
    config = config_for(trained, tmp_path / "out")
    arguments = ("--arms", "base", "kd", "--lm_eval_tasks", task_file)
    assert evaluate_script(config, monkeypatch, *arguments) == 0
    found = {arm: read_json(tmp_path / "out" / f"lm_eval_{arm}.json") for arm in ("base", "kd")}
    arms = resolve_arms(config)
    tokenizer = AutoTokenizer.from_pretrained(arms.base)
    kd = AutoPeftModelForCausalLM.from_pretrained(arms.found["kd"]).eval()
    losses = {}
    for arm, context in (("base", kd.disable_adapter()), ("kd", contextlib.nullcontext())):
        with torch.no_grad(), context:
            own = []
            for row in read_jsonl(tmp_path / "rows.jsonl"):
                prompt = prompt_text(tokenizer, [{"role": "user", "content": row["question"]}])
                asked = prompt.rstrip()  # the harness scores the blanks at the end of a prompt with the answer
                asked, said = (tokenizer(t)["input_ids"] for t in (asked, prompt[len(asked) :] + row["answer"]))
                logits = kd(torch.tensor([asked + said])).logits[0, len(asked) - 1 : -1].float()
                logits = logits[:, : len(tokenizer)] if arm == "kd" else logits  # it cuts padded columns of adapters
                own.append(torch.nn.functional.cross_entropy(logits, torch.tensor(said), reduction="sum").item())
        losses[arm] = math.log(found[arm]["results"]["tiny_sums"]["perplexity,none"])
        assert losses[arm] == pytest.approx(sum(own) / 5, rel=0.02), "the harness computes in bf16 where it can"
        assert found[arm]["settings"]["apply_chat_template"] is True
        assert found[arm]["configs"]["tiny_sums"]["output_type"] == "loglikelihood"
    assert losses["kd"] < 0.95 * losses["base"]
    assert found["kd"]["settings"]["model_args"]["peft"] == arms.found["kd"]

    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("lm_eval_*.json")}
    assert evaluate_script(config, monkeypatch, *arguments) == 0, "a finished evaluation and its judge are left alone"
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    task_file.write_text(task_file.read_text().replace("{{question}}", "Say {{question}}"))
    assert evaluate_script(config, monkeypatch, *arguments) == 2


def test_a_task_that_cannot_be_run_is_one_line(trained, tmp_path, task_file):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (requirements-dev.txt)")
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(
        UserError, match=r"lm-evaluation-harness cannot run .*tiny_sums\.yaml: FileNotFoundError"
    ) as error:
        judge_outside(config_for(trained, tmp_path / "out", lm_eval_tasks=[str(task_file)], arms=["kd"]))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("installed", "task", "words"),
    [
        (False, "arc_easy", "--lm_eval_tasks needs lm-evaluation-harness; pip install lm_eval"),
        (True, "arc_eazy", "no task and no YAML file 'arc_eazy'; did you mean arc_easy?"),
    ],
)
def test_the_harness_is_looked_for_first(trained, tmp_path, monkeypatch, capsys, installed, task, words):
    if installed:
        pytest.importorskip("lm_eval", reason="lm_eval is not installed (requirements-dev.txt)")
    else:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert evaluate_script(config_for(trained, tmp_path / "out"), monkeypatch, "--lm_eval_tasks", task) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert words in line
    assert not (tmp_path / "out").exists()
