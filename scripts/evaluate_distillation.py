"""Stage 4: what did it bring?

    python scripts/evaluate_distillation.py --config configs/embedded.yaml
    python scripts/evaluate_distillation.py --model_path RUN/final_model --output_dir outputs/evaluation/other

    python scripts/evaluate_distillation.py --config configs/embedded.yaml --from grade     # no model is loaded

Compares the student before, its SFT control, the distilled student and the teacher, on graded answers over a
temperature sweep and by what their runs measured on held-out teacher text. Four steps in `output_dir`: answers.jsonl ->
samples.jsonl (graded) -> results.json and heldout.jsonl -> report.md and report.html (one page that opens from disk).
"""

import sys
from pathlib import Path

# a script's own folder is on the path, the repository is not: its modules are imported from here on
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.evaluation.evaluator import SECTION, EvaluateConfig, run_evaluation, shipped_profile
from src.report.tables import print_summary
from src.utils.common import run_cli
from src.utils.config import build_config, load_config, profile_argument


def main() -> None:
    argv = sys.argv[1:]
    # without a profile: the run that is named says of which experiment it is, and so which shipped profile is its
    if profile_argument(argv) is None:
        said = build_config(EvaluateConfig, argv=argv)
        if said.model_path and said.experiment_dir == EvaluateConfig.experiment_dir:
            argv = ["--config", str(shipped_profile(said.model_path)), *argv]  # flags still win
    config = load_config(EvaluateConfig, SECTION, argv)
    print_summary(run_evaluation(config), config.output_dir)


if __name__ == "__main__":
    run_cli(main)
