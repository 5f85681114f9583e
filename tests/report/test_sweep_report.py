"""A sweep's table and plot say what sweep.json says, and no more."""

import csv
import io
import re

import pytest

from src.report.sweep import csv_text, markdown, plot


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
            "experiment_dir": "outputs/experiment/tiny", "heldout_shown": False, "cells": cells,
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


def test_held_out_numbers_come_with_a_warning(stored):
    stored["heldout_shown"] = True
    for each in stored["cells"]:
        each["heldout"] = measures(0.123)
    assert "0.1230 (0.1230 to 0.1230)" in markdown(stored)
    assert "a cell chosen by them would have no such rows left" in markdown(stored)
    assert "heldout_nll_mean" in csv_text(stored)


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
