"""Qwen3 as it is, but for the width: the real tokenizer and templates, 151,936 logits, a MoE teacher, a hybrid student.

The models are random but for one thing: each says words of a short list, one that may follow the other, and then ends
its turn. Head and embedding are made for that; attention and experts stir it.
"""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from src.distillation.base import (
    IGNORED,
    collate,
    encode_row,
    end_of_turn_id,
    load_model_config,
    load_tokenizer,
    prompt_text,
    skeleton,
)
from src.distillation.kd import run_kd_pipeline
from src.utils.common import read_json, read_jsonl, write_jsonl

pytestmark = pytest.mark.slow

TOKENS, LOGITS = 151_669, 151_936  # of the tokenizer, and of the output layers
THINK, END_THINK, END, LINE, TWO_LINES = "<think>", "</think>", "<|im_end|>", "\n", "\n\n"
EMPTY_THOUGHT = f"{THINK}{TWO_LINES}{END_THINK}{TWO_LINES}"
WORDS = ("It", " is", " easy", " sum", " total", " seven", " red", " blue", " the", " one", " two", ".", " So", " then")
OPENS = ("It", " So", " the")  # what an answer begins with
WIDTH, LOGIT = 64, 14.0  # e^14 against 151,936 others at about e^0: said words are all but certain at T = 1


def instruct_template(hybrid: str) -> str:
    """The template of Qwen3-30B-A3B-Instruct-2507 out of the hybrid models': both think blocks are taken out."""
    asked = (
        "\n    {%- if enable_thinking is defined and enable_thinking is false %}\n"
        "        {{- '<think>\\n\\n</think>\\n\\n' }}\n    {%- endif %}"
    )
    answered = r"'\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' + content.lstrip('\n')"
    for part, instead in ((asked, ""), (answered, r"'\n' + content")):
        assert hybrid.count(part) == 1
        hybrid = hybrid.replace(part, instead)
    return hybrid


def speak(model, tokenizer, begins: dict[str, tuple[str, ...]], seed: int) -> None:
    """Make the model follow each token by one of a few.

    Args:
        begins: what follows a token that is no word, such as the line break at the end of a prompt.
    """
    generator = torch.Generator().manual_seed(seed)
    followers = dict(begins)
    for word in WORDS:
        chosen = torch.randperm(len(WORDS), generator=generator)[:2].tolist()
        followers[word] = (*(WORDS[index] for index in chosen), END)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    with torch.no_grad():
        embedding.copy_(torch.randn(embedding.shape, generator=generator))
        head.copy_(0.02 * torch.randn(head.shape, generator=generator))
        for token, after in followers.items():
            [own], ids = tokenizer(token)["input_ids"], tokenizer.convert_tokens_to_ids([THINK, END_THINK, END])
            direction = embedding[own] / embedding[own].norm()
            for follower in after:
                [index] = tokenizer(follower)["input_ids"]
                # the last norm makes states sqrt(WIDTH) long; they point where their token's embedding does
                head[index] += LOGIT / WIDTH**0.5 * direction
            assert own < TOKENS
            assert max(ids) < TOKENS


def save_qwen3(folder: Path, real_data: Path, name: str, begins: dict, seed: int, thinks: bool, **sizes: int) -> str:
    """One of Qwen's models with its own config but for the sizes, and with its tokenizer and template."""
    config = load_model_config(str(real_data / "configs" / name))
    assert config.vocab_size == LOGITS
    small = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 16, "dtype": torch.float32, "layer_types": None}  # fmt: skip
    for key, value in (small | sizes).items():
        setattr(config, key, value)
    config.layer_types = ["full_attention"] * config.num_hidden_layers
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    tokenizer = AutoTokenizer.from_pretrained(real_data / "tokenizers" / "qwen3")
    if not thinks:
        tokenizer.chat_template = instruct_template(tokenizer.chat_template)
    speak(model, tokenizer, begins, seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("qwen3")


@pytest.fixture(scope="module")
def teacher(root, real_data) -> str:
    """As the 2507 models: without thoughts, its prompts end with the line break behind `assistant`."""
    return save_qwen3(root / "teacher", real_data, "qwen3-30b-a3b-instruct-2507", {LINE: OPENS}, 1, False, **MOE)


@pytest.fixture(scope="module")
def student(root, real_data) -> str:
    """As Qwen3-8B: hybrid, its prompts end with an empty thought."""
    return save_qwen3(root / "student", real_data, "qwen3-8b", {TWO_LINES: OPENS}, 2, True)


def write_profile(root: Path, teacher: str, student: str, experiment: str = "tiny", **changes: dict) -> str:
    own = root / "own.jsonl"
    if not own.is_file():
        write_jsonl(own, [{"prompt": f"Which of the colours has number {i}?", "reference": str(i)} for i in range(8)])
    values = {
        "data_dir": str(root / "data"),
        "experiment_dir": str(root / "experiment" / experiment),
        "teacher_model_name_or_path": teacher,
        "model_name_or_path": student,
        "seed": 7,
        "download_datasets": {
            "domains": ["maths"], "domain_train_rows": [12], "domain_eval_rows": [4],
            "prompts_file": str(own), "prompts_eval_fraction": 0.25,
        },
        "generate_sft_data": {
            "temperature": 0.7, "top_p": 0.8, "top_k": 20, "max_new_tokens": 48, "batch_size": 16,
        },
        "fix_sft_data": {"select": "all"},
        "cache_teacher": {
            "validation_fraction": 0.1, "bf16": False, "tokens_per_batch": 1024, "temperatures": [1.0, 2.5],
        },
        "run_improved_kd": {
            "temperature": 2.5, "learning_rate": 1e-2, "warmup_steps": 0, "lora_r": 8, "lora_alpha": 16,
            "batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3, "validation_fraction": 0.1,
            "eval_steps": 0, "save_steps": 0, "bf16": False, "compile_loss": False,
        },
        "evaluate_distillation": {
            "output_dir": str(root / "evaluation"), "mode": "quick", "temperatures": [0.7], "max_new_tokens": 48,
        },
    }  # fmt: skip
    for section, own_changes in changes.items():
        values[section] |= own_changes
    path = root / f"{experiment}.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def newest(root: Path, prefix: str) -> Path:
    return sorted((root / "experiment").glob(f"{prefix}_*"))[-1]


def losses(folder: Path | str, *names: str) -> list[list[float]]:
    names = names or ("loss", "kd_loss", "ce_loss", "grad_norm")
    rows = [row for row in read_jsonl(Path(folder) / "metrics.jsonl") if "loss" in row]
    return [[row[name] for name in names] for row in rows]


def test_each_model_reads_its_own_template(teacher, student, real_data):
    """The hybrid student is asked with an empty thought, the teacher without; their answers are the same tokens, which
    are predicted from the same place in either answer."""
    ours, theirs = load_tokenizer(student), load_tokenizer(teacher)
    row = {"id": "a", "messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "It is 4."}]}
    asked = f"<|im_start|>user\n2 + 2?{END}\n<|im_start|>assistant\n"
    assert prompt_text(theirs, row["messages"][:1]) == asked
    assert prompt_text(ours, row["messages"][:1]) == asked + EMPTY_THOUGHT
    assert prompt_text(ours, row["messages"][:1], enable_thinking=True) == asked
    rows = [encode_row(tokenizer, row, end_of_turn_id(tokenizer)) for tokenizer in (ours, theirs)]
    assert rows[0].response_ids == rows[1].response_ids == (*ours("It is 4.")["input_ids"], 151_645)
    assert rows[0].prompt_ids == (*rows[1].prompt_ids, 151_667, 271, 151_668, 271)
    labels = collate(rows, 151_643)["labels"]
    for label, own in zip(labels, rows, strict=True):
        assert label[label != IGNORED].tolist() == list(own.response_ids)
        assert label[: len(own.prompt_ids)].eq(IGNORED).all()
    # and they are the real ones: the student's is Qwen's own, the teacher's differs by its think blocks alone
    real = AutoTokenizer.from_pretrained(real_data / "tokenizers" / "qwen3").chat_template
    assert ours.chat_template == real
    assert theirs.chat_template == instruct_template(real)
    history = [*row["messages"], {"role": "user", "content": "Sure?"}]
    assert prompt_text(ours, history) == prompt_text(theirs, history) + EMPTY_THOUGHT


def test_the_whole_pipeline(root, teacher, student, succeeds):
    """Download, answer, clean, keep, control, distil by three signals, evaluate: by the scripts, as a user does."""
    profile = write_profile(root, teacher, student)
    # 1. prompts and answers: all of them end by themselves, and nothing but words is in them
    for name in ("prepare_models", "download_datasets", "generate_sft_data", "fix_sft_data"):
        succeeds(name, "--config", profile)
    sft = root / "experiment" / "tiny" / "sft"
    answers = read_jsonl(sft / "sft_train_data.jsonl") + read_jsonl(sft / "sft_eval_data.jsonl")
    assert len(answers) == 12 + 4 + 8
    ended = [row for row in answers if row["finish_reason"] == "stop"]
    assert len(ended) >= 0.9 * len(answers)
    stats = read_json(sft / "stats.json")
    assert sum(stats[split]["kept"] + stats[split]["rejected"] for split in ("train", "eval")) == len(answers)
    clean = read_jsonl(sft / "sft_train_data_clean.jsonl")
    assert not [row for row in clean if THINK in row["messages"][-1]["content"]]

    # 2. what the teacher believes: over the tokens that there are, not over the columns of its output layer
    succeeds("cache_teacher", "--config", profile)
    index = read_json(root / "experiment" / "tiny" / "teacher_cache" / "index.json")
    assert index["vocab_size"] == TOKENS < LOGITS
    assert index["tokens"] == sum(len(load_row) for load_row in response_tokens(sft, teacher))

    # 3. the control, and the student by every signal
    succeeds("run_improved_kd", "--config", profile, "--alpha", "0", "--teacher_signal", "hidden")
    succeeds("run_improved_kd", "--config", profile, "--teacher_signal", "hidden")
    hidden = newest(root, "gpu_optimized_kd")
    online = root / "experiment" / "online"
    succeeds("run_improved_kd", "--config", profile, "--teacher_signal", "online", "--output_dir", online)
    for ours, theirs in zip(losses(hidden), losses(online), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    results = read_json(hidden / "kd_results.json")
    assert results["after"]["kl_to_teacher"] < results["before"]["kl_to_teacher"]
    assert read_json(online / "kd_results.json")["after"] == pytest.approx(results["after"], rel=1e-3)

    succeeds("cache_teacher", "--config", profile, "--signal", "topk", "--overwrite")
    topk = root / "experiment" / "topk"
    succeeds("run_improved_kd", "--config", profile, "--teacher_signal", "topk", "--output_dir", topk)
    for exact, bucketed in zip(losses(hidden, "ce_loss")[:1], losses(topk, "ce_loss")[:1], strict=True):
        assert exact == pytest.approx(bucketed, rel=1e-5)  # before the first update the students are one
    [exact, *_], [bucketed, *_] = losses(hidden, "kd_loss"), losses(topk, "kd_loss")
    assert 0 < bucketed[0] < exact[0]  # what is outside the top k counts as one, which no divergence grows by

    # 4. four arms
    succeeds("evaluate_distillation", "--config", profile, "--model_path", hidden / "final_model")
    evaluation = read_json(root / "evaluation" / "results.json")
    assert evaluation["missing_arms"] == {}
    assert evaluation["heldout"]["arms"].keys() == {"base", "sft", "kd", "teacher"}
    for score in evaluation["graded"]["scores"]:
        assert sum(score["outcomes"].values()) == score["answers"] > 0


def response_tokens(sft: Path, teacher: str) -> list[tuple[int, ...]]:
    tokenizer = load_tokenizer(teacher)
    end_id = end_of_turn_id(tokenizer)
    rows = read_jsonl(sft / "sft_train_data_clean.jsonl") + read_jsonl(sft / "sft_eval_data_clean.jsonl")
    return [encode_row(tokenizer, row, end_id).response_ids for row in rows]


def with_huge_padding(folder: Path, name: str) -> str:
    """The model with output rows for tokens that do not exist which beat every other."""
    shutil.copytree(name, folder)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight[TOKENS:] = 1e4
    model.save_pretrained(folder)
    return str(folder)


def test_columns_beyond_the_vocabulary_take_no_part(root, teacher, student, clean_rows, write_sft):
    """267 logits of either model belong to no token; were one of them in a softmax, nothing else would be."""
    experiment = write_sft(root / "experiment" / "padded", clean_rows(8), clean_rows(2, start=100))
    settings = {"experiment_dir": str(experiment), "teacher_signal": "online", "gradient_accumulation_steps": 4,
                "max_steps": 2, "warmup_steps": 0, "learning_rate": 1e-2, "lora_r": 4, "eval_steps": 0, "save_steps": 0,
                "validation_fraction": 0, "bf16": False, "compile_loss": False}  # fmt: skip
    padded = (with_huge_padding(root / "padded_teacher", teacher), with_huge_padding(root / "padded_student", student))
    found = []
    for number, (theirs, ours) in enumerate(((teacher, student), padded)):
        names = {"teacher_model_name_or_path": theirs, "model_name_or_path": ours}
        results = run_kd_pipeline(settings | names | {"output_dir": str(root / f"run_{number}")})
        found.append((losses(results["run_dir"]), results["before"], results["after"], results["teacher"]))
    assert found[0] == found[1]
    assert all(0 < loss < 50 for row in found[0][0] for loss in row)


def test_thoughts_on_and_off(root, student, real_data, succeeds):
    """A hybrid teacher is asked to think: it does, and what it thought is in the raw answer and in no row."""
    says = {LINE: (THINK,), THINK: (" hm",), " hm": (END_THINK,), END_THINK: (TWO_LINES,), TWO_LINES: OPENS}
    hybrid = save_qwen3(root / "hybrid", real_data, "qwen3-30b-a3b-instruct-2507", says, 3, True, **MOE)
    few = {"download_datasets": {"domain_train_rows": [6], "domain_eval_rows": [2], "prompts_file": ""}}
    for thinks in (True, False):
        name = "thinking" if thinks else "silent"
        profile = write_profile(root, hybrid, student, name, generate_sft_data={"enable_thinking": thinks}, **few)
        data = root / f"data_{name}"
        for stage in ("download_datasets", "generate_sft_data", "fix_sft_data"):
            succeeds(stage, "--config", profile, "--data_dir", data)
        sft = root / "experiment" / name / "sft"
        raw = [row for row in read_jsonl(sft / "sft_train_data.jsonl") if row["finish_reason"] == "stop"]
        assert len(raw) >= 5
        assert all(row["response"].startswith(f"{THINK} hm{END_THINK}\n\n") == thinks for row in raw)
        rows = read_jsonl(sft / "sft_train_data_clean.jsonl")
        assert len(rows) >= 3
        for row in rows:
            said = row["messages"][-1]["content"]
            assert said.startswith(tuple(word.strip() for word in OPENS))
            assert not any(word in said for word in (THINK, END_THINK, "hm"))


def test_answers_that_were_brought_with_thoughts(root, teacher, student, succeeds, clean_rows):
    """Raw answers out of a thinking model, as a person may bring them: cut, cleaned, and encoded without a thought."""
    profile = write_profile(root, teacher, student, "brought")
    sft = root / "experiment" / "brought" / "sft"
    sft.mkdir(parents=True)
    data = root / "data_brought"
    succeeds("download_datasets", "--config", profile, "--data_dir", data)
    for split in ("train", "eval"):
        answers = []
        for number, row in enumerate(read_jsonl(data / f"{split}_dataset.jsonl")):
            thought = "<think>\nFirst, hm.\n</think>\n\n" if number % 2 else ""
            answers.append({"id": row["id"], "sample_index": 0, "finish_reason": "stop", "num_tokens": None,
                            "response": f"{thought}It is {number}."})  # fmt: skip
        write_jsonl(sft / f"sft_{split}_data.jsonl", answers)
    for stage in ("generate_sft_data", "fix_sft_data"):
        succeeds(stage, "--config", profile, "--data_dir", data)
    rows = read_jsonl(sft / "sft_train_data_clean.jsonl")
    assert len(rows) == len(read_jsonl(data / "train_dataset.jsonl"))
    tokenizer = load_tokenizer(student)
    for row in rows:
        encoded = encode_row(tokenizer, row, end_of_turn_id(tokenizer))
        assert tokenizer.decode(encoded.response_ids) == row["messages"][-1]["content"] + END
        assert 151_667 not in encoded.response_ids
        assert encoded.prompt_ids[-4:] == (151_667, 271, 151_668, 271)


def test_the_true_vocabulary_is_that_of_the_reference(real_data):
    for name in ("qwen3-8b", "qwen3-30b-a3b-instruct-2507"):
        model = skeleton(load_model_config(str(real_data / "configs" / name)))
        assert model.get_output_embeddings().weight.shape[0] == LOGITS
    vocabulary = load_tokenizer(str(real_data / "tokenizers" / "qwen3")).get_vocab()
    assert len(vocabulary) == max(vocabulary.values()) + 1 == TOKENS
