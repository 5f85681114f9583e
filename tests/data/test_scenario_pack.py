"""A scenario pack, read and filled: a small one of the test's own, and mistakes in it."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from src.data.synthesis import load_pack, render_rows
from src.grading.graders import grade
from src.utils.common import ROOT, UserError


def small_pack() -> dict:
    return {
        "name": "small",
        "domain": "toy",
        "instruction": "Say a number.",
        "licence": "Apache-2.0",
        "lists": {"fruit": {"train": ["fig", "plum"], "eval": ["kiwi"]}},
        "slots": {"a": {"int": [1, 9]}},
        "families": [
            {
                "name": "one",
                "kind": "sum",
                "split": "train",
                "slots": {
                    "b": {"int": [2, 8, 2], "distinct_from": "a"},
                    "c": {"decimal": [0.5, 2.5, 2]},
                    "fruit": {"from": "fruit"},
                    "other": {"from": "fruit", "distinct_from": ["fruit"]},
                    "pick": {"choice": [{"word": "double {fruit}", "n": 2}, {"word": "triple {fruit}", "n": 3}]},
                    "result": {"expr": "max(a, b) * pick.n - round(7 / 2) % 3 + -abs((b + 1) // -2)"},
                },
                "require": ["a + b > 5", "0 < result"],
                "prompt": "{{{a:03}}} {b} {c:.2f} {fruit} {other} {pick.word}",
                "reference": "{result}",
                "grader": "numeric",
            }
        ],
    }


def write(folder: Path, pack: object) -> Path:
    path = folder / "pack.yaml"
    path.write_text(pack if isinstance(pack, str) else yaml.safe_dump(pack, sort_keys=False), encoding="utf-8")
    return path


def test_slots_hold_what_the_yaml_says(tmp_path: Path) -> None:
    shape = re.compile(r"\{00(\d)\} (\d) (\d\.\d\d) (fig|plum) (fig|plum) (double|triple) (fig|plum)\n\nSay a number\.")
    rows = render_rows(load_pack(write(tmp_path, small_pack())), "train", 200, 1)
    seen_b, seen_c = set(), set()
    for row in rows:
        a, b, c, fruit, other, times, again = shape.fullmatch(row["prompt"]).groups()
        a, b, c = int(a), int(b), float(c)
        assert a != b
        assert a + b > 5
        assert fruit == again != other
        assert int(row["reference"]) == max(a, b) * {"double": 2, "triple": 3}[times] - 1 - (b // 2 + 1)
        seen_b.add(b)
        seen_c.add(c)
    assert seen_b == {2, 4, 6, 8}
    assert min(seen_c) >= 0.5
    assert max(seen_c) <= 2.5
    assert len(seen_c) > 50


def test_rows_are_the_same_on_every_machine(tmp_path: Path) -> None:
    rows = render_rows(load_pack(write(tmp_path, small_pack())), "train", 2, 42)
    found = [f"{row['prompt'].splitlines()[0]} = {row['reference']}" for row in rows]
    assert found == ["{004} 6 1.61 plum fig triple plum = 13", "{007} 4 1.63 plum fig double plum = 10"]


def test_rubric_groups_are_filled_and_in_lower_case(tmp_path: Path) -> None:
    pack = small_pack()
    pack["families"][0] |= {"grader": "rubric", "groups": {"what": ["The {fruit}", "N={a}"]}, "pass_mark": 1}
    row = render_rows(load_pack(write(tmp_path, pack)), "train", 1, 1)[0]
    a, fruit = re.match(r"\{00(\d)\} \d \S+ (\w+)", row["prompt"]).groups()
    assert json.loads(row["grader_args"]) == {
        "groups": [{"name": "what", "any": [f"the {fruit}", f"n={a}"]}],
        "pass_mark": 1.0,
    }


def test_a_phrase_holds_several_and_each_grader_has_its_format(tmp_path: Path) -> None:
    pack = small_pack() | {"instruction": {"numeric": "Say a number.", "rubric": "Say a word."}}
    fields = {"grader": "rubric", "groups": {"what": ["{pick.word} | N"]}, "pass_mark": 1, "name": "two"}
    pack["families"].append(pack["families"][0] | fields)
    number, word = render_rows(load_pack(write(tmp_path, pack)), "train", 2, 1)
    assert [row["prompt"].rpartition("\n\n")[2] for row in (number, word)] == ["Say a number.", "Say a word."]
    assert json.loads(word["grader_args"])["groups"][0]["any"] in (
        [[f"{times} {fruit}", "n"] for times in ("double", "triple") for fruit in ("fig", "plum")]
    )


def test_too_many_rows_and_an_empty_split_are_refused(tmp_path: Path) -> None:
    pack = small_pack()
    pack["families"][0] |= {"slots": {}, "require": [], "prompt": "{a}?", "reference": "{a}"}
    loaded = load_pack(write(tmp_path, pack))
    assert len(render_rows(loaded, "train", 9, 0)) == 9
    with pytest.raises(UserError, match=r"family one: prompt: no distinct prompt left after 9"):
        render_rows(loaded, "train", 10, 0)
    with pytest.raises(UserError, match=r"families: none belongs to split 'eval'"):
        render_rows(loaded, "eval", 1, 0)


def change(**fields: object) -> Callable[[dict], object]:
    return lambda pack: pack["families"][0].update(fields)


def slot(**spec: object) -> Callable[[dict], object]:
    return lambda pack: pack["families"][0]["slots"].update(z=spec)


def rubric(**fields: object) -> Callable[[dict], object]:
    return change(**({"grader": "rubric", "groups": {"g": ["x"]}, "pass_mark": 0.5} | fields))


MISTAKES: list[tuple[Callable[[dict], object], str]] = [
    (lambda pack: pack.update(colour=1), "pack.yaml: unknown key 'colour'"),
    (lambda pack: pack.update(licnce="x"), "pack.yaml: unknown key 'licnce'; did you mean licence?"),
    (lambda pack: pack.pop("domain"), "pack.yaml: missing domain"),
    (lambda pack: pack.update(name=7), "pack.yaml: name: expected text, found 7"),
    (lambda pack: pack.update(instruction="a\n\nb"), "family one: instruction: must be one paragraph"),
    (lambda pack: pack.update(instruction={"rubric": "x"}), "family one: instruction: must be one paragraph, or one"),
    (lambda pack: pack.update(families=[]), "families: expected a list, found []"),
    (lambda pack: pack.update(families={}), "families: expected a list, found {}"),
    (lambda pack: pack.update(families=["one"]), "family 1: expected a mapping, found 'one'"),
    (lambda pack: pack["families"].append(pack["families"][0]), "family one: name: stands twice"),
    (lambda pack: pack["lists"]["fruit"].pop("eval"), "lists: fruit: missing eval"),
    (lambda pack: pack["lists"]["fruit"].update(eval=["fig"]), "lists: fruit: 'fig' stands in both splits"),
    (lambda pack: pack["lists"]["fruit"].update(train=[True]), "lists: fruit: train: True is neither text nor"),
    (lambda pack: pack["lists"]["fruit"].update(train=[]), "lists: fruit: train: expected a list, found []"),
    (lambda pack: pack["families"][0].pop("split"), "family one: missing split"),
    (change(split="test"), "family one: split must be train or eval"),
    (change(grader="vibes"), "grader numeric or rubric; found 'train' and 'vibes'"),
    (change(promt="x"), "family one: unknown key 'promt'; did you mean prompt?"),
    (change(prompt=""), "family one: prompt: expected text"),
    (change(prompt="{resutl}"), "family one: prompt: unknown slot 'resutl'; did you mean result?"),
    (change(prompt=["{a}", "{nobody}"]), "family one: prompt: unknown slot 'nobody'"),
    (change(prompt="{a"), "family one: prompt: expected '}' before end of string"),
    (change(prompt="{pick}"), "family one: prompt: no value 'pick'; the fields of pick: word, n"),
    (change(prompt="{a.n}"), "family one: prompt: no value 'a.n'; the fields of a: none"),
    (change(prompt="{fruit:02d}"), "family one: prompt: Unknown format code 'd'"),
    (change(reference="{b} plums"), "family one: reference: the numeric grader needs a plain number"),
    (change(require=["a > 9"]), "family one: require: not met in 200 draws"),
    (change(require="a > 1"), "family one: require: expected a list"),
    (change(require=["a >"]), "family one: require: 'a >' is not an expression"),
    (change(slots={"a": {"int": [1, 2]}}), "family one: slots: a: is a slot of the whole pack already"),
    (change(slots={"max": {"int": [1, 2]}}), "family one: slots: max: is no name for a slot"),
    (slot(int=[5, 1]), "slots: z: expected [lo, hi] or [lo, hi, step]"),
    (slot(int=[1, 5, 0]), "slots: z: expected [lo, hi] or [lo, hi, step]"),
    (slot(decimal=["1", 2]), "slots: z: expected [lo, hi] or [lo, hi, digits]"),
    (slot(decimal=[0, 2000, 3]), "slots: z: [0, 2000, 3] has over a million values"),
    (slot(choice=["x", {"n": 1}]), "slots: z: needs at least one entry, and all of one sort"),
    (slot(choice=["x", "{nobody}"]), "slots: z: unknown slot 'nobody'"),
    (slot(**{"from": "fruits"}), "slots: z: unknown list 'fruits'; did you mean fruit?"),
    (slot(number=[1, 2]), "slots: z: expected one of int, decimal, choice, from, expr; found number"),
    (slot(int=[1, 2], distinct_from="y"), "slots: z: distinct_from: unknown slot 'y'"),
    (slot(choice=["fig", "plum"], distinct_from=["fruit", "other"]), "slots: z: no option is distinct from fruit"),
    (slot(expr="a + nobody"), "slots: z: unknown slot 'nobody'"),
    (slot(expr="a / (b - b)"), "slots: z: 'a / (b - b)' cannot be computed: "),
    (slot(expr="a + fruit"), "slots: z: 'a + fruit' cannot be computed: "),
    (slot(expr="a ** 9"), "a ** 9 is not allowed"),
    (slot(expr="open(a)"), "open(a) is not allowed"),
    (slot(expr="a.__class__.__mro__"), "is not allowed"),
    (slot(expr="a.__class__"), "no value 'a.__class__'"),
    (slot(expr="'text'"), "'text' is not allowed"),
    (slot(expr="[a for a in (1, 2)]"), "is not allowed"),
    (rubric(pass_mark=1.5), "family one: pass_mark: must be a number above 0 and at most 1, found 1.5"),
    (rubric(pass_mark=0), "family one: pass_mark: must be a number above 0"),
    (rubric(pass_mark=None), "family one: pass_mark: must be a number above 0"),
    (rubric(groups={}), "family one: groups: needs at least one group"),
    (rubric(groups={"g": []}), "family one: groups: needs at least one group, and each group a list"),
    (rubric(groups={"g": [3]}), "family one: groups: g: expected text, found 3"),
    (rubric(groups={"g": ["{nobody}"]}), "family one: groups: g: unknown slot 'nobody'"),
]


@pytest.mark.parametrize(("mistake", "message"), MISTAKES, ids=[message[-40:] for _, message in MISTAKES])
def test_a_mistake_in_a_pack_gives_one_clear_line(
    tmp_path: Path, mistake: Callable[[dict], object], message: str
) -> None:
    pack = small_pack()
    mistake(pack)
    path = write(tmp_path, pack)
    with pytest.raises(UserError) as caught:
        load_pack(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert message in text
    assert "\n" not in text


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml: no such scenario pack"):
        load_pack(tmp_path / "none.yaml")
    with pytest.raises(UserError, match=r"pack\.yaml: not valid YAML: .*line 2") as caught:
        load_pack(write(tmp_path, "name: [a\nb: c"))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"pack\.yaml: expected a mapping, found None"):
        load_pack(write(tmp_path, ""))


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_the_pack_shown_in_the_readme_loads_and_fits_twenty_lines(readme: str, tmp_path: Path) -> None:
    text = (ROOT / readme).read_text(encoding="utf-8")
    (shown,) = [block for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if "families:" in block]
    assert len(shown.splitlines()) <= 20
    pack = load_pack(write(tmp_path, shown))
    for split, count in (("train", 100), ("eval", 40)):
        for row in render_rows(pack, split, count, 42):
            assert grade(row, row["reference"]).outcome == "correct"
            assert grade(row, "Restart the printer and call the help desk.").outcome == "wrong"
