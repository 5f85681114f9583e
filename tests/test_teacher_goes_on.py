"""What a teacher makes of a student's wrong beginnings: cut, gone on with and graded as whole answers."""

import shutil
import sys

import pytest
import torch

from benchmarks import teacher_goes_on
from src.distillation.base import end_of_turn_id, load_tokenizer, prompt_ids, prompt_text
from src.grading.rows import dataset_row
from src.utils.common import ROOT, UserError, read_json, write_json, write_jsonl


def row_of(index: int) -> dict[str, str]:
    return dataset_row(
        source="sums", domain="maths", split="train", instruction="", prompt=f"What is {'0 + ' * index}5?",
        reference="5", grader="numeric", family=f"sums-{index % 3}",
    )  # fmt: skip


class Model:
    """Says the same after every beginning, ends, and goes on with padding as a batch does."""

    def __init__(self, said: list[int], end: int) -> None:
        self.said, self.end, self.asked = said, end, []

    def generate(self, input_ids, attention_mask, **_):
        self.asked += [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
        said = torch.tensor([[*self.said, self.end, self.end]] * len(input_ids))
        return torch.cat([input_ids, said], 1)


@pytest.fixture
def run(tmp_path):
    """A run whose student began every other answer with a right half; its prompts, and what its teacher answered."""
    rows = [row_of(index) for index in range(6)]
    own, teachers = [], []
    for index, row in enumerate(rows):
        text = "#### " if index % 2 else "#### 5"
        text += " " * len(text)  # the first half is what is not blank
        messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": text}]
        own.append({"id": row["id"], "sample_index": 0, "messages": messages, "finish_reason": "stop"})
        teachers.append({"id": row["id"], "response": "#### 5", "finish_reason": "stop" if index else "length"})
    run, experiment = tmp_path / "run", tmp_path / "rows"
    write_jsonl(tmp_path / "data/train_dataset.jsonl", rows)
    write_jsonl(experiment / "sft/sft_train_data.jsonl", teachers)
    write_json(run / "kd_config.json", {"experiment_dir": str(experiment), "init_from": None})
    write_jsonl(run / "rounds/round_01/sft/sft_train_data_clean.jsonl", own)
    return run


def test_the_whole_of_a_begun_answer_is_graded(run, tmp_path, tiny_models, monkeypatch):
    """Halves are "#### 5" and "#### ": ended at once the first is right, with a "5" more the second is."""
    monkeypatch.setattr(teacher_goes_on, "BATCH", 2)
    tokenizer = load_tokenizer(tiny_models.student)
    rows = [row_of(index) for index in range(6)]
    begun = list(teacher_goes_on.read_beginnings(run, tmp_path / "data", tokenizer))
    assert [one.right for one in begun] == [{"student": not i % 2, "teacher": i > 0} for i in range(6)]

    end = end_of_turn_id(tokenizer)
    for who, said in (("student_goes_on", ""), ("teacher_goes_on", "5")):
        model = Model(tokenizer(said, add_special_tokens=False)["input_ids"] if said else [], end)
        teacher_goes_on.go_on(who, model, tokenizer, begun, {"max_new_tokens": 9})
        # prompt and beginning, whatever they were padded with
        halves = ["#### 5", "#### "]
        wanted = [
            prompt_ids(tokenizer, [prompt_text(tokenizer, [{"role": "user", "content": row["prompt"]}])])[0]
            + tokenizer(halves[index % 2], add_special_tokens=False)["input_ids"]
            for index, row in enumerate(rows)
        ]
        assert sorted(model.asked) == sorted(wanted)
    # "#### 5" and "#### 55" of the even rows, "#### " and "#### 5" of the odd ones
    assert [one.right["student_goes_on"] for one in begun] == [True, False] * 3
    assert [one.right["teacher_goes_on"] for one in begun] == [False, True] * 3
    found = teacher_goes_on.summary([one for one in begun if not one.right["student"]])
    assert found["answers"] == 3
    assert {who: share["value"] for who, share in found["right"].items()} == {
        "student": 0, "teacher": 1, "student_goes_on": 0, "teacher_goes_on": 1,
    }  # fmt: skip
    assert found["teacher_less_student"]["value"] == 1

    # 7 tokens are the longer half's with its end: "#### 5" is 6 of them, with a "5" more it is cut before it ends
    teacher_goes_on.go_on("cut", Model(tokenizer("5")["input_ids"], end), tokenizer, begun, {"max_new_tokens": 7})
    assert [one.right["cut"] for one in begun] == [False, True] * 3


def test_the_script_asks_both_models(run, tmp_path, tiny_models, monkeypatch, capsys):
    profile, output = tmp_path / "recipes.yaml", tmp_path / "found.json"
    sampling = {"temperature": 0.2, "top_p": 0.9, "top_k": 20, "max_new_tokens": 16}
    models = {"teacher_model_name_or_path": tiny_models.teacher, "model_name_or_path": tiny_models.student}
    write_json(profile, {"data_dir": str(tmp_path / "data"), **models, "generate_sft_data": sampling})  # JSON is YAML
    monkeypatch.setattr(teacher_goes_on, "PROFILE", profile)
    monkeypatch.chdir(tmp_path)  # a run and the file may be named from where one is
    monkeypatch.setattr(sys, "argv", ["teacher_goes_on.py", "run", "--output", "found.json"])
    teacher_goes_on.main()
    assert capsys.readouterr().out.count("teacher_goes_on") == 2
    found = read_json(output)
    assert found["runs"] == ["run"]
    assert found["sampling"] == sampling
    for word in ("right", "wrong"):
        part = found[f"the_student_was_{word}"]
        assert part["answers"] == 3
        assert part["right"].keys() == {"student", "teacher", "student_goes_on", "teacher_goes_on"}


def test_a_run_without_rounds_is_refused(run, tmp_path, tiny_models):
    shutil.rmtree(run / "rounds")
    with pytest.raises(UserError, match="no on-policy rounds"):
        list(teacher_goes_on.read_beginnings(run, tmp_path / "data", load_tokenizer(tiny_models.student)))


def test_what_docs_recipes_and_learn_say_of_the_record_is_so():
    results = read_json(ROOT / "benchmarks" / "results" / "teacher_goes_on.json")
    wrong, right = results["the_student_was_wrong"], results["the_student_was_right"]
    assert (wrong["answers"], wrong["answers"] + right["answers"]) == (513, 720)
    shares = {who: round(100 * share["value"]) for who, share in wrong["right"].items()}
    assert shares == {"student": 0, "teacher": 53, "student_goes_on": 12, "teacher_goes_on": 36}
    gap = [round(100 * wrong["teacher_less_student"][name]) for name in ("value", "low", "high")]
    assert gap == [24, 14, 32]
