"""results.json says what the stored rows say: decisions, withheld ones, words, shape."""

import copy
import json

import pytest

from src.distillation.heldout import POSITIONS
from src.evaluation.results import heldout_section, join_heldout, make_results, repetition
from src.evaluation.results_schema import SCHEMA_VERSION, Outcomes, check_results, read_results, write_results
from src.grading.rows import OUTCOMES
from src.utils.common import UserError, write_jsonl


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
    assert (found["corrected_over"], found["decision"]) == (5, "not shown")


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
    assert {(c["a"], c["b"]): c["corrected_over"] for c in results["graded"]["comparisons"]} == {
        ("kd", "base"): 6, ("kd", "sft"): 6, ("sft", "base"): 6, ("teacher", "base"): 6,
    }  # fmt: skip
    for c in results["graded"]["comparisons"]:
        assert c["p"] <= c["p_holm"] <= min(1, 6 * c["p"])


def test_copies_of_a_scenario_decide_nothing(made_up):
    """14 of 40 prompts won and none lost, which decides where they are independent; here 4 families won them all."""
    rows = made_up["samples"](40, arms=["base", "kd"], domains=("ops",), temperatures=[0.7], cut=0.0)
    for row in rows:
        number = int(row["id"].rpartition("-")[2])
        row["outcome"] = "correct" if row["arm"] == "kd" and number < 14 else "wrong"
    context = made_up["context"]({"teacher": "not asked for", "sft": "not asked for"})
    alone = pair(make_results(rows, [], context, 0), domain="ops")
    for row in rows:
        row["family"] = f"ops/{int(row['id'].rpartition('-')[2]) // 4}"
    found = make_results(rows, [], context, 0)
    together = pair(found, domain="ops")
    assert (alone["families"], alone["could_differ"], alone["decision"]) == (40, True, "better")
    assert (together["families"], together["could_differ"], together["decision"]) == (10, False, "not shown")
    assert (together["won"], together["lost"], together["prompts"]) == (14, 0, 40)
    assert together["p"] == pytest.approx(2 * 0.5**4)
    assert {score["families"] for score in found["graded"]["scores"]} == {10}
    assert together["interval"][1] - together["interval"][0] > 1.3 * (alone["interval"][1] - alone["interval"][0])


def test_cells_that_could_not_differ_are_not_corrected_for(made_up):
    """Three domains: one has 8 won and none lost, in the others 5 or none differ, which no signs make 5 %."""
    rows = made_up["samples"](40, arms=["base", "kd"], domains=("a", "b", "c"), temperatures=[0.7], cut=0.0)
    won = {"a": 8, "b": 5, "c": 0}
    for row in rows:
        number = int(row["id"].rpartition("-")[2])
        row["outcome"] = "correct" if row["arm"] == "kd" and number < won[row["domain"]] else "wrong"
    context = made_up["context"]({"teacher": "not asked for", "sft": "not asked for"})
    a, b, c = pair(make_results(rows, [], context, 0))
    assert [entry["could_differ"] for entry in (a, b, c)] == [True, False, False]
    assert (a["corrected_over"], a["p_holm"], a["decision"]) == (1, a["p"], "better")
    assert (b["corrected_over"], b["p"], b["p_holm"], b["decision"]) == (1, pytest.approx(2 * 0.5**5), 1.0, "not shown")
    assert (c["p"], c["p_holm"], c["decision"]) == (1.0, 1.0, "not shown")
    assert c["minimum_detectable"] > 0.1  # had it differed, it would have been one of two


def test_domains_are_pooled(made_up, results):
    overall = results["graded"]["overall"]
    assert (overall["domains"], overall["left_out"]) == (["maths", "ops"], {})
    assert len(overall["scores"]) == len(results["graded"]["scores"]) / 2
    by_domain = [s for s in results["graded"]["scores"] if (s["arm"], s["temperature"]) == ("kd", 0.7)]
    (pooled,) = [s for s in overall["scores"] if (s["arm"], s["temperature"]) == ("kd", 0.7)]
    assert (pooled["domain"], pooled["prompts"], pooled["families"]) == ("all", 120, 120)
    assert pooled["accuracy"] == pytest.approx(sum(s["accuracy"] for s in by_domain) / 2)
    assert {(c["domain"], c["prompts"], c["corrected_over"]) for c in overall["comparisons"]} == {("all", 120, 3)}


def test_domains_that_teach_nothing_are_left_out(made_up):
    rows = made_up["samples"](12, domains=("code", "maths", "ops"), cut=0.0)
    for row in rows:
        if row["domain"] == "code" and row["arm"] == "kd" and row["temperature"] == 0.7:
            row["outcome"] = "not_executed"
        if row["domain"] == "ops" and row["arm"] == "teacher":
            row["outcome"] = "wrong"
    overall = make_results(rows, [], made_up["context"](), 0)["graded"]["overall"]
    assert overall["domains"] == ["maths", "ops"], "what the student loses there must be seen"
    for row in rows:
        if row["domain"] == "ops":
            row["outcome"] = "wrong"
    overall = make_results(rows, [], made_up["context"](), 0)["graded"]["overall"]
    assert overall["domains"] == ["maths"]
    assert overall["left_out"] == {"code": "not executed", "ops": "no arm answers any of 12 right"}
    assert {score["prompts"] for score in overall["scores"]} == {12}
    rows = [row for row in rows if row["domain"] != "maths"]
    overall = make_results(rows, [], made_up["context"](), 0)["graded"]["overall"]
    assert (overall["domains"], overall["scores"], overall["comparisons"]) == ([], [], [])


def test_families_of_held_out_prompts_are_resampled_together(made_up):
    rows = made_up["heldout"](40)
    alone = heldout_section(rows, 0)
    for row in rows:
        row["family"] = f"family-{int(row['id'][-3:]) // 8}"
    together = heldout_section(rows, 0)
    assert (alone["families"], together["families"], together["prompts"]) == (40, 5, 40)
    assert together["arms"] == alone["arms"]
    assert together["intervals"]["kd"]["kl_to_teacher"] != alone["intervals"]["kd"]["kl_to_teacher"]


def test_answers_that_were_not_executed_leave_no_accuracy_and_no_comparison(made_up):
    rows = made_up["samples"](12, domains=("code", "maths"))
    next(row for row in rows if row["domain"] == "code" and row["arm"] == "kd")["outcome"] = "not_executed"
    found = make_results(rows, [], made_up["context"](), 0)
    blank = [s for s in found["graded"]["scores"] if s["accuracy"] is None]
    assert [(s["domain"], s["arm"], s["temperature"]) for s in blank] == [("code", "kd", 0.1)]
    assert len(pair(found)) == 5
    assert "left out: code (not executed)" in found["verdict"]


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
     ("你好世界你好世界", 0.2), ("안녕하세요 안녕하세요", 0), ("나는 오늘 밥을 먹고 나는 오늘 밥을 먹고", 0.2),
     ("x = 1; x = 1; x = 1;", 5 / 9)],
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
        (put(["schema_version"], 3), f"schema_version is 3, this code has {SCHEMA_VERSION}"),
        (drop(["verdict"]), "verdict: this field is missing"),
        (put(["verdit"], ""), "verdit: unknown field"),
        (put(["arms"], []), r"arms: expected a valid dictionary, found \[\]"),
        (put(["arms", "student"], ""), "arms.student: expected 'base', 'sft', 'kd' or 'teacher', found 'student'"),
        (put([*COMPARISON, "decision"], "good"), r"graded\.comparisons\[0\]\.decision: expected .*, found 'good'"),
        (put([*COMPARISON, "won"], 1.5), r"comparisons\[0\]\.won: expected a valid integer, found 1.5"),
        (put([*COMPARISON, "won"], True), r"comparisons\[0\]\.won: expected a valid integer, found True"),
        (put([*COMPARISON, "p"], True), r"comparisons\[0\]\.p: expected a valid number, found True"),
        (put([*COMPARISON, "p"], "0\n1"), r"comparisons\[0\]\.p: expected a valid number, found '0\\n1'"),
        (put([*COMPARISON, "interval"], [0.1]), r"comparisons\[0\]\.interval: List should have at least 2 items"),
        (put([*COMPARISON, "interval"], "0"), r"comparisons\[0\]\.interval: expected a valid list, found '0'"),
        (drop(["heldout", "arms", "kd", "nll"]), r"heldout\.arms\.kd\.nll: this field is missing"),
        (drop(["graded", "overall", "scores", 0, "arm"]), r"graded\.overall\.scores\[0\]\.arm: this field is missing"),
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
    with pytest.raises(UserError, match=rf"results\.json: .*{words}.*make it again"):
        read_results(tmp_path / "results.json")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused(results, tmp_path, number):
    changed = copy.deepcopy(results)
    changed["graded"]["scores"][3]["accuracy"] = number
    with pytest.raises(UserError, match=rf"graded\.scores\[3\]\.accuracy: expected a finite number, found {number}"):
        write_results(tmp_path / "results.json", changed)


def test_whole_numbers_will_do_for_others(results, tmp_path):
    changed = copy.deepcopy(results)
    changed["graded"]["scores"][3]["accuracy"] = 1
    check_results(changed, tmp_path)


def test_every_outcome_has_a_field():
    assert tuple(Outcomes.__annotations__) == OUTCOMES


def test_sections_may_be_missing_and_intervals_null(made_up, tmp_path):
    found = make_results(made_up["samples"](1), [], made_up["context"](), 0)
    assert all(c["interval"] is None and c["decision"] == "not shown" for c in found["graded"]["comparisons"])
    check_results(found, tmp_path)
    check_results(make_results([], made_up["heldout"](1), made_up["context"](), 0), tmp_path)


def measured_runs(made_up, folder, arms=("kd", "sft")):
    """Folders of training runs with the heldout.jsonl that each leaves; arm -> folder."""
    rows = made_up["heldout"](6)
    runs = {}
    for arm in arms:
        named = {"base": "before", arm: "after"}
        runs[arm] = folder / f"run_{arm}"
        own = [row | {"arm": named[row["arm"]]} for row in rows if row["arm"] in named]
        write_jsonl(runs[arm] / "heldout.jsonl", own)
    return runs


def change_rows(run, change):
    """Rewrite heldout.jsonl: `change` gets each row and returns it, another, or None to leave it out."""
    path = run / "heldout.jsonl"
    rows = [change(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if row is not None))


@pytest.mark.parametrize("arms", [("kd", "sft"), ("kd",), ("sft",)])
def test_what_the_runs_measured_is_joined(made_up, tmp_path, arms):
    runs = measured_runs(made_up, tmp_path, arms)
    joined = join_heldout(runs, {"row-000": "twins", "row-001": "twins"})
    expected = made_up["heldout"](6, arms=["base", "sft", "kd"])
    key = ("arm", "id", "sample_index")
    by_key = {tuple(row[name] for name in key): row for row in expected if row["arm"] in ("base", *arms)}
    assert {tuple(row[name] for name in key) for row in joined} == by_key.keys()
    for row in joined:
        family = row.pop("family")
        assert family == ("twins" if row["id"] in ("row-000", "row-001") else row["id"])
        assert row == by_key[tuple(row[name] for name in key)]
    assert heldout_section(join_heldout(runs, {"row-000": "twins", "row-001": "twins"}), 0)["families"] == 5


BOUND = "lower bound over the top 64 and the rest"


def test_bounds_are_joined_and_named(made_up, tmp_path):
    """Both runs measured with the same tokens of the teacher; files of the version before say nothing and are exact."""
    runs = measured_runs(made_up, tmp_path)
    exact = heldout_section(join_heldout(runs, {}), 0)
    assert (exact["kl_is"], exact["expected_acceptance_is"]) == ("exact", "exact")
    for run in runs.values():
        change_rows(run, lambda row: row | {"kl_is": BOUND})
    found = heldout_section(join_heldout(runs, {}), 0)
    assert found["kl_is"] == BOUND
    assert found["expected_acceptance_is"].startswith("lower bound")
    assert found["arms"] == exact["arms"]


def times(factor, arm="before", column="kl_sum"):
    return lambda row: row | ({column: row[column] * factor} if row["arm"] == arm else {})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda row: None if row["id"] == "row-003" else row, "row-003, sample 0, is in only one of it and"),
        (lambda row: row | {"sample_index": 1}, "row-000, sample 0, is in only one of it and"),
        (lambda row: row | {"num_tokens": row["num_tokens"] + 1}, "row-000, sample 0, has other tokens than in"),
        (times(1.02), "before training, kl_sum is .* another student, teacher or precision; train both"),
        (lambda row: None if row["arm"] == "after" and row["id"] == "row-003" else row, "before and after training"),
        (lambda row: {k: v for k, v in row.items() if k != "acceptance_sum"}, ":1: acceptance_sum is missing, the run"),
        (lambda row: row | {"nll_sum": float("nan")}, ":1: NaN is not a number"),
        (lambda row: row | {"nll_sum": None}, ":1: nll_sum is None, not a number; train again"),
        (lambda row: row | {"arm": "base"}, ":1: unknown arm 'base'; train again"),
        (
            lambda row: row | {"kl_is": BOUND},
            f"its KL is {BOUND}, that of .* exact, which cannot be compared; train both",
        ),
        (lambda row: row | ({"kl_is": BOUND} if row["arm"] == "after" else {}), f"is exact of some, {BOUND} of others"),
    ],
)
def test_runs_that_measured_other_things_are_not_joined(made_up, tmp_path, change, words):
    runs = measured_runs(made_up, tmp_path)
    change_rows(runs["sft"], change)
    with pytest.raises(UserError, match=words) as refused:
        join_heldout(runs, {})
    assert str(refused.value).startswith(str(runs["sft"] / "heldout.jsonl"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("change", [times(1.00005), times(1.1, "after"), times(1.001, column="agreement_sum")])
def test_rounding_and_training_may_differ(made_up, tmp_path, change):
    runs = measured_runs(made_up, tmp_path)
    change_rows(runs["sft"], change)
    assert len(join_heldout(runs, {})) == 18


def test_a_run_without_measures_is_named(made_up, tmp_path):
    runs = measured_runs(made_up, tmp_path)
    (runs["sft"] / "heldout.jsonl").unlink()
    words = "no such file; the run is of an earlier version; train again, or evaluate with --no_heldout"
    with pytest.raises(UserError, match=f"run_sft/heldout.jsonl: {words}"):
        join_heldout(runs, {})
