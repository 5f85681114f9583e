"""scripts/prepare_models.py: what it does with a folder that is there."""

import pytest

from src.data.scenarios import load_pack, render_rows
from src.utils.common import ROOT, finish_stage


def test_a_model_that_is_made_again_stays_until_the_new_one_is_there(scripts, tmp_path):
    """--overwrite, killed before the new model has replaced the old one, leaves the old one as it was."""
    is_ready = scripts["prepare_models"].is_ready
    target, fingerprint = tmp_path / "model", {"package": "some-model==1"}
    assert not is_ready("teacher", target, fingerprint, overwrite=False)
    target.mkdir()
    (target / "model.safetensors").write_bytes(b"weights")
    finish_stage(target / "prepared.json", fingerprint)
    assert not is_ready("teacher", target, fingerprint, overwrite=True)
    assert is_ready("teacher", target, fingerprint, overwrite=False)


@pytest.fixture
def settings(scripts):
    """`settings(**changes)`: those of a student of one layer, or what refuses them."""
    return lambda **changes: scripts["prepare_models"].PrepareModelsConfig("t", "s", student_layers=1, **changes)


@pytest.mark.parametrize(
    ("rows", "domains", "shares"),
    [
        (16, ["maths", "ops_alerts"], [8, 8]),
        (3, ["maths", "ops_alerts"], [2, 1]),
        (2, ["maths", "ops_alerts"], [1, 1]),
        (8, ["maths", "ops_alerts", "medical"], [3, 3, 2]),
        (5, ["maths"], [5]),
    ],
)
def test_calibration_rows_are_shared_out_among_the_packs(scripts, settings, rows, domains, shares):
    chosen = scripts["prepare_models"].calibration_rows(settings(calibration_rows=rows, calibration_domains=domains))
    sources = [row["source"] for row in chosen]
    assert [sources.count(source) for source in dict.fromkeys(sources)] == shares
    assert len({row["prompt"] for row in chosen}) == rows


def test_the_embedded_students_calibration_rows_stay_what_they_are(scripts, settings):
    """Eight of each pack, in the order of the packs: other texts could choose other layers."""
    packs = [load_pack(ROOT / "data" / "domains" / f"{name}.yaml") for name in ("maths", "ops_alerts")]
    expected = [row for pack in packs for row in render_rows(pack, "train", 8, 42)]
    assert scripts["prepare_models"].calibration_rows(settings()) == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"calibration_rows": 1},
            "calibration_rows = 1 for the calibration_domains maths, ops_alerts; name at",
        ),
        ({"calibration_rows": 0}, "calibration_rows = 0 for"),
        ({"calibration_rows": -4}, "calibration_rows = -4 for"),
        (
            {"calibration_domains": []},
            "calibration_rows = 16 for the calibration_domains none; name at least one",
        ),
        ({"calibration_domains": ["math"]}, "calibration_domains: math: no such file in data/domains; there are "),
    ],
)
def test_calibration_on_nothing_is_refused_before_any_work(fails, scripts, monkeypatch, tmp_path, changes, words):
    for work in ("make_teacher", "make_student"):
        monkeypatch.setattr(scripts["prepare_models"], work, lambda _: pytest.fail("worked"))
    arguments = ["--teacher_model", tmp_path / "t", "--student_name_or_path", tmp_path / "s", "--student_layers", "1",
                 "--teacher_package", "some-model==1"]  # fmt: skip
    for name, value in changes.items():
        arguments += [f"--{name}", *(value if isinstance(value, list) else [value])]
    if changes == {"calibration_domains": []}:
        profile = tmp_path / "profile.yaml"
        profile.write_text("prepare_models:\n  calibration_domains: []\n")
        arguments = ["--config", profile, *arguments[:-1]]
    assert words in fails("prepare_models", *arguments)
    assert not (tmp_path / "t").exists()


def test_settings_of_a_student_that_is_not_made_are_of_no_account(scripts):
    scripts["prepare_models"].PrepareModelsConfig("t", "s", calibration_rows=0)
