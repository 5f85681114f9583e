"""scripts/download_datasets.py: prompts, their manifest, and what it refuses."""

import json
import random
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest

from src.utils.common import UserError, read_json, read_jsonl, write_json, write_jsonl
from tests.reading import as_set, content

ROW_FIELDS = {
    "id", "source", "domain", "split", "system", "prompt", "instruction", "family", "reference", "grader",
    "grader_args",
}  # fmt: skip


def test_prompts_and_their_manifest(succeeds, profile, tmp_path):
    path = profile()
    printed = succeeds("download_datasets", "--config", path)
    assert "18 training and 8 evaluation rows" in printed
    data = tmp_path / "data"
    rows = {split: read_jsonl(data / f"{split}_dataset.jsonl") for split in ("train", "eval")}
    for split, part in rows.items():
        for row in part:
            assert row.keys() == ROW_FIELDS
            assert all(isinstance(value, str) for value in row.values())
            assert row["split"] == split
            json.loads(row["grader_args"])
    ids = [row["id"] for part in rows.values() for row in part]
    assert len(set(ids)) == len(ids) == 26
    manifest = read_json(data / "manifest.json")
    assert (manifest["train_rows"], manifest["eval_rows"]) == (18, 8)
    assert manifest["provenance"]["command"].startswith("scripts/download_datasets.py --config")
    stated = {(entry["source"], entry["split"]): entry for entry in manifest["sources"]}
    pack = read_jsonl(data / "train_dataset.jsonl")[-1]["source"]
    assert {key: entry["rows"] for key, entry in stated.items()} == {
        ("humaneval", "train"): 4, ("humaneval", "eval"): 3, (pack, "train"): 14, (pack, "eval"): 5,
    }  # fmt: skip
    for (source, _), entry in stated.items():
        assert entry["licence"]
        assert len(entry["sha256"]) == 64
        assert entry["seed"] == 7
        assert 0 <= entry["near_duplicates"] < entry["rows"]
        assert ("HumanEval.jsonl (sha256" if source == "humaneval" else "synthetic") in entry["origin"]

    before = content(data)
    assert "nothing to do" in succeeds("download_datasets", "--config", path)
    assert content(data) == before
    assert not list(data.glob(".*"))


def test_another_seed_gives_other_rows_and_the_same_seed_the_same(succeeds, profile, tmp_path):
    path = profile()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        succeeds("download_datasets", "--config", path, "--data_dir", tmp_path / name, "--seed", seed)
    train = [as_set(tmp_path / name / "train_dataset.jsonl") for name in "abc"]
    assert train[0] == train[1] != train[2]


def test_changed_settings_are_refused_by_the_field(succeeds, fails, profile, tmp_path):
    path = profile()
    succeeds("download_datasets", "--config", path)
    before = content(tmp_path / "data")
    line = fails("download_datasets", "--config", path, "--humaneval_train_rows", "5")
    assert f"{tmp_path / 'data'} was made with humaneval_train_rows = 4, this run has 5" in line
    assert "--overwrite" in line
    assert content(tmp_path / "data") == before
    succeeds("download_datasets", "--config", path, "--humaneval_train_rows", "5", "--overwrite")
    assert len(read_jsonl(tmp_path / "data" / "train_dataset.jsonl")) == 19


@pytest.mark.parametrize("arguments", [("--humaneval_path", "no/such.jsonl"), ("--humaneval_train_rows", "9")])
def test_what_is_refused_leaves_what_is_there(succeeds, fails, profile, tmp_path, arguments):
    """A source that cannot be had, or has too few rows: `--overwrite` deletes nothing until all is chosen."""
    path = profile()
    succeeds("download_datasets", "--config", path)
    before = content(tmp_path / "data")
    fails("download_datasets", "--config", path, "--overwrite", *arguments)
    assert content(tmp_path / "data") == before
    assert "nothing to do" in succeeds("download_datasets", "--config", path)


@pytest.mark.parametrize(("settings", "words"), [
    ({"gsm8k_path": "hub", "gsm8k_train_rows": 5}, "hub data set openai/gsm8k (train) cannot be had"),
    ({"humaneval_path": "hub", "humaneval_train_rows": 5}, "hub data set openai/openai_humaneval (test) cannot be had"),
    ({"mbpp_path": "hub", "mbpp_eval_rows": 5}, "hub data set google-research-datasets/mbpp (test) cannot be had"),
])  # fmt: skip
def test_a_hub_out_of_reach_names_the_flag_that_takes_a_file(fails, profile, monkeypatch, tmp_path, settings, words):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "no_cache"))
    line = fails("download_datasets", "--config", profile(**settings))
    assert words in line
    assert f"name another place with --{next(iter(settings))}" in line
    assert not (tmp_path / "data").exists()


COMMIT = "740312add88f781978c0658806c59bc2815b9866"


class OfTheHub(list):
    """Records as `datasets` gives them, out of the folder of its cache that is named after their commit."""

    def __init__(self, commit: str) -> None:
        name = "gsm8k" if commit == COMMIT else "other"
        super().__init__({"question": f"How many {name} ducks are {i}?", "answer": f"#### {i}"} for i in range(3))
        self.cache_files = [{"filename": f"/cache/openai___gsm8k/main/0.0.0/{commit}/gsm8k-train.arrow"}]


@pytest.fixture
def hub(monkeypatch):
    """A hub that knows one data set; the names and revisions that it was asked for."""
    asked = []

    def dataset_info(_, name, revision):
        asked.append((name, revision))
        return SimpleNamespace(sha=COMMIT if revision in ("main", "v1.0", COMMIT) else "f" * 40)

    def load_dataset(name, subset, split, revision):
        asked.append((name, subset, split, revision))
        return OfTheHub(revision)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize(("place", "revision", "said"), [
    ("hub", "main", ""), ("hub@v1.0", "v1.0", " (v1.0)"), (f"hub@{COMMIT}", COMMIT, ""),
])  # fmt: skip
def test_the_manifest_names_the_commit_that_was_read(succeeds, profile, tmp_path, hub, place, revision, said):
    settings = {"gsm8k_path": place, "gsm8k_train_rows": 3, "domains": ["maths"], "domain_train_rows": [0],
                "domain_eval_rows": [3]}  # fmt: skip
    succeeds("download_datasets", "--config", profile(**settings))
    assert hub == [("openai/gsm8k", revision), ("openai/gsm8k", "main", "train", COMMIT)]
    entry = read_json(tmp_path / "data" / "manifest.json")["sources"][0]
    assert entry["origin"] == f"model hub, openai/gsm8k main train at revision {COMMIT}{said}"


def test_offline_the_cache_says_what_was_read(succeeds, profile, tmp_path, hub, monkeypatch):
    def offline(*_, **__):
        raise huggingface_hub.errors.OfflineModeIsEnabled("offline")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", offline)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: OfTheHub(COMMIT))
    settings = {"gsm8k_path": "hub", "gsm8k_train_rows": 3, "domains": ["maths"], "domain_train_rows": [0],
                "domain_eval_rows": [3]}  # fmt: skip
    succeeds("download_datasets", "--config", profile(**settings))
    assert COMMIT in read_json(tmp_path / "data" / "manifest.json")["sources"][0]["origin"]


def test_another_revision_is_another_data_set(succeeds, fails, profile, hub):
    settings = {"gsm8k_path": "hub", "gsm8k_train_rows": 3, "domains": ["maths"], "domain_train_rows": [0],
                "domain_eval_rows": [3]}  # fmt: skip
    path = profile(**settings)
    succeeds("download_datasets", "--config", path)
    line = fails("download_datasets", "--config", path, "--gsm8k_path", "hub@v2")
    assert "was made with gsm8k_path = 'hub', this run has 'hub@v2'" in line


def test_one_revision_for_all_is_gone(succeeds, fails, profile, tmp_path):
    """The setting is refused with the new way; what was collected with its default stays finished, with another not."""
    path = profile()
    succeeds("download_datasets", "--config", path)
    for line in (
        fails("download_datasets", "--config", path, "--hub_revision", "v1.0"),
        fails("download_datasets", "--config", profile(hub_revision="v1.0")),
    ):
        assert "hub_revision" in line
        assert "gsm8k_path: hub@REVISION" in line
    path, marker = profile(), tmp_path / "data" / "download_datasets.json"
    assert "nothing to do" in succeeds("download_datasets", "--config", path)
    stored = read_json(marker)
    assert stored["fingerprint"]["hub_revision"] == "main"  # as it always stood there
    stored["fingerprint"]["hub_revision"] = "v1.0"
    write_json(marker, stored)
    assert "was made with hub_revision = 'v1.0'" in fails("download_datasets", "--config", path)


@pytest.mark.parametrize(("settings", "words"), [
    ({"humaneval_train_rows": 9}, "humaneval: 9 train rows are asked for, 8 can be had"),
    ({"humaneval_train_rows": 8, "humaneval_eval_rows": 1}, "humaneval: 1 eval rows are asked for, 0 can be had"),
    ({"humaneval_eval_rows": 3}, "the profile asks for no training or no evaluation rows"),
    ({"humaneval_train_rows": -1}, "humaneval_train_rows must be at least 0"),
    ({"domains": ["maths"], "domain_train_rows": [-3], "domain_eval_rows": [3]}, "domain_train_rows must be at least"),
    ({"humaneval_path": "no/such.jsonl", "humaneval_train_rows": 1}, "no/such.jsonl: no such file"),
    ({"domains": ["maths"], "domain_train_rows": [3]}, "must have one entry a pack each"),
    ({"domains": ["math"], "domain_train_rows": [3], "domain_eval_rows": [3]}, "math: no such file in data/domains; "),
    ({"domains": ["maths"] * 2, "domain_train_rows": [3] * 2, "domain_eval_rows": [3] * 2}, "2 sources are named math"),
    ({"prompts_eval_file": "held.jsonl"}, "name a prompts_file too"),
])  # fmt: skip
def test_wrong_requests_for_prompts(fails, profile, humaneval_file, tmp_path, settings, words):
    assert words in fails(
        "download_datasets", "--config", profile(**{"humaneval_path": str(humaneval_file)} | settings)
    )
    assert not list((tmp_path / "data").glob("*_dataset.jsonl"))


@pytest.mark.parametrize("name", ["gsm8k", "mbpp"])
def test_your_prompts_named_as_another_source(fails, profile, tmp_path, name):
    """By name alone one would stand in for the other."""
    write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": f"How do I feed {i} hens?"} for i in range(40)])
    questions = [{"question": f"How many legs have {i} dogs?", "answer": f"#### {4 * i}"} for i in range(3)]
    write_jsonl(tmp_path / "train.jsonl", questions)
    write_jsonl(tmp_path / "tasks.jsonl", [{"task_id": 11, "text": "Add.", "code": "x", "test_list": ["assert x"]}])
    rows = {"gsm8k": {"gsm8k_train_rows": 3}, "mbpp": {"mbpp_eval_rows": 1}}[name]
    line = fails("download_datasets", "--config", profile(
        prompts_file=str(tmp_path / f"{name}.jsonl"), gsm8k_path=str(tmp_path / "train.jsonl"),
        mbpp_path=str(tmp_path / "tasks.jsonl"), **rows,
    ))  # fmt: skip
    assert f"2 sources are named {name}; rename the prompts_file" in line


def test_your_prompts_that_all_overlap(fails, profile, tmp_path):
    for name, eggs in (("own", 3), ("held", 5)):
        rows = [{"prompt": f"A farmer sells {eggs} eggs a day to each of {i} shops; how many a week?"} for i in (7, 8)]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    line = fails("download_datasets", "--config", profile(
        prompts_file=str(tmp_path / "own.jsonl"), prompts_eval_file=str(tmp_path / "held.jsonl"),
    ))  # fmt: skip
    assert "own: no train row is left, for all of them overlap evaluation rows" in line


def test_training_rows_that_overlap_are_counted_where_too_few_are_left(scripts):
    module = scripts["download_datasets"]
    source = module.Source("pack", "MIT", {"train": [{"id": name} for name in "abc"]}, {"train": 3}, {})
    with pytest.raises(UserError, match=r"2 can be had \(1 overlap evaluation rows\); .*another seed"):
        module.choose(source, "train", 0, [], {"b"})


@pytest.mark.parametrize(("task_ids", "words"), [
    ([11, "MBPP/12"], "record 2 has task_id 'MBPP/12'; a number such as 11 is wanted"),
    ([601, 10], "no record has a task_id from 11 to 510, MBPP's test split"),
])  # fmt: skip
def test_an_mbpp_file_without_the_test_split(fails, profile, tmp_path, task_ids, words):
    path = tmp_path / "tasks.jsonl"
    write_jsonl(path, [{"task_id": i, "text": "Add.", "code": "x", "test_list": ["assert x"]} for i in task_ids])
    line = fails("download_datasets", "--config", profile(mbpp_path=str(path), mbpp_eval_rows=1))
    assert f"file {path}" in line
    assert words in line


def test_a_mistyped_file_is_not_the_one_beside_it(fails, profile, tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"question": "How many?", "answer": "#### 1"}])
    line = fails("download_datasets", "--config", profile(gsm8k_path=str(tmp_path / "mine.jsonl"), gsm8k_train_rows=1))
    assert "mine.jsonl: no such file" in line


def test_a_grader_for_all_of_your_prompts(succeeds, fails, profile, tmp_path):
    """A published JSON list, whose numbers are numbers; stages that were finished without the setting stay finished."""
    names = ("cats", "dogs", "hens", "cows", "owls", "pigs")
    records = [{"Question": f"How many legs have {i + 2} {name}?", "Answer": 4.0 * i} for i, name in enumerate(names)]
    (tmp_path / "svamp.json").write_text(json.dumps({"version": 1, "Instances": records[:4]}))
    (tmp_path / "held.csv").write_text("Question;Answer\n" + "".join(f"{r['Question']};8\n" for r in records[4:]))
    settings = {"prompts_file": str(tmp_path / "svamp.json"), "prompts_eval_file": str(tmp_path / "held.csv"),
                "prompt_column": "Question", "reference_column": "Answer"}  # fmt: skip
    path = profile(**settings)
    assert "its records are the list 'Instances'" in succeeds("download_datasets", "--config", path)
    stored = read_json(tmp_path / "data" / "download_datasets.json")["fingerprint"]
    assert "prompts_grader" not in stored
    assert "nothing to do" in succeeds("download_datasets", "--config", path)
    assert "was made with prompts_grader = None" in fails(
        "download_datasets", "--config", path, "--prompts_grader", "numeric"
    )
    succeeds("download_datasets", "--config", path, "--prompts_grader", "numeric", "--overwrite")
    for split, references in (("train", {"0.0", "4.0", "8.0", "12.0"}), ("eval", {"8"})):
        rows = read_jsonl(tmp_path / "data" / f"{split}_dataset.jsonl")
        assert {row["grader"] for row in rows} == {"numeric"}
        assert {row["reference"] for row in rows} == references
    assert "invalid choice: 'vibes'" in fails("download_datasets", "--config", path, "--prompts_grader", "vibes")


def test_what_a_source_says_twice_is_taken_once(succeeds, fails, profile, tmp_path):
    """Two rows of one id would be answered once where the answers are gone on with."""
    rows = [{"question": f"How many legs have {i} dogs?", "answer": f"#### {4 * i}"} for i in (1, 2, 2, 3)]
    write_jsonl(tmp_path / "gsm8k" / "train.jsonl", rows)
    write_jsonl(tmp_path / "gsm8k" / "test.jsonl", [{"question": "Who has five eyes?", "answer": "#### 0"}])
    settings = {"gsm8k_path": str(tmp_path / "gsm8k"), "gsm8k_train_rows": 3, "gsm8k_eval_rows": 1}
    path = profile(**settings)
    succeeds("download_datasets", "--config", path)
    ids = [row["id"] for row in read_jsonl(tmp_path / "data" / "train_dataset.jsonl")]
    assert len(set(ids)) == len(ids) == 3
    assert "4 train rows are asked for, 3 can be had" in fails(
        "download_datasets", "--config", path, "--gsm8k_train_rows", "4", "--data_dir", tmp_path / "more"
    )


def test_rows_that_overlap_only_among_the_chosen_are_passed_over(succeeds, profile, tmp_path):
    """An ending in 12 of 200 candidates is a template's wording; in the few that are chosen it is a leak."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=6)) for _ in range(5000)]
    ending = " ".join(draw.choices(words, k=16))
    for name, count, alike in (("train", 62, 2), ("test", 200, 12)):
        questions = [" ".join(draw.choices(words, k=14)) for _ in range(count)]
        rows = [{"question": f"{question} {ending * (i < alike)}", "answer": f"#### {i}"}
                for i, question in enumerate(questions)]  # fmt: skip
        write_jsonl(tmp_path / "gsm8k" / f"{name}.jsonl", rows)
    settings = {"gsm8k_path": str(tmp_path / "gsm8k"), "gsm8k_train_rows": 60, "gsm8k_eval_rows": 40}
    succeeds("download_datasets", "--config", profile(**settings))
    entries = read_json(tmp_path / "data" / "manifest.json")["sources"]
    train, evaluation = (entry for entry in entries if entry["source"] == "gsm8k")
    assert (train["rows"], evaluation["rows"]) == (60, 40)
    assert sum(train["passed_over"].values()) == 2
    written = [read_jsonl(tmp_path / "data" / f"{split}_dataset.jsonl") for split in ("train", "eval")]
    found = [sum(ending in row["prompt"] for row in rows) for rows in written]
    assert found[0] == 0
    assert found[1] > 0


def test_a_source_file_that_is_not_the_official_one(fails, profile, tmp_path):
    path = tmp_path / "train.jsonl"
    settings = {"gsm8k_path": str(path), "gsm8k_train_rows": 1}
    path.write_text('{"question": "How many?", "answer": "#### 1"}\n{"question": "Why?"}\n')
    assert f"{path}:2: missing answer; found question" in fails("download_datasets", "--config", profile(**settings))
    path.write_text('{"question": "How many?", "answer": "one"}\n')
    assert "record 1 has no '#### <number>'" in fails("download_datasets", "--config", profile(**settings))


@pytest.mark.parametrize("given", ["gsm8k/train.jsonl", "gsm8k"])
def test_official_gsm8k_and_mbpp_go_through_every_stage(succeeds, profile, real_data, tmp_path, given):
    """20 rows of GSM8K and 3 of MBPP; the tiny teacher's answers are nonsense, so `select: all`."""
    path = profile(
        gsm8k_path=str(real_data / given), gsm8k_train_rows=16, gsm8k_eval_rows=4,
        mbpp_path=str(real_data / "mbpp" / "mbpp.jsonl"), mbpp_eval_rows=3,
    )  # fmt: skip
    succeeds("download_datasets", "--config", path)
    rows = {split: read_jsonl(tmp_path / "data" / f"{split}_dataset.jsonl") for split in ("train", "eval")}
    assert [row["source"] for row in rows["train"]] == ["gsm8k"] * 16
    assert [row["source"] for row in rows["eval"]] == ["gsm8k"] * 4 + ["mbpp"] * 3
    official = {
        split: {row["question"].strip() for row in read_jsonl(real_data / "gsm8k" / f"{name}.jsonl")}
        for split, name in (("train", "train"), ("eval", "test"))
    }
    for split, part in rows.items():
        for row in part:
            if row["source"] == "gsm8k":
                assert row["prompt"].rpartition("\n\n")[0] in official[split]
                float(row["reference"])
    tasks = [int(json.loads(row["grader_args"])["task_id"].removeprefix("MBPP/")) for row in rows["eval"][4:]]
    assert all(11 <= task <= 510 for task in tasks)
    stated = {(e["source"], e["split"]): e for e in read_json(tmp_path / "data" / "manifest.json")["sources"]}
    assert "train.jsonl (sha256" in stated["gsm8k", "train"]["origin"]
    assert "test.jsonl (sha256" in stated["gsm8k", "eval"]["origin"]
    assert stated["mbpp", "eval"]["licence"] == "CC BY 4.0"
    if given == "gsm8k":
        return
    for name in ("generate_sft_data", "fix_sft_data"):
        succeeds(name, "--config", path)
    printed = succeeds("run_improved_kd", "--config", path, "--max_length", "2000")
    assert "kd: held-out kl_to_teacher" in printed


def test_a_folder_with_a_dot_in_its_name(succeeds, profile, tmp_path):
    folder = tmp_path / "gsm8k-1.0"
    for name in ("train", "test"):
        rows = [{"question": f"How many {name} ducks are {i}?", "answer": f"#### {i}"} for i in range(3)]
        write_jsonl(folder / f"{name}.jsonl", rows)
    settings = {"gsm8k_path": str(folder), "gsm8k_train_rows": 2, "gsm8k_eval_rows": 1}
    succeeds("download_datasets", "--config", profile(**settings))


def test_a_changed_source_file_is_noticed(succeeds, fails, profile, humaneval_file):
    path = profile()
    succeeds("download_datasets", "--config", path)
    rows = read_jsonl(humaneval_file)
    write_jsonl(humaneval_file, [row | {"test": "def check(candidate):\n    pass\n"} for row in rows])
    assert "was made with" in fails("download_datasets", "--config", path)
