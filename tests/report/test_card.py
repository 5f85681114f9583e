"""The model card: numbers of this very run or none, metadata that the hub takes, and text of others as text."""

import json
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from markdown_it import MarkdownIt

from src.evaluation.results import make_results
from src.evaluation.results_schema import write_results
from src.evaluation.verdict import against_sft, closeness, headline
from src.report.card import CardFacts, Evaluation, find_evaluation, model_card, plain
from src.utils.common import UserError, write_json, write_jsonl

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
    return CardFacts(
        "student", config, measured, {"sources": sources}, stats, None, {"license": "apache-2.0"},
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
    assert "vllm serve student --default-chat-template-kwargs '{\"enable_thinking\": false}'\n" in card
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
    said = words(model_card(replace(facts, manifest=None, stats=None)))
    assert "There is no manifest.json: where the prompts come from is not recorded." in said
    assert "the data's (not recorded)" in said


def test_text_of_others_stays_text(facts, results):
    assert plain(NASTY).count("\n") == 0
    hostile = json.loads(json.dumps(results).replace('"ops"', json.dumps(NASTY)))
    sources = [facts.manifest["sources"][0] | {"source": NASTY, "licence": NASTY, "origin": NASTY}]
    config = facts.config | {"teacher_model_name_or_path": NASTY}
    nasty = replace(facts, config=config, manifest={"sources": sources}, licence={"license": NASTY}, check=NASTY)
    card = evaluated(nasty, hostile, graders=((NASTY, NASTY),))
    assert ModelCard(card).data.license == NASTY
    tokens = RENDERER.parse(card.partition("---\n\n")[2])
    inner = [child for token in tokens for child in token.children or ()]
    assert not {"html_inline", "html_block", "link_open", "image"} & {token.type for token in (*tokens, *inner)}
    assert [token.content for token in inner if token.type == "code_inline"] == []
    assert [token.tag for token in tokens if token.type == "heading_open"].count("h1") == 1
    shown = " ".join(NASTY.replace("\u202e", " ").split())
    assert words(card).count(shown) >= 8


@pytest.fixture
def evaluations(tmp_path, results, made_up):
    """`evaluations(name, time, **training)`: a results.json below the folder of evaluations."""

    def write(name, time, **training):
        path = tmp_path / "evaluation" / name / "results.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_results(path, results | {"training": training, "provenance": {"time": time}})
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


def test_results_of_another_version_are_refused_only_where_they_matter(evaluations, run, tmp_path):
    for name, training in (("other", {"kd": OTHER}), ("own", {"kd": OWN})):
        path = evaluations(name, "2026-11-28T15:00:00+0000", **training)
        path.write_text(path.read_text().replace('"schema_version": 4', '"schema_version": 3'))
        if name == "other":
            assert find_evaluation(tmp_path / "evaluation", run) is None
    with pytest.raises(UserError, match="schema_version is 3"):
        find_evaluation(tmp_path / "evaluation", run)
