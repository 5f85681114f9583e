"""The comparison of recipes: its arms are runs of equally many steps, its record says what was answered, its report
says what the records say."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from benchmarks import recipe_report, recipe_runs, recipes, whose_text
from benchmarks.recipe_arms import ARMS, CANDIDATES, CHOOSING_STEPS, STEPS, Arm, on_policy
from benchmarks.recipe_report import Phase
from src.distillation.base import encode_row, end_of_turn_id, load_model, load_tokenizer
from src.distillation.batching import is_validation
from src.distillation.kd import KDConfig
from src.distillation.losses import plain_kd_loss
from src.distillation.sft import Sampling
from src.distillation.teacher import model_reader
from src.distillation.teacher_cache import CacheTeacherConfig, make_cache
from src.evaluation.statistics import crossed, holm
from src.grading.rows import dataset_row
from src.utils.common import ROOT, UserError, read_json, read_jsonl, sha256_file, write_jsonl
from src.utils.config import build_config, read_merged, read_profile


def test_every_arm_is_a_run_and_all_take_equally_many_steps():
    profile = read_profile(recipe_runs.PROFILE, recipe_runs.SECTION, KDConfig)
    by_name = {arm.name: arm for arm in ARMS}
    assert len({arm.name for arm in [*ARMS, *CANDIDATES]}) == len(ARMS) + len(CANDIDATES)  # their runs lie side by side
    begun = {arm.after for arm in ARMS if arm.after}
    for arm in [*ARMS, *CANDIDATES]:
        config = build_config(KDConfig, profile | arm.settings)
        assert config.on_policy == ("on_policy_rounds" in arm.settings)
        assert (
            config.validation_fraction
            == read_profile(recipe_runs.PROFILE, "cache_teacher", CacheTeacherConfig)["validation_fraction"]
        )
    for arm in ARMS:
        before = by_name[arm.after].steps if arm.after else 0
        assert arm.steps + before == STEPS or arm.name in begun
    assert {arm.steps for arm in CANDIDATES} == {CHOOSING_STEPS}


def questions(split: str, count: int) -> list[dict[str, str]]:
    """Sums of two domains, in families of three."""
    rows = []
    for index in range(count):
        rows.append(
            dataset_row(source="sums", domain=("maths", "aiops")[index % 2], split=split, instruction="",
                        prompt=f"What is {index} + {len(split)}?", reference=str(index + len(split)), grader="numeric",
                        family=f"{split}-{index // 3}")
        )  # fmt: skip
    return rows


def answered(row: dict[str, str]) -> dict:
    messages = [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": f"#### {row['reference']}"},
    ]
    return {"id": row["id"], "sample_index": 0, "domain": row["domain"], "messages": messages}


@pytest.fixture
def experiment(tmp_path, tiny_models, monkeypatch):
    """A comparison of three arms by tiny models, as far as it is before the first run."""
    data, rows = tmp_path / "data", tmp_path / "rows"
    splits = {split: questions(split, count) for split, count in (("train", 40), ("eval", 12))}
    for split, asked in splits.items():
        write_jsonl(data / f"{split}_dataset.jsonl", asked)
        write_jsonl(rows / "sft" / f"sft_{split}_data_clean.jsonl", [answered(row) for row in asked])
    models = {"teacher_model_name_or_path": tiny_models.teacher, "model_name_or_path": tiny_models.student}
    training = {"validation_fraction": 0.2, "batch_size": 4, "gradient_accumulation_steps": 1, "max_length": 256,
                "lora_r": 4, "bf16": False, "compile_loss": False, "learning_rate": 1e-2}  # fmt: skip
    profile = models | {"data_dir": str(data), "experiment_dir": str(rows), "run_improved_kd": training}
    (tmp_path / "recipes.yaml").write_text(yaml.safe_dump(profile), encoding="utf-8")
    make_cache(CacheTeacherConfig(tiny_models.teacher, str(rows), bf16=False, validation_fraction=0.2, max_length=256))
    arms = [
        Arm("sft", "SFT", {"alpha": 0.0}, 2),
        Arm("begun", "begun", {"temperature": 1.0}, 2),
        Arm("after", "after", on_policy(1.0, 10, temperature=1.0), 2, "begun"),
        Arm("control", "control", {"temperature": 1.0, "data_seed": 1000}, 2, "begun"),
    ]
    candidate = Arm("candidate_sft", "sft", {"alpha": 0.0}, 1)
    monkeypatch.setattr(recipe_runs, "ARMS", arms)
    monkeypatch.setattr(recipes, "WAIT", 0.1)
    monkeypatch.setattr(recipe_runs, "PROFILE", tmp_path / "recipes.yaml")
    monkeypatch.setattr(recipe_runs, "PHASES", {"choose": [candidate], "table": arms})
    monkeypatch.setattr(recipe_runs, "OWN", Sampling(1.0, 1.0, 0, 8))
    monkeypatch.setattr(
        recipe_runs, "GRADED", {n: Sampling(t, 1.0, 0, 8) for n, t in (("greedy", 0.0), ("T=0.7", 0.7))}
    )
    for module in (recipe_runs, recipe_report):
        monkeypatch.setattr(module, "SEEDS", (1, 2))
    monkeypatch.setattr(recipe_report, "ARMS", arms)
    monkeypatch.setattr(recipe_report, "CANDIDATES", [candidate])
    return tmp_path


def asked(folder, phase: str, *only: str) -> argparse.Namespace:
    return argparse.Namespace(phase=phase, output=str(folder / "out"), only=only, json=None, pages=[])


def test_prepare_runs_the_stages_and_keeps_few_rows_to_measure_on(experiment, monkeypatch):
    """Before the teacher reads them; the rows that are graded stay."""
    made = []

    def run(command, **_):
        made.append((Path(command[1]).stem, len(read_jsonl(experiment / "rows" / "sft" / "sft_eval_data_clean.jsonl"))))
        assert command[2:] == ["--config", str(experiment / "recipes.yaml")]

    monkeypatch.setattr(recipes.subprocess, "run", run)
    monkeypatch.setattr(recipe_runs, "MEASURED_PROMPTS", 2)
    recipes.prepare(asked(experiment, "prepare"))
    assert made == [(stage, 4 if stage == "cache_teacher" else 12) for stage in recipes.STAGES]
    assert len(read_jsonl(experiment / "data" / "eval_dataset.jsonl")) == 12


def test_runs_are_made_once_and_the_report_says_what_they_answered(experiment, monkeypatch):
    for phase in ("choose", "table"):
        recipes.work(asked(experiment, phase))
    records = sorted((experiment / "out" / "records" / "table").glob("*.json"))
    names = {path.stem for path in records}
    assert names == {
        "base",
        "teacher",
        *(f"{arm}_seed_{seed}" for arm in ("sft", "begun", "after", "control") for seed in (1, 2)),
    }
    written = [path.stat().st_mtime_ns for path in records]
    recipes.work(asked(experiment, "table"))
    assert [path.stat().st_mtime_ns for path in records] == written  # nothing was made twice

    # the arm that goes on from another: its own answers, that other's adapter, and the cost of both
    after, begun = (read_json(path) for path in records if path.stem in ("after_seed_2", "begun_seed_2"))
    rounds = sorted((experiment / "out" / "train" / "after_seed_2" / "rounds").glob("*/round.json"))
    assert after["cost"]["student_tokens_written"] == sum(read_json(path)["sampled_tokens"] for path in rounds) > 0
    run = experiment / "out" / "train" / "after_seed_2"
    weights = experiment / "out" / "train" / "begun_seed_2" / "final_model" / "adapter_model.safetensors"
    assert read_json(run / "kd_config.json")["fingerprint"]["init_from"] == sha256_file(weights)
    assert after["cost"]["steps"] == 4
    trained = read_json(run / "kd_results.json")["train_tokens"] + begun["cost"]["student_tokens_trained"]
    assert after["cost"]["student_tokens_trained"] == trained

    recipes.report(asked(experiment, "report"))
    results = read_json(experiment / "out" / "recipes.json")
    assert results["prompts"] == {"both": 12, "aiops": 6, "maths": 6}
    assert [facts["name"] for facts in results["arms"]] == ["sft", "begun", "after", "control"]
    rows = read_jsonl(experiment / "data" / "eval_dataset.jsonl")
    for facts in [*results["models"], *results["arms"]]:
        for seed, mean in zip(facts["seeds"], facts["accuracy"]["greedy"]["both"]["by_seed"], strict=True):
            name = facts["name"] + (f"_seed_{seed}" if seed else "")
            answers = read_jsonl(experiment / "out" / "answers" / "table" / f"{name}.jsonl")
            said = {a["id"]: a["response"] for a in answers if a["sampling"]["temperature"] == 0}
            assert mean == np.mean([said[row["id"]].strip().endswith(row["reference"]) for row in rows])
    assert "<!-- recipes: differences -->" in (experiment / "out" / "recipes.md").read_text(encoding="utf-8")

    # answers that are not those of the record are refused
    path = experiment / "out" / "answers" / "table" / "sft_seed_1.jsonl"
    kept = path.read_text(encoding="utf-8")
    path.write_text(kept.replace("stop", "length"), encoding="utf-8")
    with pytest.raises(UserError, match=r"sft_seed_1\.jsonl: missing or not as it was written"):
        recipes.report(asked(experiment, "report"))
    path.write_text(kept, encoding="utf-8")

    # an arm that means another thing now is not taken for what was measured
    changed = [Arm("sft", "SFT", {"alpha": 0.0, "learning_rate": 1e-3}, 2)]
    monkeypatch.setitem(recipe_runs.PHASES, "table", changed)
    with pytest.raises(UserError, match=r"sft_seed_1\.json was made with arm = .* move it and .*train/sft_seed_1 away"):
        recipes.work(asked(experiment, "table"))


def test_answers_of_other_weights_are_thrown_away(experiment, tiny_models):
    [job] = recipe_runs.jobs_of("choose", experiment / "out", ["base"])
    first = recipe_runs.answer(job, tiny_models.student, "")
    written = job.answers.stat().st_mtime_ns
    assert recipe_runs.answer(job, tiny_models.student, "") == first
    assert job.answers.stat().st_mtime_ns == written
    assert recipe_runs.answer(job, tiny_models.teacher, "") != first


def test_what_cannot_be_made_is_said(experiment):
    with pytest.raises(
        UserError, match="--only kd: no such arm in table; there are sft, begun, after, control, base, teacher"
    ):
        recipes.work(asked(experiment, "table", "kd"))
    with pytest.raises(UserError, match="after_seed_1 goes on from begun, which is not trained; add it to --only"):
        recipes.work(asked(experiment, "table", "after"))


def test_a_cut_answer_ends_where_it_was_cut(tiny_models):
    tokenizer = load_tokenizer(tiny_models.student)
    given = {"prompt": "What?", "finish_reason": "length"}
    answers = [given | {"id": "a", "response": "so"}, given | {"id": "b", "response": "s\ufffd"}]
    answers += [given | {"id": "c", "response": ""}, given | {"id": "d", "response": "", "finish_reason": "stop"}]
    end = end_of_turn_id(tokenizer)
    found = {row.id: tokenizer.decode(row.response_ids) for row in recipe_runs.encoded(answers, tokenizer)}
    assert found == {"a": "so", "b": "s", "d": tokenizer.decode([end])}


def test_settings_are_chosen_on_validation_rows_and_judged_on_others(experiment):
    profile = read_profile(recipe_runs.PROFILE, recipe_runs.SECTION, KDConfig)
    choosing, table = (recipe_runs.asked_rows(phase, profile) for phase in ("choose", "table"))
    train = {row["id"] for row in read_jsonl(experiment / "data" / "train_dataset.jsonl")}
    assert {row["id"] for row in choosing} == {key for key in train if is_validation(key, 0.2)}
    assert len(table) == 12
    assert not train & {row["id"] for row in table}


def test_reverse_kl_is_that_of_full_logits(tiny_models, clean_rows):
    tokenizer = load_tokenizer(tiny_models.student)
    rows = [encode_row(tokenizer, row, end_of_turn_id(tokenizer)) for row in clean_rows(5)]
    models = [load_model(name, torch.float32) for name in (tiny_models.student, tiny_models.teacher)]
    readers = [model_reader(model, tokenizer.pad_token_id, packing=False).cut(261) for model in models]
    found = recipe_runs.reverse_kl(*readers, rows)
    for row, value in zip(rows, found, strict=True):
        ids = torch.tensor([[*row.prompt_ids, *row.response_ids]])
        with torch.no_grad():
            logs = [model(ids).logits[0, :, :261].double().log_softmax(-1) for model in models]
        log_q, log_p = (log[len(row.prompt_ids) - 1 : -1] for log in logs)
        assert value == pytest.approx((log_q.exp() * (log_q - log_p)).sum().item(), rel=1e-4)


@pytest.mark.parametrize("settings", [
    {"temperature": 1.0, "divergence": "reverse_kl"},
    {"temperature": 2.5, "divergence": "jsd", "teacher_temperature": 0.2, "teacher_top_k": 20, "teacher_top_p": 0.9},
])  # fmt: skip
def test_a_divergence_of_rows_is_the_one_that_a_run_lowers(settings, tiny_models, clean_rows):
    """And its sums are those of the reference loss, row by row."""
    tokenizer = load_tokenizer(tiny_models.student)
    rows = [encode_row(tokenizer, row, end_of_turn_id(tokenizer)) for row in clean_rows(5)]
    models = [load_model(name, torch.float32) for name in (tiny_models.student, tiny_models.teacher)]
    readers = [model_reader(model, tokenizer.pad_token_id, packing=False).cut(261) for model in models]
    states = [recipe_runs.hidden_of(reader, rows) for reader in readers]
    counts = [len(row.response_ids) for row in rows]
    found = recipe_runs.divergences(*readers, *states, counts, KDConfig(**settings))
    for row, value in zip(rows, found, strict=True):
        ids = torch.tensor([[*row.prompt_ids, *row.response_ids]])
        with torch.no_grad():
            logits = [model(ids).logits[0, len(row.prompt_ids) - 1 : -1, :261] for model in models]
        wanted = plain_kd_loss(*logits, torch.tensor(row.response_ids), alpha=1.0, kind=settings["divergence"],
                               **{name: value for name, value in settings.items() if name != "divergence"})  # fmt: skip
        assert value == pytest.approx(wanted.kd.item(), rel=1e-4)


def test_a_change_on_own_text_is_what_is_learnt_and_where_the_text_goes(experiment, monkeypatch, capsys):
    """The two parts add up; nothing is read twice, and what was read is used as it stands."""
    recipes.work(asked(experiment, "table"))
    output, store = experiment / "whose_text.json", experiment / "out" / "whose_text" / "readings.jsonl"
    command = ["whose_text.py", "--recipes", str(experiment / "out"), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", command)
    whose_text.main()
    facts, control = read_json(output)["arms"]
    assert (facts["arm"], facts["begun"], facts["control"], control["arm"]) == ("after", "begun", "control", "control")
    less = facts["after_on_its_text"] - control["after_on_its_text"]
    assert facts["less_control_a_token"]["value"] == pytest.approx(less)
    change = facts["after_on_its_text"] - facts["before_on_its_text"]
    assert facts["change"]["value"] == pytest.approx(change)
    assert facts["learnt"]["value"] + facts["moved"]["value"] == pytest.approx(change)
    assert "after " in capsys.readouterr().out
    # 2 seeds, 7 readings each; cut in the middle of the last line by a kill, the last one is made again alone
    rows = read_jsonl(store)
    assert len(rows) == 14
    before = {(row["student"], row["text"], row["seed"]): sum(row["sums"]) / sum(row["tokens"]) for row in rows}
    wanted = np.mean([before["after", "begun", seed] for seed in (1, 2)])
    assert facts["after_on_befores_text"] == pytest.approx(wanted)
    whole = store.read_bytes()
    store.write_bytes(whole[:-20])
    whose_text.main()
    assert store.read_bytes() == whole
    # a reading that is there is believed
    rows[0]["sums"] = [value + 1 for value in rows[0]["sums"]]
    write_jsonl(store, rows)
    whose_text.main()
    assert read_json(output)["arms"][0]["before_on_its_text"] > facts["before_on_its_text"]
    # of other weights it is not
    write_jsonl(store, [row | {"made_of": row["made_of"] | {"weights": "other"}} for row in rows])
    whose_text.main()
    assert len(read_jsonl(store)) == 28
    # by the ids that were sampled, whatever their text would be cut into
    [path] = store.parent.glob("after_seed_2_*.jsonl")
    drawn = {row["id"]: row for row in read_jsonl(path)}
    [read] = [row for row in rows if (row["student"], row["text"], row["seed"]) == ("begun", "after", 2)]
    counted = dict(zip(read["ids"], read["tokens"], strict=True))
    # a token that only the padding of the logits has sends an answer back to its text
    by_ids = [row_id for row_id in read["ids"] if max(drawn[row_id]["token_ids"], default=0) < 261]
    assert by_ids
    assert [counted[row_id] for row_id in by_ids] == [drawn[row_id]["num_tokens"] for row_id in by_ids]
    monkeypatch.setattr(sys, "argv", [*command, "--only", "sft"])
    with pytest.raises(UserError, match="--only sft: arms go on from begun"):
        whose_text.main()
    monkeypatch.setattr(sys, "argv", command)
    next((experiment / "out" / "records" / "table").glob("after_seed_2.json")).unlink()
    with pytest.raises(UserError, match=r"after_seed_2\.json: not there yet; run `recipes\.py table` first"):
        whose_text.main()


def test_all_that_go_on_from_an_arm_have_one_objective():
    for group in whose_text.groups():
        objectives = [{name: arm.settings.get(name) for name in whose_text.OBJECTIVE} for arm in group.later]
        assert objectives == [objectives[0]] * len(objectives)
        assert {"on_policy_rounds" in arm.settings for arm in group.later} == {True, False}  # a control in each


def record(arm: str, seed: int, right: list[int], own: list[float]) -> dict:
    graded = {"right": [bool(r) for r in right], "tokens": [3] * len(right)}
    graded |= {"repetition": [0.0] * len(right), "truncated": 0}
    return {
        "name": arm,
        "seed": seed,
        "made_of": {"arm": arm, "after": None},
        "graded": dict.fromkeys(recipe_report.CELLS, graded),
        "own": {"ids": [str(i) for i in range(len(own))], "tokens": [2] * len(own), "reverse_kl": own},
        "provenance": {"git_commit": "abc", "git_dirty": False},
    }


def test_differences_are_paired_by_prompt_and_seed_and_corrected():
    prompts = [{"id": str(i), "domain": "ab"[i % 2], "family": str(i // 2)} for i in range(8)]
    generator = np.random.default_rng(0)
    right = generator.integers(0, 2, (3, 3, 8))
    own = generator.random((3, 3, 4))
    records = []
    for arm, name in enumerate(("sft", "kd_T1", "jsd")):
        for seed in (1, 2, 3):
            records.append(record(name, seed, right[arm, seed - 1].tolist(), own[arm, seed - 1].tolist()))
    phase = Phase(prompts, records[::-1])  # in no order
    results = recipe_report.make_results(Phase(prompts, []), phase)
    found = {d["arm"]: d for d in results["differences"] if d["against"] == "sft"}
    assert [(d["arm"], d["against"], d["differ"]) for d in results["differences"]] == [
        ("kd_T1", "sft", "recipe"), ("jsd", "sft", "recipe"), ("jsd", "kd_T1", "divergence"),
    ]  # fmt: skip
    assert results["tests"] == {"accuracy": 6, "own_reverse_kl": 3, "own_reverse_kl_a_token": 3}
    families = [prompt["family"] for prompt in prompts]
    gaps = (right[1] - right[0]).astype(float)
    compared = ((1, 0), (2, 0), (2, 1))  # all pairs are one family of tests, here alike greedily and at T = 0.7
    p_values = [crossed((right[a] - right[b]).astype(float), families).p for a, b in compared for _ in range(2)]
    holms = holm(p_values)
    wanted = asdict(crossed(gaps, families)) | {"corrected_p": holms[0]}
    assert found["kd_T1"]["accuracy"]["greedy"]["both"] == wanted
    assert found["kd_T1"]["accuracy"]["T=0.7"]["a"] == asdict(crossed(gaps[:, ::2], families[::2]))
    own_p = holm([crossed(own[a] - own[b], families[:4]).p for a, b in compared])
    wanted = asdict(crossed(own[2] - own[0], families[:4])) | {"corrected_p": own_p[1]}
    assert found["jsd"]["own_reverse_kl"] == wanted
    assert ("sft", "kd_T1") not in {(d["arm"], d["against"]) for d in results["differences"]}  # one verdict a pair
    assert json.loads(json.dumps(results)) == results


def test_a_kl_a_token_is_compared_as_a_ratio():
    """Its mean is the ratio of sums; its spread that of the ratio when the sample is drawn again."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(1, 60, (2, 4000)).astype(float)
    sums = tokens * generator.gamma(2.0, 0.4, (2, 4000))
    values = recipe_report.linearised(sums, tokens)
    assert np.allclose(values.mean(1), sums.sum(1) / tokens.sum(1))
    drawn = generator.integers(0, 4000, (2000, 4000))
    ratios = sums[0][drawn].sum(1) / tokens[0][drawn].sum(1)
    assert abs(ratios.std() / (values[0].std() / np.sqrt(4000)) - 1) < 0.06  # two standard errors of a spread of 2,000
    # a mean of the answers' own ratios has another value
    prompts = [{"id": str(i), "domain": "a", "family": str(i)} for i in range(2)]
    short, long = ({"own": {"ids": ["0", "1"], "tokens": t, "reverse_kl": [4.0, 4.0]}} for t in ([1, 1], [1, 3]))
    found = recipe_report.own_differences([short] * 2, [long] * 2, Phase(prompts, []))
    assert found["own_reverse_kl"]["value"] == 0
    assert found["own_reverse_kl_a_token"]["value"] == 4 - 2


def test_an_arm_that_lacks_a_seed_is_left_out_and_named():
    prompts = [{"id": "0", "domain": "a", "family": "0"}, {"id": "1", "domain": "a", "family": "1"}]
    records = [record("sft", seed, [1, 0], [0.1, 0.2]) for seed in (1, 2, 3)]
    records += [record("kd_T1", seed, [1, 1], [0.1, 0.2]) for seed in (1, 2)]
    results = recipe_report.make_results(Phase(prompts, []), Phase(prompts, records))
    assert [facts["name"] for facts in results["arms"]] == ["sft"]
    assert "kd_T1" in results["unfinished"]
    assert "left out: kd_T2.5, kd_T1," in recipe_report.what_was_asked(results)[0]
    with pytest.raises(UserError, match="no arm has a record of every seed"):
        recipe_report.make_results(Phase(prompts, []), Phase(prompts, records[3:]))


def test_what_holds_is_bold():
    found = {"value": 0.042, "low": 0.01, "high": 0.074, "corrected_p": 0.03}
    assert recipe_report.signed(found, 100, 1) == "**+4.2** (1.0 to 7.4)"
    assert recipe_report.signed(found | {"corrected_p": 0.06}, 100, 1) == "+4.2 (1.0 to 7.4)"
    assert recipe_report.signed(found | {"low": None}, 100, 1) == "**+4.2**"


RESULTS = ROOT / "benchmarks" / "results" / "recipes.json"


@pytest.mark.parametrize("page", ["docs/recipes.md", "README.md", "README.zh-CN.md"])
def test_a_page_that_quotes_the_results_says_what_they_say(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    words = recipe_report.CHINESE if "zh-CN" in page else {}
    assert recipe_report.brought_up_to_date(text, read_json(RESULTS), words) == text
    quoted = [name for name in recipe_report.TABLES if f"<!-- recipes: {name} -->" in text]
    assert quoted == (["summary"] if "README" in page else [name for name in recipe_report.TABLES if name != "summary"])


def test_the_results_are_those_of_the_arms_that_there_are():
    results = read_json(RESULTS)
    arms = {arm.name: json.loads(json.dumps(asdict(arm))) for arm in ARMS}
    measured = {facts["name"]: facts["made_of"]["arm"] for facts in results["arms"]}
    assert measured.items() <= arms.items()
    assert results["unfinished"] == [name for name in arms if name not in measured]
    candidates = {facts["name"]: facts["settings"] for facts in results["candidates"]}
    assert candidates == {arm.about: json.loads(json.dumps(arm.settings)) for arm in CANDIDATES}


def test_tables_between_marks_are_brought_up_to_date():
    prompts = [{"id": str(i), "domain": "ab"[i % 2], "family": str(i)} for i in range(4)]
    records = [record(name, seed, [1, 0, 1, 0], [0.1, 0.2]) for name in ("sft", "kd_T1") for seed in (1, 2, 3)]
    results = recipe_report.make_results(Phase(prompts, []), Phase(prompts, records))
    page = "Before.\n<!-- recipes: asked -->\nold\n<!-- /recipes: asked -->\nbehind recipe"
    new = recipe_report.brought_up_to_date(page, results, {"training seeds": "Startwerte"})
    line = "4 prompts (2 of a, 2 of b) in 4 families; Startwerte 1, 2, 3."
    assert new.startswith(f"Before.\n<!-- recipes: asked -->\n\n{line}")
    assert new.endswith("<!-- /recipes: asked -->\nbehind recipe")
    assert recipe_report.brought_up_to_date(new, results, {"training seeds": "Startwerte"}) == new
    [_, _, sft, kd] = recipe_report.summary_table(results)
    assert sft.startswith("| SFT (alpha = 0) | 50.0 % | 50.0 % |  |  |")
    assert "| +0.0 (0.0 to 0.0) |" in kd


def test_what_the_pages_say_of_the_results_is_so():
    """The sentences of docs/recipes.md, README.md and learn.md on the comparison, one assertion each."""
    results = read_json(RESULTS)
    arms = {facts["name"]: facts for facts in results["arms"]}
    differences = {(each["arm"], each["against"]): each for each in results["differences"]}

    def points(arm: str, against: str) -> list[dict]:
        """Greedy, T = 0.7."""
        return [differences[arm, against]["accuracy"][cell]["both"] for cell in recipe_report.CELLS]

    def shows_nothing(test: dict) -> bool:
        return test["low"] < 0 < test["high"]

    def holds(test: dict) -> bool:
        return test["corrected_p"] <= recipe_report.ALPHA

    right = {name: facts["accuracy"]["greedy"]["both"]["mean"] for name, facts in arms.items()}
    kl = {name: facts["heldout"]["kl_to_teacher"] for name, facts in arms.items()}
    a_token = {name: facts["own_samples"]["reverse_kl_a_token"] for name, facts in arms.items()}
    tokens = {name: facts["own_samples"]["tokens"] for name, facts in arms.items()}

    # nobody beats SFT
    for arm, against in differences:
        if against == "sft":
            assert all(test["value"] < 0 or not holds(test) for test in points(arm, against))
    # the target: 8 points either way, without 0, not after correction; as sampled is as SFT, whatever alpha is
    for test in points("kd_sampled_alpha0.8", "kd_T1"):
        assert 7.9 < 100 * test["value"] < 8.5
        assert test["low"] > 0
        assert not holds(test)
    for pair in (("kd_sampled", "sft"), ("kd_sampled_alpha0.8", "sft"), ("kd_sampled", "kd_sampled_alpha0.8")):
        assert all(map(shows_nothing, points(*pair)))
    assert abs(kl["kd_sampled"] / kl["sft"] - 1) < 0.05
    # T = 2.5
    greedy, sampled = points("kd_T2.5", "sft")
    assert shows_nothing(greedy)
    assert sampled["high"] < 0
    assert not holds(sampled)
    assert 0.5 < kl["kd_T2.5"] / kl["sft"] < 0.6
    # JSD and reverse KL: three quarters and two thirds
    for arm, share in (("jsd", 3 / 4), ("reverse_kl", 2 / 3)):
        assert all(map(shows_nothing, points(arm, "sft")))
        assert abs(kl[arm] / kl["sft"] - share) < 0.04
    # on-policy by the reverse KL, beside its control
    assert [round(a_token[name], 2) for name in ("soft_begun", "on_policy_soft", "soft_after")] == [0.91, 0.66, 0.95]
    fall = differences["on_policy_soft", "soft_after"]["own_reverse_kl_a_token"]
    assert holds(fall)
    assert 0.27 < -fall["value"] / a_token["soft_after"] < 0.33
    assert holds(differences["on_policy_soft", "kd_T1"]["own_reverse_kl_a_token"])
    greedy, sampled = points("on_policy_soft", "soft_after")
    assert [round(-100 * test["value"]) for test in (greedy, sampled)] == [22, 18]
    assert holds(greedy)
    assert shows_nothing(differences["on_policy_soft", "soft_after"]["own_reverse_kl"])
    assert 1.35 < tokens["on_policy_soft"] / tokens["soft_begun"] < 1.45
    teacher = next(facts for facts in results["models"] if facts["name"] == "teacher")["own_samples"]["tokens"]
    learned = arms["sft"]["cost"]["teacher_tokens_written"] / (STEPS * 8)  # a row: steps of 8
    assert 1.8 < teacher / learned < 2.2
    # on-policy by JSD: the more of its own, the fewer right
    assert right["on_policy_after"] < right["on_policy_mixed"] < right["kd_after"]
    greedy, _ = points("on_policy_after", "kd_after")
    assert round(-100 * greedy["value"]) == 9
    assert greedy["high"] < 0
    assert not holds(greedy)
    greedy, sampled = points("on_policy_mixed", "kd_after")
    assert round(-100 * greedy["value"]) == 5
    assert shows_nothing(greedy)
    assert shows_nothing(sampled)
    # from scratch; on its own answers alone in loops, and at the lowest reverse KL a token
    facts = arms["on_policy_all"]
    assert right["on_policy_all"] == facts["accuracy"]["T=0.7"]["both"]["mean"] == 0
    assert facts["tokens"] == {cell: pytest.approx(128) for cell in recipe_report.CELLS}
    assert 0.81 < facts["repetition"]["T=0.7"] < 0.85
    assert min(a_token, key=a_token.get) == "on_policy_all"
    greedy, _ = points("on_policy_half", "kd_sampled_alpha0.8")
    assert round(-100 * greedy["value"]) == 9
    assert greedy["high"] < 0
    assert not holds(greedy)
    loops = next(facts for facts in results["candidates"] if facts["name"] == "reverse_kl_sampled")
    assert loops["mean_accuracy"] == 0


def test_the_embedded_profile_has_the_winner():
    profile = read_merged(ROOT / "configs" / "embedded.yaml")
    training, answers = profile["run_improved_kd"], profile["generate_sft_data"]
    winner = next(arm for arm in ARMS if arm.name == "kd_sampled")
    assert {name: training[name] for name in winner.settings} == winner.settings
    for name in ("temperature", "top_k", "top_p"):  # and its target is what its answers are drawn from
        assert training[f"teacher_{name}"] == answers[name]
