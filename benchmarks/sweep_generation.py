"""Tokens a second of an evaluation's temperature sweep against stage 1's engine; same prompts, settings and seeds.

    python benchmarks/sweep_generation.py --output benchmarks/results/sweep_generation.json    # after run_pipeline.sh

`sweep_ARM` is what `evaluate_distillation.py` does for an arm, grading and storing included. `stage_1_ARM` is the
transformers engine of `generate_sft_data.py` asked for the same answers, one temperature after the other; since it
knows no adapters, those of sft and kd are merged into the student for it. Loading is not timed.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness
from src.distillation.base import compute_dtype, load_model, load_tokenizer
from src.distillation.engines import Engine, opened
from src.distillation.lora import load_adapters
from src.distillation.sft import Sampling, make_requests
from src.evaluation.arms import Arms, resolve_arms
from src.evaluation.evaluator import (
    MODES,
    PRESETS,
    SECTION,
    EvaluateConfig,
    cells,
    generate_answers,
    load_models,
    select_rows,
)
from src.evaluation.results_schema import ARMS
from src.grading.graders import read_dataset
from src.grading.rows import UNGRADED
from src.grading.sandbox import open_sandbox
from src.utils.common import UserError, read_jsonl
from src.utils.config import build_config, read_profile


def rows_of(config: EvaluateConfig) -> list[dict[str, Any]]:
    rows = read_dataset(Path(config.data_dir) / "eval_dataset.jsonl")
    return select_rows([row for row in rows if row["grader"] != UNGRADED], MODES[config.mode])


def sweep(config: EvaluateConfig, arm: str, found: dict[str, str]) -> tuple[float, list[int]]:
    arms = Arms(found["base"], {arm: found[arm]}, {})
    models, sandbox, rows = load_models(config, arms), open_sandbox(config.allow_unsafe_execution), rows_of(config)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "samples.jsonl"
        start = time.perf_counter()
        generate_answers(config, arms, models, rows, path, sandbox)
        seconds = time.perf_counter() - start
        return seconds, [row["num_tokens"] for row in read_jsonl(path)]


def stage_1(config: EvaluateConfig, model: str) -> tuple[float, list[int]]:
    seconds, tokens, rows = 0.0, [], rows_of(config)
    for preset, temperature in cells(config):
        sampling = Sampling(temperature, **PRESETS[preset], max_new_tokens=config.max_new_tokens)
        requests = make_requests(rows, config.num_samples, config.seed, f"{preset}/{temperature:g}")
        with opened(Engine("transformers", model, config.batch_size), sampling) as generate:
            start = time.perf_counter()
            tokens += [row["num_tokens"] for part in generate(requests, frozenset()) for row in part]
            seconds += time.perf_counter() - start
    return seconds, tokens


def measure(name: str, job: dict[str, Any]) -> dict[str, Any]:
    config, arm = build_config(EvaluateConfig, job["settings"]), name.rpartition("_")[2]
    if name.startswith("merge"):
        student = load_adapters(load_model(job["models"]["base"], compute_dtype()), {arm: job["models"][arm]})
        student.merge_and_unload().save_pretrained(job["merged"][arm])
        load_tokenizer(job["models"]["base"]).save_pretrained(job["merged"][arm])
        return {"seconds": 0.0}
    if name.startswith("sweep"):
        seconds, tokens = sweep(config, arm, job["models"])
    else:
        seconds, tokens = stage_1(config, job["merged"].get(arm, job["models"][arm]))
    return {"seconds": seconds, "tokens_per_second": sum(tokens) / seconds, "answers": len(tokens),
            "tokens": sum(tokens), "peak_mb": None}  # fmt: skip


def parent(arguments: argparse.Namespace) -> None:
    before = harness.machine()
    settings = read_profile(arguments.config, SECTION, EvaluateConfig)
    own = ("data_dir", "experiment_dir", "model_path", "mode")
    settings |= {name: getattr(arguments, name) for name in own if getattr(arguments, name)}
    settings |= {"max_new_tokens": 8} if arguments.quick else {}
    found = resolve_arms(build_config(EvaluateConfig, settings)).found
    settings["data_dir"] = str(Path(settings["data_dir"]).resolve())  # workers start elsewhere
    found = {arm: str(Path(name).resolve()) if Path(name).is_dir() else name for arm, name in found.items()}
    config = build_config(EvaluateConfig, settings)
    with tempfile.TemporaryDirectory() as folder:
        job = {"settings": settings, "models": found, "merged": {}}
        for arm in found.keys() & {"sft", "kd"}:
            job["merged"][arm] = str(Path(folder) / arm)
            if "absent" in (made := harness.run_worker(sys.executable, f"merge_{arm}", job)):
                raise UserError(f"merging the adapter of {arm} failed: {made['absent']}")
        names = [f"{what}_{arm}" for arm in arguments.arms if arm in found for what in ("sweep", "stage_1")]
        results = harness.round_robin(dict.fromkeys(names, sys.executable), lambda _: job, arguments.repeats)
    rate = {result["name"]: result["tokens_per_second"] for result in results if "absent" not in result}
    ratios = {
        f"{name} / {other}": rate[name] / rate[other]
        for name in rate if name.startswith("sweep")
        for other in dict.fromkeys((name.replace("sweep", "stage_1"), "stage_1_teacher")) if other in rate
    }  # fmt: skip
    harness.print_table(results, {"seconds": ".1f", "tokens_per_second": ".1f", "answers": "", "tokens": ""})
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f}")
    shapes = {"prompts": len(rows_of(config)), "cells": cells(config), "batch_size": config.batch_size}
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
