"""Which recipe wins, and when is distillation worth it: the same student, rows and steps, one recipe after the other.

    python benchmarks/recipes.py prepare            # rows, the teacher's answers and its cache: minutes
    python benchmarks/recipes.py choose             # one seed, half the steps, graded on the validation rows
    python benchmarks/recipes.py table              # every arm with every seed, graded on the evaluation rows: hours
    python benchmarks/recipes.py report             # recipes.json and recipes.md from what there is

Each run leaves OUTPUT/records/PHASE/NAME_seed_N.json and is not made again; a killed one goes on. Started several times
at once (OMP_NUM_THREADS=1 each), the processes share the runs out between them. What is compared stands in
recipe_arms.py, the profile in recipes.yaml, how a run is made in recipe_runs.py, what is made of the records in
recipe_report.py.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from filelock import Timeout

from benchmarks import recipe_runs
from benchmarks.recipe_report import CHINESE, brought_up_to_date, make_results, markdown
from src.utils.common import (
    ROOT,
    UserError,
    logger,
    read_jsonl,
    run_cli,
    write_json,
    write_jsonl,
    write_text,
)
from src.utils.config import read_merged
from src.utils.stages import locked

STAGES = ("prepare_models", "download_datasets", "generate_sft_data", "fix_sft_data", "cache_teacher")
WAIT = 20.0  # seconds between two looks whether an arm that another goes on from is trained


def prepare(arguments: argparse.Namespace) -> None:
    """The stages before training, with the profile."""
    for stage in STAGES:
        if stage == "cache_teacher":
            # before the teacher reads them, and behind the stage that has written them
            keep_measured(Path(read_merged(recipe_runs.PROFILE)["experiment_dir"]) / "sft")
        command = [sys.executable, str(ROOT / "scripts" / f"{stage}.py"), "--config", str(recipe_runs.PROFILE)]
        subprocess.run(command, cwd=ROOT, check=True)


def keep_measured(folder: Path) -> None:
    """Cut the evaluation's clean rows down to those on which KL and NLL are measured, for every run measures them; all
    prompts are graded all the same. stats.json still counts what there was."""
    path = folder / "sft_eval_data_clean.jsonl"
    write_jsonl(path, recipe_runs.measured_of(read_jsonl(path)))


def work(arguments: argparse.Namespace) -> None:
    """Make every record of a phase that is missing; what another process makes is left to it and looked at later.

    Raises:
        UserError: an arm goes on from one that is not there and is not asked for.
    """
    folder = Path(arguments.output)
    # 1. what is asked for, and that nothing of it waits for ever
    left = recipe_runs.jobs_of(arguments.phase, folder, arguments.only)
    (folder / "train").mkdir(parents=True, exist_ok=True)
    names = {job.arm.name for job in left if job.arm}
    for job in left:
        if recipe_runs.waits(job) and job.arm.after not in names:
            raise UserError(f"{job.name} goes on from {job.arm.after}, which is not trained; add it to --only")
    # 2. round after round over what is left; a record that is there is left out of the next
    while left:
        waiting = []
        for job in left:
            job.record.parent.mkdir(parents=True, exist_ok=True)
            try:
                # timeout 0: a job that another process holds is not waited for
                with locked(job.record.with_name(f".{job.name}.lock"), timeout=0):
                    if recipe_runs.is_made(job):
                        continue
                    if recipe_runs.waits(job):
                        waiting.append(job)
                        continue
                    logger.info("%s: %s", job.phase, job.name)
                    write_json(job.record, recipe_runs.make(job))
            except Timeout:  # another process makes it, or dies of it
                waiting.append(job)
        left = waiting
        if left:
            # what is left depends on others
            time.sleep(WAIT)


def report(arguments: argparse.Namespace) -> None:
    """recipes.json and recipes.md, and the tables of the pages that quote them."""
    folder = Path(arguments.output)
    results = make_results(*(recipe_runs.read_phase(phase, folder) for phase in recipe_runs.PHASES))
    write_json(Path(arguments.json or folder / "recipes.json"), results)
    write_text(folder / "recipes.md", markdown(results))
    for page in map(Path, arguments.pages):
        # the tables of a Chinese page have other words
        words = CHINESE if page.name.endswith(".zh-CN.md") else {}
        write_text(page, brought_up_to_date(page.read_text(encoding="utf-8"), results, words))
    print(markdown(results))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=("prepare", *recipe_runs.PHASES, "report"))
    parser.add_argument("--output", default="outputs/recipes", help="runs, answers and records (outputs/recipes)")
    parser.add_argument("--only", nargs="+", default=[], metavar="ARM", help="these arms alone")
    parser.add_argument("--json", help="report: the results' file (OUTPUT/recipes.json)")
    parser.add_argument("--pages", nargs="+", default=[], help="report: pages whose tables are brought up to date")
    arguments = parser.parse_args()
    os.chdir(ROOT)  # the profile's folders are below it
    {"prepare": prepare, "report": report}.get(arguments.phase, work)(arguments)


if __name__ == "__main__":
    run_cli(main)
