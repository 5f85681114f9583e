"""Stage 3: distil the student.

    python scripts/run_improved_kd.py --config configs/embedded.yaml             # the distilled student
    python scripts/run_improved_kd.py --config configs/embedded.yaml --alpha 0   # its control: SFT on the same rows

Writes a run folder beside `experiment_dir`: kd_config.json, metrics.jsonl, heldout.jsonl, kd_results.json,
final_model/. Safe to kill and run again: an unfinished run of the same settings goes on from its newest complete
checkpoint.
"""

import sys
from pathlib import Path

# a script's own folder is on the path, the repository is not: its modules are imported from here on
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.distillation.kd import SECTION, KDConfig, run_kd_pipeline
from src.utils.common import run_cli, speaks
from src.utils.config import load_config


def main() -> None:
    results = run_kd_pipeline(load_config(KDConfig, SECTION))
    if not speaks():  # of several processes the first speaks
        return
    if results.get("kl_is", "exact") != "exact":  # a run of the version before does not say
        print(
            f"{results['arm']}: kl_to_teacher is a {results['kl_is']}, expected_acceptance a "
            f"{results['expected_acceptance_is']}; compare neither with exact values"
        )
    for name in ("kl_to_teacher", "nll", "top1_agreement", "expected_acceptance"):
        before, after, teacher = (results[arm][name] for arm in ("before", "after", "teacher"))
        print(f"{results['arm']}: held-out {name}: {before:.4f} before, {after:.4f} after, teacher {teacher:.4f}")
    print(f"{results['arm']}: run folder {results['run_dir']}")


if __name__ == "__main__":
    run_cli(main)
