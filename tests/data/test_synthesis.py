"""Scenario packs: rows that follow from the seed, disjoint splits, keys that fit the text, errors that name a field.

Every file in data/domains/ is tested, with no list of them here.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import yaml

from src.data.cleaning import near_duplicates, words_of
from src.data.sources import Row, question_of
from src.data.synthesis import Family, Pack, load_pack, names_of, render_rows
from src.evaluation.graders import grade, mentions
from src.utils.common import ROOT, UserError

DOMAINS = ROOT / "data" / "domains"
NAMES = sorted(path.stem for path in DOMAINS.glob("*.yaml"))
DRILLS = ("maths", "ops_alerts")  # for very small models: short prompts that repeat their templates by intent
SIZES = {
    "aiops": {"train": 1000, "eval": 100},
    "maths": {"train": 500, "eval": 100},
    "ops_alerts": {"train": 600, "eval": 100},
}
PER_FAMILY = {"train": 25, "eval": 10}  # rows of the other packs
ALIKE = 0.05  # the share of near-duplicates a pack may have
WORDS = {"maths": (20, 60), "ops_alerts": (20, 40)}  # of a prompt; tokens of English are about 1.6 x words
ALL = pytest.mark.parametrize("name", NAMES)
RUBRIC = pytest.mark.parametrize("name", [name for name in NAMES if name != "maths"])
AIOPS_PACKS = pytest.mark.parametrize("name", ["aiops", "ops_alerts"])
SPLITS = pytest.mark.parametrize("split", ["train", "eval"])


@cache
def pack_of(name: str) -> Pack:
    return load_pack(DOMAINS / f"{name}.yaml")


def size_of(name: str, split: str) -> int:
    return SIZES[name][split] if name in SIZES else PER_FAMILY[split] * len(families_of(name, split))


@cache
def rows_of(name: str, split: str, seed: int = 42) -> list[Row]:
    return render_rows(pack_of(name), split, size_of(name, split), seed)


def families_of(name: str, split: str) -> list[Family]:
    return [family for family in pack_of(name).families if family.split == split]


def with_family(name: str, split: str) -> list[tuple[Family, Row]]:
    families = families_of(name, split)
    return [(families[i % len(families)], row) for i, row in enumerate(rows_of(name, split))]


def stands_in(text: str, phrase: str, whole_words: bool) -> bool:
    return phrase in text and (not whole_words or bool(re.search(rf"(?<!\w){re.escape(phrase)}s?(?!\w)", text)))


def hits(row: Row, answer: str, whole_words: bool = True) -> dict[str, bool]:
    """Which rubric groups an answer hits: any phrase, ignoring case, as whole words (or a plural) or anywhere."""
    groups = json.loads(row["grader_args"])["groups"]
    return {
        group["name"]: any(stands_in(answer.lower(), phrase, whole_words) for phrase in group["any"])
        for group in groups
    }


# --- rows ------------------------------------------------------------------------------------------------------------


@ALL
@SPLITS
def test_rows_are_a_function_of_the_seed(name: str, split: str) -> None:
    again = render_rows(load_pack(DOMAINS / f"{name}.yaml"), split, size_of(name, split), 42)
    assert again == rows_of(name, split)
    assert rows_of(name, split, seed=43)[:50] != again[:50]


@ALL
@SPLITS
def test_fewer_rows_are_a_prefix_of_more(name: str, split: str) -> None:
    count = min(40, size_of(name, split) // 2)
    assert render_rows(pack_of(name), split, count, 42) == rows_of(name, split)[:count]


@ALL
def test_prompts_and_ids_are_distinct_within_and_between_splits(name: str) -> None:
    rows = rows_of(name, "train") + rows_of(name, "eval")
    for field in ("id", "prompt"):
        assert len({row[field] for row in rows}) == len(rows)


@ALL
def test_splits_share_no_family_no_list_entry_and_no_name(name: str) -> None:
    train, evaluation = ({family.name for family in families_of(name, split)} for split in ("train", "eval"))
    assert train
    assert evaluation
    assert not train & evaluation
    for entries in pack_of(name).lists.values():
        assert not [entry for entry in entries["train"] if entry in entries["eval"]]
    named = {"services", "gateways", "databases", "caches", "queues", "nodes", "regions", "places", "pupils"}
    for key in pack_of(name).lists.keys() & named:
        for split, foreign in (("train", "eval"), ("eval", "train")):
            text = "\n".join(row["prompt"] for row in rows_of(name, split))
            assert not [entry for entry in pack_of(name).lists[key][foreign] if entry in text]


@ALL
def test_evaluation_shares_no_run_of_words_with_training(name: str) -> None:
    size = 13 if name.endswith("_zh") else 8  # 13 Han characters are about eight words

    def grams(row: Row) -> set[tuple[str, ...]]:
        words = words_of(re.sub(r"\d+", "0", question_of(row)))
        return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}

    seen = set().union(*(grams(row) for row in rows_of(name, "train")))
    assert len(seen) > 1000
    assert not [row["prompt"] for row in rows_of(name, "eval") if grams(row) & seen]


@ALL
@SPLITS
def test_prompts_are_complete_and_of_the_promised_size(name: str, split: str) -> None:
    low, high = WORDS.get(name, (40, 180))
    for family, row in with_family(name, split):
        for text in (row["prompt"], row["reference"], row["grader_args"].replace('{"', "").replace('"}', "")):
            assert not re.search(r"\{[a-z_]+[}.:]", text), family.name
        words = len(row["prompt"].split()) if name in WORDS else len(words_of(row["prompt"]))
        assert low <= words <= high, family.name
        assert {row["source"], row["domain"], row["split"]} == {pack_of(name).name, pack_of(name).domain, split}


@ALL
@SPLITS
def test_the_numbers_and_names_are_not_all_that_differs(name: str, split: str) -> None:
    alike = near_duplicates(rows_of(name, split), names_of(pack_of(name)))
    assert name in DRILLS or len(alike) <= ALIKE * len(rows_of(name, split))


# --- keys ------------------------------------------------------------------------------------------------------------


@ALL
@SPLITS
def test_every_reference_is_graded_correct(name: str, split: str) -> None:
    """In the asked-for format as well, where that has a label for each group; and it hits every group."""
    for family, row in with_family(name, split):
        result = grade(row, row["reference"])
        assert (result.outcome, result.score) == ("correct", 1.0), (family.name, row["reference"])
        if family.grader == "rubric" and name not in DRILLS:
            assert result.strict, (family.name, row["reference"])


@ALL
@SPLITS
def test_a_parroted_or_empty_answer_fails(name: str, split: str) -> None:
    """Neither the prompt as it is nor, for a rubric, its words without the shield against copied lines."""
    for family, row in with_family(name, split):
        assert grade(row, "").outcome == "no_answer"
        if family.grader == "rubric":
            assert grade(row, row["prompt"]).outcome == "wrong", (family.name, row["prompt"])
            groups = json.loads(row["grader_args"])["groups"]
            hit = sum(mentions(question_of(row), group["any"]) for group in groups)
            assert round(hit / len(groups), 2) < family.pass_mark, (family.name, row["prompt"])
        elif name not in DRILLS:
            assert grade(row, row["prompt"]).outcome != "correct", (family.name, row["prompt"])


@RUBRIC
def test_the_reference_of_another_family_fails(name: str) -> None:
    """Up to two of a hundred pairs (drills, with one group each: three), for families of one field do touch."""
    kept = {}
    for family, row in with_family(name, "train") + with_family(name, "eval"):
        if family.grader == "rubric":
            kept.setdefault((family.name, re.sub(r"\d+", "0", row["reference"])), (family, row))
    by_family = defaultdict(list)
    for family, row in kept.values():
        by_family[family.name].append((family, row))
    some = [pair for pairs in by_family.values() for pair in pairs[:5]]
    passed = [
        (a.name, b.name) for a, one in some for b, other in some
        if a.kind != b.kind and grade(other, one["reference"]).outcome == "correct"
    ]  # fmt: skip
    assert len(passed) <= (0.03 if name in DRILLS else 0.02) * len(some) ** 2, Counter(passed)


@pytest.mark.parametrize("name", ["aiops", "medical", "finance", "legal", "education", "manufacturing"])
def test_every_domain_has_families_enough_and_a_chinese_pack(name: str) -> None:
    assert len(pack_of(name).families) >= (42 if name == "aiops" else 14)
    chinese = pack_of(f"{name}_zh")
    assert len(chinese.families) >= 14
    assert chinese.domain == pack_of(name).domain
    assert all(re.search(r"[\u4e00-\u9fff]", row["prompt"]) for row in rows_of(f"{name}_zh", "eval"))


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


def test_domain_can_be_renamed() -> None:
    row = render_rows(pack_of("maths"), "eval", 1, 0, domain="arithmetic")[0]
    assert (row["domain"], row["source"]) == ("arithmetic", "maths_word_problems")


# --- AIOps keys ------------------------------------------------------------------------------------------------------


@AIOPS_PACKS
def test_every_aiops_kind_has_families_in_both_splits(name: str) -> None:
    kinds = Counter((family.split, family.kind) for family in pack_of(name).families)
    names = {kind for _, kind in kinds}
    assert len(names) == 14
    assert all(kinds["train", kind] >= 2 and kinds["eval", kind] >= 1 for kind in names)


@AIOPS_PACKS
@SPLITS
def test_echoing_the_ticket_hits_neither_cause_nor_actions(name: str, split: str) -> None:
    for family, row in with_family(name, split):
        hit = hits(row, question_of(row), whole_words=False)
        assert not hit["root_cause"], family.name
        assert not hit.get("first_actions"), family.name


def test_the_component_stands_in_the_ticket() -> None:
    for family, row in with_family("aiops", "train") + with_family("aiops", "eval"):
        assert hits(row, question_of(row))["component"], family.name


@SPLITS
def test_keys_tell_the_kinds_apart(split: str) -> None:
    """Another kind's root cause rarely hits; the paged service and advice that fits everything rarely pass."""
    one = with_family("aiops", split)[: len(families_of("aiops", split))]
    pairs = [(a, b) for family, a in one for other, b in one if family.kind != other.kind]
    assert sum(hits(b, a["reference"])["root_cause"] for a, b in pairs) / len(pairs) < 0.05
    passed = 0
    for _, row in one:
        service = re.search("|".join(pack_of("aiops").lists["services"][split]), row["prompt"]).group()
        hit = hits(
            row,
            f"Root cause: a fault\nComponent: {service}\nFirst actions: restart it, roll back, scale up, check logs",
        )
        passed += round(sum(hit.values()) / len(hit), 2) >= json.loads(row["grader_args"])["pass_mark"]
    assert passed / len(one) < 1 / 3


# --- maths keys ------------------------------------------------------------------------------------------------------

Solve = Callable[..., int]
ADD: Solve = lambda a, b: a + b  # noqa: E731
TIMES: Solve = lambda a, b: a * b  # noqa: E731
SOLUTIONS: dict[str, Solve] = {
    "buys_more": ADD,
    "friend_gives": ADD,
    "finds_more": ADD,
    "class_of_children": ADD,
    "same_again": ADD,
    "bags_hold": TIMES,
    "boxes_of_things": TIMES,
    "hourly_wage": TIMES,
    "every_day": TIMES,
    "twice_as_many": lambda a: 2 * a,
    "money_left": lambda a, b: a - b,
    "buys_and_gives": lambda a, b, c: a + b - c,
    "bags_and_extra": lambda a, b, c: a * b + c,
    "earns_and_spends": lambda had, wage, hours, spent: had + wage * hours - spent,
    "shelter_animals": ADD,
    "picks_more": ADD,
    "neighbour_brings": ADD,
    "crates_contain": TIMES,
    "driver_is_paid": TIMES,
    "same_number_again": ADD,
    "bakes_and_sells": lambda a, b, c: a + b - c,
    "rows_of_tulips": lambda plants, beds, dead, new: plants * beds - dead + new,
}


@SPLITS
def test_numeric_references_follow_from_the_numbers_in_the_prompt(split: str) -> None:
    for family, row in with_family("maths", split):
        numbers = [int(number) for number in re.findall(r"\d+", question_of(row))]
        assert row["reference"] == str(SOLUTIONS[family.name](*numbers)), row["prompt"]
        assert int(row["reference"]) >= 0
        assert (row["grader"], row["grader_args"]) == ("numeric", "{}")


def test_maths_is_mostly_one_step() -> None:
    steps = defaultdict(Counter)
    for family in pack_of("maths").families:
        steps[family.split][family.kind] += 1
    assert steps["train"].total() >= 14
    assert steps["eval"].total() >= 6
    for count in steps.values():
        assert set(count) == {"one_step", "two_step", "three_step"}
        assert count["one_step"] > count.total() / 2


# --- a small pack of the test's own ----------------------------------------------------------------------------------


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
