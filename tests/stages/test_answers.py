"""From prompts to answers, clean rows and a run; what each stage leaves and refuses."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import yaml

from src.data.cleaning import REASONS
from src.distillation.base import model_fingerprint
from src.distillation.server import answers as answers_at
from src.utils.common import ROOT, UserError, read_json, read_jsonl, write_json, write_jsonl
from tests.distillation.test_openai_engine import Body, FaultServer, completion
from tests.distillation.test_server import alive
from tests.reading import as_set, content
from tests.stub_server import starts, write_stub

ANSWER_FIELDS = {
    "id", "sample_index", "prompt", "response", "finish_reason", "num_tokens", "engine", "sampling", "seed",
}  # fmt: skip
CLEAN_FIELDS = {"id", "sample_index", "source", "domain", "messages", "verified"}


def test_stages_2_and_3_leave_the_promised_artifacts(answered, succeeds, tmp_path, teacher_that_ends):
    path, sft = answered
    prompts = {split: read_jsonl(tmp_path / "data" / f"{split}_dataset.jsonl") for split in ("train", "eval")}
    raw = {split: read_jsonl(sft / f"sft_{split}_data.jsonl") for split in prompts}
    for split, answers in raw.items():
        assert {row["id"] for row in answers} == {row["id"] for row in prompts[split]}
        for row in answers:
            assert row.keys() == ANSWER_FIELDS
            assert row["finish_reason"] in ("stop", "length")
            assert row["sampling"] == {"temperature": 1.0, "top_p": 1.0, "top_k": 20, "max_new_tokens": 32}
        facts = read_json(sft / f"generate_{split}.json")
        assert facts["finished"] is True
        assert facts["answers"] == len(answers) == sum(facts["finish_reasons"].values())
        assert facts["tokens"] == sum(row["num_tokens"] for row in answers)
    raw_bytes = {split: (sft / f"sft_{split}_data.jsonl").read_bytes() for split in raw}

    succeeds("fix_sft_data", "--config", path)
    stats, rejected = read_json(sft / "stats.json"), read_jsonl(sft / "rejected.jsonl")
    assert stats["select"] == "all"
    assert stats["sandbox_level"] in ("namespaces", "none")
    assert stats["train"]["by_reason"]["truncated"] > 0
    for split, answers in raw.items():
        kept = read_jsonl(sft / f"sft_{split}_data_clean.jsonl")
        dropped = [row for row in rejected if row["split"] == split]
        assert len(answers) == len(kept) + len(dropped)
        assert (stats[split]["answers"], stats[split]["kept"]) == (len(answers), len(kept))
        assert stats[split]["by_reason"] == {r: [row["reason"] for row in dropped].count(r) for r in REASONS}
        assert sum(one["answers"] for one in stats[split]["by_source"].values()) == len(answers)
        keys = [{(row["id"], row["sample_index"]) for row in part} for part in (answers, kept, dropped)]
        assert keys[0] == keys[1] | keys[2]
        assert not keys[1] & keys[2]
        for row in kept:
            assert row.keys() == CLEAN_FIELDS
            assert [message["role"] for message in row["messages"]][-2:] == ["user", "assistant"]
            assert row["verified"] in (True, False, None)
        assert (sft / f"sft_{split}_data.jsonl").read_bytes() == raw_bytes[split]
    assert all({"id", "sample_index", "reason"} <= row.keys() for row in rejected)

    printed = succeeds("cache_teacher", "--config", path, "--signal", "topk", "--max_length", "1500", "--bf16", "false")
    assert re.search(r"outside its top 64: [\d.]+% at T = 1.0, .*[\d.]+% at T = 4.0", printed)
    assert "nothing to do" in succeeds(
        "cache_teacher", "--config", path, "--signal", "topk", "--max_length", "1500", "--bf16", "false"
    )
    printed = succeeds("cache_teacher", "--config", path, "--max_length", "1500", "--bf16", "false", "--overwrite")
    assert re.search(r"teacher_cache: \d+ rows, [\d,]+ response tokens, \d+ bytes each, [\d,]+ tokens/s", printed)
    printed = succeeds("run_improved_kd", "--config", path, "--teacher_signal", "hidden")
    [folder] = (tmp_path / "experiment").glob("gpu_optimized_kd_*")
    assert f"kd: run folder {folder}" in printed
    config, results = read_json(folder / "kd_config.json"), read_json(folder / "kd_results.json")
    assert (config["experiment"], config["arm"]) == ("tiny", "kd")
    assert (config["batch_size"], config["max_steps"], config["temperature"]) == (2, 2, 2.0)
    assert config["teacher_model_name_or_path"] == teacher_that_ends
    assert config["provenance"]["command"].startswith("scripts/run_improved_kd.py --config")
    metrics = [row for row in read_jsonl(folder / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in metrics] == [1, 2]
    measures = {"kd_loss", "ce_loss", "lr", "grad_norm", "tokens_per_second", "peak_memory_mb"}
    assert all(measures <= row.keys() for row in metrics)
    assert {"before", "after", "teacher", "gap_recovered", "trainable_parameters", "train_seconds"} <= results.keys()
    assert (folder / "final_model" / "adapter_model.safetensors").is_file()
    assert not list(sft.glob(".*"))


def test_finished_stages_do_nothing_again(answered, succeeds, scripts, monkeypatch):
    path, sft = answered
    succeeds("fix_sft_data", "--config", path)
    before = content(sft)
    monkeypatch.setattr(scripts["generate_sft_data"], "opened", lambda *_: pytest.fail("generated again"))
    assert "is complete; nothing to do" in succeeds("generate_sft_data", "--config", path)
    assert "is clean already; nothing to do" in succeeds("fix_sft_data", "--config", path)
    assert content(sft) == before


def test_a_killed_generation_goes_on_to_the_same_answers(answered, succeeds):
    path, sft = answered
    target, marker = sft / "sft_train_data.jsonl", sft / "generate_train.json"
    whole, raw = as_set(target), target.read_bytes()
    lines = raw.splitlines(keepends=True)
    cut = b"".join(lines[:5]) + lines[5][: len(lines[5]) // 2]
    target.write_bytes(cut)
    marker.write_text(json.dumps(read_json(marker) | {"finished": False}))
    printed = succeeds("generate_sft_data", "--config", path)
    assert "cut a torn last line" in printed
    assert "5 of 18 answers are there, going on" in printed
    assert as_set(target) == whole
    assert target.read_bytes().startswith(b"".join(lines[:5])), "what was there is only appended to"
    assert read_json(marker)["finished"] is True


def refuse(*_: object, **__: object) -> None:
    raise UserError("refused")


@pytest.mark.parametrize("step", ["require_disk", "check_student", "started", "opened", None])
def test_old_answers_stay_until_there_is_a_new_one(answered, fails, scripts, monkeypatch, step):
    """Whatever refuses after --overwrite: the disk, the student, the server, the teacher; or a server that is gone."""
    path, sft = answered
    before = content(sft)
    arguments = ["--config", path, "--temperature", "0.5", "--overwrite"]
    if step is None:
        pytest.importorskip("openai")
        arguments += ["--engine", "openai", "--base_url", "http://127.0.0.1:9/v1", "--tries", "1"]
    else:
        monkeypatch.setattr(scripts["generate_sft_data"], step, refuse)
    line = fails("generate_sft_data", *arguments)
    assert ("in 1 tries" if step is None else "refused") in line
    assert content(sft) == before


def test_answers_that_lack_their_summary_alone_get_it_without_a_teacher(answered, succeeds, scripts, monkeypatch):
    path, sft = answered
    marker, before = sft / "generate_train.json", content(sft)
    whole = read_json(marker)
    write_json(marker, {"finished": False, "fingerprint": whole["fingerprint"]})
    monkeypatch.setattr(scripts["generate_sft_data"], "opened", lambda *_: pytest.fail("a model was loaded"))
    assert "train: 18 answers in" in succeeds("generate_sft_data", "--config", path)
    made = read_json(marker)
    assert made["last_session"] == {"seconds": 0.0, "tokens": 0, "tokens_per_second": None}
    for facts in (whole, made):
        del facts["last_session"], facts["provenance"]
    assert made == whole
    assert {n: d for n, d in content(sft).items() if n != marker.name} == {
        n: d for n, d in before.items() if n != marker.name
    }


def test_the_disk_is_asked_for_the_missing_answers_alone(answered, succeeds, scripts, monkeypatch):
    path, sft = answered
    target, marker, asked = sft / "sft_train_data.jsonl", sft / "generate_train.json", []
    target.write_bytes(b"".join(target.read_bytes().splitlines(keepends=True)[:5]))
    write_json(marker, {"finished": False, "fingerprint": read_json(marker)["fingerprint"]})
    monkeypatch.setattr(scripts["generate_sft_data"], "require_disk", lambda folder, needed, what: asked.append(needed))
    succeeds("generate_sft_data", "--config", path)
    assert asked == [(18 - 5) * (4 * 32 + 2000)]


def test_a_deleted_answers_file_is_made_again(answered, succeeds):
    path, sft = answered
    whole = as_set(sft / "sft_eval_data.jsonl")
    (sft / "sft_eval_data.jsonl").unlink()
    succeeds("generate_sft_data", "--config", path)
    assert as_set(sft / "sft_eval_data.jsonl") == whole


@pytest.mark.parametrize(("arguments", "words"), [
    (["--temperature", "0.5"], "was made with sampling = {'temperature': 1.0"),
    (["--num_samples", "2"], "was made with num_samples = 1, this run has 2"),
    (["--batch_size", "4"], "was made with batch_size = 8, this run has 4"),
])  # fmt: skip
def test_answers_of_another_run_are_refused_by_the_field(answered, fails, arguments, words):
    path, sft = answered
    before = content(sft)
    line = fails("generate_sft_data", "--config", path, *arguments)
    assert words in line
    assert str(sft) in line
    assert content(sft) == before


def test_clean_rows_of_another_run_are_refused_by_the_field(answered, succeeds, fails):
    path, sft = answered
    succeeds("fix_sft_data", "--config", path)
    before = content(sft)
    assert "was made with select = 'all', this run has 'first_correct'" in fails(
        "fix_sft_data", "--config", path, "--select", "first_correct"
    )
    with (sft / "sft_train_data.jsonl").open("a") as file:
        file.write(json.dumps({"id": "x", "sample_index": 0, "response": "", "finish_reason": "stop"}) + "\n")
    assert "was made with sft_train_data.jsonl = " in fails("fix_sft_data", "--config", path)
    assert {name: text for name, text in content(sft).items() if name != "sft_train_data.jsonl"} == {
        name: text for name, text in before.items() if name != "sft_train_data.jsonl"
    }
    succeeds("fix_sft_data", "--config", path, "--overwrite")
    assert read_json(sft / "stats.json")["train"]["by_reason"]["unknown_id"] == 1


def test_a_ready_made_answers_file_is_used_as_it_is(succeeds, profile, tmp_path, scripts, monkeypatch):
    """No marker beside it: a person brought it. It is never changed, not even its last line without a newline."""
    path = profile()
    succeeds("download_datasets", "--config", path)
    sft = tmp_path / "experiment" / "tiny" / "sft"
    sft.mkdir(parents=True)
    for split in ("train", "eval"):
        rows = read_jsonl(tmp_path / "data" / f"{split}_dataset.jsonl")
        made = [
            {"id": row["id"], "sample_index": 0, "response": f"{row['id']} #### 1", "finish_reason": "stop"}
            for row in rows
        ]
        (sft / f"sft_{split}_data.jsonl").write_text("\n".join(map(json.dumps, made)))
    before = content(sft)
    monkeypatch.setattr(scripts["generate_sft_data"], "opened", lambda *_: pytest.fail("generated"))
    printed = succeeds("generate_sft_data", "--config", path)
    assert "18 answers brought ready-made; used as they are" in printed
    assert content(sft) == before
    succeeds("fix_sft_data", "--config", path)
    assert {name: content(sft)[name] for name in before} == before
    assert read_json(sft / "stats.json")["train"]["kept"] == 18


def test_ready_made_clean_rows_are_used_as_they_are(succeeds, profile, tmp_path, write_sft, clean_rows):
    sft = write_sft(tmp_path / "experiment" / "tiny", clean_rows(20), clean_rows(4, start=50)) / "sft"
    before = content(sft)
    path = profile()
    assert "clean rows brought ready-made" in succeeds("fix_sft_data", "--config", path)
    assert content(sft) == before
    assert "kd: run folder" in succeeds("run_improved_kd", "--config", path)


@pytest.mark.parametrize("stage", ["generate_sft_data", "fix_sft_data"])
@pytest.mark.parametrize(("brought", "lacking"), [("train", "eval"), ("eval", "train")])
def test_one_clean_file_alone_is_refused_by_both_stages(fails, profile, tmp_path, write_sft, clean_rows, stage,
                                                        brought, lacking):  # fmt: skip
    sft = write_sft(tmp_path / "experiment" / "tiny", clean_rows(20), clean_rows(4, start=50)) / "sft"
    (sft / f"sft_{lacking}_data_clean.jsonl").unlink()
    line = fails(stage, "--config", profile(), *(["--splits", brought] if stage == "generate_sft_data" else []))
    assert f"sft_{lacking}_data_clean.jsonl: no such file, but the other clean file was brought" in line
    assert "both are wanted: bring this one too, or move the other away" in line


def test_clean_rows_that_others_would_judge_otherwise_stay_with_a_word(answered, succeeds, scripts, monkeypatch):
    path, sft = answered
    fix = scripts["fix_sft_data"]
    shut = SimpleNamespace(executes=False, used_level="none", level="none")
    monkeypatch.setattr(fix, "open_sandbox", lambda *_: shut)
    succeeds("fix_sft_data", "--config", path)
    before = content(sft)
    said = succeeds("fix_sft_data", "--config", path)
    assert "--overwrite" not in said
    monkeypatch.setattr(fix, "open_sandbox", lambda *_: SimpleNamespace(executes=True))
    assert "code answers were not executed, which this host can do; --overwrite" in succeeds(
        "fix_sft_data", "--config", path
    )
    monkeypatch.setattr(fix, "graders_sha256", lambda: "mended")
    assert "were judged by other graders than there are now; --overwrite" in succeeds("fix_sft_data", "--config", path)
    assert content(sft) == before


def test_clean_rows_stay_until_nothing_is_left_to_refuse(answered, succeeds, fails):
    path, sft = answered
    succeeds("fix_sft_data", "--config", path)
    target = sft / "sft_eval_data.jsonl"
    write_jsonl(target, [row | {"finish_reason": "length"} for row in read_jsonl(target)])
    before = content(sft)
    assert "answers are kept, 1 are needed" in fails("fix_sft_data", "--config", path, "--overwrite")
    assert content(sft) == before


def test_a_broken_line_of_answers_is_named(answered, fails):
    path, sft = answered
    target = sft / "sft_train_data.jsonl"
    lines = target.read_text().splitlines(keepends=True)
    target.write_text("".join([*lines[:2], lines[2][:40] + "\n", *lines[3:]]))
    assert f"{target}:3: not valid JSON" in fails("fix_sft_data", "--config", path)
    target.write_text("".join([lines[0], '{"id": "x"}\n']))
    assert f"{target}:2: missing sample_index, response, finish_reason; found id" in fails(
        "fix_sft_data", "--config", path
    )


@pytest.mark.parametrize("name", ["generate_sft_data", "fix_sft_data"])
def test_an_id_that_stands_twice_is_named_with_both_lines(answered, fails, tmp_path, name):
    """Uninterrupted such a row would be answered twice, gone on with once."""
    path, sft = answered
    data = tmp_path / "data" / "train_dataset.jsonl"
    rows = read_jsonl(data)
    write_jsonl(data, [*rows, rows[2] | {"prompt": "Why?", "instruction": ""}])
    before = content(sft)
    line = fails(name, "--config", path)
    assert f"{data}:{len(rows) + 1}: id {rows[2]['id']} stands in line 3 too; give each row its own, or delete" in line
    assert content(sft) == before


def test_each_stage_names_the_one_before_it(fails, succeeds, profile):
    path = profile()
    assert "train_dataset.jsonl: no such file; run scripts/download_datasets.py" in fails(
        "generate_sft_data", "--config", path
    )
    assert "no such file; run scripts/download_datasets.py" in fails("fix_sft_data", "--config", path)
    succeeds("download_datasets", "--config", path)
    assert "no such file; run scripts/generate_sft_data.py" in fails("fix_sft_data", "--config", path)
    assert "no such file; run scripts/fix_sft_data.py" in fails("run_improved_kd", "--config", path)


def test_no_answer_left_says_what_to_try(answered, fails):
    path, sft = answered
    target = sft / "sft_train_data.jsonl"
    write_jsonl(target, [row | {"finish_reason": "length"} for row in read_jsonl(target)])
    line = fails("fix_sft_data", "--config", path)
    assert "0 of 18 answers are kept" in line
    assert "truncated 18" in line
    assert "max_new_tokens" in line


@pytest.mark.parametrize(("arguments", "words"), [
    (["--teacher_model", ""], "teacher_model_name_or_path is not set"),
    (["--num_samples", "0"], "num_samples must be at least 1"),
    (["--splits"], "splits: none named; name train, eval or both"),
    (["--splits", "train", "test"], "splits: train, test; name train, eval or both"),
    (["--batch_size", "-1"], "batch_size at least 0"),
    (["--engine", "sglang"], "engine 'sglang': there are transformers and openai"),
    (["--engine", "vllm"], "engine vllm is a server now, which the stage starts: say serve: {command: vllm}"),
    (["--vllm_arguments", "{}"], "unknown flag --vllm_arguments; say serve: {command: vllm, arguments: {...}}"),
    (["--server_command", "vllm serve x"], "unknown flag --server_command; say serve: {command: ...}"),
    (["--serve", "vllm"], "serve must be a mapping such as {command: vllm}"),
    (["--serve", '{"command": "vllm"}', "--engine", "transformers"], "--serve '' leaves the profile's server out"),
    (["--serve", '{"command": "vllm"}', "--served_model_name", "x"], "served_model_name is for a server that runs"),
    (["--serve", '{"command": "run {base}"}'], "names {base}, which only the evaluation has"),
    (["--engine", "openai", "--teacher_model", ""], "teacher_model_name_or_path is not set"),
    (["--top_p", "0"], "top_p must be above 0"),
    (["--temp", "1"], "unknown flag --temp"),
])  # fmt: skip
def test_wrong_settings_of_generation(fails, profile, arguments, words):
    assert words in fails("generate_sft_data", "--config", profile(), *arguments)


def test_a_student_that_ends_a_turn_otherwise_is_refused_before_generation(
    fails, succeeds, profile, tmp_path, scripts, monkeypatch, make_model, make_tokenizer, save_model
):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|endoftext|>")
    student = save_model(tmp_path / "student", make_model(), tokenizer)
    path = profile()
    succeeds("download_datasets", "--config", path)
    monkeypatch.setattr(scripts["generate_sft_data"], "opened", lambda *_: pytest.fail("generated"))
    line = fails("generate_sft_data", "--config", path, "--model_name_or_path", student)
    assert "the student ends a turn with <|endoftext|>, the teacher with <|im_end|>" in line


@pytest.mark.parametrize(("select", "chosen"), [("all", [0, 1, 2]), ("first_correct", [1]), ("shortest_correct", [2])])
def test_best_of_n_goes_through_and_the_counts_add_up(succeeds, profile, tmp_path, select, chosen):
    path = profile(domains=["maths"], domain_train_rows=[6], domain_eval_rows=[3])
    succeeds("download_datasets", "--config", path)
    succeeds("generate_sft_data", "--config", path, "--num_samples", "3")
    sft = tmp_path / "experiment" / "tiny" / "sft"
    for split in ("train", "eval"):
        gold = {row["id"]: row["reference"] for row in read_jsonl(tmp_path / "data" / f"{split}_dataset.jsonl")}
        answers = read_jsonl(sft / f"sft_{split}_data.jsonl")
        assert sorted(row["sample_index"] for row in answers) == sorted([0, 1, 2] * len(gold))
        texts = ("#### 123456789", "It is clear: #### {}", "#### {}")
        write_jsonl(sft / f"sft_{split}_data.jsonl", [
            row | {"response": texts[row["sample_index"]].format(gold[row["id"]]), "finish_reason": "stop"}
            for row in answers
        ])  # fmt: skip
    succeeds("fix_sft_data", "--config", path, "--select", select)
    [stats] = read_json(sft / "stats.json")["train"]["by_source"].values()
    assert (stats["answers"], stats["prompts"], stats["prompts_kept"], stats["kept"]) == (18, 6, 6, 6 * len(chosen))
    assert stats["acceptance_rate"] == 12 / 18
    assert stats["answers"] == stats["kept"] + sum(stats["rejected"].values())
    kept = read_jsonl(sft / "sft_train_data_clean.jsonl")
    assert sorted(row["sample_index"] for row in kept) == sorted(chosen * 6)
    assert {row["verified"] for row in kept} == ({True, False} if select == "all" else {True})


def test_own_prompts_go_through_every_stage(succeeds, profile, tmp_path):
    mine, held = tmp_path / "mine.jsonl", tmp_path / "held.csv"
    write_jsonl(
        mine,
        [
            {"question": f"How many legs have {i} horses and {i} hens?", "gold": str(6 * i), "by": "numeric"}
            for i in range(3)
        ]
        + [{"question": f"Tell me about the colour {name}.\n\nBriefly."} for name in ("red", "blue", "green", "grey")],
    )
    held.write_text("question\nTell me about the shape of a cube.\nTell me about the shape of a cube.\n")
    settings = {"prompts_file": str(mine), "prompts_eval_file": str(held), "prompt_column": "question",
                "reference_column": "gold", "grader_column": "by", "prompts_domain": "zoo"}  # fmt: skip
    path = profile(**settings)
    assert "7 training and 1 evaluation rows" in succeeds("download_datasets", "--config", path)
    entries = read_json(tmp_path / "data" / "manifest.json")["sources"]
    assert [(e["source"], e["split"], e["rows"], e["licence"]) for e in entries] == [
        ("mine", "train", 7, "not stated"), ("mine", "eval", 1, "not stated"),
    ]  # fmt: skip
    succeeds("generate_sft_data", "--config", path, "--max_new_tokens", "128")
    succeeds("fix_sft_data", "--config", path)
    kept = read_jsonl(tmp_path / "experiment" / "tiny" / "sft" / "sft_train_data_clean.jsonl")
    verdicts = {row["verified"] for row in kept if row["messages"][0]["content"].startswith("Tell")}
    assert verdicts == {None}
    stats = read_json(tmp_path / "experiment" / "tiny" / "sft" / "stats.json")["train"]["by_source"]["mine"]
    assert stats["unverifiable"] > 0


@pytest.mark.parametrize(("settings", "words"), [
    ({"prompt_column": "text"}, "mine.jsonl:1: no column text or messages; found prompt"),
    ({"prompts_eval_fraction": 0.0}, "4 rows to train and 0 to evaluate on at prompts_eval_fraction = 0.0"),
    ({"prompts_eval_file": "SAME"}, "are one row, in training and evaluation"),
])  # fmt: skip
def test_wrong_own_prompts(fails, profile, tmp_path, settings, words):
    mine, copy = tmp_path / "mine.jsonl", tmp_path / "copy.jsonl"
    for path in (mine, copy):
        write_jsonl(path, [{"prompt": f"What is the colour of a {name}?"} for name in ("cat", "dog", "hen", "cow")])
    settings = {name: str(copy) if value == "SAME" else value for name, value in settings.items()}
    assert words in fails("download_datasets", "--config", profile(**{"prompts_file": str(mine)} | settings))


@pytest.mark.parametrize("change", [{"response": None}, {"response": ["x"]}, {"id": ["x"]}], ids=str)
def test_an_answer_of_the_wrong_type_is_named(answered, fails, change):
    path, sft = answered
    target = sft / "sft_train_data.jsonl"
    rows = read_jsonl(target)
    write_jsonl(target, [rows[0], rows[1] | change, *rows[2:]])
    assert f"{target}:2: " in fails("fix_sft_data", "--config", path)


@pytest.fixture
def ask_server(succeeds, profile):
    """`ask_server(faults)`: a FaultServer, and the arguments with which stage 2 asks it the profile's prompts."""
    pytest.importorskip("openai")
    servers = []

    def start(faults):
        path = profile(domains=["maths"], domain_train_rows=[9], domain_eval_rows=[3])
        succeeds("download_datasets", "--config", path)
        servers.append(FaultServer(faults))
        return servers[-1], ["--config", path, "--engine", "openai", "--base_url", servers[-1].url]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_prompt_that_the_server_refuses_is_recorded_and_passed_over(ask_server, succeeds, fails, tmp_path):
    refused = []

    def faults(prompt, number):
        if not refused:
            refused.append(prompt)
        return Body({"error": {"message": "Your question is not allowed."}}, 400) if prompt in refused else None

    server, arguments = ask_server(faults)
    line = fails("generate_sft_data", *arguments, "--max_refused", "0", "--concurrency", "1")
    assert "Your question is not allowed.; 1 of 9 answers refused, max_refused 0 allows 0" in line
    assert "1 of them refused by the server" in succeeds("generate_sft_data", *arguments)
    sft = tmp_path / "experiment" / "tiny" / "sft"
    rows = read_jsonl(sft / "sft_train_data.jsonl")
    assert len(rows) == 9
    [one] = [row for row in rows if row["finish_reason"] == "refused"]
    assert (one["prompt"], one["response"]) == (refused[0], "")
    assert one["refusal"] == "Error code: 400 - Your question is not allowed."
    marker = sft / "generate_train.json"
    assert read_json(marker)["finish_reasons"] == {"stop": 8, "refused": 1}

    marker.write_text(json.dumps(read_json(marker) | {"finished": False}))
    asked = sum(server.tries.values())
    succeeds("generate_sft_data", *arguments)
    assert sum(server.tries.values()) == asked, "a recorded refusal is done"
    assert read_json(marker)["finished"] is True
    succeeds("fix_sft_data", *arguments[:2])
    assert read_json(sft / "stats.json")["train"]["by_reason"]["refused"] == 1


def test_answers_whose_tokens_nobody_counts(ask_server, succeeds, tmp_path, teacher_that_ends):
    _, arguments = ask_server(lambda *_: Body(completion("It is 4.")))
    printed = succeeds("generate_sft_data", *arguments, "--teacher_model", "", "--served_model_name", teacher_that_ends)
    assert "9 answers in" in printed
    assert "an unknown number of tokens/s" in printed
    assert "9 of them without a count of tokens, which the server does not give" in printed
    facts = read_json(tmp_path / "experiment" / "tiny" / "sft" / "generate_train.json")
    assert (facts["tokens"], facts["answers_without_token_count"]) == (0, 9)
    assert facts["last_session"]["tokens_per_second"] is None
    printed = succeeds("generate_sft_data", *arguments, "--overwrite")
    assert "without a count" not in printed
    facts = read_json(tmp_path / "experiment" / "tiny" / "sft" / "generate_train.json")
    assert (facts["tokens"], facts["answers_without_token_count"]) == (9 * 9, 0)


def test_a_share_of_refusals_is_a_share(fails, profile):
    assert "max_refused must be a share from 0 (none) to 1 (all), got 2.0" in fails(
        "generate_sft_data", "--config", profile(), "--max_refused", "2"
    )


@pytest.fixture
def served(succeeds, profile, tmp_path):
    """A profile whose `serve` starts a stub of vLLM, and the folder of its answers."""
    pytest.importorskip("openai")
    path = profile(domains=["maths"], domain_train_rows=[9], domain_eval_rows=[3])
    succeeds("download_datasets", "--config", path)
    serve = {"command": str(write_stub(tmp_path)), "port": 0, "arguments": {"max_num_seqs": 8}}
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"serve": serve}))
    return path, tmp_path / "experiment" / "tiny" / "sft"


def test_the_stage_starts_the_profiles_server_and_stops_it(served, succeeds, tmp_path, teacher_that_ends):
    path, sft = served
    printed = succeeds("generate_sft_data", "--config", path)
    [start] = starts(tmp_path)
    assert start["words"][:2] == ["serve", teacher_that_ends]
    assert start["words"][-2:] == ["--max-num-seqs", "8"]
    port = start["words"][start["words"].index("--port") + 1]
    assert f"starting {tmp_path / 'vllm'} serve {teacher_that_ends} --host 127.0.0.1 --port {port}" in printed
    assert not answers_at(f"http://127.0.0.1:{port}/v1")
    for split, count in (("train", 9), ("eval", 3)):
        rows = read_jsonl(sft / f"sft_{split}_data.jsonl")
        assert [row["response"] for row in rows] == [f"{teacher_that_ends} at 1.0 from 20"] * count
        facts = read_json(sft / f"generate_{split}.json")["fingerprint"]
        assert (facts["engine"], facts["teacher"]) == ("openai", model_fingerprint(teacher_that_ends))
    succeeds("generate_sft_data", "--config", path)
    assert len(starts(tmp_path)) == 1, "nothing was left to answer"


def test_what_stands_in_for_the_teacher_answers_and_is_recorded(served, succeeds, fails, tmp_path, tiny_student):
    path, sft = served
    succeeds("generate_sft_data", "--config", path)
    serve = yaml.safe_load(path.read_text())["serve"]
    other = json.dumps(serve | {"model": tiny_student})
    assert "was made with teacher = " in fails("generate_sft_data", "--config", path, "--serve", other)
    flags = json.dumps(serve | {"arguments": {"quantization": "fp8"}})
    assert "was made with server_arguments = None" in fails("generate_sft_data", "--config", path, "--serve", flags)
    succeeds("generate_sft_data", "--config", path, "--serve", other, "--overwrite")
    assert starts(tmp_path)[-1]["words"][:2] == ["serve", tiny_student]
    assert read_jsonl(sft / "sft_eval_data.jsonl")[0]["response"] == f"{tiny_student} at 1.0 from 20"


def test_a_flag_takes_the_profiles_server_away(served, succeeds, fails, tmp_path):
    path, sft = served
    line = fails("generate_sft_data", "--config", path, "--engine", "transformers")
    assert "--serve '' leaves the profile's server out" in line
    succeeds("generate_sft_data", "--config", path, "--engine", "transformers", "--serve", "")
    assert {row["engine"] for row in read_jsonl(sft / "sft_train_data.jsonl")} == {"transformers"}
    assert starts(tmp_path) == []


def test_a_profile_that_says_the_old_settings_is_told_the_new_ones(served, fails):
    path, _ = served
    values = yaml.safe_load(path.read_text())
    told = [({"engine": "vllm"}, "engine vllm is a server now"),
            ({"vllm_arguments": {"seed": 1}}, "unknown setting 'vllm_arguments'; say serve: ")]  # fmt: skip
    for old, words in told:
        path.write_text(yaml.safe_dump(values | {"generate_sft_data": values["generate_sft_data"] | old}))
        assert words in fails("generate_sft_data", "--config", path)


@pytest.mark.parametrize(("word", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_stage_that_is_ended_leaves_no_server(served, tmp_path, word, code):
    """SIGTERM unwinds as Ctrl-C does: in one line, without locks or temporary files. SIGKILL: the guard is left."""
    path, sft = served
    write_stub(tmp_path, seconds=600)
    stage = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "generate_sft_data.py"), "--config", str(path)], cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in stage.stderr:
        if "answers after" in line:
            break
    [start] = starts(tmp_path)
    stage.send_signal(word)
    said = stage.communicate(timeout=60)[1]
    assert stage.returncode == code
    if code > 0:
        assert said.splitlines()[-1].endswith("; run the same command again to continue")
        assert "Traceback" not in said
        assert not list(sft.glob(".*"))
    deadline = time.monotonic() + 20
    while alive(start["pid"]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(start["pid"])


def test_an_adapter_is_no_teacher(succeeds, fails, profile, tmp_path):
    """Its base would answer in its name."""
    path = profile()
    succeeds("download_datasets", "--config", path)
    (tmp_path / "adapter").mkdir()
    write_json(tmp_path / "adapter" / "adapter_config.json", {"base_model_name_or_path": "base/model"})
    line = fails("generate_sft_data", "--config", path, "--teacher_model", tmp_path / "adapter")
    assert "is an adapter of 'base/model', not a model" in line
    assert not list((tmp_path / "experiment").rglob("*.jsonl"))
