#!/usr/bin/env bash
# The loss and whole steps at the shapes of the reference run, with random weights, ours beside TRL and Liger, and the
# plan of the overlay 1x80 beside what its stages take, on one GPU.
#   bash benchmarks/on_gpu.sh [STUDENT TEACHER]    folders or hub ids; configuration and tokenizer alone are read
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
student="${1:-Qwen/Qwen3-8B}" teacher="${2:-Qwen/Qwen3-30B-A3B-Instruct-2507}"
python="${PYTHON:-.venv/bin/python}"
"$python" benchmarks/kd_loss.py --output outputs/benchmarks/kd_loss_gpu.json
"$python" benchmarks/train_step.py --output outputs/benchmarks/train_step_gpu.json \
  --config configs/qwen3_30b_to_8b.yaml --random_weights "$student" "$teacher"
"$python" benchmarks/plan.py --output outputs/benchmarks/plan_1x80.json \
  --config configs/qwen3_30b_to_8b.yaml --hardware 1x80 --random_weights "$student" "$teacher"
