"""The model card: numbers of this very run or none, metadata that the hub takes, and text of others as text."""

import json
import re
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from markdown_it import MarkdownIt

from src.evaluation.results import make_results
from src.evaluation.results_schema import SCHEMA_VERSION, write_results
from src.evaluation.verdict import against_sft, closeness, headline
from src.report.card import CardFacts, Evaluation, find_evaluation, model_card, plain
from src.report.data_records import DataRecords, data_records
from src.utils.common import UserError, read_json, sha256_file, sha256_text, write_json, write_jsonl

NASTY = (
    "<img src=x onerror=alert(1)>| **b** [x](javascript:y) `c` ![i](//e) <!--\n# no\n---\nlicense: mit\u202e $$x$$ &lt;"
)
RENDERER = MarkdownIt("commonmark", {"html": True}).enable("table")
HUB = "model hub, openai/gsm8k main train at revision 740312a"


@pytest.fixture
def facts(tmp_path) -> CardFacts:
    """A distilled hub model that was not evaluated."""
    own = {"git_commit": "abc123", "git_dirty": False, "versions": {"torch": "2.13.0"}}
    measures = {"kl_to_teacher": 1.23456, "nll": 2.0, "top1_agreement": 0.4321, "expected_acceptance": 0.5}
    config = {
        "arm": "kd", "model_name_or_path": "Qwen/Qwen3-8B", "teacher_model_name_or_path": str(tmp_path),
        "alpha": 0.8, "temperature": 2.5, "teacher_temperature": None, "divergence": "forward_kl", "lora_r": 64,
        "lora_alpha": 128, "learning_rate": 2e-5, "lr_scheduler_type": "cosine", "warmup_steps": 20, "seed": 42,
        "rows_per_step": 32, "rows": {"train": 3006, "validation": 158, "heldout": 345}, "fingerprint": {},
        "provenance": own,
    }  # fmt: skip
    measured = {"steps": 93, "heldout_rows": 345, "heldout_tokens": 71234, "before": measures,
                "after": measures | {"kl_to_teacher": 0.98765, "top1_agreement": 0.5678}}  # fmt: skip
    sources = [
        {"source": "gsm8k", "split": "train", "rows": 2000, "licence": "MIT", "origin": HUB},
        {"source": "gsm8k", "split": "eval", "rows": 200, "licence": "MIT", "origin": HUB},
        {"source": "aiops", "split": "train", "rows": 1000, "licence": "Apache-2.0", "origin": "synthetic"},
    ]
    stats = {"train": {"answers": 3164, "by_reason": {"truncated": 79}}}
    measured["adapter_sha256"] = "f" * 64
    return CardFacts(
        "student", config, measured, DataRecords({"sources": sources}, stats, {}), None, {"license": "apache-2.0"},
        {"base model": "Qwen/Qwen3-8B@b968826d", "adapter_model.safetensors": "f" * 64}, "bfloat16", "as it should be",
        "<|im_end|>", "No sampling defaults.", False, own,
    )  # fmt: skip


@pytest.fixture(scope="module")
def results(made_up):
    return make_results(made_up["samples"](12, temperatures=(0.1, 0.7)), made_up["heldout"](), made_up["context"](), 0)


def evaluated(facts, results, arm="kd", graders=(("maths", "numeric"), ("ops", "rubric"))):
    return model_card(replace(facts, evaluation=Evaluation("results.json", results, arm, graders)))


def words(card: str) -> str:
    """What a reader sees of it."""
    shown = []
    for token in RENDERER.parse(card.partition("---\n\n")[2]):
        shown += [child.content for child in token.children or () if child.type in ("text", "code_inline")]
        shown += [" "] if token.type == "inline" else []
    return "".join(shown)


def test_the_hub_takes_the_metadata(facts):
    data = ModelCard(model_card(facts), ignore_metadata_errors=False).data.to_dict()
    assert data == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "base_model": "Qwen/Qwen3-8B",
        "base_model_relation": "finetune", "datasets": ["openai/gsm8k"], "license": "apache-2.0",
        "tags": ["knowledge-distillation", "lora"],
    }  # fmt: skip
    validate_repo_id(data["base_model"])


def test_a_pinned_base_is_named_without_its_revision(facts):
    pinned = replace(facts, config=facts.config | {"model_name_or_path": "Qwen/Qwen3-8B@b968826d"})
    card = model_card(pinned)
    assert ModelCard(card).data.base_model == "Qwen/Qwen3-8B"
    assert "Qwen/Qwen3-8B at revision b968826d, distilled from" in words(card)


def test_a_path_is_no_base_model_and_shows_no_way_to_it(facts, tmp_path):
    folder = tmp_path / "home" / "somebody" / "own-8b"
    folder.mkdir(parents=True)
    local = replace(facts, config=facts.config | {"model_name_or_path": str(folder)}, hashes={"base model": "0123abcd"})
    card = model_card(local)
    assert "base_model" not in ModelCard(card).data.to_dict()
    assert "The local folder own-8b, distilled from the local folder" in words(card)
    assert "somebody" not in card


def test_a_path_that_is_not_there_is_no_hub_id(facts):
    """A relative path with one slash looks like an id; the fingerprint says what was read."""
    config = {"model_name_or_path": "models/student", "teacher_model_name_or_path": "models/big",
              "fingerprint": {"teacher": "89abcdef01234567"}}  # fmt: skip
    card = model_card(replace(facts, config=facts.config | config, hashes={"base model": "0123456789abcdef"}))
    assert "base_model" not in ModelCard(card).data.to_dict()
    assert "The local folder student, distilled from the local folder big:" in words(card)
    assert "models/" not in card


@pytest.mark.parametrize("teacher", ["Qwen/Big@740312a", "served by vllm: Qwen/Big", ""])
def test_a_hub_teacher_is_named_by_its_id(facts, teacher):
    config = {"teacher_model_name_or_path": "Qwen/Big", "fingerprint": {"teacher": teacher} if teacher else {}}
    assert "distilled from Qwen/Big:" in words(model_card(replace(facts, config=facts.config | config)))


def test_a_folder_of_that_name_does_not_hide_the_hub_model(facts, monkeypatch, tmp_path):
    (tmp_path / "Qwen" / "Qwen3-8B").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    card = model_card(facts)
    assert ModelCard(card).data.base_model == "Qwen/Qwen3-8B"
    assert "Qwen/Qwen3-8B at revision b968826d" in words(card)


def test_what_it_was_made_from_is_said(facts):
    said = words(model_card(facts))
    for sentence in (
        "Rows: 3006 answers of the teacher to train on, 158 to watch, 345 held out.",
        "Objective: 0.8 x T^2 x forward_kl(teacher, student) at T = 2.5 + 0.2 x cross-entropy.",
        "Training: 93 steps of 32 rows, learning rate 2e-05 (cosine, 20 warm-up steps), LoRA rank 64, alpha 128, seed",
        "Merged weights: as it should be.",
        "One training seed (42)",
        "Trained for gsm8k, aiops alone",
        "79 of the teacher's 3164 answers (2.5%) were cut",
        "The base model's licence is apache-2.0. Check beside it the data's (Apache-2.0, MIT)",
        "It ends its turn with <|im_end|>; generation_config.json stops there. No sampling defaults.",
        "Trained with abc123 (torch 2.13.0)",
        f"adapter_model.safetensors: {'f' * 64}",
    ):
        assert sentence in said
    assert "enable_thinking" not in said


def test_1_minus_alpha_is_written_as_it_is_meant(facts):
    card = model_card(replace(facts, config=facts.config | {"alpha": 0.9, "teacher_temperature": 1.0}))
    assert "at T = 2.5 (the teacher at 1) + 0.1 x cross-entropy" in words(card)


def test_it_says_what_the_teachers_distribution_was_cut_to(facts):
    cut = {"teacher_top_k": 20, "teacher_top_p": 0.9}
    assert "at T = 2.5 (the teacher at 2.5, top_k 20, top_p 0.9) + 0.2" in words(
        model_card(replace(facts, config=facts.config | cut))
    )


def test_without_an_evaluation_it_says_so(facts):
    said = words(model_card(facts))
    assert "Not evaluated. There is no results.json of an evaluation of this run" in said
    assert "without intervals: KL to the teacher 0.9877 nats per token (1.2346 before training)" in said
    assert "its own at 56.8% (43.2% before)" in said
    assert "No graded answers: no gain over the base model is shown" in said


def test_results_stand_with_intervals_and_numbers(facts, results):
    said = words(evaluated(facts, results))
    assert "Not evaluated" not in said
    for sentence in (headline(results), closeness(results), against_sft(results)):
        assert sentence in said
    score = next(s for s in results["graded"]["scores"] if (s["arm"], s["temperature"]) == ("kd", 0.1))
    low, high = score["interval"]
    assert f"{score['accuracy']:.0%} ({low:.0%} to {high:.0%})" in said
    gain = next(d for d in results["heldout"]["differences"] if (d["a"], d["b"]) == ("kd", "base"))
    assert "{:+.4f} to {:+.4f}".format(*gain["interval"]) in said
    assert "Graded in ops by rubric: answers are searched for the phrases" in said
    assert "This model is the arm distilled." in said


def test_a_control_does_not_speak_of_the_distilled_student(facts, results):
    config = facts.config | {"arm": "sft", "alpha": 0.0}
    said = words(evaluated(replace(facts, config=config), results, "sft"))
    assert headline(results) not in said
    assert closeness(results) not in said
    assert "This model is the arm SFT control." in said
    assert "fine-tuned on the answers of" in said


def test_a_hybrid_student_is_asked_without_a_thought(facts):
    card = model_card(replace(facts, hybrid=True))
    assert 'tokenizer_encode_kwargs={"enable_thinking": False}' in card
    assert "vllm serve PATH_OR_HUB_ID --default-chat-template-kwargs '{\"enable_thinking\": false}'\n" in card
    assert "With thinking on it was neither trained nor evaluated." in words(card)


@pytest.mark.parametrize(("licence", "said"), [
    ({}, "not recorded here: look it up"),
    ({"license": "other", "license_name": "my own", "license_link": "LICENSE"}, "The base model's licence is my own."),
])  # fmt: skip
def test_licences(facts, licence, said):
    card = model_card(replace(facts, licence=licence))
    assert said in words(card)
    assert {name: value for name, value in ModelCard(card).data.to_dict().items() if "licen" in name} == licence


def test_without_manifest_and_statistics(facts):
    records = DataRecords(None, None, {"manifest.json": "it is another's", "stats.json": "it is lost"})
    said = words(model_card(replace(facts, records=records)))
    assert "Where the prompts come from is not recorded: it is another's." in said
    assert "How many of the teacher's answers were cut or left out is not recorded: it is lost." in said
    assert "the data's (not recorded)" in said


def test_text_of_others_stays_text(facts, results):
    assert plain(NASTY).count("\n") == 0
    hostile = json.loads(json.dumps(results).replace('"ops"', json.dumps(NASTY)))
    sources = [facts.records.manifest["sources"][0] | {"source": NASTY, "licence": NASTY, "origin": NASTY}]
    config = facts.config | {"teacher_model_name_or_path": NASTY}
    nasty = replace(
        facts,
        config=config,
        records=replace(facts.records, manifest={"sources": sources}),
        licence={"license": NASTY},
        check=NASTY,
    )
    card = evaluated(nasty, hostile, graders=((NASTY, NASTY),))
    assert ModelCard(card).data.license == NASTY
    tokens = RENDERER.parse(card.partition("---\n\n")[2])
    inner = [child for token in tokens for child in token.children or ()]
    assert not {"html_inline", "html_block", "link_open", "image"} & {token.type for token in (*tokens, *inner)}
    assert [token.content for token in inner if token.type == "code_inline"] == []
    assert [token.tag for token in tokens if token.type == "heading_open"].count("h1") == 1
    shown = " ".join(NASTY.replace("\u202e", " ").split())
    assert words(card).count(shown) >= 8


@pytest.mark.parametrize("text", ["see https://a.b/c", "ftp://a.b", "WWW.a.b", "ask a@b.co", "thanks @somebody"])
def test_bare_addresses_and_names_are_no_links(text):
    """What makes a link of them anywhere (GFM, autolinks) needs one of these sequences whole."""
    assert not re.search(r"(?<!\\)://|www\.|(?<!\\)@", plain(text), re.IGNORECASE)
    assert words(f"---\n\n{plain(text)}").strip() == text


def with_source(facts, **entry) -> str:
    sources = [facts.records.manifest["sources"][0] | entry]
    return model_card(replace(facts, records=replace(facts.records, manifest={"sources": sources})))


def test_the_way_to_a_local_file_is_not_published(facts):
    card = with_source(facts, origin="file /home/some body/secret (old)/own.jsonl (sha256 0f3a5b), 10% by question")
    assert "file own.jsonl (sha256 0f3a5b), 10% by question" in words(card)
    assert "some" + " body" not in card
    assert "secret" not in card


@pytest.mark.parametrize("name", ["../..", "a--b/c", "-a/b"])
def test_what_is_no_id_is_no_data_set_of_the_hub(facts, name):
    card = with_source(facts, origin=f"model hub, {name} main train at revision 740312a")
    assert "datasets" not in ModelCard(card).data.to_dict()


def test_a_lower_bound_is_no_exact_kl(facts):
    bound = "lower bound over the top 20 and the rest"
    said = words(model_card(replace(facts, measured=facts.measured | {"kl_is": bound})))
    assert "KL to the teacher at least 0.9877 nats per token (at least 1.2346 before training)" in said
    assert f"The KL is a {bound}: the teacher's server says no more." in said
    assert "at least" not in words(model_card(replace(facts, measured=facts.measured | {"kl_is": "exact"})))


def test_a_4_bit_student_says_what_was_measured(facts, results):
    bits = replace(facts, config=facts.config | {"load_in_4bit": True})
    for said in (words(model_card(bits)), words(evaluated(bits, results))):
        assert "measured with the base model's weights in 4 bits (NF4), as in training." in said
        assert "merged into unquantised ones: the two differ by the error of the quantisation." in said
    assert "4 bits" not in words(model_card(facts)) + words(evaluated(facts, results))


@pytest.mark.parametrize(("engine", "merged"), [("transformers", True), ("openai", False)])
def test_how_the_evaluated_weights_relate_to_these(facts, results, engine, merged):
    own = results | {"settings": results["settings"] | {"engine": engine}}
    said = words(evaluated(facts, own))
    assert ("it merged the adapter by itself" in said) == merged
    assert ("with the adapter beside the base model's weights rather than merged" in said) != merged


def test_a_run_that_did_not_record_its_adapter_says_so(facts):
    older = {name: value for name, value in facts.measured.items() if name != "adapter_sha256"}
    sentence = "The run did not record the hash of its adapter"
    assert sentence in words(model_card(replace(facts, measured=older)))
    assert sentence not in words(model_card(facts))


def test_the_card_names_no_folder_of_this_machine_to_load(facts):
    card = model_card(replace(facts, name="exp"))
    assert 'model="PATH_OR_HUB_ID"' in card
    assert "vllm serve PATH_OR_HUB_ID\n" in card


@pytest.fixture
def data(tmp_path):
    """Prompts with their manifest, clean rows with their statistics, and the fingerprint of a run on them."""
    prompts = [{"id": str(i), "source": "gsm8k" if i < 3 else "ops"} for i in range(5)]
    write_jsonl(tmp_path / "data" / "train_dataset.jsonl", prompts)
    sources = []
    for name, split, rows in (("gsm8k", "train", prompts[:3]), ("gsm8k", "eval", []), ("ops", "train", prompts[3:])):
        text = "".join(json.dumps(row, sort_keys=True) for row in rows)
        sources.append({"source": name, "split": split, "rows": len(rows), "sha256": sha256_text(text)})
    write_json(tmp_path / "data" / "manifest.json", {"sources": sources})
    sft, fingerprint = tmp_path / "sft", {}
    for split, count in (("train", 4), ("eval", 2)):
        path = sft / f"sft_{split}_data_clean.jsonl"
        write_jsonl(path, [{"id": str(i)} for i in range(count)])
        fingerprint[path.name] = sha256_file(path)
    write_json(sft / "stats.json", {"train": {"kept": 4}, "eval": {"kept": 2}})
    read = {"train_dataset.jsonl": sha256_file(tmp_path / "data" / "train_dataset.jsonl")}
    write_json(sft / "fix_sft_data.json", {"finished": True, "fingerprint": read})
    return tmp_path, fingerprint


def test_records_of_the_very_data_are_taken(data):
    root, fingerprint = data
    records = data_records(fingerprint, root / "data", root / "sft")
    assert records.missing == {}
    assert records.manifest == read_json(root / "data" / "manifest.json")
    assert records.stats == read_json(root / "sft" / "stats.json")
    assert {path.name for path in records.paths} == {"manifest.json", "stats.json"}


def change(path, key, value):
    write_json(path, read_json(path) | {key: value})


@pytest.mark.parametrize(("foreign", "stats", "why"), [
    (lambda root: change(root / "data" / "manifest.json", "sources", []), True, "describes 0 rows"),
    (lambda root: change(root / "data" / "manifest.json", "sources", [
        {"source": "mbpp", "split": "train", "rows": 5, "sha256": "0" * 64}]), True, "other rows of mbpp"),
    (lambda root: (root / "data" / "manifest.json").unlink(), True, "there is no manifest.json"),
    (lambda root: write_jsonl(root / "data" / "train_dataset.jsonl", [{"id": "9"}]), True, "is not the file whose"),
    (lambda root: write_jsonl(root / "sft" / "sft_train_data_clean.jsonl", [{"id": "9"}]), False, "no longer the file"),
    (lambda root: change(root / "sft" / "stats.json", "train", {"kept": 9}), False, "counts other rows"),
    (lambda root: change(root / "sft" / "fix_sft_data.json", "finished", False), False, "is not finished"),
    (lambda root: (root / "sft" / "fix_sft_data.json").unlink(), False, "there is no fix_sft_data.json"),
])  # fmt: skip
def test_records_of_other_data_are_left_out(data, foreign, stats, why):
    root, fingerprint = data
    foreign(root)
    records = data_records(fingerprint, root / "data", root / "sft")
    assert records.manifest is None
    assert why in records.missing["manifest.json"]
    assert (records.stats is not None) == stats


@pytest.fixture
def evaluations(tmp_path, results, made_up):
    """`evaluations(name, time, **training)`: a results.json below the folder of evaluations."""

    def write(name, time, asked=None, **training):
        path = tmp_path / "evaluation" / name / "results.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        own = results | {"settings": results["settings"] | (asked or {})}
        write_results(path, own | {"training": training, "provenance": {"time": time}})
        write_jsonl(path.with_name("samples.jsonl"), [{"domain": "maths", "grader": "numeric"}] * 2)
        return path

    return write


@pytest.fixture
def run(tmp_path):
    write_json(tmp_path / "run" / "kd_results.json", {"steps": 5, "train_seconds": 12.5})
    return tmp_path / "run"


OWN, OTHER = {"steps": 5, "train_seconds": 12.5}, {"steps": 5, "train_seconds": 12.6}


def test_the_newest_evaluation_of_this_very_run_is_found(evaluations, run, tmp_path):
    folder = tmp_path / "evaluation"
    assert find_evaluation(folder, run) is None
    evaluations("other", "2026-11-28T15:00:00+0000", kd=OTHER)
    evaluations("none", "2026-11-28T15:00:00+0000")
    assert find_evaluation(folder, run) is None
    evaluations("first", "2026-11-26T09:00:00+0000", kd=OWN, sft=OTHER)
    newest = evaluations("deep/second", "2026-11-27T09:00:00+0000", kd=OTHER, sft=OWN)
    found = find_evaluation(folder, run)
    assert (found.path, found.arm, found.graders) == (newest, "sft", [("maths", "numeric")])


def test_the_evaluation_that_asked_most_is_taken(evaluations, run, tmp_path):
    """Then the one with most samples, then the newest by the moment, not by the letters of its time."""
    small, large = {"prompts": 10, "num_samples": 9}, {"prompts": 500, "num_samples": 1}
    evaluations("small", "2026-11-27T09:00:00+0000", small, kd=OWN)
    evaluations("earlier", "2026-11-26T09:00:00+0800", large | {"num_samples": 4}, kd=OWN)
    later = evaluations("later", "2026-11-26T08:00:00+0000", large | {"num_samples": 4}, kd=OWN)
    evaluations("one sample", "2026-11-28T09:00:00+0000", large, kd=OWN)
    found = find_evaluation(tmp_path / "evaluation", run)
    assert found.path == later
    assert [other.partition(" (")[0] for other in found.passed_over] == ["small", "one sample", "earlier"]
    assert "small (10 prompts, 9 samples of each, 2026-11-27 09:00 +0000)" in found.passed_over


def test_evaluations_passed_over_are_on_the_card(facts, results):
    other = Evaluation("results.json", results, "kd", (), ("small (10 prompts, 1 samples of each)",))
    said = words(model_card(replace(facts, evaluation=other)))
    assert "Other evaluations of this run are smaller, older or unreadable: small (10 prompts" in said
    assert "Other evaluations" not in words(evaluated(facts, results))


def test_broken_results_are_passed_over_with_a_warning(evaluations, run, tmp_path, caplog):
    (tmp_path / "evaluation" / "broken").mkdir(parents=True)
    (tmp_path / "evaluation" / "broken" / "results.json").write_text('{"training": ')
    whole = evaluations("whole", "2026-11-27T09:00:00+0000", kd=OWN)
    old = evaluations("old", "2026-11-28T09:00:00+0000", {"prompts": 10**6}, kd=OWN)
    old.write_text(old.read_text().replace(f'"schema_version": {SCHEMA_VERSION}', '"schema_version": 3'))
    found = find_evaluation(tmp_path / "evaluation", run)
    assert found.path == whole
    assert found.passed_over == ["old (not readable by this version)"]
    assert "broken/results.json" in caplog.text


def test_results_of_another_version_are_refused_only_where_they_matter(evaluations, run, tmp_path):
    for name, training in (("other", {"kd": OTHER}), ("own", {"kd": OWN})):
        path = evaluations(name, "2026-11-28T15:00:00+0000", **training)
        path.write_text(path.read_text().replace(f'"schema_version": {SCHEMA_VERSION}', '"schema_version": 3'))
        if name == "other":
            assert find_evaluation(tmp_path / "evaluation", run) is None
    with pytest.raises(UserError, match="schema_version is 3"):
        find_evaluation(tmp_path / "evaluation", run)


def test_the_students_own_answers_are_named(facts):
    own = {"on_policy_rounds": 4, "on_policy_fraction": 0.5, "on_policy_temperature": 0.7, "on_policy_top_p": 1.0,
           "on_policy_top_k": 0}  # fmt: skip
    read = facts.measured["steps"] * facts.config["rows_per_step"]
    facts = replace(facts, measured=facts.measured | {"rounds": {"made": 4, "rows": read // 3}})
    line = (f"- On-policy: 4 rounds; {read // 3} of the {read} rows that the steps took were the student's own answers "
            "(a share of 0.5 was asked for; drawn at T = 0.7")  # fmt: skip
    assert line in model_card(replace(facts, config=facts.config | own))
    for idle in ({"on_policy_rounds": 0}, {"on_policy_fraction": 0.0}, {"arm": "sft"}):
        assert "On-policy" not in model_card(replace(facts, config=facts.config | own | idle))


def test_it_says_whose_adapter_training_went_on_from(facts):
    """By the run's name and the hash of the weights; the way to it is nobody else's business."""
    begun = {"init_from": "/home/someone/runs/gpu_optimized_kd_1/final_model/", "fingerprint": {"init_from": "ab" * 32}}
    card = model_card(replace(facts, config=facts.config | begun))
    assert "Began from the adapter of gpu_optimized_kd_1 (sha256 abababababababab)." in words(card)
    assert "someone" not in card
    assert "Began from" not in model_card(facts)
