#!/usr/bin/env bash
# Every stage, one command: models, prompts, teacher answers, cleaning, the teacher's beliefs, the SFT control, the distilled
# student, evaluation.
# Safe to run again: finished stages are skipped, unfinished ones go on where they were.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/venv.sh

usage() {
  cat <<'TEXT'
usage: bash run_pipeline.sh [--profile NAME] [--seed N]

  --profile NAME   configs/NAME.yaml, or the path of a profile (default: embedded, two CPU cores, no GPU, no model hub)
  --seed N         the whole of it once more with other prompts, answers and training, in folders that end in _seed_N
  --help           this text

The stages, each of which can be run alone as `python scripts/STAGE.py --config configs/NAME.yaml`:
  prepare_models  download_datasets  generate_sft_data  fix_sft_data
  cache_teacher  run_improved_kd --alpha 0  run_improved_kd  evaluate_distillation
TEXT
}

profile=embedded
seed=""
while [ $# -gt 0 ]; do
  case "$1" in
    --profile) [ $# -ge 2 ] || { echo "error: --profile needs a name" >&2; exit 2; }; profile="$2"; shift 2 ;;
    --profile=*) profile="${1#*=}"; shift ;;
    --seed) [ $# -ge 2 ] || { echo "error: --seed needs a number" >&2; exit 2; }; seed="$2"; shift 2 ;;
    --seed=*) seed="${1#*=}"; shift ;;
    -h|--help) usage; exit 0 ;;
    *) echo "error: unknown argument $1 (--help lists them)" >&2; exit 2 ;;
  esac
done
[[ -z "$seed" || "$seed" =~ ^[0-9]+$ ]] || { echo "error: --seed needs a whole number, found $seed" >&2; exit 2; }
config="$profile"
[ -f "$config" ] || config="configs/$profile.yaml"
[ -f "$config" ] || { echo "error: no profile $profile; there are: $(cd configs && echo *.yaml)" >&2; exit 2; }

ensure_venv requirements.txt
if [ -n "$seed" ]; then
  config="$("$VENV/bin/python" - "$config" "$seed" <<'PYTHON'
"""The profile with another seed and folders of its own; prints the path of the file."""
import sys
from pathlib import Path

import yaml

path, seed = Path(sys.argv[1]), int(sys.argv[2])
values = yaml.safe_load(path.read_text(encoding="utf-8"))
for section in (values, values.get("evaluate_distillation", {})):
    for name in ("data_dir", "experiment_dir", "output_dir"):
        if name in section:
            section[name] += f"_seed_{seed}"
values.setdefault("prepare_models", {}).setdefault("seed", values.get("seed", 42))  # the models stay the same
values["seed"] = seed
target = Path("outputs", "profiles", f"{path.stem}_seed_{seed}.yaml")
target.parent.mkdir(parents=True, exist_ok=True)
target.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
print(target)
PYTHON
)"
fi
begin=$SECONDS
stage() {
  local name="$1" start=$SECONDS
  shift
  printf '\n=== %s %s\n' "$name" "$*"
  "$VENV/bin/python" "scripts/$name.py" --config "$config" "$@"
  echo "=== $name: $((SECONDS - start)) s"
}

stage prepare_models
stage download_datasets
stage generate_sft_data
stage fix_sft_data
stage cache_teacher
stage run_improved_kd --alpha 0
stage run_improved_kd
stage evaluate_distillation
echo "=== all stages: $((SECONDS - begin)) s"
