"""A grid of training runs on one teacher cache, chosen among by their validation rows; the teacher is not needed.

    python scripts/sweep.py --config configs/embedded.yaml --alpha 0 0.5 0.8 1 --temperature 1 2.5 --seed 1 2

Every setting of training is a flag; one with several values is varied, one with a single value holds for all runs.
Writes OUTPUT_DIR/{sweep.json,sweep.md,sweep.csv,sweep.svg} and the runs, each a folder as run_improved_kd.py makes
them, with its profile and its log beside it. Safe to kill and run again, also with a larger grid: finished runs are
kept, unfinished ones go on.
"""

import argparse
import shlex
import sys
from pathlib import Path

# a script's own folder is on the path, the repository is not: its modules are imported from here on
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.distillation.kd import SECTION, KDConfig
from src.distillation.sweep import Plan, command_of, make_plan, read_grid, run_plan, status_of
from src.report.sweep import csv_text, markdown, plot
from src.utils.common import read_json, run_cli, write_text
from src.utils.config import read_profile
from src.utils.stages import hold


def show_plan(plan: Plan) -> None:
    """Every run with its command, and what of the grid it serves."""
    for cell in plan.cells:
        # None: the cell does not depend on it, as alpha 0 on the temperature
        values = ", ".join(f"{name} {'any' if value is None else value}" for name, value in cell.settings.items())
        print(f"cell {values}: {len(cell.runs)} run{'s' if len(cell.runs) > 1 else ''}")
    for run in plan.runs.values():
        print(f"{status_of(run)}, {run.steps} steps: {shlex.join(command_of(run))}")
    print("the runs' profiles are written when they are begun")


def render(folder: Path) -> None:
    """Table and plot from sweep.json."""
    sweep = read_json(folder / "sweep.json")
    write_text(folder / "sweep.md", markdown(sweep))
    write_text(folder / "sweep.csv", csv_text(sweep))
    drawn = plot(sweep)
    (folder / "sweep.svg").unlink(missing_ok=True)  # of a smaller grid, where this one cannot be drawn
    if drawn:  # None: no axis of numbers, or not two cells measured along it
        write_text(folder / "sweep.svg", drawn)
    print(markdown(sweep))
    print(f"{folder / 'sweep.json'}, and sweep.md, sweep.csv{', sweep.svg' if drawn else ''} beside it")


def main() -> None:
    # 1. what is asked for; every flag that is not the sweep's own is a setting of training
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, metavar="PROFILE.yaml", help="the profile")
    parser.add_argument("--hardware", help="a hardware overlay (default: the profile's own)")
    parser.add_argument("--experiment_dir", help="with the clean rows and the teacher's cache (default: the profile's)")
    parser.add_argument("--output_dir", help="the sweep's folder (default: outputs/sweep/EXPERIMENT)")
    parser.add_argument("--dry_run", action="store_true", help="show the runs and their commands; write nothing")
    parser.add_argument(
        "--heldout",
        choices=("kl_to_teacher", "nll"),
        default="",
        help="choose the cell with the lowest of this on the validation rows, and show its held-out rows, once all "
        "runs are made",
    )
    parser.add_argument("--stop_on_failure", action="store_true", help="end with the first run that fails")
    parser.add_argument("--overwrite", action="store_true", help="train finished runs again")
    asked, words = parser.parse_known_args()
    values = read_profile(asked.config, SECTION, KDConfig, asked.hardware)
    values |= {"experiment_dir": asked.experiment_dir or values.get("experiment_dir") or KDConfig.experiment_dir}
    grid = read_grid(words, values)
    folder = Path(asked.output_dir or Path("outputs", "sweep", Path(values["experiment_dir"]).name))

    # 2. the runs it takes
    plan = make_plan(grid, folder)
    points = 1
    for values in grid.axes.values():
        points *= len(values)  # 3 alphas x 2 seeds are 6
    print(f"{points} points of the grid, {len(plan.cells)} cells, {len(plan.runs)} runs: {folder}")
    if asked.dry_run:
        show_plan(plan)
        return

    # 3. make them; a table is left of whatever was finished
    with hold(folder, "sweep"):
        try:
            run_plan(
                plan,
                folder,
                profile=asked.config,
                heldout=asked.heldout,
                overwrite=asked.overwrite,
                stop_on_failure=asked.stop_on_failure,
            )
        finally:
            if (folder / "sweep.json").is_file():  # written after each run that has ended
                render(folder)


if __name__ == "__main__":
    run_cli(main)
