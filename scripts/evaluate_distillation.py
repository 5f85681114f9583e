"""Stage 4: what did it bring?

    python scripts/evaluate_distillation.py --config configs/embedded.yaml
    python scripts/evaluate_distillation.py --model_path RUN/final_model --output_dir outputs/evaluation/other
    python scripts/evaluate_distillation.py --config configs/embedded.yaml --lm_eval_tasks arc_easy my_task.yaml

Compares the student before, its SFT control, the distilled student and the teacher, on held-out teacher text and on
graded answers over a temperature sweep. Writes samples.jsonl, heldout.jsonl, results.json, report.md and report.html
(one page that opens from disk) to `output_dir`; with --lm_eval_tasks lm_eval_ARM.json as well.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.evaluation.evaluator import SECTION, EvaluateConfig, run_evaluation, shipped_profile
from src.evaluation.outside import check_tasks, judge_outside
from src.evaluation.report import console_tables, make_console
from src.utils.common import run_cli
from src.utils.config import load_config, profile_argument


def main() -> None:
    config, argv = load_config(EvaluateConfig, SECTION), sys.argv[1:]
    if config.model_path and profile_argument(argv) is None and config.experiment_dir == EvaluateConfig.experiment_dir:
        config = load_config(EvaluateConfig, SECTION, ["--config", str(shipped_profile(config.model_path)), *argv])
    if config.lm_eval_tasks:
        check_tasks(config.lm_eval_tasks)
    results = run_evaluation(config)
    console = make_console()
    for table in console_tables(results):
        console.print(table)
    console.print(results["verdict"], markup=False)
    for name in ("results.json", "samples.jsonl", "report.md", "report.html"):
        print(Path(config.output_dir) / name)
    for path in judge_outside(config) if config.lm_eval_tasks else ():
        print(path)


if __name__ == "__main__":
    run_cli(main)
