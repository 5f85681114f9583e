"""A sweep's table and plot say what sweep.json says, and no more."""

import csv
import io
import re
import xml.etree.ElementTree as ElementTree

import pytest
from markdown_it import MarkdownIt

from src.report.sweep import csv_text, log_ticks, markdown, plot

NASTY = "<img src=x onerror=alert(1)>| **b** [x](javascript:y) `c`\x1b[31m\n# no\n---\n<script>alert(2)</script> $$x$$"
RENDERER = MarkdownIt("commonmark", {"html": True}).enable("table")


def measures(mean: float, spread: float = 0.0) -> dict:
    found = {"mean": mean, "min": mean - spread, "max": mean + spread}
    return {name: found for name in ("kl_to_teacher", "nll", "top1_agreement", "expected_acceptance")}


def cell(alpha: float, temperature: float | None, mean: float, n: int = 2, spread: float = 0.01) -> dict:
    return {"settings": {"alpha": alpha, "temperature": temperature}, "runs": ["a", "b"][:n], "n": n,
            "validation": measures(mean, spread if n > 1 else 0.0)}  # fmt: skip


@pytest.fixture
def stored() -> dict:
    cells = [cell(0.0, None, 0.9), cell(0.5, 1.0, 0.6), cell(0.5, 2.5, 0.7), cell(1.0, 1.0, 0.605), cell(1.0, 2.5, 0.8)]
    run = {"status": "finished", "line": "", "validation_rows": 44, "steps": 20}
    return {"axes": {"alpha": ["0", "0.5", "1"], "temperature": ["1", "2.5"], "seed": ["1", "2"]}, "fixed": "",
            "experiment_dir": "outputs/experiment/tiny", "heldout": None, "kl_is": "exact",
            "models": {"student": "s", "teacher": "t"}, "cells": cells,
            "lowest": {"kl_to_teacher": {"cell": 1, "overlapping": [3]}, "nll": {"cell": 1, "overlapping": []}},
            "runs": {"a": run, "b": run}}  # fmt: skip


def table(text: str) -> list[list[str]]:
    """The cells of a Markdown table, without its head."""
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]


def test_a_row_for_each_cell(stored):
    rows = table(markdown(stored))
    assert [row[:3] for row in rows] == [
        ["0", "any", "2"], ["0.5", "1", "2"], ["0.5", "2.5", "2"], ["1", "1", "2"], ["1", "2.5", "2"]
    ]  # fmt: skip
    assert rows[1][3] == "0.6000 (0.5900 to 0.6100)"
    text = markdown(stored)
    assert "on 44 validation rows" in text
    assert (
        "Lowest validation KL to the teacher: alpha 0.5, temperature 1. Ranges over seeds overlap with: alpha 1" in text
    )
    assert "Lowest validation NLL: alpha 0.5, temperature 1.\n" in text
    assert "does not depend on temperature; one run a seed serves all (alpha 0)" in text
    assert "one seed show" not in text


def test_one_seed_is_not_hidden(stored):
    stored["cells"][2] = cell(0.5, 2.5, 0.7, n=1)
    assert table(markdown(stored))[2] == ["0.5", "2.5", "1", "0.7000", "0.7000", "0.7000"]
    assert "Cells with one seed show no range" in markdown(stored)


def test_csv_holds_every_number(stored):
    head, *rows = csv.reader(io.StringIO(csv_text(stored)))
    assert head[:5] == [
        "alpha",
        "temperature",
        "seeds",
        "validation_kl_to_teacher_mean",
        "validation_kl_to_teacher_min",
    ]
    assert rows[1][:3] == ["0.5", "1", "2"]
    assert [float(value) for value in rows[1][3:6]] == [0.6, 0.59, 0.61]
    assert {len(row) for row in rows} == {len(head)}


def test_held_out_numbers_are_of_the_chosen_cell(stored):
    stored["heldout"] = {"chosen_by": "nll", "cell": 1, **measures(0.123)}
    text = markdown(stored)
    assert "Chosen by the lowest validation NLL: alpha 0.5, temperature 1. On the held-out rows" in text
    assert text.count("0.1230") == 9  # mean, min and max of three measures
    assert "heldout" not in csv_text(stored)


def test_cells_that_are_not_ranked_are_named(stored):
    stored["cells"][2] |= {"n": 1}
    assert "not all of their seeds have finished: alpha 0.5, temperature 2.5 (1 of 2)." in markdown(stored)


def test_a_lower_bound_is_not_called_a_kl(stored):
    assert "at least" not in markdown(stored) + plot(stored)
    stored["kl_is"] = "lower bound over the top 20 and the rest"
    text = markdown(stored)
    assert "| validation KL to the teacher (at least) | validation NLL |" in text
    assert "Lowest validation KL to the teacher (at least): alpha 0.5" in text
    assert "KL is a lower bound over the top 20 and the rest:" in text
    assert "KL to the teacher (at least)" in plot(stored)


def test_words_of_others_are_text(stored):
    """A model's path, a setting and a failed run's line: no markup, no further cell, no control characters."""
    stored["axes"]["model_name_or_path"] = [NASTY]
    stored["fixed"] = stored["experiment_dir"] = stored["models"]["student"] = NASTY
    for each in stored["cells"]:
        each["settings"]["model_name_or_path"] = NASTY
    stored["runs"][NASTY] = {"status": "failed", "line": NASTY}
    text = markdown(stored)
    assert text.replace("\n", "").isprintable()
    tokens = RENDERER.parse(text)
    parts = [token for token in tokens if token.type == "inline"]
    inner = {child.type for token in parts for child in token.children}
    assert inner <= {"text", "text_special", "softbreak"}
    assert {token.type for token in tokens} & {"html_block", "fence", "hr"} == set()
    assert sum(token.type == "td_open" for token in tokens) == 5 * 7
    assert sum(token.type == "heading_open" for token in tokens) == 1
    root = ElementTree.fromstring(plot(stored))  # a control character is no XML, escaped or not
    assert [element for element in root.iter() if element.tag.endswith(("img", "script"))] == []


def test_values_over_decades_stand_at_even_factors(stored):
    """Learning rates: 1e-5, 1e-4 and 1e-3 are as far from each other; a narrow axis, or one with 0, stays linear."""
    assert "log scale" not in plot(stored)
    stored["axes"] = {"learning_rate": ["1e-5", "1e-4", "1e-3"]}
    stored["cells"] = stored["cells"][:3]
    for each, rate in zip(stored["cells"], (1e-5, 1e-4, 1e-3), strict=True):
        each["settings"] = {"learning_rate": rate}
    svg = plot(stored)
    assert "learning_rate (log scale)" in svg
    first, second, third = [float(x) for x in re.findall(r'<circle cx="([0-9.]+)"', svg)[:3]]
    assert second - first == pytest.approx(third - second, abs=0.2)
    assert log_ticks(2e-5, 1e-3) == pytest.approx([1e-5, 1e-4, 1e-3])
    assert log_ticks(1.0, 20.0) == pytest.approx([1, 10, 100])


def test_a_plot_says_what_is_fixed_and_of_which_models(stored):
    stored["fixed"] = "--max_steps 50"
    assert ">All with --max_steps 50<" in plot(stored)
    assert ">Models: student s, teacher t<" in plot(stored)


def test_a_cell_without_temperature_is_on_every_curve(stored):
    svg = plot(stored)
    curves = re.findall(r'<path d="(M[^"]+)" fill="none"[^>]*><title>temperature ([0-9.]+)</title>', svg)
    assert [name for _, name in curves] == ["1", "2.5"] * 2
    for path, _ in curves:
        assert path.count("L") == 2  # three alphas
    assert len({path[1:].split("L")[0] for path, _ in curves[:2]}) == 1  # both begin at alpha = 0, where one run serves


def test_nothing_is_drawn_where_there_is_no_line_to_draw(stored):
    stored["axes"] = {"divergence": ["forward_kl", "jsd"]}
    for each, kind in zip(stored["cells"], ("forward_kl", "jsd"), strict=False):
        each["settings"] = {"divergence": kind}
    stored["cells"] = stored["cells"][:2]
    assert plot(stored) is None
