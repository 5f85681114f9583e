"""The words of the verdict: every honest case reads as it should, and follows the numbers."""

import copy

import pytest

from src.evaluation.results import make_results
from src.evaluation.results_schema import ARMS
from src.evaluation.verdict import (
    NO_CONTROL,
    NO_STUDENT,
    NOT_GRADED,
    NOT_HELD_OUT,
    Setting,
    against_sft,
    bound_note,
    closeness,
    could_show_nothing,
    headline,
    headline_setting,
    particulars,
    sentences,
)

SHARES = {"base": 0.1, "sft": 0.2, "kd": 0.5, "teacher": 0.6}


def made(made_up, right=SHARES, of=100, cut=None, heldout=True, samples=1):
    """An evaluation in which an arm is right on the first `right` of a domain's prompts, and its last `cut` are cut."""
    arms = list(right)
    rows = made_up["samples"](of, arms=arms, domains=("maths",), temperatures=(0.1, 0.7), cut=0, samples=samples)
    for row in rows:
        number = int(row["id"].rpartition("-")[2])
        row["outcome"] = "correct" if number < round(right[row["arm"]] * of) else "wrong"
        if number >= of - (cut or {}).get(row["arm"], 0):
            row["outcome"] = "truncated"
    missing = {arm: "not asked for" for arm in ARMS if arm not in arms}
    held = made_up["heldout"](arms=[arm for arm in arms if arm != "teacher"]) if heldout else []
    return make_results(rows, held, made_up["context"](missing), 0)


def without(*arms):
    return {arm: share for arm, share in SHARES.items() if arm not in arms}


@pytest.fixture(scope="module")
def results(made_up):
    return made(made_up)


def test_the_first_three_sentences_are_accuracy_closeness_and_the_control(results):
    first, second, third = sentences(results)[:3]
    assert first == (
        "At temperature 0.1 the distilled student answers 50 of 100 questions right, 10 before training, its teacher "
        "60: a gain of 40 points (95 % interval 30 to 50) that holds after correction."
    )
    assert second == (
        "Of 100 tokens of the distilled student its teacher would accept 63, 36 before training (KL to the teacher "
        "0.96 nats per token, 2.78 before): it is closer to its teacher than before."
    )
    assert third == (
        "Distilled against SFT: in accuracy at temperature 0.1 distilled wins, by 30 points (95 % interval 21 to 39); "
        "in closeness to the teacher distilled wins, its KL lower by 0.57 nats per token (95 % interval 0.40 to 0.75)."
    )
    assert (first, results["verdict"]) == (results["headline"], " ".join(sentences(results)))


@pytest.mark.parametrize(
    ("right", "of", "cut", "words"),
    [
        ({"kd": 0.03}, 100, {}, ": a loss of 7 points (95 % interval 2 to 12) that holds after correction."),
        ({"kd": 0.25}, 40, {}, ": no difference is shown (15 points higher, 95 % interval 5 to 28, corrected p = "),
        ({"kd": 0.1}, 100, {}, ": no gain can be shown, because no question is answered differently."),
        ({"kd": 0.3}, 10, {}, ": no gain can be shown, because too few answers differ."),
        ({}, 100, {"base": 40}, ": whether that is a gain is withheld, because 0 of its answers and 40 from before "
                                "training were cut at the token limit, and the decision would turn if they counted"),
    ],
)  # fmt: skip
def test_what_is_decided_about_accuracy(made_up, right, of, cut, words):
    assert words in headline(made(made_up, SHARES | right, of, cut))


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        (["teacher"], "answers 50 of 100 questions right, 10 before training: a gain of 40 points"),
        (["base"], "right, its teacher 60; the student before training was not evaluated, so no gain can be told."),
        (
            ["kd"],
            f"{NO_STUDENT} At temperature 0.1 the student before training answers 10 of 100 questions right",
        ),
        (["kd", "base", "sft"], f"{NO_STUDENT} At temperature 0.1 the teacher answers 60 of 100 questions right."),
    ],
)
def test_missing_arms_are_left_out_of_the_headline_and_named(made_up, missing, words):
    found = made(made_up, without(*missing))
    assert words in headline(found)
    for arm in missing:
        assert f"The arm {arm} is missing: not asked for." in particulars(found)


def test_without_a_control_nothing_is_shown_about_distillation(made_up):
    found = made(made_up, without("sft"))
    assert NO_CONTROL in against_sft(found).lower()
    assert "SFT" not in found["verdict"]


def test_several_answers_a_prompt_are_told_in_percent(made_up):
    words = "the distilled student has 50.0 % of 400 answers to 100 questions right, 10.0 % before training"
    assert words in headline(made(made_up, samples=4))


def test_what_was_not_measured_is_said(made_up, results):
    assert closeness(made(made_up, heldout=False)) == NOT_HELD_OUT
    ungraded = make_results([], made_up["heldout"](), made_up["context"](), 0)
    assert headline(ungraded) == NOT_GRADED
    assert against_sft(ungraded).startswith("Distilled against SFT: accuracy was not compared; in closeness")
    rows = [row | {"outcome": "not_executed"} for row in made_up["samples"](8, domains=("code",))]
    unjudged = make_results(rows, [], made_up["context"](), 0)
    assert headline(unjudged) == "Nothing can be said about accuracy; left out: code (not executed)."
    some = make_results(rows + made_up["samples"](8, domains=("maths",)), [], made_up["context"](), 0)
    assert "The headline is about maths; left out: code (not executed)." in particulars(some)


def test_sft_wins_where_it_does(made_up):
    found = made(made_up, SHARES | {"sft": 0.7})
    for entry in found["heldout"]["differences"]:
        entry["difference"], entry["interval"] = -entry["difference"], [-end for end in entry["interval"][::-1]]
    words = against_sft(found)
    assert "in accuracy at temperature 0.1 SFT wins, by 20 points (95 % interval 12 to 28)" in words
    assert "in closeness to the teacher SFT wins, its KL lower by 0.57" in words
    assert "it is farther from its teacher than before" in closeness(found)


def test_what_another_temperature_shows_against_sft_is_said_too(made_up):
    found = made(made_up, SHARES | {"sft": 0.5})
    [entry] = [c for c in found["graded"]["overall"]["comparisons"]
               if (c["a"], c["b"], c["temperature"]) == ("kd", "sft", 0.7)]  # fmt: skip
    assert "temperature 0.7" not in against_sft(found)
    entry |= {"decision": "worse", "difference": -0.2, "interval": [-0.28, -0.12]}
    said = (
        "too few answers differ to show a winner, at temperature 0.7 SFT wins, by 20 points (95 % interval 12 to 28);"
    )
    assert f"in accuracy at temperature 0.1 {said}" in against_sft(found)


def test_bounds_read_as_bounds(made_up):
    found = made(made_up)
    exact = closeness(found)
    assert not bound_note(found["heldout"])
    found["heldout"] |= {"kl_is": "lower bound over the top 8 and the rest", "expected_acceptance_is": "lower bound"}
    assert "KL to the teacher is a lower bound over the top 8 and the rest" in bound_note(found["heldout"])
    words = closeness(found)
    assert words != exact
    assert words.replace("at least ", "") == exact
    assert words.count("at least ") == 4  # tokens and nats, of the student after and before
    assert "its KL, as far as it is known, lower by" in against_sft(found)


def test_one_may_win_in_accuracy_and_the_other_in_closeness(made_up):
    words = against_sft(made(made_up, SHARES | {"sft": 0.7}))
    assert "in accuracy at temperature 0.1 SFT wins" in words
    assert "in closeness to the teacher distilled wins" in words


def test_what_the_interval_leaves_open_is_not_claimed(results):
    unsure = copy.deepcopy(results)
    unsure["heldout"]["arms"]["kd"]["kl_to_teacher"] = 0.0012
    assert "(KL to the teacher 0.0012 nats per token, 2.78 before)" in closeness(unsure)
    for entry in unsure["heldout"]["differences"]:
        entry["real"] = False
    assert closeness(unsure).endswith("no difference from before is shown.")
    assert "in closeness to the teacher neither is shown to win" in against_sft(unsure)


def test_the_headline_is_at_the_lowest_temperature_of_the_recommended_preset(made_up, results):
    assert headline_setting(results) == Setting("recommended", 0.1)
    rows = made_up["samples"](4, temperatures=(0.7, 0.4))
    raw = [row | {"preset": "raw", "temperature": 0.0} for row in rows if row["temperature"] == 0.4]
    assert headline_setting(make_results(rows + raw, [], made_up["context"](), 0)) == Setting("recommended", 0.4)
    assert headline_setting(make_results(raw, [], made_up["context"](), 0)) == Setting("raw", 0.0)


def test_what_could_show_nothing_is_one_line(results):
    entries = results["graded"]["comparisons"]
    assert could_show_nothing([entry | {"could_differ": True} for entry in entries]) == ""
    one = {"domain": "code", "preset": "recommended", "could_differ": False, "decision": "not shown"}
    idle = [one | {"temperature": t} for t in (1.2, 0.1, 0.7)]
    assert could_show_nothing(idle) == (
        "3 comparisons could show nothing: no or too few answers differ (code at T = 0.1, 0.7, 1.2)."
    )
    more = [*entries, one | {"temperature": 0.7}]
    assert could_show_nothing(more).startswith("1 further comparison could show nothing")
    assert could_show_nothing([one | {"temperature": 0.7, "decision": "withheld"}]) == ""
