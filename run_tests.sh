#!/usr/bin/env bash
# Installs what is needed, lints, runs the tests; ends with the whole embedded pipeline at reduced size.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/venv.sh

usage() {
  cat <<'TEXT'
usage: bash run_tests.sh [--quick] [--profile NAME] [PYTEST ARGUMENT ...]

  --quick          leave out the end-to-end tests (marked `slow`)
  --profile NAME   the profile of the end-to-end test (default: embedded)
  --help           this text

Paths count from the repository's folder, wherever this is called from.
TEXT
}

arguments=()
while [ $# -gt 0 ]; do
  case "$1" in
    --quick) arguments+=(-m "not slow"); shift ;;
    --profile) [ $# -ge 2 ] || { echo "error: --profile needs a name" >&2; exit 2; }; export KD_TEST_PROFILE="$2"; shift 2 ;;
    --profile=*) export KD_TEST_PROFILE="${1#*=}"; shift ;;
    -h|--help) usage; exit 0 ;;
    *) arguments+=("$1"); shift ;;
  esac
done

# report.html is tested in a browser: Debian's, installed if it is missing and this is root; without one the tests skip
if ! command -v chromedriver >/dev/null && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
  echo "installing chromium"
  said=$({ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium chromium-driver; } 2>&1) ||
    { echo "chromium could not be installed, so the browser tests will be skipped:"; tail -n 3 <<<"$said"; }
fi
ensure_venv requirements.txt requirements-dev.txt
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
for script in run_pipeline.sh run_kd_inference_test.sh scripts/venv.sh configs/slurm/*.sbatch; do bash -n "$script"; done
# a file's tests stay together, files run side by side: two processes of one thread each do more than one of two
cores=$(nproc)
workers=${KD_TEST_WORKERS:-$((cores < 8 ? cores : 8))}
export OMP_NUM_THREADS=1
"$VENV/bin/python" -m pytest -n "$workers" --dist loadfile --no-loadscope-reorder "${arguments[@]}"
