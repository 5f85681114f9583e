"""Tokens a second of an evaluation's temperature sweep against stage 1's way of asking: same prompts, settings, seeds.

    python benchmarks/sweep_generation.py --output benchmarks/results/sweep_generation.json    # after run_pipeline.sh

`sweep_ARM` is what `evaluate_distillation.py` does for an arm, storing included: one list with all temperatures.
`stage_1_ARM` asks the engine of `generate_sft_data.py` for the same answers, one temperature after the other. Loading
and merging are not timed.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness
from src.distillation.engines import opened
from src.evaluation.answers import MODES, arm_engine, cells, select_rows, sweep_requests
from src.evaluation.arms import Arms, resolve_arms
from src.evaluation.evaluator import SECTION, EvaluateConfig
from src.evaluation.results_schema import ARMS
from src.grading.graders import read_dataset
from src.grading.rows import UNGRADED, Row
from src.utils.common import append_jsonl
from src.utils.config import build_config, read_profile


def rows_of(config: EvaluateConfig) -> list[Row]:
    rows = read_dataset(Path(config.data_dir) / "eval_dataset.jsonl")
    # prompts that nobody grades are no part of an evaluation
    return select_rows([row for row in rows if row["grader"] != UNGRADED], MODES[config.mode])


def measure(name: str, job: dict[str, Any]) -> dict[str, Any]:
    # "stage_1_kd" -> "stage_1", "kd"
    config, (what, _, arm) = build_config(EvaluateConfig, job["settings"]), name.rpartition("_")
    requests = sweep_requests(config, rows_of(config))
    # one list with all temperatures, or a list for each in the order in which they come
    lists = [requests]
    if what == "stage_1":
        lists = [[r for r in requests if r.sampling == own] for own in dict.fromkeys(r.sampling for r in requests)]
    tokens: list[int] = []
    # nothing is missing: arms that were not found are not asked
    arms = Arms(job["models"]["base"], job["models"], {})
    # opened: the model is loaded and its adapter merged before the clock runs
    with tempfile.TemporaryDirectory() as folder, opened(arm_engine(config, arms, arm)) as generate:
        start = time.perf_counter()
        for asked in lists:
            for part in generate(asked, frozenset()):
                # storing is part of what an evaluation does
                append_jsonl(Path(folder) / "answers.jsonl", part)
                tokens += [row["num_tokens"] for row in part]
        seconds = time.perf_counter() - start
    # peak_mb None: memory is no part of this comparison
    return {"seconds": seconds, "tokens_per_second": sum(tokens) / seconds, "answers": len(tokens),
            "tokens": sum(tokens), "peak_mb": None}  # fmt: skip


def parent(arguments: argparse.Namespace) -> None:
    before = harness.machine()
    # 1. the profile, with what the command line says
    settings = read_profile(arguments.config, SECTION, EvaluateConfig)
    own = ("data_dir", "experiment_dir", "model_path", "mode")
    settings |= {name: getattr(arguments, name) for name in own if getattr(arguments, name)}
    settings |= {"max_new_tokens": 8} if arguments.quick else {}
    # 2. the models, by path or hub id
    found = resolve_arms(build_config(EvaluateConfig, settings)).found
    settings["data_dir"] = str(Path(settings["data_dir"]).resolve())  # workers start elsewhere
    found = {arm: str(Path(name).resolve()) if Path(name).is_dir() else name for arm, name in found.items()}
    config = build_config(EvaluateConfig, settings)
    job = {"settings": settings, "models": found}
    names = [f"{what}_{arm}" for arm in arguments.arms if arm in found for what in ("sweep", "stage_1")]
    # 3. every arm both ways, in turn
    results = harness.round_robin(dict.fromkeys(names, sys.executable), lambda _: job, arguments.repeats)
    rate = {result["name"]: result["tokens_per_second"] for result in results if "absent" not in result}
    # against stage 1's way with the same arm, and with the teacher, which is what stage 1 asks
    ratios = {
        f"{name} / {other}": rate[name] / rate[other]
        for name in rate if name.startswith("sweep")
        for other in dict.fromkeys((name.replace("sweep", "stage_1"), "stage_1_teacher")) if other in rate
    }  # fmt: skip
    harness.print_table(results, {"seconds": ".1f", "tokens_per_second": ".1f", "answers": "", "tokens": ""})
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f}")
    shapes = {"prompts": len(rows_of(config)), "cells": len(cells(config)), "batch_size": config.batch_size}
    harness.write_report(arguments.output, {"results": results, "ratios": ratios, "shapes": shapes}, before)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/embedded.yaml", help="the profile")
    parser.add_argument("--data_dir", help="folder of eval_dataset.jsonl (the profile's)")
    parser.add_argument("--experiment_dir", help="runs are beside it (the profile's)")
    parser.add_argument("--model_path", help="RUN/final_model of the distilled student (the newest)")
    parser.add_argument("--mode", choices=MODES, help="how many prompts (the profile's)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM")
    harness.main(parser, parent, measure)
