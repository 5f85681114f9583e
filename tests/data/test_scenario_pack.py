"""A scenario pack, read and filled: a small one of the test's own, and mistakes in it."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from src.data.scenarios import load_pack, render_rows
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
                    "pick": {
                        "choice": [{"word": "double {{ fruit }}", "n": 2}, {"word": "triple {{ fruit }}", "n": 3}]
                    },
                    "result": {"expr": "max(a, b) * pick.n - round(7 / 2) % 3 + -abs((b + 1) // -2)"},
                },
                "require": ["a + b > 5", "0 < result"],
                "prompt": "{{ '{' }}{{ a | form('03') }}} {{ b }} {{ c | form('.2f') }} "
                "{{ fruit }} {{ other }} {{ pick.word }}",
                "reference": "{{ result }}",
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
    pack["families"][0] |= {"grader": "rubric", "groups": {"what": ["The {{ fruit }}", "N={{ a }}"]}, "pass_mark": 1}
    row = render_rows(load_pack(write(tmp_path, pack)), "train", 1, 1)[0]
    a, fruit = re.match(r"\{00(\d)\} \d \S+ (\w+)", row["prompt"]).groups()
    assert json.loads(row["grader_args"]) == {
        "groups": [{"name": "what", "any": [f"the {fruit}", f"n={a}"]}],
        "pass_mark": 1.0,
    }


def test_a_phrase_holds_several_and_each_grader_has_its_format(tmp_path: Path) -> None:
    pack = small_pack() | {"instruction": {"numeric": "Say a number.", "rubric": "Say a word."}}
    fields = {"grader": "rubric", "groups": {"what": ["{{ pick.word }} | N"]}, "pass_mark": 1, "name": "two"}
    pack["families"].append(pack["families"][0] | fields)
    number, word = render_rows(load_pack(write(tmp_path, pack)), "train", 2, 1)
    assert [row["prompt"].rpartition("\n\n")[2] for row in (number, word)] == ["Say a number.", "Say a word."]
    assert json.loads(word["grader_args"])["groups"][0]["any"] in (
        [[f"{times} {fruit}", "n"] for times in ("double", "triple") for fruit in ("fig", "plum")]
    )


def test_too_many_rows_and_an_empty_split_are_refused(tmp_path: Path) -> None:
    pack = small_pack()
    pack["families"][0] |= {"slots": {}, "require": [], "prompt": "{{ a }}?", "reference": "{{ a }}"}
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
    (lambda pack: pack.update(name=7), "pack.yaml: name: Input should be a valid string, found 7 (quote it"),
    (lambda pack: pack.update(instruction="a\n\nb"), "pack.yaml: instruction: numeric: must be one paragraph"),
    (
        lambda pack: pack.update(instruction={"rubric": "x"}),
        "family one: instruction: the pack has none for the grader numeric",
    ),
    (lambda pack: pack.update(families=[]), "pack.yaml: families: List should have at least 1 item"),
    (lambda pack: pack.update(families={}), "pack.yaml: families: Input should be a valid list, found {}"),
    (lambda pack: pack.update(families=["one"]), "family 1: expected a mapping, found 'one'"),
    (lambda pack: pack["families"].append(pack["families"][0]), "family one: name: stands twice"),
    (lambda pack: pack["lists"]["fruit"].pop("eval"), "lists: fruit: missing eval"),
    (lambda pack: pack["lists"]["fruit"].update(eval=["fig"]), "lists: fruit: 'fig' stands in both splits"),
    (lambda pack: pack["lists"]["fruit"].update(train=[True]), "lists: fruit: train: True is neither text nor"),
    (
        lambda pack: pack["lists"]["fruit"].update(train=[]),
        "lists: fruit: train: expected a list with at least one entry, found []",
    ),
    (lambda pack: pack["families"][0].pop("split"), "family one: missing split"),
    (change(split="test"), "family one: split: Input should be 'train' or 'eval', found 'test'"),
    (change(grader="vibes"), "family one: grader: Input should be 'numeric' or 'rubric', found 'vibes'"),
    (change(promt="x"), "family one: unknown key 'promt'; did you mean prompt?"),
    (change(prompt=""), "family one: prompt: entry 1: String should have at least 1 character"),
    (change(prompt="{{ resutl }}"), "family one: prompt: unknown slot 'resutl'; did you mean result?"),
    (change(prompt=["{{ a }}", "{{ nobody }}"]), "family one: prompt: unknown slot 'nobody'"),
    (change(prompt="{{ a"), "family one: prompt: '{{ a' cannot be read: unexpected end of template"),
    (
        change(prompt="{{ a | f('02') }}"),
        "family one: prompt: \"{{ a | f('02') }}\" cannot be read: No filter named 'f'",
    ),
    (
        change(prompt="{a} {{ b }}"),
        "family one: prompt: {a} would stand in the text as it is; a slot is written {{ a }}",
    ),
    (slot(choice=["{pick.n:02}"]), "slots: z: {pick.n:02} would stand in the text as it is; a slot is written"),
    (
        change(prompt="{{ pick }}"),
        "family one: prompt: '{{ pick }}' cannot be computed: a mapping; name one of its fields: word, n",
    ),
    (change(prompt="{{ a.n }}"), "family one: prompt: '{{ a.n }}' cannot be computed: unknown field 'n'; known: none"),
    (
        change(prompt="{{ pick.wrod }}"),
        "family one: prompt: '{{ pick.wrod }}' cannot be computed: unknown field 'wrod'; did you mean word?",
    ),
    (
        change(prompt="{{ fruit | form('02d') }}"),
        "family one: prompt: \"{{ fruit | form('02d') }}\" cannot be computed: Unknown format code 'd'",
    ),
    (
        change(prompt="{{ c | form('9999') }}"),
        "family one: prompt: \"{{ c | form('9999') }}\" cannot be computed: no format '9999' (such as '02', ",
    ),
    (change(reference="{{ b }} plums"), "family one: reference: the numeric grader needs a plain number"),
    (change(require=["a > 9"]), "family one: require: not met in 200 draws"),
    (change(require="a > 1"), "family one: require: Input should be a valid list, found 'a > 1'"),
    (change(require=["a >"]), "family one: require: 'a >' cannot be read: unexpected 'end of print"),
    (change(slots={"a": {"int": [1, 2]}}), "family one: slots: a: is a slot of the whole pack already"),
    (change(slots={"max": {"int": [1, 2]}}), "family one: slots: max: is no name for a slot"),
    (change(slots={"self": {"int": [1, 2]}}), "family one: slots: self: is no name for a slot"),
    (slot(int=[5, 1]), "slots: z: int: expected [lo, hi] or [lo, hi, step]"),
    (slot(int=[1, 5, 0]), "slots: z: int: expected [lo, hi] or [lo, hi, step]"),
    (slot(int=[0, 10**9]), "slots: z: int: expected [lo, hi] or [lo, hi, step] with lo <= hi and 1e7 values"),
    (slot(decimal=["1", 2]), "slots: z: decimal: entry 1: Input should be a valid number, found '1'"),
    (slot(decimal=[0, 2000, 3]), "slots: z: decimal: expected [lo, hi] or [lo, hi, digits] with lo <= hi"),
    (slot(choice=["x", {"n": 1}]), "slots: z: choice: entries must be all of one sort"),
    (slot(choice=["x", "{{ nobody }}"]), "slots: z: unknown slot 'nobody'"),
    (slot(**{"from": "fruits"}), "slots: z: unknown list 'fruits'; did you mean fruit?"),
    (slot(number=[1, 2]), "slots: z: unknown key 'number'; known: int, decimal, choice"),
    (slot(int=[1, 2], expr="a"), "slots: z: expected exactly one of int, decimal, choice, from, expr"),
    (slot(int=[1, 2], distinct_from="y"), "slots: z: distinct_from: unknown slot 'y'"),
    (slot(choice=["fig", "plum"], distinct_from=["fruit", "other"]), "slots: z: no option is distinct from fruit"),
    (slot(expr="a + nobody"), "slots: z: unknown slot 'nobody'"),
    (slot(expr="a / (b - b)"), "slots: z: 'a / (b - b)' cannot be computed: "),
    (slot(expr="a + fruit"), "slots: z: 'a + fruit' cannot be computed: "),
    (slot(expr="a ** 9"), "slots: z: 'a ** 9' cannot be computed: ** is not allowed"),
    (slot(expr="1e999"), "family one: slots: z: '1e999' cannot be computed: name 'inf' is not defined"),
    (
        slot(expr="open(a)"),
        "slots: z: unknown slot 'open'; known: a, b, c, fruit, other, pick, result, min, max, round",
    ),
    (slot(expr="a.__class__.__mro__"), "slots: z: 'a.__class__.__mro__' cannot be computed: unknown field '__class__'"),
    (slot(expr="a.__class__"), "slots: z: 'a.__class__' cannot be computed: unknown field '__class__'"),
    (slot(expr="'text'"), "family one: slots: z: \"'text'\" gives 'text', not a number"),
    (slot(expr="[a for a in b]"), "family one: slots: z: '[a for a in b]' cannot be read: expected token"),
    (rubric(pass_mark=1.5), "family one: pass_mark: Input should be less than or equal to 1, found 1.5"),
    (rubric(pass_mark=0), "family one: pass_mark: Input should be greater than 0, found 0"),
    (rubric(pass_mark=None), "family one: pass_mark: Input should be a valid number, found None"),
    (change(grader="rubric", groups={"g": ["x"]}), "family one: missing pass_mark"),
    (rubric(groups={}), "family one: groups: needs at least one group"),
    (rubric(groups={"g": []}), "family one: groups: g: List should have at least 1 item"),
    (rubric(groups={3: ["x"]}), "family one: groups: 3: Input should be a valid string, found 3 (quote it"),
    (rubric(groups={"g": [3]}), "family one: groups: g: entry 1: Input should be a valid string, found 3 (quote it"),
    (rubric(groups={"g": ["{{ nobody }}"]}), "family one: groups: g: unknown slot 'nobody'"),
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


HOSTILE = [
    "{{ ''.__class__ }}",
    "{{ a.__class__ }}",
    "{{ pick.__init__ }}",
    "{{ pick.items() }}",
    "{{ fruit['upper'] }}",
    "{{ fruit.upper() }}",
    "{{ fruit[0] }}",
    "{{ [a] * 10 }}",
    "{{ [a, b] }}",
    "{{ max }}",
    "{{ self }}",
    "{{ a is defined }}",
    "{{ 9 ** a }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ lipsum() }}",
    "{{ self._TemplateReference__context }}",
    "{{ (a | attr('real')) }}",
    "{{ fruit.format(a) }}",
    "{{ range(10 ** 9) }}",
    "{{ 'a' * 10 ** 9 }}",
    "{{ 'a' * 1000000000 }}",
    "{{ '%999999999d' % a }}",
    "{{ 9 * 99999999999999999999 }}",
    "{{ round(a, -999999999) }}",
    "{{ '" + "x" * 100_001 + "' }}",
    "{{ " + "(" * 5000 + "a" + ")" * 5000 + " }}",
    "{{ " + "1 + " * 5000 + "1 }}",
    "{% for i in range(1000000000) %}x{% endfor %}",
    "{% set a = 1 %}{{ a }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% include 'other' %}",
    "{% import os %}",
]


@pytest.mark.parametrize("text", HOSTILE, ids=[text[:30] for text in HOSTILE])
@pytest.mark.parametrize("place", ["prompt", "reference", "choice", "expr", "require"])
def test_a_pack_is_data_and_cannot_run_as_code(tmp_path: Path, text: str, place: str) -> None:
    pack = small_pack()
    family = pack["families"][0]
    inner = text.removeprefix("{{ ").removesuffix(" }}")
    if place == "choice":
        family["slots"]["z"] = {"choice": [text]}
    elif place == "expr":
        family["slots"]["z"] = {"expr": inner}
    else:
        family[place] = [inner] if place == "require" else text
    path = write(tmp_path, pack)
    with pytest.raises(UserError) as caught:
        load_pack(path)
    said = str(caught.value)
    field = "slots: z" if place in ("choice", "expr") else place
    assert said.startswith(f"{path}: family one: {field}: ")
    assert "\n" not in said
    assert len(said) < 500


def test_slots_that_feed_one_another_stay_bounded(tmp_path: Path) -> None:
    for first, grow, message in (
        ({"int": [9, 9]}, lambda name: {"expr": f"{name} * {name}"}, "a number above 1e+15"),
        ({"choice": ["ten chars."]}, lambda name: {"choice": [f"{{{{ {name} }}}}" * 10]}, "over 100,000 characters"),
    ):
        pack = small_pack()
        slots = pack["families"][0]["slots"] = {"z0": first}
        for number in range(40):
            slots[f"z{number + 1}"] = grow(f"z{number}")
        with pytest.raises(UserError, match=re.escape(message)):
            load_pack(write(tmp_path, pack))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{ half }} {{ third }} {{ whole }} {{ big }}", "0.5 0.333333 3 1200000"),
        ("{{ whole * 2 }} {{ big + 0.5 }} {{ -third }}", "6 1200000.5 -0.333333"),
        ("{{ big | form(',') }} {{ third | form('.2f') }} {{ n | form('03') }}", "1,200,000 0.33 007"),
        ("{{ 'one' if n == 1 else 'several' }}, {{ n // 2 }} {{ n % 4 }} {{ round(n / 2) }}", "several, 3 3 4"),
        ("{ {{ n }} } {{ '{{' }} {% raw %}{{ n }}{% endraw %} {# unseen #}.", "{ 7 } {{ {{ n }} ."),
        ("{{ odd.items }}, {{ odd.is }}, {{ odd['keys'] }}\n  end", "a, b, c\n  end"),
    ],
)
def test_what_a_template_may_say(tmp_path: Path, text: str, expected: str) -> None:
    pack = small_pack()
    slots = {
        "n": {"int": [7, 7]},
        "half": {"expr": "1 / 2"},
        "third": {"expr": "1 / 3"},
        "whole": {"expr": "0.1 * 3 * 10"},
        "big": {"expr": "1200000"},
        "odd": {"choice": [{"items": "a", "is": "b", "keys": "c"}]},
    }
    pack["families"][0] |= {"slots": slots, "require": [], "prompt": text, "reference": "1"}
    (row,) = render_rows(load_pack(write(tmp_path, pack)), "train", 1, 1)
    assert row["prompt"].removesuffix("\n\nSay a number.") == expected


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml: no such scenario pack"):
        load_pack(tmp_path / "none.yaml")
    with pytest.raises(UserError, match=r"pack\.yaml: not valid YAML: .*line 2") as caught:
        load_pack(write(tmp_path, "name: [a\nb: c"))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"pack\.yaml: expected a mapping, found None"):
        load_pack(write(tmp_path, ""))


def test_the_pack_shown_in_the_docs_loads_and_fits_twenty_lines(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "own_domain.md").read_text(encoding="utf-8")
    (shown,) = [block for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if "families:" in block]
    assert len(shown.splitlines()) <= 20
    pack = load_pack(write(tmp_path, shown))
    for split, count in (("train", 100), ("eval", 40)):
        for row in render_rows(pack, split, count, 42):
            assert grade(row, row["reference"]).outcome == "correct"
            assert grade(row, "Restart the printer and call the help desk.").outcome == "wrong"
