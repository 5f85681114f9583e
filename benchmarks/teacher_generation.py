"""Tokens a second of the teacher's answers: our engines against plain `generate` and vLLM; same prompts, one run.

    python benchmarks/teacher_generation.py --output FILE.json [--vllm_python PYTHON_WITH_VLLM]

`ours` is the transformers engine; `one_by_one` and `unsorted_batch` (32 rows, as they come) are the model's own
`generate`; `vllm` is `vllm.LLM` with all prompts at once and a seed for each; `vllm_without_seeds` is spared those;
`vllm_all_cores` computes on every core, where vLLM by itself leaves one to its scheduler; `openai_server` is the openai
engine on a vLLM server.
Loading, start-up and a first request of each are not timed. A rival that is not installed is listed under `absent`.
"""

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import GenerationConfig, set_seed

from src.distillation.base import compute_dtype, load_model, load_tokenizer, prompt_text
from src.distillation.engines import end_ids
from src.distillation.openai_engine import Server, generate_from_server
from src.distillation.serving import CPU_BATCHED_TOKENS
from src.distillation.sft import Sampling, generate, make_requests
from src.utils.common import UserError, provenance, run_cli, write_json

PLACES = ["library", "small harbour", "school kitchen", "night train", "mountain hut", "bicycle workshop", "bakery"]
TASKS = [
    "What can go wrong in a {}?",
    "Anna works in a {}. Yesterday {} people came and each of them stayed for half an hour. How long is that in all?",
    "Write three short rules for visitors of a {}.",
    "A {} has {} lamps. Every week two of them break and one is replaced, and nobody looks after the others. Explain "
    "step by step how many of them are still working after five weeks, and what the owner should do about it.",
]

# run by vLLM's own interpreter, which has nothing of this checkout
OFFLINE = """
import json, sys, time
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    job = json.load(open(sys.argv[1]))
    llm = LLM(job["model"], dtype=job["dtype"], max_model_len=job["length"], generation_config="vllm", seed=0,
              gpu_memory_utilization=job["memory"], max_num_batched_tokens=job["batched_tokens"])
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    parameters = [SamplingParams(**job["sampling"], seed=seed) for seed in job["seeds"]]
    found = []
    for name in job["names"]:
        for one in parameters if name == "vllm_without_seeds" else ():
            one.seed = None
        llm.generate(prompts[:2], parameters[:2], use_tqdm=False)
        llm.reset_prefix_cache()
        begin = time.perf_counter()
        outputs = llm.generate(prompts, parameters, use_tqdm=False)
        seconds = time.perf_counter() - begin
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        print(f"{name}: {tokens / seconds:.0f} tokens/s", flush=True)
        found.append({"name": name, "tokens_per_second": tokens / seconds, "tokens": tokens, "rows": len(prompts),
                      "seconds": seconds})
    json.dump(found, open(sys.argv[2], "w"))
"""


def make_rows(count: int) -> list[dict[str, str]]:
    draw = random.Random(0)
    # an empty {} more or less: `format` passes over arguments that a text does not use
    texts = [draw.choice(TASKS).format(draw.choice(PLACES), draw.randint(3, 90)) for _ in range(count)]
    return [{"id": f"row-{i:04d}", "prompt": text} for i, text in enumerate(texts)]


def timed(name: str, rows: int, work: Any) -> dict[str, Any]:
    """Run `work`, which returns its number of tokens."""
    begin = time.perf_counter()
    tokens = work()
    seconds = time.perf_counter() - begin
    print(f"{name}: {tokens / seconds:.0f} tokens/s ({tokens} tokens of {rows} rows in {seconds:.1f} s)", flush=True)
    return {"name": name, "tokens_per_second": tokens / seconds, "tokens": tokens, "rows": rows, "seconds": seconds}


def plain(model: Any, tokenizer: Any, texts: list[str], sampling: Sampling, ends: list[int], size: int) -> int:
    """`generate` on the texts as they come, `size` at a time."""
    sample = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    # greedy where the temperature is 0; sampling settings would be warned of
    settings = GenerationConfig(
        **(sample if sampling.temperature else {"do_sample": False}),
        max_new_tokens=sampling.max_new_tokens, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    tokens = 0
    # in the order of the texts: no sorting by length
    for start in range(0, len(texts), size):
        batch = tokenizer(texts[start : start + size], add_special_tokens=False, padding=True, padding_side="left",
                          return_tensors="pt")  # fmt: skip
        # [rows, new tokens]: without the prompts
        made = model.generate(**batch, generation_config=settings)[:, batch["input_ids"].shape[1] :]
        ended = torch.isin(made, torch.tensor(ends)).int()
        # [0 0 1 1] ended -> cumsum less own [0 0 0 1] -> True up to the first end; behind it is padding
        before = ended.cumsum(1) - ended == 0  # up to and with the first end token
        tokens += int(before.sum())
    return tokens


@contextmanager
def vllm_server(python: str, model: str, dtype: str, length: int, memory: float, log: Path) -> Any:
    # port 0: the system names one that is free; it is free again for the server once the probe is closed
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(port), "--host",
               "127.0.0.1", "--dtype", dtype, "--max-model-len", str(length),
               "--gpu-memory-utilization", str(memory),
               "--max-num-batched-tokens", str(CPU_BATCHED_TOKENS)]  # fmt: skip
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        # loading a model takes minutes: 600 looks, half a second apart
        for _ in range(600):
            if process.poll() is not None:
                raise RuntimeError(f"the vLLM server ended: {log.read_text()[-2000:]}")
            # an OSError is a connection refused, or an HTTP error: not ready yet
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(timeout=60)


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--teacher", default="outputs/models/smollm2-135m-instruct")
    parser.add_argument("--rows", type=int, default=192)
    parser.add_argument("--rows_one_by_one", type=int, default=8, help="the slow loop answers only the first of them")
    parser.add_argument("--batch_size", type=int, default=96, help="of ours")
    parser.add_argument("--concurrency", type=int, default=64, help="of openai_server")
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--vllm_python", default=sys.executable)
    parser.add_argument("--vllm_memory", type=float, default=0.4, help="share of the memory that vLLM may reserve")
    options = parser.parse_args()
    options.output.parent.mkdir(parents=True, exist_ok=True)

    # 1. the same requests for all, as stage 1 makes them: a seed for each
    sampling = Sampling(0.7, 0.8, 20, options.max_new_tokens)
    requests = make_requests(make_rows(options.rows), 1, 42, sampling)
    tokenizer, dtype = load_tokenizer(options.teacher), compute_dtype()
    model = load_model(options.teacher, dtype)
    texts = [prompt_text(tokenizer, request.messages) for request in requests]
    prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
    ends, lengths = end_ids(options.teacher, tokenizer), [len(ids) for ids in prompts]
    words = str(dtype).removeprefix("torch.")
    few, absent = options.rows_one_by_one, []

    def ours(some: list) -> int:
        parts = generate(model, tokenizer, some, options.batch_size)
        return sum(row["num_tokens"] for part in parts for row in part)

    # 2. ours, and the model's own `generate`
    set_seed(0)
    # not timed
    ours(requests[:2])
    results = [
        timed("ours", len(requests), lambda: ours(requests)),
        timed("one_by_one", few, lambda: plain(model, tokenizer, texts[:few], sampling, ends, 1)),
        timed("unsorted_batch", len(requests), lambda: plain(model, tokenizer, texts, sampling, ends, 32)),
    ]
    # 3. vLLM, if that interpreter has it
    ask = [options.vllm_python, "-c", "import vllm; print(vllm.__version__)"]
    found = subprocess.run(ask, capture_output=True, text=True)
    version = None
    if found.returncode:
        absent = [{"name": name, "why": f"{options.vllm_python} has no vLLM"} for name in ("vllm", "openai_server")]
    else:
        # the version is the last word, whatever the import prints before it
        version = found.stdout.split()[-1]
        length = max(lengths) + options.max_new_tokens
        job, answer = (options.output.with_suffix(f".{name}.tmp") for name in ("job", "answer"))
        # its memory is vLLM's now
        del model
        settings = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k,
                    "max_tokens": sampling.max_new_tokens, "stop_token_ids": ends}  # fmt: skip
        seeds = [request.seed for request in requests]
        task = {
            "model": options.teacher, "dtype": words, "length": length, "prompts": prompts, "seeds": seeds,
            "memory": options.vllm_memory, "batched_tokens": CPU_BATCHED_TOKENS, "sampling": settings,
        }  # fmt: skip
        code = options.output.with_suffix(".offline.py")
        code.write_text(OFFLINE)
        # one process for those that share an engine; the environment is read when it starts
        for names, environment in (
            (["vllm", "vllm_without_seeds"], {}),
            (["vllm_all_cores"], {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}),
        ):
            job.write_text(json.dumps(task | {"names": names}))
            # what it says goes to the console, where `absent` sends whoever looks for its error
            offline = subprocess.run(
                [options.vllm_python, str(code), str(job), str(answer)], stdout=sys.stderr, env=os.environ | environment
            )
            if offline.returncode:
                absent.append({"name": names[0], "why": f"it ended with code {offline.returncode}; its error is above"})
            else:
                results += json.loads(answer.read_text())
        # 4. our openai engine on a server
        log = options.output.with_suffix(".server.log")
        try:
            with vllm_server(options.vllm_python, options.teacher, words, length, options.vllm_memory, log) as url:
                place = Server(url, options.teacher, "vllm", concurrency=options.concurrency)

                def served(some: list) -> int:
                    return sum(row["num_tokens"] for part in generate_from_server(place, some) for row in part)

                served(requests[:2])
                results.append(timed("openai_server", len(requests), lambda: served(requests)))
        except (RuntimeError, UserError) as error:
            absent.append({"name": "openai_server", "why": " ".join(str(error).split())[-300:]})
        # 5. the record alone is left
        for path in (job, answer, code, log):
            path.unlink(missing_ok=True)
    by_name = {entry["name"]: entry["tokens_per_second"] for entry in results}
    ratios = {f"ours / {name}": by_name["ours"] / rate for name, rate in by_name.items() if name != "ours"}
    if {"openai_server", "vllm"} <= by_name.keys():
        ratios["openai_server / vllm"] = by_name["openai_server"] / by_name["vllm"]
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f}")
    shapes = {"rows": len(requests), "prompt_tokens": [min(lengths), sum(lengths) / len(lengths), max(lengths)],
              "dtype": words, "batch_size": options.batch_size, "concurrency": options.concurrency}  # fmt: skip
    write_json(options.output, {
        "results": results, "ratios": ratios, "absent": absent, "shapes": shapes, "sampling": asdict(sampling),
        "teacher": options.teacher, "threads": torch.get_num_threads(), "load_average": os.getloadavg(),
        "vllm_version": version, "provenance": provenance(),
    })  # fmt: skip


if __name__ == "__main__":
    run_cli(main)
