"""Will it fit, how long will it take: a plan of every stage, before anything is paid for.

    python scripts/plan_hardware.py --config configs/qwen3_30b_to_8b.yaml --gpus 8x40
    python scripts/plan_hardware.py --config configs/qwen3_30b_to_8b.yaml --hardware 1x80 --json
    python scripts/plan_hardware.py --config configs/embedded.yaml

Nothing is loaded: shapes are enough, and those of the models of the shipped profiles are in configs/models.
`--gpus` says how many GPUs of how many GB, or which (1xH100); `--detect` takes this machine's. Without either the
profile's own `gpus` count, and where it has none, this machine without a GPU.
"""

import argparse
import sys
from pathlib import Path

# a script's own folder is on the path, the repository is not: its modules are imported from here on
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.planning.hardware import detect
from src.planning.plan import make_plan
from src.planning.report import as_json, print_plan
from src.utils.common import UserError, run_cli
from src.utils.config import read_merged


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # argparse's own would print the usage and exit
        raise UserError(f"{message} (--help lists the flags)")


def read_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="PROFILE.yaml", help="the profile")
    parser.add_argument("--hardware", help="an overlay in configs/hardware, or its path")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--gpus", help="how many x GB each, or which: 8x40, 8xA100-40, 1xH100")
    where.add_argument("--detect", action="store_true", help="the GPUs of this machine")
    parser.add_argument("--json", action="store_true", help="every number, for machines")
    parser.add_argument("--teacher_config", metavar="FOLDER", help="the teacher's config.json, instead of the hub's")
    parser.add_argument("--student_config", metavar="FOLDER", help="the student's")
    parser.add_argument(
        "--prompt_tokens", type=float, help="mean tokens of a prompt, instead of what is known or usual"
    )
    parser.add_argument("--answer_tokens", type=float, help="mean tokens of an answer")
    # for --help: `run_cli` has taken it off the command line by now
    parser.add_argument("--debug", action="store_true", help="a traceback where otherwise one clear line would stand")
    return parser.parse_args()


def main() -> None:
    arguments = read_arguments()
    profile = read_merged(arguments.config, arguments.hardware)
    folders = {"teacher_model_name_or_path": arguments.teacher_config, "model_name_or_path": arguments.student_config}
    # the model's name from here on: shapes are read there, and the tokenizer if there is one
    profile |= {key: folder for key, folder in folders.items() if folder}
    gpus = detect() if arguments.detect else arguments.gpus
    plan = make_plan(profile, gpus, arguments.prompt_tokens, arguments.answer_tokens)
    if arguments.json:
        print(as_json(plan))
    else:
        print_plan(plan)


if __name__ == "__main__":
    run_cli(main)
