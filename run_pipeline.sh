#!/usr/bin/env bash
# Every stage, one command: models, prompts, teacher answers, cleaning, the teacher's beliefs, the SFT control, the distilled
# student, evaluation.
# Safe to run again: finished stages are skipped, unfinished ones go on where they were.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/venv.sh

usage() {
  cat <<'TEXT'
usage: bash run_pipeline.sh [--profile NAME] [--hardware NAME] [--from STAGE] [--to STAGE] [--seed N] [--dry_run]
                            [--print_config]

  --profile NAME   configs/NAME.yaml, or the path of a profile (default: embedded, two CPU cores, no GPU, no model hub)
  --hardware NAME  the machine: configs/hardware/NAME.yaml (8x40, 4x40, 2x24, 1x80), or the path of such a file, over the
                   profile; none: none (default: the one that the profile names)
  --from STAGE     begin with this stage
  --to STAGE       end with this stage
  --seed N         the whole of it once more with other prompts, answers and training, in folders that end in _seed_N
  --dry_run        print every command, its GPUs, what it reads and writes, and the plan (will it fit, how long does it
                   take); nothing is run
  --print_config   print the profile with its overlay and seed, and end
  --debug          show a traceback where otherwise one clear line would stand
  --help           this text

Paths count from the repository's folder, wherever this is called from.

The stages, each of which can be run alone by its command in the dry run:
  prepare_models  download_datasets  generate_sft_data  fix_sft_data
  cache_teacher  sft_control  distil  evaluate_distillation
TEXT
}

for word in "$@"; do
  case "$word" in
    -h|--help) usage; exit 0 ;;
    --profile|--hardware|--from|--to|--seed|--dry_run|--print_config|--debug) ;;
    --profile=*|--hardware=*|--from=*|--to=*|--seed=*) ;;
    -*) echo "error: unknown argument $word (--help lists them)" >&2; exit 2 ;;
  esac
done

ensure_venv requirements.txt
exec "$VENV/bin/python" scripts/run_stages.py "$@"
