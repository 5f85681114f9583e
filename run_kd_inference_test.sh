#!/usr/bin/env bash
# Base against distilled over the temperature sweep, on the newest finished run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/venv.sh

usage() {
  cat <<'TEXT'
usage: ./run_kd_inference_test.sh quick|medium|full [--profile NAME] [--hardware NAME] [--model_path RUN/final_model]
                                  [--overwrite]

  quick, medium, full   10, 50 or 350 prompts, each at temperatures 0.1, 0.7 and 1.2
  --profile NAME        configs/NAME.yaml, or the path of a profile (default: the one with the newest finished run)
  --hardware NAME       configs/hardware/NAME.yaml over it, or the path of an overlay; none: none
  --model_path PATH     another run than the newest finished one

Paths count from the repository's folder, wherever this is called from.
TEXT
}

mode=""
arguments=()
while [ $# -gt 0 ]; do
  case "$1" in
    quick|medium|full) mode="$1"; shift ;;
    --profile) [ $# -ge 2 ] || { echo "error: --profile needs a name" >&2; exit 2; }
      [ -f "$2" ] && arguments+=(--config "$2") || arguments+=(--config "configs/$2.yaml"); shift 2 ;;
    --hardware|--model_path) [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 2; }
      arguments+=("$1" "$2"); shift 2 ;;
    --overwrite) arguments+=(--overwrite); shift ;;
    -h|--help) usage; exit 0 ;;
    *) echo "error: unknown argument $1" >&2; usage >&2; exit 2 ;;
  esac
done
[ -n "$mode" ] || { usage >&2; exit 2; }

ensure_venv requirements.txt
exec "$VENV/bin/python" test_kd_inference_v2.py --mode "$mode" --temperature 0.1 0.7 1.2 "${arguments[@]}"
