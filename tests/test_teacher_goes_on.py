"""What a teacher makes of a student's wrong beginnings: cut, gone on with and graded as whole answers."""

import pytest
import torch

from benchmarks import teacher_goes_on
from src.distillation.base import end_of_turn_id, load_model, load_tokenizer, prompt_ids, prompt_text
from src.grading.rows import dataset_row
from src.utils.common import UserError, write_json, write_jsonl


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


def test_the_whole_of_a_begun_answer_is_graded(tmp_path, tiny_models, monkeypatch):
    """Halves are "#### 5" and "#### ": ended at once the first is right, with a "5" more the second is."""
    monkeypatch.setattr(teacher_goes_on, "BATCH", 2)
    tokenizer = load_tokenizer(tiny_models.student)
    rows = [row_of(index) for index in range(6)]
    run, experiment = tmp_path / "run", tmp_path / "rows"
    own, teachers = [], []
    for index, row in enumerate(rows):
        text = "#### " if index % 2 else "#### 5"
        text += " " * len(text)  # the first half is what is not blank
        messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": text}]
        own.append({"id": row["id"], "sample_index": 0, "messages": messages, "finish_reason": "stop"})
        teachers.append({"id": row["id"], "response": "#### 5", "finish_reason": "stop" if index else "length"})
    write_jsonl(tmp_path / "data/train_dataset.jsonl", rows)
    write_jsonl(experiment / "sft/sft_train_data.jsonl", teachers)
    write_json(run / "kd_config.json", {"experiment_dir": str(experiment)})
    with pytest.raises(UserError, match="no on-policy rounds"):
        list(teacher_goes_on.read_beginnings(run, tmp_path / "data", tokenizer))
    write_jsonl(run / "rounds/round_01/sft/sft_train_data_clean.jsonl", own)
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


def test_a_real_model_goes_on(tiny_models):
    tokenizer = load_tokenizer(tiny_models.teacher)
    begun = [teacher_goes_on.Begun(row_of(i), [65] * (3 + i), [66, 67], {}) for i in range(3)]
    model = load_model(tiny_models.teacher, torch.float32)
    sampling = {"temperature": 0.2, "top_p": 0.9, "top_k": 20, "max_new_tokens": 4}
    teacher_goes_on.go_on("teacher", model, tokenizer, begun, sampling)
    assert all(set(one.right) == {"teacher"} for one in begun)
