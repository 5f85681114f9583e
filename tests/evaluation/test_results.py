"""results.json says what the stored rows say: decisions, withheld ones, words, shape."""

import copy
import json

import pytest

from src.distillation.heldout import POSITIONS
from src.evaluation.results import heldout_section, make_results, repetition
from src.evaluation.results_schema import SCHEMA_VERSION, check_results, read_results, write_results
from src.evaluation.verdict import NO_CONTROL, headline, sentences
from src.utils.common import UserError


@pytest.fixture(scope="module")
def results(made_up):
    return make_results(made_up["samples"](60, samples=2), made_up["heldout"](), made_up["context"](), 42)


def pair(results, a="kd", b="base", **where):
    found = [
        c
        for c in results["graded"]["comparisons"]
        if (c["a"], c["b"]) == (a, b) and all(c[name] == value for name, value in where.items())
    ]
    return found[0] if where else found


def scripted(made_up, right: dict[str, int], of: int, cut: dict[str, int] | None = None, domains=("maths",)):
    """One answer a prompt at one temperature: an arm is right on its first `right` prompts; its last `cut` are cut."""
    rows = made_up["samples"](of, arms=list(right), domains=domains, temperatures=[0.7], cut=0.0)
    for row in rows:
        number = int(row["id"].rpartition("-")[2])
        row["outcome"] = "correct" if number < right[row["arm"]] else "wrong"
        if number >= of - (cut or {}).get(row["arm"], 0):
            row["outcome"] = "truncated"
    return make_results(rows, [], made_up["context"]({"teacher": "not asked for", "sft": "not asked for"}), 0)


def test_a_difference_is_decided_by_the_corrected_exact_test(made_up):
    found = pair(scripted(made_up, {"base": 10, "kd": 22}, 40), domain="maths")
    assert (found["won"], found["lost"], found["prompts"], found["decision"]) == (12, 0, 40, "better")
    assert found["p"] == found["p_holm"] == pytest.approx(2 * 0.5**12)
    assert found["difference"] == pytest.approx(0.3)
    assert pair(scripted(made_up, {"base": 22, "kd": 10}, 40), domain="maths")["decision"] == "worse"
    assert pair(scripted(made_up, {"base": 10, "kd": 15}, 40), domain="maths")["decision"] == "not shown"


def test_an_interval_without_0_is_not_enough(made_up):
    """7 won and none lost: the interval excludes 0 and p is 0.016 alone, but 0.078 as one of five cells."""
    found = pair(scripted(made_up, {"base": 10, "kd": 17}, 40, domains="abcde"), domain="a")
    assert found["interval"][0] > 0
    assert found["p"] < 0.05 < found["p_holm"]
    assert (found["family"], found["decision"]) == (5, "not shown")


@pytest.mark.parametrize(
    ("cut", "decision"), [({}, "better"), ({"kd": 10}, "better"), ({"base": 2}, "better"), ({"base": 12}, "withheld")]
)
def test_a_decision_is_withheld_where_cut_answers_would_turn_it(made_up, cut, decision):
    found = pair(scripted(made_up, {"base": 10, "kd": 22}, 40, cut), domain="maths")
    assert found["cut"] == [cut.get("kd", 0), cut.get("base", 0)]
    assert found["decision"] == decision
    assert found["difference_if_cut_right"] == pytest.approx(0.3 + (found["cut"][0] - found["cut"][1]) / 40)


def test_cut_answers_can_hide_a_difference(made_up):
    """All wrong: 10 against 10. All right: 22 against 10. Nobody can say."""
    assert pair(scripted(made_up, {"base": 10, "kd": 10}, 40, {"kd": 12}), domain="maths")["decision"] == "withheld"


def test_holm_is_over_the_cells_of_one_comparison(results):
    assert {(c["a"], c["b"]): c["family"] for c in results["graded"]["comparisons"]} == {
        ("kd", "base"): 6, ("kd", "sft"): 6, ("sft", "base"): 6, ("teacher", "base"): 6,
    }  # fmt: skip
    for c in results["graded"]["comparisons"]:
        assert c["p"] <= c["p_holm"] <= min(1, 6 * c["p"])


def test_answers_that_were_not_executed_leave_no_accuracy_and_no_comparison(made_up):
    rows = made_up["samples"](12, domains=("code", "maths"))
    next(row for row in rows if row["domain"] == "code" and row["arm"] == "kd")["outcome"] = "not_executed"
    found = make_results(rows, [], made_up["context"](), 0)
    blank = [s for s in found["graded"]["scores"] if s["accuracy"] is None]
    assert [(s["domain"], s["arm"], s["temperature"]) for s in blank] == [("code", "kd", 0.1)]
    assert len(pair(found)) == 5
    assert "Not executed, and so without accuracy: answers of code." in found["verdict"]


def test_pass_and_majority_at_k(made_up):
    rows = made_up["samples"](2, arms=["kd"], domains=("maths", "ops"), temperatures=[0.7], samples=4, cut=0.0)
    for row in rows:  # the first prompt: right, right, wrong, wrong in two ways; the second: never
        right = row["id"].endswith("000") and row["sample_index"] < 2
        row["outcome"], row["extracted"] = ("correct", "0") if right else ("wrong", f"{9 + row['sample_index']}")
    maths, ops = make_results(rows, [], made_up["context"]({"base": "not asked for"}), 0)["graded"]["scores"]
    assert maths["pass_at_k"] == pytest.approx({"1": 0.25, "2": (1 - 1 / 6) / 2, "4": 0.5})
    assert (maths["majority_at_k"], ops["majority_at_k"]) == (0.5, None)
    assert maths["accuracy"] == 0.25


def test_the_gap_is_recovered_only_where_there_is_one(made_up, results):
    found = [g for g in results["graded"]["gap_recovered"] if g["arm"] == "kd" and g["domain"] == "maths"]
    maths = [s for s in results["graded"]["scores"] if s["domain"] == "maths"]
    scores = {(s["arm"], s["temperature"]): s["accuracy"] for s in maths}
    assert len(found) == 3
    for g in (g for g in found if g["score"]):
        base, kd, teacher = (scores[arm, g["temperature"]] for arm in ("base", "kd", "teacher"))
        assert g["score"]["value"] == pytest.approx((kd - base) / (teacher - base))
        assert g["score"]["interval"][0] < g["score"]["value"] < g["score"]["interval"][1]
    alike = made_up["samples"](20)
    outcomes = {(r["id"], r["temperature"]): r["outcome"] for r in alike if r["arm"] == "base"}
    alike = [r | {"outcome": outcomes[r["id"], r["temperature"]]} if r["arm"] == "teacher" else r for r in alike]
    few = make_results(alike, made_up["heldout"](), made_up["context"](), 42)
    assert all(g["score"] is None for g in few["graded"]["gap_recovered"])
    held = results["heldout"]
    base, kd = (held["arms"][arm]["kl_to_teacher"] for arm in ("base", "kd"))
    recovered = held["gap_recovered"]["kd"]["kl_to_teacher"]
    assert recovered["value"] == pytest.approx((base - kd) / base)
    assert recovered["interval"][0] < recovered["value"] < recovered["interval"][1] < 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", 0), ("a b c", 0), ("a b c d", 0), ("a b c d a b c d", 0.2), ("no no no no no no", 2 / 3),
     ("你好世界你好世界", 0.2), ("x = 1; x = 1; x = 1;", 5 / 9)],
)  # fmt: skip
def test_repetition(text, expected):
    assert repetition(text) == pytest.approx(expected)


def test_positions_are_summed_over_the_rows_that_reach_them():
    sums = {
        "sample_index": 0,
        "kl_sum": 9.0,
        "nll_sum": 9.0,
        "teacher_nll_sum": 5.0,
        "agreement_sum": 4.0,
        "acceptance_sum": 3.0,
    }
    rows = [
        {"arm": "kd", "id": "a", "num_tokens": 6, "kl_by_position": [4.0, 5.0], "agreement_by_position": [4.0, 0.0]},
        {"arm": "kd", "id": "b", "num_tokens": 2, "kl_by_position": [8.0], "agreement_by_position": [2.0]},
    ]
    held = heldout_section([row | sums for row in rows], 0)
    assert held["by_position"]["start"] == list(POSITIONS[:2])
    assert held["by_position"]["tokens"] == [6, 2]
    assert held["by_position"]["arms"]["kd"] == {"kl_to_teacher": [2.0, 2.5], "top1_agreement": [1.0, 0.0]}


def test_the_headline_says_what_was_found(made_up, results):
    assert results["headline"] == (
        "Distillation brought the student closer to its teacher, closer than training on the same answers alone does; "
        f"it answers more questions correctly than before in {sum(c['decision'] == 'better' for c in pair(results))} "
        "of 6 combinations of task and temperature."
    )
    few = make_results(made_up["samples"](3), [], made_up["context"](), 42)
    assert "correctly than before, 6 questions were too few to show" in few["headline"]
    for against in ("the untrained student", "its SFT control"):
        words = f"Against {against}, 6 cells had too few prompts to show a difference of any size."
        assert few["verdict"].count(words) == 1
    assert "Closeness to the teacher on held-out text was not measured" in few["verdict"]


@pytest.mark.parametrize(("missing", "words"), [
    ({"sft": "no finished control"}, "without a control run nobody can say how much of this is due to distillation"),
    ({"kd": "not asked for"}, "No distilled student was evaluated."),
])  # fmt: skip
def test_missing_arms_are_named(made_up, missing, words):
    kept = [arm for arm in ("base", "sft", "kd", "teacher") if arm not in missing]
    samples = made_up["samples"](20, arms=kept)
    heldout = made_up["heldout"](arms=[arm for arm in kept if arm != "teacher"])
    found = make_results(samples, heldout, made_up["context"](missing), 0)
    assert words in found["headline"]
    for arm, why in missing.items():
        assert f"The arm {arm} is missing: {why}." in found["verdict"]
    assert (NO_CONTROL in found["verdict"].lower()) == ("sft" in missing)


def test_the_words_follow_the_numbers(results):
    """Turn every number round: what was closer is farther, what was better is worse."""
    turned = copy.deepcopy(results)
    for entry in turned["heldout"]["differences"] + turned["graded"]["comparisons"]:
        entry["difference"] = -entry["difference"]
        entry["interval"] = [-end for end in entry["interval"][::-1]]
    for c in turned["graded"]["comparisons"]:
        c["decision"] = {"better": "worse", "worse": "better"}.get(c["decision"], c["decision"])
    words = headline(turned)
    assert words.startswith("Distillation took the student away from its teacher, though training on the same answers")
    assert "fewer questions correctly than before" in words
    assert "farther" in " ".join(sentences(turned))
    for entry in turned["heldout"]["differences"]:
        entry["real"] = False
    assert headline(turned).startswith("Whether distillation brought the student closer to its teacher cannot be told")


def test_what_is_written_is_read(results, tmp_path):
    write_results(tmp_path / "results.json", results)
    assert read_results(tmp_path / "results.json") == json.loads(json.dumps(results))


def drop(path):
    def change(results):
        *way, last = path
        for step in way:
            results = results[step]
        del results[last]

    return change


def put(path, value):
    def change(results):
        *way, last = path
        for step in way:
            results = results[step]
        results[last] = value

    return change


COMPARISON = ("graded", "comparisons", 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put(["schema_version"], 1), f"schema_version is 1, this code has {SCHEMA_VERSION}"),
        (drop(["verdict"]), "results: field verdict is missing"),
        (put(["verdit"], ""), "results: unknown field verdit"),
        (put(["arms"], []), "results.arms: expected dict, found list"),
        (put([*COMPARISON, "decision"], "good"), r"results\.graded\.comparisons\[0\]\.decision: unknown value 'good'"),
        (put([*COMPARISON, "won"], 1.5), r"comparisons\[0\]\.won: expected int, found float"),
        (put([*COMPARISON, "won"], True), r"comparisons\[0\]\.won: expected int, found bool"),
        (put([*COMPARISON, "interval"], [0.1]), r"comparisons\[0\]\.interval: expected 2 items, found 1"),
        (put([*COMPARISON, "interval"], "0"), r"comparisons\[0\]\.interval: expected list, found str"),
        (drop(["heldout", "arms", "kd", "nll"]), r"results\.heldout\.arms\.kd: field nll is missing"),
        (put(["graded", "scores", 0, "outcomes", "correct"], 99), "outcomes of base in maths do not add up"),
    ],
)
def test_another_shape_is_refused_in_one_line(results, tmp_path, change, words):
    changed = copy.deepcopy(results)
    change(changed)
    with pytest.raises(UserError, match=words) as refused:
        write_results(tmp_path / "results.json", changed)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "results.json").exists()
    (tmp_path / "results.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match=rf"results\.json: .*{words}.*evaluate again"):
        read_results(tmp_path / "results.json")


def test_sections_may_be_missing_and_intervals_null(made_up, tmp_path):
    found = make_results(made_up["samples"](1), [], made_up["context"](), 0)
    assert all(c["interval"] is None and c["decision"] == "not shown" for c in found["graded"]["comparisons"])
    check_results(found, tmp_path)
    check_results(make_results([], made_up["heldout"](1), made_up["context"](), 0), tmp_path)
