"""How many rows there will be and how long: counted, or assumed and said so."""

import json

import pytest

from src.distillation.base import encode_row, end_of_turn_id, load_tokenizer
from src.planning.rows import ASSUMED, read_rows
from src.utils.common import UserError


def profile_of(tmp_path, teacher="", **sections):
    return {"data_dir": str(tmp_path / "data"), "experiment_dir": str(tmp_path), "teacher_model_name_or_path": teacher,
            **sections}  # fmt: skip


def test_rows_that_a_profile_asks_for(tmp_path):
    wanted = {"gsm8k_train_rows": 300, "gsm8k_eval_rows": 20, "mbpp_eval_rows": 10, "domains": ["aiops"],
              "domain_train_rows": [100], "domain_eval_rows": [5]}  # fmt: skip
    rows = read_rows(profile_of(tmp_path, download_datasets=wanted))
    assert (rows.train, rows.evaluation) == (400, 35)
    assert rows.prompt_tokens == pytest.approx((300 * ASSUMED["gsm8k"][0] + 100 * ASSUMED["aiops"][0]) / 400)
    assert "usual for their source" in rows.source


def test_rows_are_read_as_the_stage_reads_them(tmp_path):
    """null leaves the default, one pack needs no list."""
    wanted = {"gsm8k_train_rows": None, "gsm8k_eval_rows": 2, "domains": "aiops", "domain_train_rows": 7,
              "domain_eval_rows": 5}  # fmt: skip
    rows = read_rows(profile_of(tmp_path, download_datasets=wanted, generate_sft_data={"max_new_tokens": None}))
    assert (rows.train, rows.evaluation) == (7, 7)
    assert (rows.prompt_tokens, rows.answer_tokens) == ASSUMED["aiops"]


def test_lengths_as_given_and_never_beyond_the_limit(tmp_path):
    profile = profile_of(tmp_path, download_datasets={"gsm8k_train_rows": 3}, generate_sft_data={"max_new_tokens": 128})
    assert read_rows(profile).answer_tokens == 128
    rows = read_rows(profile, prompt_tokens=50, answer_tokens=40)
    assert (rows.prompt_tokens, rows.answer_tokens) == (50, 40)
    assert "prompt tokens as given; answer tokens as given" in rows.source


@pytest.mark.parametrize(
    ("section", "said"), [({}, "no training rows"), ({"prompts_file": "my.jsonl"}, "run that first")]
)
def test_nothing_says_how_many(tmp_path, section, said):
    with pytest.raises(UserError, match=said):
        read_rows(profile_of(tmp_path, download_datasets=section))


def test_clean_rows_are_counted(tmp_path, tiny_teacher, clean_rows, write_sft):
    rows = clean_rows(30)
    write_sft(tmp_path, rows, clean_rows(4, start=100))
    found = read_rows(profile_of(tmp_path, tiny_teacher, download_datasets={"gsm8k_train_rows": 9999}))
    assert (found.train, found.evaluation) == (30, 4)
    tokenizer = load_tokenizer(tiny_teacher)
    encoded = [encode_row(tokenizer, row, end_of_turn_id(tokenizer)) for row in rows]
    assert found.prompt_tokens == pytest.approx(sum(len(row.prompt_ids) for row in encoded) / 30)
    assert found.answer_tokens == pytest.approx(sum(len(row.response_ids) for row in encoded) / 30)
    assert found.tokens == found.prompt_tokens + found.answer_tokens


@pytest.mark.parametrize("counted", [True, False])
def test_prompts_are_counted_where_the_tokenizer_is_there(tmp_path, tiny_teacher, counted):
    (tmp_path / "data").mkdir()
    for split, count in (("train", 5), ("eval", 2)):
        rows = [{"id": f"{split}-{n}", "source": "gsm8k", "system": "", "prompt": "x" * 100} for n in range(count)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "data" / f"{split}_dataset.jsonl").write_text(text, encoding="utf-8")
    rows = read_rows(profile_of(tmp_path, tiny_teacher if counted else str(tmp_path)))
    assert (rows.train, rows.evaluation) == (5, 2)
    assert (100 < rows.prompt_tokens < 150) is counted, "a token a byte, and the template's"
    assert rows.answer_tokens == ASSUMED["gsm8k"][1]
    assert ("counted by the teacher's tokenizer" in rows.source) is counted
