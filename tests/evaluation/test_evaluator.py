"""Four arms of tiny models: the numbers come from the stored rows, scripted answers are graded right."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from src.distillation.heldout import tokens_by_position
from src.evaluation import evaluator
from src.evaluation.evaluator import MODES, run_evaluation, select_rows
from src.evaluation.results import CONTEXT, heldout_section, make_results
from src.evaluation.results_schema import ARMS, SCHEMA_VERSION
from src.evaluation.verdict import NO_CONTROL, sentences
from src.grading.rows import OUTCOMES
from src.grading.sandbox import Sandbox
from src.report.page import write_reports
from src.utils.common import ROOT, read_json, read_jsonl, write_json, write_jsonl
from tests.evaluation.tiny import config_for, refused, run_of, stored

SAMPLE_FIELDS = {
    "arm", "id", "source", "domain", "family", "grader", "prompt", "reference", "temperature", "preset", "sample_index",
    "seed", "sampling", "prompt_sha256", "response", "finish_reason", "num_tokens", "extracted", "outcome", "strict",
    "score", "sandbox_level",
}  # fmt: skip
HELDOUT_FIELDS = {
    "arm", "id", "sample_index", "num_tokens", "kl_sum", "nll_sum", "teacher_nll_sum", "agreement_sum",
    "acceptance_sum", "kl_by_position", "agreement_by_position", "kl_is", "family",
}  # fmt: skip


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
    """One number for one quantity: the evaluation takes over what the runs measured."""
    _, results = evaluated
    run = read_json(run_of(trained) / "kd_results.json")
    for arm, name in (("base", "before"), ("kd", "after"), ("teacher", "teacher")):
        assert results["heldout"]["arms"][arm] == pytest.approx(run[name], rel=1e-12)
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
    assert "it is closer to its teacher than before" in results["verdict"]
    assert "Distilled against SFT: " in results["verdict"]
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


def test_reports_are_made_from_the_stored_files_alone(evaluated, tmp_path):
    config, results = evaluated
    folder = Path(config.output_dir)
    written = read_json(folder / "results.json")
    assert written == json.loads(json.dumps(results))
    write_reports(tmp_path, read_json(folder / "results.json"), stored(config, "samples"))
    for name in ("report.md", "report.html"):
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
    assert [sentence for sentence in sentences(results) if sentence not in text] == []
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
    sums = {"teacher_nll_sum": 0.0, "agreement_sum": 0.0, "nll_sum": 0.0, "acceptance_sum": 0.0}
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
    assert "left out: code (not executed)" in results["verdict"]
    report = (tmp_path / "out" / "report.md").read_text()
    assert "not executed" in report
    assert "return" not in report
    assert "heldout" not in results
    assert not (tmp_path / "out" / "heldout.jsonl").exists()


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


def test_raw_and_recommended_state_every_sampling_field(trained, tmp_path, scripted):
    run_evaluation(config_for(trained, tmp_path / "out", heldout=False, arms=["kd"], presets=["raw", "recommended"]))
    found = {row["preset"]: row["sampling"] for row in read_jsonl(tmp_path / "out" / "samples.jsonl")}
    stated = {"temperature": 0.7, "max_new_tokens": 8}
    assert found == {"raw": {"top_p": 1.0, "top_k": 0} | stated, "recommended": {"top_p": 0.8, "top_k": 20} | stated}


@pytest.mark.parametrize("change", [{"temperatures": [0.7, 0.7]}, {"presets": ["raw", "raw"]}], ids=str)
def test_a_cell_named_twice_is_refused(trained, tmp_path, change):
    refused(config_for(trained, tmp_path / "out", heldout=False, **change), "is named twice")


@pytest.mark.parametrize(
    ("measured", "named", "is_shown"),
    [("abc", "org/x", True), ("abd", "org/x", False), ("served by vllm: x", "org/x", True),
     ("served by vllm: x", "org/y", False)],
)  # fmt: skip
def test_a_run_with_another_teacher_is_left_out(tmp_path, measured, named, is_shown):
    """A teacher that was behind a server has no weights to be known by: both name one tokenizer."""
    write_jsonl(tmp_path / "run" / "heldout.jsonl", [{}])
    config = {"teacher_model_name_or_path": named, "fingerprint": {"student": "s", "teacher": measured}}
    write_json(tmp_path / "run" / "kd_config.json", config)
    arms = {"kd": str(tmp_path / "run" / "final_model"), "base": "org/base", "teacher": "org/x"}
    facts = {"arms": arms, "fingerprint": {"models": {"kd": "k", "base": "s", "teacher": "abc"}}}
    assert evaluator._measured_runs(facts) == ({"kd": tmp_path / "run"} if is_shown else {})


@pytest.mark.parametrize(
    ("models", "teacher", "is_shown"),
    [
        ({"base": "s"}, None, True),
        ({"base": "o"}, None, False),
        ({"base": "s"}, "org/teacher", True),
        ({"base": "s"}, "copy/of-teacher", True),
        ({"base": "s"}, "org/other", False),
    ],
)
def test_another_student_or_teacher_counts_though_it_is_no_arm(tmp_path, monkeypatch, models, teacher, is_shown):
    """`--base` and `--teacher` name models of the evaluation, whether or not these answer."""
    monkeypatch.setattr(evaluator, "model_fingerprint", {"copy/of-teacher": "t", "org/other": "o"}.get)
    write_jsonl(tmp_path / "run" / "heldout.jsonl", [{}])
    config = {"teacher_model_name_or_path": "org/teacher", "fingerprint": {"student": "s", "teacher": "t"}}
    write_json(tmp_path / "run" / "kd_config.json", config)
    facts = {
        "arms": {"kd": str(tmp_path / "run" / "final_model")},
        "fingerprint": {"models": {"kd": "k"} | models},
    }
    assert evaluator._measured_runs(facts, teacher) == ({"kd": tmp_path / "run"} if is_shown else {})


@pytest.mark.parametrize(
    "change", [{"batch_size": -1}, {"num_samples": 0}, {"temperatures": []}, {"presets": []}, {"arms": []}], ids=str
)
def test_sizes_below_one_are_refused(trained, tmp_path, change):
    refused(config_for(trained, tmp_path / "out", **({"heldout": False} | change)), next(iter(change)))


def test_an_id_that_stands_twice_among_the_prompts_is_refused(copied, tmp_path):
    """Uninterrupted its row would be answered twice, gone on with once."""
    data = copied / "data" / "eval_dataset.jsonl"
    rows = read_jsonl(data)
    write_jsonl(data, [*rows, rows[4] | {"prompt": "What is 5 + 0?"}])
    refused(config_for(copied, tmp_path / "out", heldout=False),
            rf"eval_dataset\.jsonl:13: id {rows[4]['id']} stands in line 5 too")  # fmt: skip


def comparison(monkeypatch):
    """The script test_kd_inference_v2.py, loaded by its path."""
    spec = importlib.util.spec_from_file_location("comparison", ROOT / "test_kd_inference_v2.py")
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, script)  # dataclasses look there
    spec.loader.exec_module(script)
    return script


def test_the_questions_shown_are_whole(copied, tmp_path, scripted, capsys, monkeypatch):
    """A prompt that stands as it is keeps its last paragraph; an instruction is left out."""
    data = copied / "data" / "eval_dataset.jsonl"
    rows = []
    for row in read_jsonl(data):
        if row["source"] == "sums":
            whole = int(row["id"].removeprefix("sums-")) % 4 == 0
            asked = {"prompt": "Asked.\n\nForm.", "instruction": "Form."}
            rows.append(row | ({"prompt": "Whole.\n\nLast.", "instruction": ""} if whole else asked))
    write_jsonl(data, rows)
    results = run_evaluation(config_for(copied, tmp_path / "out", heldout=False, arms=["base", "kd"]))
    moved = (copied / "data").rename(copied / "moved")
    comparison(monkeypatch).show(results | {"output_dir": str(tmp_path / "out")}, str(moved))
    shown = capsys.readouterr().out
    assert "Whole." in shown
    assert "Last." in shown
    assert "Asked." in shown
    assert "Form." not in shown


def test_answers_of_every_preset_are_shown(copied, tmp_path, scripted, capsys, monkeypatch):
    """Each beside its own sampling, not one in the other's place."""
    asked = {"arms": ["base", "kd"], "temperatures": [0.7], "presets": ["raw", "recommended"]}
    results = run_evaluation(config_for(copied, tmp_path / "out", heldout=False, **asked))
    script = comparison(monkeypatch)
    monkeypatch.setattr(script, "print_summary", lambda *_: None)
    script.show(results | {"output_dir": str(tmp_path / "out")}, str(copied / "data"))
    shown = capsys.readouterr().out
    assert "raw" in shown
    assert "recommended" in shown
