import json
import random
from collections import Counter
from textwrap import indent

import pytest

from src.data.cleaning import (
    ALIKE,
    REASONS,
    clean,
    count,
    drop_overlapping,
    near_duplicates,
    overlap_index,
    word_ngrams,
)
from src.data.code_overlap import function_trees
from src.data.sources import gsm8k_rows
from src.grading.rows import dataset_row, question_of
from src.utils.common import UserError, read_jsonl

LONG = "Anna picks seven red apples and her brother picks 12 green pears before they walk home to share them"


def make_row(prompt="How many apples are left?", reference="72", grader="numeric", split="train", **extra):
    return dataset_row(
        source=extra.pop("source", "gsm8k"), domain="maths", split=split, prompt=prompt,
        instruction="End with #### <number>", reference=reference, grader=grader,
        system=extra.pop("system", ""), grader_args=extra,
    )  # fmt: skip


def make_answer(row, response="So 72.\n#### 72", sample_index=0, finish_reason="stop", **extra):
    base = {"num_tokens": 9, "engine": "transformers", "sampling": {}, "seed": 0, "prompt": row["prompt"]}
    return base | {
        "id": row["id"], "sample_index": sample_index, "response": response, "finish_reason": finish_reason,
    } | extra  # fmt: skip


def reasons(answers, rows, eval_rows=(), select="all_correct"):
    return [row["reason"] for row in clean(answers, rows, list(eval_rows), select, minimum=0)[1]]


def test_kept_row_is_conversational():
    row = make_row(system="Be brief.")
    kept, rejected, _ = clean([make_answer(row, "  So 72.\n#### 72\n")], [row], [], "all_correct")
    assert rejected == []
    assert kept == [
        {
            "id": row["id"],
            "sample_index": 0,
            "source": "gsm8k",
            "domain": "maths",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": "So 72.\n#### 72"},
            ],
            "verified": True,
        }
    ]
    assert clean([make_answer(make_row())], [make_row()], [], "all")[0][0]["messages"][0]["role"] == "user"


@pytest.mark.parametrize(
    ("response", "finish_reason", "reason"),
    [
        ("", "stop", "empty"),
        (" \n ", "length", "empty"),
        ("So 72.\n#### 72", "length", "truncated"),
        ("So 72.\n#### 72", "error", "truncated"),
        ("<think>72 it is", "stop", "think_tag"),
        ("<think>a</think><think>#### 72", "stop", "think_tag"),
        ("<think>72 it is</think>", "stop", "empty"),
        ("well </think> #### 72 <|im_end|>", "stop", "special_token"),
        ("<think>surely 71 #### 71</think>\n\n#### 72", "stop", None),
        ("surely 72 #### 72</think>\n\n#### 71", "stop", "wrong"),
        ("surely 72 #### 72\n</think>\n#### 72", "stop", None),
        ("<think>It says #### 72", "length", "truncated"),
        ("#### 72<|im_end|>", "stop", "special_token"),
        ("#### 72</s>", "stop", "special_token"),
        ("#### 72 <eos>\n", "stop", "special_token"),
        ("<s>71</s> no:\n#### 72", "stop", None),
        ("It ends with `<|im_end|>`.\n#### 72", "stop", None),
        ("The tag </think> is said.\n#### 72", "stop", "think_tag"),
        ("The tag `</think>` is spelt.\n#### 72", "stop", None),
        ("#### 72", "eos", None),
        ("#### 72", "END_TURN", None),
        ("#### 72", "max_tokens", "truncated"),
        ("", "refused", "refused"),
        ("", "content_filter", "refused"),
        ("<|im_start|>assistant\n#### 72", "stop", "special_token"),
        ("[INST] #### 72", "stop", "special_token"),
        ("I'm sorry, but I can't help with that. #### 72", "stop", "refusal"),
        ("I’m sorry, but I cannot do so. #### 72", "stop", "refusal"),
        ("As an AI language model, I cannot count. #### 72", "stop", "refusal"),
        ("Sorry, I am unable to answer. #### 72", "stop", "refusal"),
        ("I cannot assist with that. #### 72", "stop", "refusal"),
        ("很抱歉，我无法回答。#### 72", "stop", "refusal"),
        ("作为一个人工智能助手，我不能提供。#### 72", "stop", "refusal"),
        ("抱歉让你久等。#### 72", "stop", None),
        ("#### 71", "stop", "wrong"),
        ("I do not know.", "stop", "wrong"),
        ("I'm sorry for the ducks. #### 72", "stop", None),
        ("I cannot see any left but 72. #### 72", "stop", None),
        ("I can't help but notice that it is 72. #### 72", "stop", None),
        ("She said: I'm sorry, but I can't. #### 72", "stop", None),
        ("a < b and b | c > d. #### 72", "stop", None),
    ],
)
def test_reason_that_shows_in_one_answer(response, finish_reason, reason):
    row = make_row()
    assert reasons([make_answer(row, response, finish_reason=finish_reason)], [row]) == ([reason] if reason else [])


def test_unknown_id_and_duplicates():
    row, stranger = make_row(), make_row("Where from?")
    answers = [
        make_answer(stranger),
        make_answer(row),
        make_answer(row, "Other words.\n#### 72"),
        make_answer(row, "so 72.\n\n####  72", sample_index=1),
        make_answer(row, "#### 71", sample_index=2),
        make_answer(row, "#### 71", sample_index=3),
        make_answer(row, "Other words.\n#### 72", sample_index=4),
    ]
    kept, rejected, stats = clean(answers, [row], [], "all_correct")
    assert [row["sample_index"] for row in kept] == [0, 4]
    assert [row["reason"] for row in rejected] == ["unknown_id", "duplicate_key", "duplicate", "wrong", "wrong"]
    assert rejected[0] == {"id": stranger["id"], "sample_index": 0, "reason": "unknown_id"}
    assert reasons(answers, [row], select="all") == ["unknown_id", "duplicate_key", "duplicate", "duplicate"]
    assert stats["by_source"]["unknown"]["rejected"] == {"unknown_id": 1}


def test_same_words_under_two_prompts_are_no_duplicates():
    rows = [make_row(), make_row("How many pears?")]
    assert reasons([make_answer(row) for row in rows], rows) == []


def test_verified_follows_the_grader():
    code = make_row("Write f.", grader="python_tests", entry_point="f", source="humaneval")
    rows = [make_row(), code]
    answers = [
        make_answer(rows[0]),
        make_answer(rows[0], "#### 71", 1),
        make_answer(rows[0], "no idea", 2),
        make_answer(code, "```python\ndef f(): pass\n```"),
        make_answer(code, "no code", 1),
    ]
    assert [row["verified"] for row in clean(answers, rows, [], "all")[0]] == [True, False, False, None, False]
    assert [row["verified"] for row in clean(answers, rows, [], "all_correct")[0]] == [True, None]


@pytest.mark.parametrize(
    ("select", "kept", "reasons_of"),
    [
        ("first_correct", {"maths": [1], "hard": [], "code": [0]},
         {("maths", 0): "wrong", ("maths", 2): "duplicate", ("maths", 3): "not_selected", ("hard", 0): "wrong",
          ("hard", 1): "truncated", ("code", 1): "not_selected"}),
        ("shortest_correct", {"maths": [3], "hard": [], "code": [1]},
         {("maths", 0): "wrong", ("maths", 1): "not_selected", ("maths", 2): "duplicate", ("hard", 0): "wrong",
          ("hard", 1): "truncated", ("code", 0): "not_selected"}),
        ("all_correct", {"maths": [1, 3], "hard": [], "code": [0, 1]},
         {("maths", 0): "wrong", ("maths", 2): "duplicate", ("hard", 0): "wrong", ("hard", 1): "truncated"}),
        ("all", {"maths": [0, 1, 3], "hard": [0], "code": [0, 1]},
         {("maths", 2): "duplicate", ("hard", 1): "truncated"}),
    ],
)  # fmt: skip
def test_best_of_n(select, kept, reasons_of):
    """Every answer is kept or has its reason; what nothing can judge is labelled; the acceptance rate is the sampler's
    and does not depend on the choice."""
    rows = {"maths": make_row(), "hard": make_row("Why?"), "code": make_row("Write f.", grader="none", source="own")}
    name_of = {row["id"]: name for name, row in rows.items()}
    answers = [
        make_answer(rows["maths"], "#### 71", 0),
        make_answer(rows["maths"], "Well, it is 72.\n#### 72", 1),
        make_answer(rows["maths"], "well, it is 72. #### 72", 2),
        make_answer(rows["maths"], "#### 72", 3),
        make_answer(rows["hard"], "#### 1", 0),
        make_answer(rows["hard"], "#### 72", 1, finish_reason="length"),
        make_answer(rows["code"], "return the answer", 0),
        make_answer(rows["code"], "return it", 1),
    ]
    found, rejected, stats = clean(answers, list(rows.values()), [], select)
    assert {name: [r["sample_index"] for r in found if name_of[r["id"]] == name] for name in rows} == kept
    assert {(name_of[r["id"]], r["sample_index"]): r["reason"] for r in rejected} == reasons_of
    assert [r["verified"] for r in found if name_of[r["id"]] == "code"] == [None] * len(kept["code"])
    maths, own = stats["by_source"]["gsm8k"], stats["by_source"]["own"]
    assert (maths["acceptance_rate"], own["acceptance_rate"]) == (3 / 6, None)
    assert (maths["prompts"], maths["prompts_kept"]) == (2, 2 if select == "all" else 1)
    assert (own["unverifiable"], maths["unverifiable"]) == (2, 0)


def test_one_correct_answer_is_chosen_before_the_unverifiable():
    row = make_row("Write f.", grader="python_tests", entry_point="f")
    answers = [make_answer(row, "```python\ndef f(): pass\n```", 0), make_answer(row, "no code", 1)]
    assert [r["sample_index"] for r in clean(answers, [row], [], "first_correct")[0]] == [0]
    wrong = [make_answer(row, "no code", 0), make_answer(row, "```python\ndef f(): pass\n```", 1)]
    assert [r["sample_index"] for r in clean(wrong, [row], [], "first_correct")[0]] == [1]


def test_thoughts_never_enter_a_row():
    row = make_row()
    kept, _, _ = clean([make_answer(row, "<think>\nSecret: 70 + 2\n</think>\n\nSo 72.\n#### 72")], [row], [], "all")
    assert kept[0]["messages"][-1]["content"] == "So 72.\n#### 72"


def test_code_is_verified_by_running_it(sandbox):
    sound, broken = "def check(f):\n    assert f(3) == 4", "def check(f):\n    import no_such_module"
    rows = [make_row("Write f.", grader="python_tests", entry_point="f", tests=tests) for tests in (sound, broken)]
    right, stub = "```python\ndef f(x): return x + 1\n```", "```python\ndef f(x): pass\n```"
    answers = [make_answer(rows[0], stub), make_answer(rows[1], right), make_answer(rows[0], right, 1)]
    kept, rejected, _ = clean(answers, rows, [], "all_correct", sandbox=sandbox)
    assert [(row["id"], row["verified"]) for row in kept] == [(rows[1]["id"], None), (rows[0]["id"], True)]
    assert rejected == [{"id": rows[0]["id"], "sample_index": 0, "reason": "wrong"}]
    assert [row["verified"] for row in clean(answers, rows, [], "all", sandbox=sandbox)[0]] == [False, None, True]


@pytest.mark.parametrize("where", ["question", "reference"])
def test_answer_that_quotes_the_evaluation_is_rejected(where):
    row = make_row()
    held = make_row(LONG, split="eval") if where == "question" else make_row(reference=LONG, grader="rubric")
    words = LONG.split()
    quote = " ".join(words[2:15]).upper().replace(" AND ", ", and - ")
    assert len(words[2:15]) == 13
    assert reasons([make_answer(row, f"{quote}. #### 72")], [row], [held]) == ["eval_overlap"]
    assert reasons([make_answer(row, f"{' '.join(words[2:14])} #### 72")], [row], [held]) == []
    assert reasons([make_answer(row, f"{quote}. #### 72")], [row], []) == []


def test_words_of_the_own_prompt_are_no_overlap():
    row = make_row(f"{LONG}. How many are left?")
    held = make_row(f"{LONG}. How many pears are there?", split="eval")
    answer = make_answer(row, f"{LONG}. #### 72")
    assert reasons([answer], [row], [held]) == []
    assert reasons([make_answer(row, f"{LONG}. How many pears are there? #### 72")], [row], [held]) == ["eval_overlap"]


def test_short_question_counts_as_a_whole_and_a_number_not_at_all():
    row = make_row("What now?")
    held = [make_row("How many blue marbles does Tom have left?", reference="72"), make_row("How many?", reference="9")]
    assert reasons([make_answer(row, "how many blue marbles does Tom have left: 72")], [row], held) == ["eval_overlap"]
    assert reasons([make_answer(row, "how many blue marbles does Tom have: 72")], [row], held) == []
    assert reasons([make_answer(row, "72"), make_answer(row, "how many? 72", 1)], [row], held) == []


def test_stats_add_up():
    rows = [make_row(), make_row("Write f.", grader="python_tests", source="humaneval", entry_point="f")]
    answers = [
        make_answer(rows[0]),
        make_answer(rows[0], "", 1),
        make_answer(rows[0], "#### 71", 2),
        make_answer(rows[0], "#### 70", 3),
        make_answer(rows[1], "```python\ndef f(): pass\n```"),
        make_answer(make_row("Who?")),
    ]
    _, _, stats = clean(answers, rows, [], "all_correct")
    assert stats == {
        "answers": 6,
        "kept": 2,
        "rejected": 4,
        "by_reason": dict.fromkeys(REASONS, 0) | {"unknown_id": 1, "empty": 1, "wrong": 2},
        "by_source": {
            "gsm8k": {
                "answers": 4,
                "prompts": 1,
                "kept": 1,
                "prompts_kept": 1,
                "rejected": {"empty": 1, "wrong": 2},
                "verified": {"true": 1, "false": 0, "null": 0},
                "unverifiable": 0,
                "acceptance_rate": 0.25,
            },
            "humaneval": {
                "answers": 1,
                "prompts": 1,
                "kept": 1,
                "prompts_kept": 1,
                "rejected": {},
                "verified": {"true": 0, "false": 0, "null": 1},
                "unverifiable": 1,
                "acceptance_rate": None,
            },
            "unknown": {
                "answers": 1,
                "prompts": 1,
                "kept": 0,
                "prompts_kept": 0,
                "rejected": {"unknown_id": 1},
                "verified": {"true": 0, "false": 0, "null": 0},
                "unverifiable": 0,
                "acceptance_rate": None,
            },
        },
    }
    assert json.loads(json.dumps(stats)) == stats


@pytest.mark.parametrize("grader", ["none", "python_tests"])
def test_a_source_that_nothing_can_judge_has_no_acceptance_rate(grader):
    """Faults of form are found without a grader: they are no share of anything."""
    rows = [make_row("Write f.", grader=grader, source="own", entry_point="f"), make_row()]
    code = "```python\ndef f(): pass\n```"
    answers = [
        make_answer(rows[0], code),
        make_answer(rows[0], code, 1, finish_reason="length"),
        make_answer(rows[0], "I cannot help with that.", 2),
        make_answer(rows[1]),
        make_answer(rows[1], "So 72.", 1, finish_reason="length"),
    ]
    by_source = clean(answers, rows, [], "all_correct")[2]["by_source"]
    assert (by_source["own"]["acceptance_rate"], by_source["own"]["unverifiable"]) == (None, 3)
    assert (by_source["gsm8k"]["acceptance_rate"], by_source["gsm8k"]["unverifiable"]) == (1 / 2, 0)
    cut = clean(answers[1:2], rows, [], "all_correct", minimum=0)[2]["by_source"]["own"]
    assert (cut["rejected"], cut["acceptance_rate"]) == ({"truncated": 1}, None)


def test_rows_without_a_grader_do_not_lower_the_acceptance_rate():
    rows = [make_row(), make_row("Tell me of it.", grader="none")]
    answers = [make_answer(rows[0]), make_answer(rows[1]), make_answer(rows[1], "It", 1, finish_reason="length")]
    gsm8k = clean(answers, rows, [], "all_correct")[2]["by_source"]["gsm8k"]
    assert (gsm8k["acceptance_rate"], gsm8k["unverifiable"]) == (1.0, 2)


def test_lost_answer_is_an_assertion():
    row = make_row()
    with pytest.raises(AssertionError, match="gsm8k: answers != kept"):
        count([make_answer(row)], [], [], {row["id"]: "gsm8k"}, Counter())


def test_too_few_kept_and_unknown_select_are_user_errors():
    row = make_row()
    with pytest.raises(UserError, match=r"0 of 1 answers are kept, 1 are needed \(rejected: wrong 1\)"):
        clean([make_answer(row, "#### 71")], [row], [], "all_correct")
    with pytest.raises(UserError, match="select = 'best' is not known; say first_correct"):
        clean([make_answer(row)], [row], [], "best")


def test_word_ngrams():
    assert word_ngrams("One, two THREE; four_five!", 3) == {"one two three", "two three four_five"}
    assert word_ngrams("one two", 3) == set()


def test_template_wording_is_no_overlap():
    rows = [make_row(f"{LONG}. Alert {number}: service {number} of the north zone is down") for number in range(11)]
    assert len(overlap_index(rows[:10]) & word_ngrams(LONG, 13)) == len(word_ngrams(LONG, 13))
    assert not overlap_index(rows) & word_ngrams(LONG, 13)
    held = [make_row(f"{LONG}. Question about marbles")]
    train = [make_row(f"{LONG}. The {thing} first") for thing in "abcdefghij"]
    assert drop_overlapping(train, held) == (train, [])
    assert [row["reason"] for row in drop_overlapping(train[:9], held)[1]] == ["ngram"] * 9


@pytest.mark.parametrize("twin", ["id", "question"])
def test_exact_overlap_is_refused_by_name(twin):
    held = make_row(LONG, split="eval", source="held")
    train = make_row(LONG, source="held") if twin == "id" else make_row(LONG.upper().replace(" ", "  "), source="other")
    with pytest.raises(UserError, match=f"{train['source']} {train['id']} and held {held['id']} are one row"):
        drop_overlapping([make_row("Fine?"), train], [held])


def code_row(name, tests="", **extra):
    reference = f"import math\ndef helper():\n    pass\n\ndef {name}(x):\n    return x"
    return make_row(f"Do {name} of {extra}.", reference, "python_tests", tests=tests, **extra)


@pytest.mark.parametrize(
    ("train", "held", "reason"),
    [
        (make_row(f"{LONG} again"), make_row(f"Now {LONG}"), "ngram"),
        (make_row(LONG), make_row(LONG.replace("pears", "figs").replace("12", "9")), None),
        (make_row(LONG), make_row(LONG.replace("12", "1,300.5")), "masked_numbers"),
        (make_row("He has 3 pens and buys 4 more, how many?"), make_row("He has 5 pens and buys 6 more, how many?"),
         "masked_numbers"),
        (make_row("What is 3 times 4, Bob?"), make_row("What is 5 times 6, Bob?"), None),
        (make_row("Well: What is 3 plus 4 plus 5, Bob?"), make_row("What is 3 plus 4 plus 5, Bob?"), "ngram"),
        (make_row("Well: What is 3 plus 4?"), make_row("What is 3 plus 4?"), None),
        (make_row("What is 2 - 2?"), make_row("What is 2 + 2?"), None),
        (code_row("f", entry_point="f", a=1), code_row("f", entry_point="f", b=1), "entry_point"),
        (code_row("f", entry_point="f"), code_row("g", entry_point="g"), None),
        (code_row("f", entry_point="f"), code_row("f", "assert f(1) == 1", entry_point=""), "entry_point"),
        (code_row("f", "assert f(1)"), code_row("g", "assert g(1)"), None),
        (code_row("f", entry_point="f"), make_row("f", grader="rubric", entry_point="f"), None),
    ],
)  # fmt: skip
def test_near_overlap_is_dropped_by_reason(train, held, reason):
    other = make_row("Quite another matter?")
    kept, dropped = drop_overlapping([train, other], [held])
    assert dropped == ([{"id": train["id"], "reason": reason}] if reason else [])
    assert kept == ([other] if reason else [train, other])


def solution(name, *lines, **extra):
    return make_row(f"Write {name}.", "\n".join(lines), "python_tests", tests=f"assert {name}(1)", **extra)


def test_the_same_code_under_other_names_is_an_overlap():
    body = ["    total = 0", "    for item in {0}:", "        if item > 0:", "            total += item * item",
            "    return total"]  # fmt: skip
    held = solution("squares", "def squares(values):", *[line.format("values") for line in body])
    other = [line.format("numbers").replace("total", "acc").replace("item", "n") for line in body]
    renamed = solution("energy", "def energy(numbers: list) -> int:", '    """Sum of squares."""', *other)
    changed = solution("cubes", "def cubes(numbers):", *[line.replace("n * n", "n * n * n") for line in other])
    broken = solution("broken", "def broken(:")
    kept, dropped = drop_overlapping([renamed, changed, broken], [held])
    assert dropped == [{"id": renamed["id"], "reason": "syntax_tree"}]
    assert kept == [changed, broken]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        # a keyword of another's function keeps its name, whatever else has it; one of its own function does not
        ("key = len; out = sorted(rows, key=key)", "by = len; out = sorted(rows, key=by)"),
        ("def one(step): return step + 1\nout = one(step=2)", "def two(add): return add + 1\nout = two(add=2)"),
        ("import math as m; out = m.sqrt(2)", "import math as tools; out = tools.sqrt(2)"),
        ("from math import sqrt as s; out = s(2)", "from math import sqrt as root; out = root(2)"),
        ("try: out = 1\nexcept OSError as error: print(error)", "try: out = 1\nexcept OSError as e: print(e)"),
        ("def one(a): return a\nout = [one(1)]", "def two(b: int) -> int:\n    'b.'\n    return b\nout = [two(1)]"),
        ("class A: pass\nout = A()", "class Node:\n    'A node.'\nout = Node()"),
        ("async def one(a): pass\nout = one", "async def two(b): pass\nout = two"),
        ("out = list(map(lambda a: a + 1, rows))", "out = list(map(lambda item: item + 1, rows))"),
        ("n = 0\ndef one(): nonlocal n; n += 1\nout = n", "k = 0\ndef add(): nonlocal k; k += 1\nout = k"),
        ("match rows:\n case [a, *b]: out = b\n case {'k': 1, **c}: out = c\n case str() as d: out = d",
         "match rows:\n case [x, *y]: out = y\n case {'k': 1, **z}: out = z\n case str() as t: out = t"),
        ("total = 0; out = total", "total: int = 0; out = total"),
    ],
)  # fmt: skip
def test_every_name_that_a_function_chose_is_seen_through(ours, theirs):
    first, second = (
        solution(name, f"def {name}(rows):", indent(body, "  "), "  for row in rows:\n    out = out + row * row - 1",
                 "  return out + 2 * out + 3")
        for name, body in (("first", ours), ("second", theirs))
    )  # fmt: skip
    assert function_trees(first) == function_trees(second) != set()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("out = sorted(rows, key=len)", "out = sorted(rows, reverse=len)"),
        ("import math as m; out = m.sqrt(2)", "import cmath as m; out = m.sqrt(2)"),
        ("math = 1; import math as m; out = m.sqrt(2)", "cmath = 1; import cmath as m; out = m.sqrt(2)"),
        ("try: out = 1\nexcept OSError as e: print(e)", "try: out = 1\nexcept KeyError as e: print(e)"),
    ],
)
def test_names_that_it_did_not_choose_tell_code_apart(ours, theirs):
    first, second = (
        solution("f", "def f(rows):", indent(body, "  "), "  for row in rows:\n    out = out + row * row - 1",
                 "  return out + 2 * out + 3")
        for body in (ours, theirs)
    )  # fmt: skip
    assert function_trees(first) != function_trees(second)
    assert function_trees(first)


@pytest.mark.parametrize(("every", "reasons_of"), [(12, ["short_ngrams"]), (9, [])])
def test_a_quarter_of_the_8_grams_is_an_overlap(every, reasons_of):
    """One word in `every` differs, so that no 13-gram is shared; of 53 8-grams 20 or 6 are."""
    words = [f"word{i}" for i in range(60)]
    changed = [f"other{i}" if i % every == every - 1 else word for i, word in enumerate(words)]
    shared = word_ngrams(" ".join(words), 8) & word_ngrams(" ".join(changed), 8)
    assert len(shared) == {12: 20, 9: 6}[every]
    held = [make_row(" ".join(words))]
    assert [row["reason"] for row in drop_overlapping([make_row(" ".join(changed))], held)[1]] == reasons_of


def test_template_wording_does_not_lengthen_a_question():
    """A training question shares 4 of the 12 8-grams that it has beside 23 of a template; the other one has 17."""
    template = " ".join(f"said{i}" for i in range(30))
    own, others = [[f"{name}{i}" for i in range(12)] for name in ("own", "other")]
    held = make_row(" ".join([*others, *own[1:], "end"]))
    short = make_row(f"{template} {' '.join(own)}")
    fillers = [make_row(f"{template} {i}") for i in range(11)]
    ours, theirs = (word_ngrams(question_of(row), 8) for row in (short, held))
    assert (len(ours), len(theirs), len(ours & theirs)) == (35, 17, 4)
    assert drop_overlapping([short, *fillers], [held])[1] == [{"id": short["id"], "reason": "short_ngrams"}]
    # without the others it is no template, and 4 of 17 are too few
    assert drop_overlapping([short], [held])[1] == []


def test_official_gsm8k_splits_are_nearly_disjoint(real_data):
    train, held = (
        gsm8k_rows(read_jsonl(real_data / "gsm8k" / f"{name}.jsonl"), split, name)
        for name, split in (("train", "train"), ("test", "eval"))
    )
    kept, dropped = drop_overlapping(train, held)
    assert len(kept) + len(dropped) == 7473
    assert 0 < len(dropped) < 75
    assert drop_overlapping(kept, held) == (kept, [])


def test_near_duplicates_see_through_numbers_and_names():
    text = "On call at {}: {} answers slowly since the release of this morning, and its {} queue grows by {} an hour"
    first = make_row(text.format("10:15", "checkout-api", "order", 40))
    twin = make_row(text.format("22:40", "cart-service", "order", 1200))
    other = make_row("On call at 22:40: cart-service restarts all the time since its memory is used up within an hour")
    names = {"checkout-api", "cart-service", "cart"}
    assert near_duplicates([first, twin, other], names) == [twin]
    assert near_duplicates([first, other, twin]) == []  # a name of two words changes five of its 18 3-grams
    sites = ((3, "甲站", 4), (21, "乙站", 7))
    chinese = [make_row(f"{hour}点，{name}响应变慢，队列每小时增加{n}条，请定位") for hour, name, n in sites]
    assert near_duplicates(chinese, {"甲站", "乙站"}) == chinese[1:]
    assert near_duplicates(chinese) == []


def test_near_duplicates_are_those_of_comparing_all_pairs():
    rng = random.Random(5)
    base = [rng.choice("abcdefghijkl") + rng.choice("mnopqrs") for _ in range(60)]
    texts = [[rng.choice("tuvwxyz") if rng.random() < rate else word for word in base]
             for rate in (0.01, 0.03, 0.06, 0.1) for _ in range(40)]  # fmt: skip
    rows = [make_row(" ".join(words[: rng.randint(40, 60)])) for words in texts]
    grams = [word_ngrams(question_of(row), 3) for row in rows]
    expected = [rows[i] for i in range(len(rows))
                if any(len(grams[i] & grams[j]) / len(grams[i] | grams[j]) >= ALIKE for j in range(i))]  # fmt: skip
    assert near_duplicates(rows) == expected
    assert 10 < len(expected) < 150


def test_code_about_control_words_is_kept_whole():
    """What a template or a filter would take for a thought or an end is text in it."""
    code = '```python\ndef f(s):\n    return s.split("</think>")[-1].replace("<|im_end|>", "")\n```'
    row = make_row(grader="none")
    for response in (code, f"<think>Easy: `</think>`.</think>\n\n{code}", f"Easy.\n</think>\n\n{code}"):
        [kept], rejected, _ = clean([make_answer(row, response)], [row], [], "all")
        assert (kept["messages"][-1]["content"], rejected) == (code, [])


def test_a_control_word_that_the_question_names_is_text():
    row = make_row("What does <|im_end|> mean?", grader="none")
    answers = [make_answer(row, "<|im_end|> ends a turn."), make_answer(row, "<|im_start|> too.", sample_index=1)]
    kept, rejected, _ = clean(answers, [row], [], "all")
    assert [r["messages"][-1]["content"] for r in kept] == ["<|im_end|> ends a turn."]
    assert [r["reason"] for r in rejected] == ["special_token"]
