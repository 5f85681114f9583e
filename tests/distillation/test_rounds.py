"""On-policy rounds: what a step learns from, that nothing is lost with a kill, and that idle settings do nothing."""

import contextlib
import dataclasses
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from peft import load_peft_weights
from transformers import set_seed

from src.distillation import kd, rounds, training
from src.distillation.base import (
    EncodedRow,
    config_folder,
    encode_row,
    layer_device_map,
    load_model,
    load_tokenizer,
    meta_model,
    model_bytes,
    response_ids,
)
from src.distillation.batching import Pair, StepOrder, Tokenizers, TrainingData, is_validation, read_clean
from src.distillation.kd import run_kd_pipeline
from src.distillation.kd_config import ON_POLICY, KDConfig
from src.distillation.lora import add_lora
from src.distillation.losses import divergence
from src.distillation.sft import Request, Sampling, answer_row
from src.distillation.sweep import idle_settings
from src.distillation.teacher_cache import CacheTeacherConfig, make_cache
from src.evaluation import arms
from src.utils.common import ROOT, UserError, read_json, read_jsonl, sha256_file, write_json, write_jsonl
from src.utils.config import build_config, read_merged
from tests.stub_server import starts, write_stub

MEASURED = ("tokens_per_second", "peak_memory_mb")  # columns of metrics.jsonl that no two runs share


@pytest.fixture(scope="module")
def settings_in(tiny_teacher, ending_teacher, clean_rows, write_sft):
    """`settings_in(folder)`: a run of six steps in two rounds, of a student some of whose answers end."""
    plain = {
        "model_name_or_path": ending_teacher,
        "teacher_model_name_or_path": tiny_teacher,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "max_length": 256,
        "save_steps": 2,
        "eval_steps": 100,
        "lora_r": 4,
        "bf16": False,
        "teacher_signal": "hidden",
        "compile_loss": False,
        "on_policy_rounds": 2,
        "on_policy_batch_size": 4,
        "on_policy_max_new_tokens": 24,
    }

    def made(folder: Path) -> dict:
        experiment = write_sft(folder / "experiment" / "tiny", clean_rows(40), clean_rows(8, start=100))
        return plain | {"experiment_dir": str(experiment)}

    return made


@pytest.fixture
def settings(settings_in, tmp_path):
    return settings_in(tmp_path)


@pytest.fixture(scope="module")
def whole(settings_in, tmp_path_factory):
    """What such a run gives where nothing comes between."""
    settings = settings_in(tmp_path_factory.mktemp("whole"))
    cached(settings)
    return run_kd_pipeline(settings)


def cached(settings: dict, **changes) -> dict:
    names = ("teacher_model_name_or_path", "experiment_dir", "max_length")
    plain = {name: settings[name] for name in names} | {"bf16": False, "temperatures": [2.5]}
    return make_cache(CacheTeacherConfig(**plain | changes))


def metrics(results: dict) -> list[dict]:
    rows = read_jsonl(Path(results["run_dir"]) / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in rows]


def round_files(results: dict) -> dict[str, bytes]:
    """What each round has left but for times and versions."""
    found = {}
    for folder in sorted(Path(results["run_dir"]).glob("rounds/*")):
        for path in sorted([*folder.glob("sft/*"), *folder.glob("teacher_cache/*.safetensors")]):
            found[f"{folder.name}/{path.name}"] = path.read_bytes()
        facts = read_json(folder / "round.json")
        del facts["answering_seconds"], facts["caching_seconds"]
        found[f"{folder.name}/round.json"] = str(facts).encode()
    return found


def assert_same_run(one: dict, other: dict) -> None:
    assert metrics(one) == metrics(other)
    ours, theirs = (load_peft_weights(results["final_model"]) for results in (one, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


class Killed(BaseException):
    pass


def kill_after(calls: int, function: Callable) -> Callable:
    """The function, which does its work `calls` times and is killed then."""
    done = []

    def killed(*arguments, **keywords):
        if len(done) == calls:
            raise Killed
        done.append(True)
        return function(*arguments, **keywords)

    return killed


# where a run of two rounds of three steps is killed, one time after the other: with a third of a round's answers, with
# all of them, with the cache, at a step, between the rounds (there are checkpoints after steps 2, 3, 4 and 6)
KILLS = [
    (rounds, "append_jsonl", 1),
    (rounds, "_write_clean", 0),
    (rounds, "round_facts", 0),
    (training, "take_step", 1),
    (kd, "open_round", 1),
    (rounds, "append_jsonl", 2),
    (rounds, "make_cache", 0),
    (training, "take_step", 2),
    (kd, "_save_final", 0),
]


def test_a_run_killed_anywhere_ends_as_an_uninterrupted_one(settings, whole, tmp_path, monkeypatch):
    cached(settings)
    cut = settings | {"output_dir": str(tmp_path / "cut")}
    for module, name, calls in KILLS:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, kill_after(calls, getattr(module, name)))
            with pytest.raises(Killed):
                run_kd_pipeline(cut)
    resumed = run_kd_pipeline(cut)
    assert_same_run(whole, resumed)
    assert round_files(whole) == round_files(resumed)
    assert whole["after"] == resumed["after"]
    assert [row["round"] for row in metrics(whole) if "loss" in row] == [1, 1, 1, 2, 2, 2]
    assert not list((tmp_path / "cut").glob("rounds/*/begun.json"))


def losses_of(results: dict) -> list[dict]:
    return [row for row in metrics(results) if "loss" in row]


@pytest.mark.parametrize("idle", [{"on_policy_rounds": 0}, {"on_policy_fraction": 0.0}, {"alpha": 0.0}], ids=str)
def test_without_rounds_or_own_rows_or_a_divergence_all_settings_are_idle(settings, tmp_path, idle):
    """The same run by its fingerprint, bit for bit, with the columns that every run has."""
    plain = {name: value for name, value in settings.items() if not name.startswith("on_policy_")}
    plain |= {"teacher_signal": "online"} | ({"alpha": 0.0} if "alpha" in idle else {})
    others = settings | plain | idle | {"on_policy_temperature": 0.3, "on_policy_top_k": 7}
    assert build_config(KDConfig, others).identity() == build_config(KDConfig, plain).identity()
    made = [run_kd_pipeline(s | {"output_dir": str(tmp_path / str(i))}) for i, s in enumerate((plain, others))]
    assert_same_run(*made)
    assert not (tmp_path / "1" / "rounds").exists()
    columns = {"step", "loss", "kd_loss", "ce_loss", "grad_norm", "lr", "tokens"}
    assert losses_of(made[1])[0].keys() == columns


@pytest.mark.parametrize("field", ["on_policy_rounds", "on_policy_fraction", "alpha"])
def test_a_sweep_keeps_the_setting_that_leaves_the_others_idle(settings, field):
    """In a cell with a 0 the idle settings take the profile's value; the 0 itself must stay one."""
    config = build_config(KDConfig, settings | {field: 0})
    idle = idle_settings(config)
    assert field not in idle
    assert set(ON_POLICY) - {field} <= idle
    assert not set(ON_POLICY) & idle_settings(build_config(KDConfig, settings))


def response_logits(model: torch.nn.Module, row: EncodedRow, columns: int) -> torch.Tensor:
    """Logits at the positions that predict a row's response tokens, read without padding or packing."""
    ids = torch.tensor([row.prompt_ids + row.response_ids])
    return model(ids).logits[0, len(row.prompt_ids) - 1 : -1, :columns]


@pytest.mark.parametrize(
    ("kind", "fraction"), [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("reverse_kl", 1.0)]
)
def test_a_steps_gradient_is_that_of_the_formula(settings, kind, fraction):
    """One step of SGD at learning rate 1, against autograd through full logits: alpha T^2 D of all tokens and
    (1 - alpha) CE of the teacher's rows, divided by the step's tokens; an answer that was cut off has no end."""
    cached(settings)
    results = run_kd_pipeline(
        settings
        | {"divergence": kind, "on_policy_rounds": 1, "on_policy_fraction": fraction, "max_steps": 1, "alpha": 0.7}
        | {"optim": "sgd", "learning_rate": 1.0, "weight_decay": 0.0, "lr_scheduler_type": "constant"}
        | {"max_grad_norm": 0.0}
    )
    set_seed(42)
    names = ("model_name_or_path", "teacher_model_name_or_path")
    model, teacher = (load_model(settings[name], torch.float32) for name in names)
    model = add_lora(model, 4, 128, 0.0)
    tokenizer = load_tokenizer(settings["model_name_or_path"])

    folder = Path(results["run_dir"]) / "rounds" / "round_01" / "sft"
    clean = read_jsonl(Path(settings["experiment_dir"]) / "sft" / "sft_train_data_clean.jsonl")
    clean = [row for row in clean if not is_validation(row["id"], 0.05)]
    own = read_jsonl(folder / "sft_train_data_clean.jsonl")
    theirs = [clean[index] for index in StepOrder(len(clean), 8, 42).rows_of(0)][: 8 - len(own)]
    assert len(own) == 8 * fraction
    assert {row["finish_reason"] for row in own} == {"stop", "length"}, "the test wants both"

    loss, kd, ce, tokens, own_kd, own_tokens = 0.0, 0.0, 0.0, 0, 0.0, 0
    for row in theirs + own:
        encoded = encode_row(tokenizer, row, 258, row in own)
        assert (encoded.response_ids[-1] == 258) == (row.get("finish_reason") != "length")
        ours = response_logits(model, encoded, 261)
        with torch.no_grad():
            log_p = (response_logits(teacher, encoded, 261) / 2.5).log_softmax(-1)
        part = divergence(log_p, (ours / 2.5).log_softmax(-1), kind).sum()
        loss, kd, tokens = loss + 0.7 * 2.5**2 * part, kd + part.item(), tokens + len(encoded.response_ids)
        if row in own:
            own_kd, own_tokens = own_kd + part.item(), own_tokens + len(encoded.response_ids)
        else:
            labels = torch.tensor(encoded.response_ids)
            part = torch.nn.functional.cross_entropy(ours, labels, reduction="sum")
            loss, ce = loss + 0.3 * part, ce + part.item()
    (loss / tokens).backward()
    [row] = losses_of(results)
    found = [row[name] for name in ("loss", "kd_loss", "ce_loss", "on_policy_kd_loss")]
    wanted = [loss.item() / tokens, kd / tokens, ce / tokens, own_kd / own_tokens]
    assert found == pytest.approx(wanted, rel=1e-4)
    made = load_peft_weights(results["final_model"])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.testing.assert_close(made[name.replace(".default", "")], -parameter.grad, atol=2e-5, rtol=1e-3)


def test_the_divergence_on_own_rows_is_a_mean_over_their_tokens():
    """Of all steps of a row of the log: one without an own row is no 0, and a long answer weighs as its tokens."""
    one_process = SimpleNamespace(num_processes=1, device="cpu", reduce=lambda tensor: tensor)

    def logged(*own: tuple[float, int]) -> dict[str, float]:
        steps = [training.StepFacts(torch.tensor([1.0, 2.0, 3.0, *sums]), 0.1, 9) for sums in own]
        return training.Window(steps, seconds=1.0).means(one_process)

    row = logged((6.0, 3), (0.0, 0), (8.0, 1))
    assert [row[name] for name in ("loss", "kd_loss", "ce_loss")] == pytest.approx([1, 2, 3])
    assert row["on_policy_kd_loss"] == pytest.approx(14 / 4)
    assert "on_policy_kd_loss" not in logged((0.0, 0))


def test_own_answers_take_the_last_places_of_a_step():
    """The teacher's rows stay those of the run's order; one keeps its place where an answer cannot be used."""
    theirs = [Pair(EncodedRow(f"t{i}", (1,), (2,)), EncodedRow(f"t{i}", (1,), (2,))) for i in range(12)]
    own = [[Pair(EncodedRow(f"o{i}", (1,), (2,)), EncodedRow(f"o{i}", (1,), (2,)), own=True)] for i in range(4)]
    by_step = [own[0] + own[1], own[2]]
    order = StepOrder(12, 4, 7)
    for step, taken in ((2, ["o0", "o1"]), (3, ["o2"])):
        run = SimpleNamespace(data=SimpleNamespace(train=theirs), order=order, step=step, own=None)
        plain = [row.student.id for row in training.rows_of_step(run)]
        run.own = training.OwnRows(2, first_step=2, by_step=by_step, teacher=None)
        assert [row.student.id for row in training.rows_of_step(run)] == plain[: 4 - len(taken)] + taken


def test_rounds_walk_on_through_the_prompts(settings):
    """Every prompt is asked once before one is asked again; a prompt that returns within a round is another sample."""
    config = build_config(KDConfig, settings | {"on_policy_rounds": 3, "max_steps": 20})
    rows = [{"id": f"p{i}", "system": "", "prompt": f"{i}?"} for i in range(20)]
    prompts = rounds.Prompts(rows, config.own_sampling(24))
    parts = rounds.rounds_of(config, 20)
    assert [(part.first_step, part.end) for part in parts] == [(0, 6), (6, 13), (13, 20)]
    asked = [rounds.requests_of(config, part, prompts) for part in parts]
    assert [len(requests) for requests in asked] == [6 * 4, 7 * 4, 7 * 4]
    ids = [request.id for requests in asked for request in requests]
    for epoch in range(4):
        assert len(set(ids[20 * epoch : 20 * epoch + 20])) == 20
    for requests in asked:
        keys = [(request.id, request.sample_index) for request in requests]
        assert len(set(keys)) == len(keys)
    assert max(request.sample_index for request in asked[1]) == 1
    seeds = [request.seed for requests in asked for request in requests]
    assert len(set(seeds)) == len(seeds)
    plain = StepOrder(20, 8, config.data_seed)
    assert [rows[index]["id"] for index in plain.rows_of(0)[:4]] != ids[:4], "the teacher's rows have their own order"


def test_an_answer_that_was_cut_has_no_end(make_tokenizer):
    """Nor has it the blank that a template writes before one; an answer that ended at once is its end alone."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("'<|im_end|>\\n'", "' <|im_end|>\\n'")
    row = {"id": "a", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "So it is"}]}
    ended = encode_row(tokenizer, row | {"finish_reason": "stop"}, 258, own_answer=True)
    cut = encode_row(tokenizer, row | {"finish_reason": "length"}, 258, own_answer=True)
    assert ended == encode_row(tokenizer, row, 258)
    assert ended == encode_row(tokenizer, row | {"finish_reason": "length"}, 258), "a teacher's row is as it ever was"
    assert (cut.prompt_ids, cut.response_ids) == (ended.prompt_ids, ended.response_ids[:-2])
    assert tokenizer.decode(ended.response_ids) == "So it is <|im_end|>"
    row["messages"][-1]["content"] = "<|im_end|> is text"
    spelt = encode_row(tokenizer, row | {"finish_reason": "length"}, 258, own_answer=True)
    assert tokenizer.decode(spelt.response_ids) == "<|im_end|> is text"
    assert 258 not in spelt.response_ids
    row["messages"][-1]["content"] = ""
    assert encode_row(make_tokenizer(), row | {"finish_reason": "stop"}, 258, own_answer=True).response_ids == (258,)
    assert encode_row(make_tokenizer(), row | {"finish_reason": "length"}, 258, own_answer=True).response_ids == ()


def test_answers_become_rows(tmp_path, make_tokenizer, caplog):
    """A character that the cut has torn is taken off; what a server refused is left out; the order is the requests'."""
    requests = [Request(f"q{i}", 0, "Be brief." if i else "", "Hi", i, Sampling(max_new_tokens=4)) for i in range(6)]
    said = [("caf\ufffd", "length"), ("caf\ufffd", "stop"), ("", "stop"), ("", "length"), ("no", "refused"),
            ("x" * 99, "stop")]  # fmt: skip
    answers = [answer_row(r, "it", text, reason, 4) for r, (text, reason) in zip(requests, said, strict=True)]
    rounds._write_clean(tmp_path, requests, answers[::-1], 300)
    rows = read_jsonl(tmp_path / "sft" / "sft_train_data_clean.jsonl")
    assert [row["messages"][-1]["content"] for row in rows] == ["caf", "caf\ufffd", "", "", "x" * 99]
    assert [len(row["messages"]) for row in rows] == [2, 3, 3, 3, 3]
    tokenizer = make_tokenizer()
    pairs = rounds.read_own_pairs(tmp_path, Tokenizers(tokenizer, tokenizer), max_length=80)
    assert [pair.student.id for pair in pairs] == ["q0", "q1", "q2"]
    assert all(pair.own for pair in pairs)
    facts = rounds.round_facts(rounds.Round(1, 0, 6), requests, answers, pairs)
    assert {name: facts[name] for name in ("rows", "ended", "truncated", "empty", "left_out", "encoded_otherwise")} == {
        "rows": 3, "ended": 3, "truncated": 2, "empty": 2, "left_out": 3, "encoded_otherwise": 3
    }  # fmt: skip
    caplog.set_level("INFO")
    facts |= {"answering_seconds": 1.0, "caching_seconds": 0.0}
    rounds._say_round(facts, answers)
    assert "3 ended, 2 cut off, 2 empty" in caplog.text
    assert "little can be learned" not in caplog.text
    rounds._say_round(facts, answers[:4])
    assert "3 of 4 answers are empty or cut off, and little can be learned from such" in caplog.text
    with pytest.raises(UserError, match="the assistant's answer is empty"):  # but in a round
        read_clean(tmp_path / "sft" / "sft_train_data_clean.jsonl")


def test_what_was_sampled_is_learned_from_and_not_how_its_text_is_spelt(tmp_path, make_tokenizer):
    """Ids that no text gives, an end of another word, a special token in the middle; a column that is no token's."""
    sampling = Sampling(max_new_tokens=4)
    requests = [Request(f"q{i}", 0, "", "Hi", i, sampling) for i in range(4)]
    sampled = [((67, 258, 66), "stop"), ((67, 66, 65, 64), "length"), ((), "stop"), ((299,), "stop")]
    answers = []
    for request, (ids, reason) in zip(requests, sampled, strict=True):
        answers.append(answer_row(request, "it", "ab", reason, len(ids) + (reason == "stop"), ids))
    tokenizer = make_tokenizer()
    size = max(tokenizer.get_vocab().values()) + 1
    assert size <= 299, "the last answer's token is padding"
    rounds._write_clean(tmp_path, requests, answers, size)
    pairs = rounds.read_own_pairs(tmp_path, Tokenizers(tokenizer, tokenizer), max_length=80)
    sampled_ids = [(67, 258, 66, 258), (67, 66, 65, 64), (258,)]
    assert [pair.student.response_ids for pair in pairs] == [*sampled_ids, (*response_ids(tokenizer, "ab"), 258)]
    facts = rounds.round_facts(rounds.Round(1, 0, 4), requests, answers, pairs)
    assert (facts["encoded_otherwise"], facts["left_out"]) == (1, 0)
    path = tmp_path / "sft" / "sft_train_data_clean.jsonl"
    write_jsonl(path, [row | {"response_ids": ["67"]} for row in read_jsonl(path)])
    with pytest.raises(UserError, match="response_ids must be a list of token ids"):
        rounds.read_own_pairs(tmp_path, Tokenizers(tokenizer, tokenizer), max_length=80)


def test_an_answer_with_other_tokens_for_the_teacher_is_left_out(tmp_path, make_tokenizer, monkeypatch):
    """Behind another prompt a line break at its start may be part of another token; one such answer ends no run."""
    rows = [{"id": i, "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
             "finish_reason": "stop"} for i in ("joined", "plain")]  # fmt: skip
    write_jsonl(tmp_path / "sft" / "sft_train_data_clean.jsonl", rows)
    student, teacher = make_tokenizer(), make_tokenizer()
    encode = rounds.encode_row

    def joins(tokenizer, row, *arguments, **keywords):
        encoded = encode(tokenizer, row, *arguments, **keywords)
        if tokenizer is student or row["id"] == "plain":
            return encoded
        return dataclasses.replace(encoded, response_ids=(7, *encoded.response_ids))

    monkeypatch.setattr(rounds, "encode_row", joins)
    pairs = rounds.read_own_pairs(tmp_path, Tokenizers(student, teacher), max_length=80)
    assert [pair.student.id for pair in pairs] == ["plain"]


def test_a_smaller_batch_keeps_the_answers_that_are_there(settings, tmp_path, monkeypatch, caplog):
    """It is what somebody passes whose memory was short; and what was refused may be put right in the same folder."""
    caplog.set_level("INFO")
    target = settings | {"teacher_signal": "online", "output_dir": str(tmp_path / "run")}
    refused(target | {"on_policy_rounds": 7}, "on_policy_rounds = 7, but the run has 6 steps")
    with monkeypatch.context() as patch:
        patch.setattr(rounds, "append_jsonl", kill_after(1, rounds.append_jsonl))
        with pytest.raises(Killed):
            run_kd_pipeline(target)
    path = tmp_path / "run" / "rounds" / "round_01" / "sft" / "sft_train_data.jsonl"
    there = path.read_bytes()
    assert there
    run_kd_pipeline(target | {"on_policy_batch_size": 3})
    assert path.read_bytes().startswith(there)
    assert "made again" not in caplog.text


def test_a_round_has_the_ids_that_the_student_drew(whole, tiny_teacher):
    tokenizer = load_tokenizer(tiny_teacher)
    folder = Path(whole["run_dir"]) / "rounds" / "round_01"
    drawn = {row["id"]: row["token_ids"] for row in read_jsonl(folder / "sft" / "sft_train_data.jsonl")}
    pairs = rounds.read_own_pairs(folder, Tokenizers(tokenizer, tokenizer), max_length=256)
    size = max(tokenizer.get_vocab().values()) + 1  # the tiny models draw from columns of padding too
    learnt = {pair.student.id: pair.student.response_ids for pair in pairs}
    exact = [row_id for row_id in learnt if max(drawn[row_id], default=0) < size]
    for row_id in exact:
        assert list(learnt[row_id])[: len(drawn[row_id])] == drawn[row_id]
    clean = read_jsonl(folder / "sft" / "sft_train_data_clean.jsonl")
    spelt = [encode_row(tokenizer, row, 258) for row in clean if row["messages"][-1]["content"] and row["id"] in exact]
    assert any(row.response_ids != learnt[row.id] for row in spelt), "a text gives them all: no test of it"
    assert read_json(folder / "round.json")["encoded_otherwise"] <= len(learnt) - len(exact)


def test_the_disk_is_asked_for_answers_with_their_ids_as_they_came_and_to_learn_from(tmp_path, monkeypatch):
    """The longest answers that there can be, of 4 letters and 6 digits a token."""
    asked, length = [], 2048
    requests = [Request(f"q{i}", 0, "", "Hi", i, Sampling(max_new_tokens=length)) for i in range(3)]
    plan = rounds.RoundPlan(rounds.Round(1, 0, 3), tmp_path, requests, None, False, {})
    answers = [answer_row(r, "it", "word" * length, "length", length, [151_643] * length) for r in requests]
    student = contextlib.nullcontext(lambda *_: [answers])
    monkeypatch.setattr(rounds, "_student", lambda *_: student)
    monkeypatch.setattr(rounds, "require_disk", lambda folder, needed, what: asked.append(needed))
    rounds._begin(plan)
    rounds._answer(KDConfig(), plan)
    rounds._write_clean(tmp_path, requests, answers, 151_669)
    written = sum(path.stat().st_size for path in (tmp_path / "sft").iterdir())
    assert written <= asked[0] <= 1.1 * written


def test_what_a_run_says_of_its_rounds_is_true(settings, monkeypatch):
    """round.json, kd_results.json, the card; and the disk's room is asked for beside what rounds have left."""
    index = cached(settings)
    asked_for: list[float] = []
    monkeypatch.setattr(kd, "require_disk", lambda folder, needed, what: asked_for.append(needed))
    results = run_kd_pipeline(settings | {"save_total_limit": 0})
    folder = Path(results["run_dir"])
    for number in (1, 2):
        of_round = folder / "rounds" / f"round_0{number}"
        facts, own = read_json(of_round / "round.json"), read_json(of_round / "teacher_cache" / "index.json")
        answers = read_jsonl(of_round / "sft" / "sft_train_data.jsonl")
        reasons = Counter(row["finish_reason"] for row in answers)
        assert (facts["ended"], facts["truncated"]) == (reasons["stop"], reasons["length"])
        assert len(answers) == facts["rows"] + facts["left_out"] == 12
        assert facts["sampled_tokens"] == sum(row["num_tokens"] for row in answers)
        assert (facts["rows"], facts["tokens"]) == (len(own["rows"]), own["tokens"])
        assert facts["mean_length"] == own["tokens"] / len(own["rows"])
        assert (facts["first_step"], facts["last_step"]) == (3 * number - 2, 3 * number)
        assert all(row["sampling"] == facts["sampling"] for row in answers)
        assert facts["sampling"] == {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 24}
        assert own["teacher"] == index["teacher"]
        assert list(own["data"]) == ["sft_train_data_clean.jsonl"]
    made = [read_json(path) for path in sorted(folder.glob("rounds/*/round.json"))]
    summed = {name: sum(facts[name] for facts in made) for name in results["rounds"] if name != "made"}
    assert results["rounds"] == {"made": 2, **summed}
    assert min(summed["rows"], summed["tokens"], summed["answering_seconds"], summed["caching_seconds"]) > 0
    there = sum(path.stat().st_size for number in (2, 3) for path in (folder / f"checkpoint-{number}").iterdir())
    assert asked_for == [asked_for[0], asked_for[0] - there]
    assert (
        "; up to 4 of them are answers of its own, made in 2 rounds"
        in (folder / "final_model" / "README.md").read_text()
    )
    assert facts["fingerprint"]["adapter"] == sha256_file(folder / "checkpoint-3" / "adapter_model.safetensors")


def test_a_resident_teacher_reads_the_answers_in_the_step(settings):
    cached(settings)
    made = [run_kd_pipeline(settings | {"teacher_signal": signal, "max_steps": 4}) for signal in ("hidden", "online")]
    for ours, theirs in zip(*map(losses_of, made), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    assert not (Path(made[1]["run_dir"]) / "rounds" / "round_01" / "teacher_cache").exists()


def test_a_top_k_cache_keeps_of_the_answers_what_it_keeps_of_the_rows(settings):
    cached(settings)
    hidden = run_kd_pipeline(settings | {"max_steps": 2, "on_policy_rounds": 1})
    cached(settings, signal="topk", top_k=260, temperatures=[1.0, 2.5], overwrite=True)
    topk = run_kd_pipeline(settings | {"max_steps": 2, "on_policy_rounds": 1, "teacher_signal": "topk"})
    index = read_json(Path(topk["run_dir"]) / "rounds" / "round_01" / "teacher_cache" / "index.json")
    assert (index["signal"], index["top_k"], index["temperatures"]) == ("topk", 260, [1.0, 2.5])
    for ours, theirs in zip(losses_of(hidden), losses_of(topk), strict=True):
        assert ours["on_policy_kd_loss"] == pytest.approx(theirs["on_policy_kd_loss"], rel=5e-3)


def test_an_sft_control_is_one_of_an_on_policy_run(settings):
    cached(settings)
    run, control = (run_kd_pipeline(settings | {"alpha": alpha, "max_steps": 2}) for alpha in (0.8, 0.0))
    run, control = (read_json(Path(results["run_dir"]) / "kd_config.json") for results in (run, control))
    assert run["fingerprint"]["on_policy_rounds"] == 2
    assert arms._difference(run, control) is None


def test_a_server_answers_as_the_adapter_of_the_moment(settings, tmp_path):
    cached(settings)
    program = write_stub(tmp_path)
    serve = {"command": str(program), "port": 0}
    results = run_kd_pipeline(settings | {"on_policy_serve": serve, "on_policy_temperature": 0.5, "max_steps": 2})
    first, second = (start["words"] for start in starts(tmp_path))
    assert "--lora-modules" not in first
    folder = Path(results["run_dir"])
    assert f"student={folder / 'checkpoint-1'}" in second
    names = (settings["model_name_or_path"], "student")
    for number, name in enumerate(names, start=1):
        of_round = folder / "rounds" / f"round_0{number}"
        said = {row["response"] for row in read_jsonl(of_round / "sft" / "sft_train_data.jsonl")}
        assert said == {f"{name} at 0.5 from -1"}
        assert {tuple(row["token_ids"]) for row in read_jsonl(of_round / "sft" / "sft_train_data.jsonl")} == {(65, 66)}
        assert read_json(of_round / "round.json")["fingerprint"]["engine"] == "vllm"


def test_a_run_that_begins_from_an_adapter_answers_with_it(settings):
    """The first round's answers are those of the adapter that `init_from` names, not of the student before training."""
    online = settings | {"teacher_signal": "online", "max_steps": 2}
    first = run_kd_pipeline(online | {"alpha": 0.0})
    folders = [Path(run_kd_pipeline(online | start)["run_dir"]) for start in ({}, {"init_from": first["run_dir"]})]
    made = [read_json(folder / "rounds" / "round_01" / "round.json")["fingerprint"] for folder in folders]
    assert [facts["adapter"] for facts in made] == [None, first["adapter_sha256"]]
    assert made[0]["requests"] == made[1]["requests"]
    answers = [read_jsonl(folder / "rounds" / "round_01" / "sft" / "sft_train_data.jsonl") for folder in folders]
    assert answers[0] != answers[1]


def refused(settings: dict, words: str) -> None:
    with pytest.raises(UserError) as caught:
        run_kd_pipeline(settings)
    assert re.search(words, str(caught.value)), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"on_policy_rounds": -1}, "on_policy_rounds must not be below 0"),
        ({"on_policy_rounds": 7}, "on_policy_rounds = 7, but the run has 6 steps.*lower --on_policy_rounds"),
        ({"on_policy_fraction": 1.5}, "on_policy_fraction must be between 0 and 1, got 1.5"),
        ({"on_policy_temperature": -1}, r"on_policy_temperature must be 0 \(greedy\) or more, got -1"),
        ({"on_policy_top_p": 0}, "on_policy_top_p must be above 0 and at most 1"),
        ({"on_policy_max_new_tokens": 0}, "on_policy_max_new_tokens must be at least 1"),
        ({"on_policy_batch_size": 0}, "on_policy_batch_size must be at least 1"),
        ({"on_policy_serve": {"command": "vllm serve {base}"}}, "a whole command line cannot name it: say command"),
        ({"on_policy_serve": {"command": "vllm", "model": "x"}}, "as the student and its adapter; take model out"),
    ],
    ids=str,
)
def test_wrong_settings(settings, change, words):
    refused(settings | {"teacher_signal": "online"} | change, words)


def test_prompts_that_leave_no_room_are_not_asked(settings, caplog):
    """So that no long prompt shortens the answers to all others."""
    caplog.set_level("INFO")
    path = Path(settings["experiment_dir"]) / "sft" / "sft_train_data_clean.jsonl"
    clean = [{"id": f"r{i}", "messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}]}
             for i in range(12)]  # fmt: skip
    write_jsonl(path, clean)
    pairs = []
    for i in range(12):
        student, teacher = (EncodedRow(f"r{i}", (1,) * length, (2,)) for length in (100 + i, 90 + 3 * i))
        pairs.append(Pair(student, teacher))
    data = TrainingData(pairs, [], [], {}, 0)
    config = build_config(KDConfig, settings | {"max_length": 130})  # prompts of 106 tokens leave it room
    prompts = rounds.read_prompts(config, data)
    assert [row["id"] for row in prompts.rows] == [f"r{i}" for i in range(6)]
    assert prompts.sampling.max_new_tokens == 24
    assert "6 of 12 training prompts are not asked, they leave no room for 24 tokens within 130" in caplog.text
    words = r"3 of 12 training prompts leave room .* asked 4 a step; lower --on_policy_max_new_tokens, or raise --max_l"
    with pytest.raises(UserError, match=words):  # 102 tokens: the student's
        rounds.read_prompts(build_config(KDConfig, settings | {"max_length": 126}), data)


def test_longer_conversations_are_refused(settings, clean_rows, write_sft):
    rows = clean_rows(40)
    rows[1]["messages"] = [*rows[1]["messages"], *rows[1]["messages"]]
    write_sft(settings["experiment_dir"], rows, clean_rows(8, start=100))
    words = "row sum-00001 asks with messages of user, assistant, user; on-policy rounds ask single turns"
    refused(settings | {"teacher_signal": "online", "validation_fraction": 0.0}, words)


def test_a_cache_that_cannot_be_gone_on_with_is_refused(settings, tmp_path, make_model, make_tokenizer, save_model):
    """A teacher behind a server cannot be asked here; weights that have changed are another teacher."""
    teacher = save_model(tmp_path / "teacher", make_model(seed=9), make_tokenizer())
    settings["teacher_model_name_or_path"] = teacher
    cached(settings)
    path = Path(settings["experiment_dir"]) / "teacher_cache" / "index.json"
    index = read_json(path)
    write_json(path, index | {"teacher": "served by vllm: x"})
    refused(settings, "was asked of a server, and rounds read .* with the teacher's weights; make the cache with")
    write_json(path, index | {"teacher": f"{teacher}@0", "teacher_model_name_or_path": teacher})
    refused(settings, "of the teacher|of another teacher")


def test_cpu_training_beside_a_gpu_is_refused(settings, monkeypatch):
    config = build_config(KDConfig, settings)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match=r"use_cpu is for training alone.*CUDA_VISIBLE_DEVICES=''"):
        rounds.check_rounds(config)


def damage(path: Path) -> None:
    """One bit of a file's last byte."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_teacher_that_has_no_place_is_refused_before_anything_is_answered(settings, monkeypatch):
    cached(settings)
    refused(
        settings | {"teacher_devices": [0]}, "where the teacher reads .* is to go on GPUs .*, but this machine has none"
    )
    config = build_config(KDConfig, settings)
    needed = model_bytes(settings["teacher_model_name_or_path"], torch.float32)
    monkeypatch.setattr(rounds, "place", lambda *arguments: {"": 0})
    for room in (needed, needed - 1):
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda _, room=room: SimpleNamespace(total_memory=room)
        )
        if room < needed:
            with pytest.raises(UserError, match=r"the teacher, which reads .* spread it with --teacher_devices"):
                rounds.check_rounds(config)
        else:
            rounds.check_rounds(config)


@pytest.mark.parametrize("hardware", sorted(path.stem for path in (ROOT / "configs" / "hardware").glob("*.yaml")))
def test_every_overlay_has_a_place_for_the_teacher_of_a_round(hardware):
    """The reference's, within what a GPU may hold; the embedding and some layers of it are on a GPU."""
    merged = read_merged(ROOT / "configs" / "qwen3_30b_to_8b.yaml", hardware)
    training, cache = merged["run_improved_kd"], merged["cache_teacher"]
    devices = training["teacher_devices"]
    assert (devices, training["cpu_offload"]) == (cache["teacher_devices"], cache["cpu_offload"])
    teacher = meta_model(config_folder(merged["teacher_model_name_or_path"]))
    budget = training["gpu_memory_gb"]
    placed = layer_device_map(teacher, devices, torch.bfloat16, budget, training["cpu_offload"])
    assert set(devices) <= set(placed.values())
    assert ("cpu" in placed.values()) == (hardware == "2x24")


def test_a_student_in_4_bits_answers_in_bf16(settings, caplog):
    cached(settings)
    rounds.check_rounds(build_config(KDConfig, settings | {"load_in_4bit": True}))
    assert "the one that answers is its bf16 model with the adapter" in caplog.text


def test_a_round_that_is_not_as_it_was_made(settings, whole, tmp_path, monkeypatch, caplog):
    """Of another adapter or damaged it is made again, unless steps were taken from it; its cache is in any case."""
    caplog.set_level("INFO")
    cached(settings)
    target = settings | {"output_dir": str(tmp_path / "run")}
    folder = tmp_path / "run" / "rounds" / "round_02"
    clean = folder / "sft" / "sft_train_data_clean.jsonl"

    def cut_at(module: ModuleType, name: str, calls: int) -> None:
        caplog.clear()
        with monkeypatch.context() as patch:
            patch.setattr(module, name, kill_after(calls, getattr(module, name)))
            with pytest.raises(Killed):
                run_kd_pipeline(target)

    # 1. before a step is taken from it
    cut_at(rounds, "append_jsonl", 4)  # three batches of the first round, one of the second
    for marker in ("begun.json", "round.json"):
        made = read_json(folder / marker)
        write_json(folder / marker, made | {"fingerprint": made["fingerprint"] | {"adapter": "another"}})
        cut_at(training, "take_step", 0)
        assert "round_02: made with another adapter or other settings; it is made again" in caplog.text
    damage(clean)
    cut_at(training, "take_step", 0)
    assert re.search(r"round_02: sft/.*_clean.jsonl, which .* is not as it was written; the round is made again",
                     caplog.text)  # fmt: skip

    # 2. a step of it is in checkpoint-4
    cut_at(training, "take_step", 2)
    assert "made again" not in caplog.text
    for lost, fault in ((folder, "round.json, .* is gone"), (folder / "round.json", "round.json, .* is gone"),
                        (clean.parent, "sft/sft_train_data_clean.jsonl, .* is gone")):  # fmt: skip
        lost.rename(tmp_path / "away")
        refused(
            target, f"round_02: steps of this round are taken, and {fault}; put the folder back as it was, or train"
        )
        shutil.rmtree(lost, ignore_errors=True)
        (tmp_path / "away").rename(lost)
    good = clean.read_text()
    clean.write_text(good.replace("assistant", "assistant "))
    refused(target, "round_02: steps of this round are taken, and .* is not as it was written; put the folder back")
    clean.write_text(good)
    requests = read_json(folder / "round.json")
    write_json(folder / "round.json", requests | {"fingerprint": requests["fingerprint"] | {"requests": "others"}})
    refused(target, "round_02: steps of this round are taken, and round.json is of another round; put the folder back")
    write_json(folder / "round.json", requests)

    # 3. the cache follows from the answers
    cache = folder / "teacher_cache"
    damage(cache / "shard_00000.safetensors")
    cut_at(rounds, "_count", 0)  # killed while it is made again
    assert "shard_00000.safetensors: not as it was written, its hash is another; the cache is made again" in caplog.text
    assert (folder / "begun.json").is_file()
    shutil.rmtree(cache)
    resumed = run_kd_pipeline(target)
    assert_same_run(whole, resumed)
    assert round_files(whole) == round_files(resumed)
    assert not (cache / "head.safetensors").exists(), "training reads the head of the run's own cache"


def test_a_rounds_cache_of_other_rows_is_made_again(settings, caplog):
    """And read as the run's own was, whatever the run's settings are by now."""
    cached(settings, packing=False)
    config = build_config(KDConfig, settings)
    folder = Path(settings["experiment_dir"])
    made = [make_cache(rounds._cache_config(config, folder), own_answers=True) for _ in range(2)]
    assert "made of other rows or settings; the cache is made again" in caplog.text
    assert caplog.text.count("made again") == 1
    assert made[0] == made[1]
    assert (made[0]["packing"], made[0]["head"]) == (False, None)


def test_the_seconds_of_all_sessions_are_counted(tmp_path):
    write_json(tmp_path / "begun.json", {"fingerprint": {}, "answering_seconds": 0.0, "caching_seconds": 0.0})
    began = time.monotonic()
    for name, ago in (("answering_seconds", 7), ("answering_seconds", 5), ("caching_seconds", 3)):
        rounds._count(tmp_path, name, began - ago)
    counted = read_json(tmp_path / "begun.json")
    assert [counted[name] for name in ("answering_seconds", "caching_seconds")] == pytest.approx([12, 3], abs=0.5)
