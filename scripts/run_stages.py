"""Every stage, one process after the other; run_pipeline.sh calls this once there is a virtual environment.

    python scripts/run_stages.py --profile embedded
    python scripts/run_stages.py --profile qwen3_30b_to_8b --hardware 1x80 --dry_run       # the commands, and the plan
    python scripts/run_stages.py --profile qwen3_30b_to_8b --from cache_teacher --to distil

A stage that fails stops the rest, with its exit code. Safe to run again: finished stages are skipped, unfinished ones
go on where they were. Each command can be copied and run by hand, in the repository's folder.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# a script's own folder is on the path, the repository is not: its modules are imported from here on
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import os
import shlex
import time

from src.launch.commands import STAGES, Command, chosen_stages, command_line, command_of, gpu_count
from src.launch.processes import run_to_end, wait_until_free
from src.launch.profile import find_profile, resolve, without_overlay
from src.utils.common import ROOT, UserError, run_cli, write_text
from src.utils.config import build_config, hardware_argument, profile_argument, setting, to_yaml, wants_config


@dataclass
class RunStagesConfig:
    profile: str = setting("embedded", "configs/NAME.yaml, or the path of a profile")
    from_stage: str = setting("", f"the first stage: {' '.join(STAGES)}", "from")
    to_stage: str = setting("", "the last stage", "to")
    seed: int | None = setting(
        None, "the whole of it once more with other prompts, answers and training, in folders that end in _seed_N"
    )
    dry_run: bool = setting(False, "print every command, what it reads and writes, and the plan; touch nothing")


def print_plan_of(values: dict[str, Any]) -> None:
    """What fits, how long it takes and what it needs; one line where the models' configurations cannot be had here."""
    # here, for only a dry run needs them
    from src.planning.plan import make_plan
    from src.planning.report import print_plan

    try:
        plan = make_plan(values, None)
    except UserError as error:
        print(f"no plan: {error}")
        return
    print_plan(plan)


def check_machine(commands: list[Command], values: dict[str, Any]) -> None:
    """Refuse to begin on a machine with fewer GPUs than the commands are for."""
    if not any(command.env for command in commands):  # CUDA_VISIBLE_DEVICES, of the stages that work on GPUs
        return
    import torch

    found, wanted = torch.cuda.device_count(), gpu_count(values)
    if found < wanted:
        raise UserError(
            f"the profile is for {wanted} GPUs ({values['gpus']}), this machine shows {found}; name another "
            "--hardware, or end before the stages that need them with --to download_datasets"
        )


def run_all(commands: list[Command], again: str) -> None:
    """Run the stages; one that fails ends this process with its exit code."""
    begin = time.monotonic()
    for command in commands:
        start = time.monotonic()
        # flush: the stage writes past this process's buffer
        print(f"\n=== {command.stage}: {command_line(command)}", flush=True)
        if command.env:
            # numbers count among the visible ones: GPU 1 of "4,6" is "6"; the stage before may still hold its memory
            wait_until_free([command.env["CUDA_VISIBLE_DEVICES"].split(",")[number] for number in command.gpus])
        code = run_to_end(command.argv, os.environ | command.env, ROOT)
        if code != 0:
            print(f"=== {command.stage} ended with exit code {code}; go on with: {again} --from {command.stage}",
                  file=sys.stderr)  # fmt: skip
            sys.exit(code)
        print(f"=== {command.stage}: {time.monotonic() - start:.0f} s", flush=True)
    print(f"=== all stages: {time.monotonic() - begin:.0f} s", flush=True)


def main() -> None:
    # 1. the profile with its overlay and seed
    argv = sys.argv[1:]
    config = build_config(RunStagesConfig, argv=argv, prog="scripts/run_stages.py")
    hardware, named = hardware_argument(argv), profile_argument(argv) or config.profile
    if config.seed is not None and config.seed < 0:
        raise UserError(f"--seed must not be below 0, found {config.seed}")
    profile = resolve(find_profile(named), hardware, config.seed)
    # what is laid over it is in the text already: an overlay named there would be laid over again
    if wants_config(argv):
        print(profile.text or to_yaml(without_overlay(profile.values)), end="")
        return
    # 2. the stages' commands, and this one, as it is said to go on
    commands = [command_of(stage, profile) for stage in chosen_stages(config.from_stage, config.to_stage)]
    again = ["bash", "run_pipeline.sh", "--profile", named]
    # "" is said, too: no overlay
    again += ["--hardware", hardware] if hardware is not None else []
    again += ["--seed", str(config.seed)] if config.seed is not None else []
    # 3. said, or run
    if config.dry_run:
        from src.launch.dry_run import dry_run_lines  # seconds of imports, which starting stages can do without

        print("\n".join(dry_run_lines(profile, commands, shlex.join(again))), end="\n\n")
        print_plan_of(profile.values)
        return
    check_machine(commands, profile.values)
    if profile.text:  # else the stages read the user's own file
        write_text(profile.path, profile.text)
    again += ["--to", config.to_stage] if config.to_stage else []  # --from is the stage that fails
    run_all(commands, shlex.join(again))


if __name__ == "__main__":
    run_cli(main)
