"""Between stages 2 and 3: keep what the teacher believes at every response position; training then needs no teacher.

    python scripts/cache_teacher.py --config configs/embedded.yaml                  # hidden states: exact at every T
    python scripts/cache_teacher.py --config configs/embedded.yaml --signal topk    # the 64 most probable tokens
    python scripts/cache_teacher.py --config configs/embedded.yaml --signal topk --temperatures 1 --engine openai \
        --base_url http://localhost:8000/v1 --served_model_name NAME                # asked of a vLLM or SGLang server

A teacher behind a server needs no weights here, only its tokenizer. vLLM must be started with --max-logprobs 64 or
more. Such a cache is for a teacher at T = 1, and what is measured against it is a bound, which results say.

Writes `experiment_dir`/teacher_cache. Safe to kill and run again: it goes on with the first missing file.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.distillation.teacher_cache import CacheTeacherConfig, make_cache
from src.utils.common import run_cli
from src.utils.config import load_config


def main() -> None:
    config = load_config(CacheTeacherConfig, "cache_teacher")
    index = make_cache(config)
    speed = index["tokens_per_second"]
    print(
        f"{config.experiment_dir}/teacher_cache: {len(index['rows'])} rows, {index['tokens']:,} response tokens, "
        f"{index['bytes_per_token']:,.0f} bytes each" + (f", {speed:,.0f} tokens/s" if speed else "")
    )
    shares = ", ".join(f"{share:.1%} at T = {t}" for t, share in index["share_outside_top_k"].items())
    print(f"of the softened teacher, outside its top {index['top_k']}: {shares}")


if __name__ == "__main__":
    run_cli(main)
