"""The summary in the terminal: short, narrow, and the same words as the page."""

import pytest

from src.evaluation.results import make_results
from src.evaluation.verdict import against_sft, closeness, headline
from src.report.tables import COLUMNS, LINES, print_summary, summary

DOMAINS = ("maths", "ops", "code")


def made(made_up, domains=DOMAINS, prompts=20, presets=("recommended", "raw")):
    rows = made_up["samples"](prompts, domains=domains)
    for row in rows:
        row["outcome"] = "wrong" if row["domain"] == "code" else row["outcome"]
    rows = [row | {"preset": preset} for preset in presets for row in rows]
    return make_results(rows, made_up["heldout"](), made_up["context"](), 0)


@pytest.fixture(scope="module")
def results(made_up):
    return made(made_up)


def test_the_summary_fits_a_screen(results, capsys):
    print_summary(results, "outputs/evaluation/made_up")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= LINES == 25
    assert max(map(len, lines)) <= COLUMNS == 100


def test_it_says_what_the_page_says(results):
    text = " ".join(summary(results, "out"))
    for sentence in (headline(results), closeness(results), against_sft(results)):
        assert sentence in text
    for words in ("student before", "SFT control", "distilled", "teacher", "of all answers were cut", "further"):
        assert words in text
    assert summary(results, "out")[-2:] == ["out/report.html", "out/results.json"]


def test_the_rows_are_those_of_the_headlines_preset(results):
    accuracy = {
        (s["domain"], f"{s['temperature']:g}", s["arm"]): f"{s['accuracy']:.0%}"
        for s in results["graded"]["scores"]
        if s["preset"] == "recommended"
    }
    rows = [line.split() for line in summary(results, "out") if line.startswith(DOMAINS)]
    assert len(rows) >= 6
    for domain, temperature, *shown in rows:
        assert shown[:4] == [accuracy[domain, temperature, arm] for arm in ("base", "sft", "kd", "teacher")]
        assert " ".join(shown[4:]) in ("better", "worse", "not shown", "withheld", "could show nothing")


def test_many_and_hostile_names_fit_too(made_up):
    domains = [f"domain-with-a-very-long-name-{number}" for number in range(12)] + ["\x1b[2J\x1b[31m"]
    lines = summary(made(made_up, domains, 6), "out")
    assert len(lines) <= LINES
    assert max(map(len, lines)) <= COLUMNS
    assert all(line.isprintable() for line in lines)
    assert any(line.endswith("more of domain, sampling and temperature: report.md") for line in lines)


@pytest.mark.parametrize("missing", [["sft"], ["teacher"], ["base"], ["kd"]])
def test_missing_arms_have_no_column(made_up, missing):
    arms = [arm for arm in ("base", "sft", "kd", "teacher") if arm not in missing]
    context = made_up["context"](dict.fromkeys(missing, "not asked for"))
    lines = summary(make_results(made_up["samples"](6, arms=arms), [], context, 0), "out")
    [header] = [line for line in lines if line.startswith("domain")]
    assert ("student before" in header) == ("base" in arms)


def test_without_answers_there_is_no_table(made_up):
    results = make_results([], made_up["heldout"](), made_up["context"](), 0)
    lines = summary(results, "out")
    assert not [line for line in lines if line.startswith("domain")]
    assert lines[0] == headline(results)
