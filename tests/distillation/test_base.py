import json
import shutil

import pytest
import torch

from src.distillation.base import (
    IGNORED,
    EncodedRow,
    causal_lm,
    collate,
    encode_row,
    end_of_turn_id,
    head_weight,
    load_tokenizer,
    prompt_text,
    response_hidden,
    response_ids,
    shared_vocabulary,
)
from src.distillation.lora import add_lora
from src.distillation.losses import kd_loss, plain_kd_loss
from src.utils.common import UserError

PAD, END, TOKENS = 256, 258, 261  # of the tiny tokenizer
THINK = "<think>\n\n</think>\n\n"


@pytest.fixture(scope="module")
def qwen3(real_data):
    return load_tokenizer(str(real_data / "tokenizers/qwen3"))


@pytest.fixture(params=["plain", "hybrid", "qwen3"])
def tokenizer(request, make_tokenizer):
    if request.param == "qwen3":
        return request.getfixturevalue("qwen3")
    return make_tokenizer(hybrid=request.param == "hybrid")


@pytest.fixture(scope="module", params=["qwen3", "qwen3_moe"])
def model(request, make_model):
    return make_model(moe=request.param == "qwen3_moe")


@pytest.fixture(scope="module")
def encoded(make_tokenizer, clean_rows):
    """Five rows of different lengths, for the tiny tokenizer."""
    return [encode_row(make_tokenizer(), row, END) for row in clean_rows(5, start=8)]


def messages(question, answer, system=None):
    start = [{"role": "system", "content": system}] if system else []
    return [*start, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_encode_row(tokenizer, system):
    """Prompt ids are the template's with the generation prompt, response ids the answer's and the end token."""
    clean = {"id": "a", "sample_index": 3, "messages": messages("2 + 2?", "It is 4.", system)}
    row = encode_row(tokenizer, clean, 7)
    prompt = "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    if system:
        prompt = f"<|im_start|>system\n{system}<|im_end|>\n{prompt}"
    if "enable_thinking" in tokenizer.chat_template:
        prompt += THINK
    assert tokenizer.decode(row.prompt_ids) == prompt
    assert list(row.prompt_ids) == tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(row.response_ids[:-1]) == "It is 4."
    assert row.response_ids[-1] == 7
    assert (row.id, row.sample_index, len(row)) == ("a", 3, len(row.prompt_ids) + len(row.response_ids))


def test_hybrid_prompt_ends_in_an_empty_think_block(qwen3, make_tokenizer):
    question = messages("hi", "")[:1]
    for hybrid in (qwen3, make_tokenizer(hybrid=True)):
        assert prompt_text(hybrid, question) == prompt_text(make_tokenizer(), question) + THINK
        assert prompt_text(hybrid, question, enable_thinking=True) == prompt_text(make_tokenizer(), question)


@pytest.mark.parametrize("text", ["stop <|im_end|> here<|im_end|>", "<|im_start|>user\nhi<|endoftext|>"])
def test_control_tokens_written_in_an_answer_are_text(tokenizer, text):
    """They would end the answer early in training. The prompt after it is read with control tokens again."""
    control = {tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")}
    ids = response_ids(tokenizer, text)
    assert not control & set(ids)
    assert tokenizer.decode(ids) == text
    assert control & set(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize(
    "text", [" leading", "trailing \n", "naïve 数学 🙂", "a\tb\r\n\n\n  c", "<think>\nhm\n</think>\n4"]
)
def test_answers_survive_encoding(tokenizer, text):
    assert tokenizer.decode(response_ids(tokenizer, text)) == text


def test_a_template_without_system_messages_is_one_line(make_tokenizer):
    tokenizer = make_tokenizer()
    refuse = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    tokenizer.chat_template = refuse + tokenizer.chat_template
    assert prompt_text(tokenizer, messages("hello", "you")[:1])
    with pytest.raises(UserError, match="refuses messages of system, user: System role not supported; take the"):
        prompt_text(tokenizer, messages("hello", "you", "Be kind.")[:2])


def test_end_of_turn_id(tokenizer):
    assert tokenizer.convert_ids_to_tokens(end_of_turn_id(tokenizer)) == "<|im_end|>"


def test_end_of_turn_id_of_the_real_tokenizer(qwen3):
    assert end_of_turn_id(qwen3) == 151_645


def test_template_without_an_end_of_turn(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "")
    with pytest.raises(UserError, match="no special token"):
        end_of_turn_id(tokenizer)


def test_shared_vocabulary_cuts_padding(make_tokenizer, encoded):
    assert shared_vocabulary(make_tokenizer(), make_tokenizer(True), 288, 320, encoded, encoded) == TOKENS


def test_shared_vocabulary_of_the_real_tokenizer(qwen3):
    assert shared_vocabulary(qwen3, qwen3, 151_936, 151_936, [], []) == 151_669


def test_different_vocabularies_are_refused(make_tokenizer):
    bigger = make_tokenizer()
    bigger.add_tokens(["<extra>"])
    with pytest.raises(UserError, match=r"261 tokens.* 262") as caught:
        shared_vocabulary(make_tokenizer(), bigger, 288, 320, [], [])
    assert "\n" not in str(caught.value)


def test_same_tokens_with_other_ids_are_refused(make_tokenizer, tmp_path, tiny_student):
    shutil.copytree(tiny_student, tmp_path / "swapped")
    path = tmp_path / "swapped/tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match="4 entries differ"):
        shared_vocabulary(make_tokenizer(), load_tokenizer(str(tmp_path / "swapped")), 288, 320, [], [])


def test_rows_encoded_differently_are_refused(make_tokenizer):
    ours, theirs = EncodedRow("row-7", (1,), (2, 3)), EncodedRow("row-7", (1,), (2, 4))
    with pytest.raises(UserError, match="row-7"):
        shared_vocabulary(make_tokenizer(), make_tokenizer(), 288, 320, [ours], [theirs])


@pytest.mark.parametrize(("student", "teacher", "name"), [(260, 320, "student"), (288, 260, "teacher")])
def test_fewer_logits_than_tokens_are_refused(make_tokenizer, student, teacher, name):
    with pytest.raises(UserError, match=f"the {name} has 260 logits .* 261 tokens"):
        shared_vocabulary(make_tokenizer(), make_tokenizer(), student, teacher, [], [])


def test_collate():
    batch = collate([EncodedRow("a", (1, 2), (3, END)), EncodedRow("b", (4,), (END,))], PAD)
    assert batch["input_ids"].tolist() == [[1, 2, 3, END], [4, END, PAD, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 3, END], [IGNORED, END, IGNORED, IGNORED]]


def test_a_pad_token_in_an_answer_is_a_label():
    """Labels follow positions, not ids: where pad and end are one token the end must still be learned."""
    assert collate([EncodedRow("a", (1,), (PAD, 3, PAD))], PAD)["labels"].tolist() == [[IGNORED, PAD, 3, PAD]]


@torch.no_grad()
def test_response_hidden_is_at_the_predicting_positions(model, encoded):
    """Against the model's own full logits, picked row by row: first answer token and end token are in, no more."""
    batch = collate(encoded, PAD)
    hidden, labels = response_hidden(model, batch)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = [
        logits[index, len(row.prompt_ids) + position - 1]
        for index, row in enumerate(encoded)
        for position in range(len(row.response_ids))
    ]
    assert labels.tolist() == [token for row in encoded for token in row.response_ids]
    torch.testing.assert_close(hidden @ head_weight(model, 288).T, torch.stack(expected))


@torch.no_grad()
def test_cross_entropy_is_the_models_own(model, encoded):
    """transformers shifts and masks the same labels itself."""
    batch = collate(encoded, PAD)
    hidden, labels = response_hidden(model, batch)
    sums = kd_loss(hidden, head_weight(model, 288), None, None, labels, temperature=1.0, alpha=0.0)
    assert (sums.loss / len(labels)).item() == pytest.approx(model(**batch).loss.item(), rel=1e-5)


@torch.no_grad()
def test_padding_changes_nothing(model, encoded):
    hidden, _ = response_hidden(model, collate(encoded, PAD))
    other, _ = response_hidden(model, collate(encoded, 17))
    assert torch.equal(other, hidden)
    alone = torch.cat([response_hidden(model, collate([row], PAD))[0] for row in encoded])
    torch.testing.assert_close(alone, hidden)


@torch.no_grad()
def test_only_predicting_positions_reach_the_loss(model, encoded):
    """Noise on the final hidden states of prompt, last token and padding is not seen; on any other position it is."""
    batch = collate(encoded, PAD)
    predicting = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    for index, row in enumerate(encoded):
        predicting[index, len(row.prompt_ids) - 1 : len(row) - 1] = True

    def loss(noisy=None):
        def add_noise(_, __, output):
            return output + 10 * torch.randn_like(output) * noisy[..., None]

        handle = model.get_decoder().norm.register_forward_hook(add_noise) if noisy is not None else None
        hidden, labels = response_hidden(model, batch)
        if handle:
            handle.remove()
        return kd_loss(hidden, head_weight(model, TOKENS), None, None, labels, temperature=1.0, alpha=0.0).loss.item()

    torch.manual_seed(0)
    clean = loss()
    assert loss(~predicting) == clean
    for index, row in ((0, encoded[0]), (4, encoded[4])):
        for position in (len(row.prompt_ids) - 1, len(row) - 2):  # before the first answer token, before the end token
            one = torch.zeros_like(predicting)
            one[index, position] = True
            assert loss(one) != clean


@torch.no_grad()
def test_response_hidden_of_a_peft_model(make_model, encoded):
    """Adapters are read; a fresh adapter changes nothing; with adapters off the student is as before."""
    batch = collate(encoded, PAD)
    before, _ = response_hidden(make_model(), batch)
    student = add_lora(make_model(), 4, 8, 0.0)
    assert causal_lm(student).config.model_type == "qwen3"
    assert torch.equal(response_hidden(student, batch)[0], before)
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            parameter.normal_()
    assert not torch.allclose(response_hidden(student, batch)[0], before)
    with student.disable_adapter():
        assert torch.equal(response_hidden(student, batch)[0], before)


def test_head_weight_cuts_padded_rows(make_model, encoded):
    """Padded logit columns take no part: whatever they hold, the loss is the same and they get no gradient."""
    model = make_model().requires_grad_(False)
    weight = model.lm_head.weight.requires_grad_()
    losses = []
    for size in (0.0, 1000.0):
        weight.data[TOKENS:] = size
        hidden, labels = response_hidden(model, collate(encoded, PAD))
        losses.append(kd_loss(hidden, head_weight(model, TOKENS), None, None, labels, temperature=1.0, alpha=0.0).loss)
    assert losses[0] == losses[1]
    losses[1].backward()
    assert (weight.grad[TOKENS:] == 0).all()
    assert (weight.grad[:TOKENS] != 0).any()


@torch.no_grad()
@pytest.mark.parametrize("student_is_moe", [False, True])
def test_templates_of_different_length_align(qwen3, make_tokenizer, make_model, student_is_moe):
    """The student's prompt carries an empty think block, the teacher's does not: token i of the answer meets token i.

    One batch through `response_hidden` and `kd_loss` against full logits of each row alone, picked from the row's end.
    """
    plain = load_tokenizer(qwen3.name_or_path)
    plain.chat_template = make_tokenizer().chat_template
    rows = [
        {"id": str(i), "messages": messages(f"What is {i} times {i}?", f"It is {i * i}. " * (i + 1))} for i in range(3)
    ]
    end, size = end_of_turn_id(qwen3), 151_669
    ours, theirs = ([encode_row(tokenizer, row, end) for row in rows] for tokenizer in (qwen3, plain))
    assert [len(a) - len(b) for a, b in zip(ours, theirs, strict=True)] == [4, 4, 4]
    assert shared_vocabulary(qwen3, plain, 151_936, 151_936, ours, theirs) == size

    student = make_model(moe=student_is_moe, seed=3, vocab_size=151_936, layers=1, initializer_range=0.2)
    teacher = make_model(moe=not student_is_moe, seed=4, vocab_size=151_936, layers=2, initializer_range=0.2)
    (hidden, labels), (teacher_hidden, teacher_labels) = (
        response_hidden(model, collate(rows, qwen3.pad_token_id))
        for model, rows in ((student, ours), (teacher, theirs))
    )
    assert torch.equal(labels, teacher_labels)
    objective = {"temperature": 2.0, "alpha": 0.5}
    heads = head_weight(student, size), head_weight(teacher, size)
    batched = kd_loss(hidden, heads[0], teacher_hidden, heads[1], labels, **objective)

    expected = torch.zeros(3)
    for our, their in zip(ours, theirs, strict=True):
        answer = len(our.response_ids)
        logits, teacher_logits = (
            model(input_ids=torch.tensor([row.prompt_ids + row.response_ids])).logits[0, -answer - 1 : -1, :size]
            for model, row in ((student, our), (teacher, their))
        )
        expected += torch.stack(plain_kd_loss(logits, teacher_logits, torch.tensor(our.response_ids), **objective))
    torch.testing.assert_close(torch.stack(batched), expected, rtol=1e-5, atol=0)
