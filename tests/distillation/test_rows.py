"""One law: prompt and answer are what the model reads where its own template renders the conversation."""

import datetime
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers.utils import chat_template_utils

from src.distillation.base import (
    answer_turn,
    encode_row,
    end_of_turn_id,
    ending_tokenizer,
    load_tokenizer,
    opened_thought,
    prompt_ids,
    prompt_text,
)
from src.distillation.batching import shared_end_of_turn
from src.utils.common import UserError
from tests.distillation.families import FAMILIES, family_tokenizer

HELLO = [{"role": "user", "content": "hello"}]
ANSWERED = sorted(name for name, family in FAMILIES.items() if not family.refused)


def row_of(answer, question="Two plus two?", system=None):
    start = [{"role": "system", "content": system}] if system else []
    messages = [*start, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": "m", "messages": messages}


def rendered_ids(tokenizer, messages):
    """What the model reads where its template renders the conversation today."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def follows_the_law(tokenizer, row):
    """The row's ids are a beginning of the rendered conversation, and end with its end of turn."""
    end = end_of_turn_id(tokenizer)
    encoded = encode_row(tokenizer, row, end)
    ids = [*encoded.prompt_ids, *encoded.response_ids]
    return ids == rendered_ids(tokenizer, row["messages"])[: len(ids)] and ids[-1] == end


@pytest.fixture(scope="module")
def tokenizers():
    return {name: family_tokenizer(family) for name, family in FAMILIES.items()}


WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=30)


@pytest.mark.parametrize("name", ANSWERED)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(answer=WORDS, question=WORDS)
def test_every_family_reads_what_its_template_renders(tokenizers, name, answer, question):
    tokenizer = tokenizers[name]
    row = row_of(answer.strip() or "4", question.strip() or "2 + 2?")
    assert follows_the_law(tokenizer, row)
    encoded = encode_row(tokenizer, row, end_of_turn_id(tokenizer))
    assert tokenizer.decode(encoded.response_ids, skip_special_tokens=True).strip() == row["messages"][-1]["content"]


@pytest.mark.parametrize("name", ANSWERED)
def test_training_and_answering_share_one_prompt(tokenizers, name):
    """The ids that an engine gives the model are those before the response in training, whatever the answer's start."""
    tokenizer = tokenizers[name]
    [asked] = prompt_ids(tokenizer, [prompt_text(tokenizer, row_of("")["messages"][:1])])
    for answer in ("Four it is.", "4", "- 4", "“4”", "数", "`4`", "(4)"):
        assert list(encode_row(tokenizer, row_of(answer), 0).prompt_ids) == asked


@pytest.mark.parametrize("name", ANSWERED)
def test_the_end_of_turn_of_every_family(tokenizers, name):
    assert tokenizers[name].convert_ids_to_tokens(end_of_turn_id(tokenizers[name])) == FAMILIES[name].control[-1]


@pytest.mark.parametrize("name", sorted(set(ANSWERED) - {"gemma"}))
def test_system_messages(tokenizers, name):
    assert follows_the_law(tokenizers[name], row_of("Four it is.", system="Be brief."))


@pytest.mark.parametrize("name", ANSWERED)
@pytest.mark.parametrize("spelt", ["{end}", "a {end} b{end}", "{end}{end}", "x {first}"])
def test_control_tokens_spelt_in_an_answer_stay_text(tokenizers, name, spelt):
    tokenizer, control = tokenizers[name], FAMILIES[name].control
    answer = spelt.format(end=control[-1], first=control[0])
    *response, end = encode_row(tokenizer, row_of(answer), end_of_turn_id(tokenizer)).response_ids
    assert not set(response) & set(tokenizer.convert_tokens_to_ids(list(control)))
    assert tokenizer.decode(response).strip() == answer
    assert end == end_of_turn_id(tokenizer)


def test_code_that_names_the_think_tag_keeps_what_stands_before_it(tokenizers):
    """Qwen3's template cuts an answer at `</think>`, wherever it stands."""
    answer = 'Do:\n```python\nreturn s.split("</think>")[-1]\n```'
    tokenizer = tokenizers["qwen3_hybrid"]
    assert tokenizer.decode(encode_row(tokenizer, row_of(answer), 0).response_ids[:-1]) == answer


@pytest.mark.parametrize(
    ("name", "answer", "kept"),
    [
        ("llama3", " 4 \n", "4"),
        ("gemma", "\n\n4", "4"),
        ("qwen3_instruct", " 4\n", " 4\n"),
        ("qwen3_hybrid", "\n\n 4 ", " 4 "),
    ],
)
def test_blanks_at_the_ends_are_kept_as_the_template_keeps_them(tokenizers, name, answer, kept):
    tokenizer = tokenizers[name]
    encoded = encode_row(tokenizer, row_of(answer), end_of_turn_id(tokenizer))
    assert follows_the_law(tokenizer, row_of(answer))
    assert tokenizer.decode(encoded.response_ids[:-1]) == kept


def test_a_thinking_template_is_refused_by_name_or_closed(tokenizers, make_tokenizer):
    with pytest.raises(
        UserError, match=r"chat template asks for an answer with '<think>\\n' where a finished"
    ) as caught:
        end_of_turn_id(tokenizers["deepseek_r1"])
    assert "\n" not in str(caught.value)
    assert "mend its chat_template.jinja" in str(caught.value)
    assert prompt_text(tokenizers["qwen3_thinking"], HELLO).endswith("assistant\n<think>\n\n</think>\n\n")
    always = make_tokenizer()
    always.chat_template = always.chat_template.replace("assistant\\\\n", "assistant\\\\n[THINK]")
    always.chat_template = always.chat_template.removesuffix("{%- endif %}") + "{{- '[THINK]' }}{%- endif %}"
    with pytest.raises(UserError, match="inside what it opens"):
        prompt_text(always, HELLO)
    # asked to think, each of them may
    assert opened_thought(prompt_text(tokenizers["deepseek_r1"], HELLO, enable_thinking=True)) == "<think>\n"
    assert opened_thought(prompt_text(always, HELLO, enable_thinking=True)) == "[THINK]"
    assert opened_thought(prompt_text(tokenizers["qwen3_hybrid"], HELLO, enable_thinking=True)) == ""


def test_a_template_that_drops_the_answer_is_refused(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("message.content", "message.role")
    with pytest.raises(UserError, match="does not write what the assistant said"):
        encode_row(tokenizer, row_of("4"), 258)


def test_words_between_prompt_and_answer_belong_to_the_prompt(tokenizers):
    assert prompt_text(tokenizers["gpt_oss"], HELLO).endswith("<|start|>assistant<|channel|>final<|message|>")


def test_a_blank_before_the_end_is_the_models_to_say(make_tokenizer, tokenizers):
    blank = make_tokenizer()
    blank.chat_template = blank.chat_template.replace("+ '<|im_end|>", "+ ' <|im_end|>")
    encoded = encode_row(blank, row_of("Four it is."), end_of_turn_id(blank))
    assert blank.decode(encoded.response_ids) == "Four it is. <|im_end|>"
    assert follows_the_law(blank, row_of("Four it is."))
    assert answer_turn(tokenizers["llama2"], HELLO).gap == " "
    with pytest.raises(UserError, match="student's chat template writes ' ', the teacher's ''"):
        shared_end_of_turn(blank, make_tokenizer())


def test_a_blank_that_a_tokenizer_puts_before_every_text_is_not_the_answers(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    encoded = encode_row(tokenizer, row_of("Four it is."), end_of_turn_id(tokenizer))
    assert tokenizer.decode(encoded.response_ids[:-1]) == "Four it is."
    assert follows_the_law(tokenizer, row_of("Four it is."))


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_metaspace_behind_a_control_token(make_tokenizer, scheme):
    """The answer follows a control token: "▁Four" is one token, and the prompt does not end in a lone blank."""
    tokenizer = family_tokenizer(FAMILIES["mistral"])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    for template in ("{{ eos_token }}", "{{ ' ' }}", ""):
        tokenizer.chat_template = (
            "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
            + template
            + "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
        )
        assert follows_the_law(tokenizer, row_of("Four it is."))
        [asked] = prompt_ids(tokenizer, [prompt_text(tokenizer, row_of("")["messages"][:1])])
        assert tokenizer.convert_ids_to_tokens(asked[-1]) != "▁"


class OtherDay(datetime.datetime):
    @classmethod
    def now(cls, *_):
        return cls(2031, 3, 9)


@pytest.mark.parametrize("name", ["llama3", "gpt_oss"])
def test_a_date_is_the_experiments(tokenizers, name, tmp_path, monkeypatch):
    """Today and on another day the rows are the same; another experiment may have its own; without one it is fixed."""
    tokenizers[name].save_pretrained(tmp_path / "tokenizer")

    def encoded(experiment):
        tokenizer = load_tokenizer(str(tmp_path / "tokenizer"), experiment)
        return encode_row(tokenizer, row_of("4"), 0), prompt_text(tokenizer, HELLO)

    first, alone = encoded(tmp_path / "one"), encoded("")
    today = datetime.date.today()
    assert json.loads((tmp_path / "one" / "prompt_date.json").read_text()) == {"date": today.isoformat()}
    assert today.strftime("%d %b %Y" if name == "llama3" else "%Y-%m-%d") in first[1]
    monkeypatch.setattr(chat_template_utils, "datetime", OtherDay)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "prompt_date.json").write_text('{"date": "2031-03-09"}')
    assert encoded(tmp_path / "one") == first
    assert encoded("") == alone
    assert ("09 Mar 2031" if name == "llama3" else "2031-03-09") in encoded(tmp_path / "two")[1]


def test_a_broken_date_file_is_one_line(tokenizers, tmp_path):
    tokenizers["llama3"].save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "prompt_date.json").write_text('{"date": "yesterday"}')
    with pytest.raises(UserError, match=r"prompt_date.json: expected .*YYYY-MM-DD"):
        load_tokenizer(str(tmp_path / "tokenizer"), tmp_path)


def test_a_template_without_a_date_leaves_no_file(tokenizers, tmp_path):
    tokenizers["phi3"].save_pretrained(tmp_path / "tokenizer")
    load_tokenizer(str(tmp_path / "tokenizer"), tmp_path / "experiment")
    assert not (tmp_path / "experiment").exists()


def test_the_saved_tokenizer_of_a_base_student_ends_at_the_turn(make_tokenizer):
    base = make_tokenizer()
    base.eos_token = "<|endoftext|>"
    assert ending_tokenizer(base).eos_token == "<|im_end|>"
    assert base.eos_token == "<|endoftext|>"
    base.chat_template = "{{ eos_token }}" + base.chat_template  # then it would read otherwise
    assert ending_tokenizer(base).eos_token == "<|endoftext|>"


def test_of_several_templates_the_default_is_read(make_tokenizer, tmp_path):
    named = make_tokenizer()
    named.chat_template = {"default": named.chat_template, "tool_use": "{{ 'tools' }}"}
    assert prompt_text(named, HELLO) == prompt_text(make_tokenizer(), HELLO)
    named.save_pretrained(tmp_path / "named")
    assert load_tokenizer(str(tmp_path / "named")).chat_template == make_tokenizer().chat_template
    named.chat_template = {"tool_use": "{{ 'tools' }}", "rag": "{{ 'sources' }}"}
    named.save_pretrained(tmp_path / "without")
    with pytest.raises(UserError, match=r"cannot be loaded: .*multiple chat templates"):
        load_tokenizer(str(tmp_path / "without"))
