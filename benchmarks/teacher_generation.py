"""Tokens a second of the teacher's answers: our engines against plain `generate` and vLLM; same prompts, one run.

    python benchmarks/teacher_generation.py --output FILE.json [--vllm_python PYTHON_WITH_VLLM]

`ours` is the transformers engine, in batches of `--batch_size`, each distinct prompt of a batch read once; `one_by_one`
and `unsorted_batch` (32 rows, as they come) are the model's own `generate`; `vllm` is `vllm.LLM` with all prompts at
once and a seed for each; `vllm_without_seeds` is spared those; `vllm_all_cores` computes on every core, where vLLM by
itself leaves one to its scheduler; `openai_server` is the openai engine on a vLLM server.
Loading, start-up and a first request of each are not timed. A rival that is not installed, or fails, is listed under
`absent`.
"""

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import GenerationConfig, set_seed

from src.distillation.base import compute_dtype, load_model, load_tokenizer, prompt_text
from src.distillation.engines import end_ids
from src.distillation.openai_engine import Server, generate_from_server
from src.distillation.serving import CPU_BATCHED_TOKENS
from src.distillation.sft import Request, Sampling, generate, make_requests
from src.utils.common import UserError, provenance, run_cli, write_json

PLACES = ["library", "small harbour", "school kitchen", "night train", "mountain hut", "bicycle workshop", "bakery"]
TASKS = [
    "What can go wrong in a {}?",
    "Anna works in a {}. Yesterday {} people came and each of them stayed for half an hour. How long is that in all?",
    "Write three short rules for visitors of a {}.",
    "A {} has {} lamps. Every week two of them break and one is replaced, and nobody looks after the others. Explain "
    "step by step how many of them are still working after five weeks, and what the owner should do about it.",
]

# one process for those that share an engine; the environment is read when it starts
OFFLINE_RUNS: tuple[tuple[list[str], dict[str, str]], ...] = (
    (["vllm", "vllm_without_seeds"], {}),
    (["vllm_all_cores"], {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}),
)
SERVED = "openai_server"

Result = dict[str, Any]

# run by vLLM's own interpreter, which has nothing of this checkout; a line for each that has come to its end
OFFLINE = """
import json, sys, time
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    job = json.load(open(sys.argv[1]))
    llm = LLM(job["model"], dtype=job["dtype"], max_model_len=job["length"], generation_config="vllm", seed=0,
              gpu_memory_utilization=job["memory"], max_num_batched_tokens=job["batched_tokens"])
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    parameters = [SamplingParams(**job["sampling"], seed=seed) for seed in job["seeds"]]
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
        with open(sys.argv[2], "a") as file:
            print(json.dumps({"name": name, "tokens_per_second": tokens / seconds, "tokens": tokens,
                              "rows": len(prompts), "seconds": seconds}), file=file)
"""


def make_rows(count: int) -> list[dict[str, str]]:
    draw = random.Random(0)
    # an empty {} more or less: `format` passes over arguments that a text does not use
    texts = [draw.choice(TASKS).format(draw.choice(PLACES), draw.randint(3, 90)) for _ in range(count)]
    return [{"id": f"row-{i:04d}", "prompt": text} for i, text in enumerate(texts)]


@dataclass(frozen=True)
class Asked:
    """What all answer: requests as stage 1 makes them, a seed for each; their prompts as text and as token ids; and the
    tokens that end an answer."""

    teacher: str
    requests: list[Request]
    texts: list[str]
    prompts: list[list[int]]
    sampling: Sampling
    ends: list[int]
    dtype: torch.dtype

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.prompts]

    @property
    def length(self) -> int:
        """Most tokens of a prompt and its answer."""
        return max(self.lengths) + self.sampling.max_new_tokens

    @property
    def words(self) -> str:
        """The type as vLLM calls it."""
        return str(self.dtype).removeprefix("torch.")


def make_asked(options: argparse.Namespace) -> Asked:
    sampling = Sampling(0.7, 0.8, 20, options.max_new_tokens)
    requests = make_requests(make_rows(options.rows), 1, 42, sampling)
    tokenizer = load_tokenizer(options.teacher)
    texts = [prompt_text(tokenizer, request.messages) for request in requests]
    prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return Asked(
        options.teacher, requests, texts, prompts, sampling, end_ids(options.teacher, tokenizer), compute_dtype()
    )


def timed(name: str, rows: int, work: Any) -> Result:
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


def stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(timeout=60)
    except subprocess.TimeoutExpired:  # it does not listen; what was measured is not to be lost for it
        process.kill()
        process.wait()


@contextmanager
def vllm_server(asked: Asked, python: str, memory: float, log: Path) -> Iterator[str]:
    # port 0: the system names one that is free; it is free again for the server once the probe is closed
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", asked.teacher, "--port", str(port),
               "--host", "127.0.0.1", "--dtype", asked.words, "--max-model-len", str(asked.length),
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
        else:
            raise RuntimeError(f"the vLLM server is not ready after 600 looks: {log.read_text()[-2000:]}")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        stop(process)


def measure_here(asked: Asked, batch_size: int, few: int) -> list[Result]:
    """Ours, and the model's own `generate`; the slow loop answers the first `few` alone."""
    tokenizer, model = load_tokenizer(asked.teacher), load_model(asked.teacher, asked.dtype)
    rows, texts, ends = len(asked.requests), asked.texts, asked.ends

    def ours(some: list[Request]) -> int:
        parts = generate(model, tokenizer, some, batch_size)
        return sum(row["num_tokens"] for part in parts for row in part)

    set_seed(0)
    # not timed
    ours(asked.requests[:2])
    return [
        timed("ours", rows, lambda: ours(asked.requests)),
        timed("one_by_one", few, lambda: plain(model, tokenizer, texts[:few], asked.sampling, ends, 1)),
        timed("unsorted_batch", rows, lambda: plain(model, tokenizer, texts, asked.sampling, ends, 32)),
    ]


def vllm_version(python: str) -> str | None:
    """Of the vLLM that this interpreter has, if any."""
    found = subprocess.run([python, "-c", "import vllm; print(vllm.__version__)"], capture_output=True, text=True)
    # the last word, whatever the import prints before it
    return None if found.returncode else found.stdout.split()[-1]


def measure_offline(asked: Asked, python: str, memory: float, folder: Path) -> tuple[list[Result], list[Result]]:
    """What `vllm.LLM` does, and what is absent of it: those that had not come to their end when a process failed."""
    sampling = asked.sampling
    settings = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k,
                "max_tokens": sampling.max_new_tokens, "stop_token_ids": asked.ends}  # fmt: skip
    task = {
        "model": asked.teacher, "dtype": asked.words, "length": asked.length, "prompts": asked.prompts,
        "seeds": [request.seed for request in asked.requests], "memory": memory,
        "batched_tokens": CPU_BATCHED_TOKENS, "sampling": settings,
    }  # fmt: skip
    code, job, answers = (folder / name for name in ("offline.py", "job.json", "answers.jsonl"))
    code.write_text(OFFLINE)
    answers.touch()
    absent = []
    for names, environment in OFFLINE_RUNS:
        job.write_text(json.dumps(task | {"names": names}))
        # what it says goes to the console, where `absent` sends whoever looks for its error
        command = [python, str(code), str(job), str(answers)]
        ended = subprocess.run(command, stdout=sys.stderr, env=os.environ | environment).returncode
        results = [json.loads(line) for line in answers.read_text().splitlines()]
        why = f"it ended with code {ended}; its error is above"
        absent += [{"name": name, "why": why} for name in names if name not in {r["name"] for r in results}]
    return results, absent


def measure_server(asked: Asked, options: argparse.Namespace, folder: Path) -> Result:
    """Our openai engine on a vLLM server; `why` it is absent, where it is."""
    rows = len(asked.requests)
    try:
        with vllm_server(asked, options.vllm_python, options.vllm_memory, folder / "server.log") as url:
            place = Server(url, asked.teacher, "vllm", concurrency=options.concurrency)

            def served(some: list[Request]) -> int:
                return sum(row["num_tokens"] for part in generate_from_server(place, some) for row in part)

            served(asked.requests[:2])
            return timed(SERVED, rows, lambda: served(asked.requests))
    except (RuntimeError, UserError) as error:
        return {"name": SERVED, "why": " ".join(str(error).split())[-300:]}


def measure_vllm(asked: Asked, options: argparse.Namespace) -> tuple[list[Result], list[Result]]:
    """Everything on vLLM, and what is absent of it."""
    with tempfile.TemporaryDirectory() as folder:
        results, absent = measure_offline(asked, options.vllm_python, options.vllm_memory, Path(folder))
        served = measure_server(asked, options, Path(folder))
    (absent if "why" in served else results).append(served)
    return results, absent


def compared(results: list[Result]) -> dict[str, float]:
    """How many times as fast: ours against each other, and our engine on a server against vLLM by itself."""
    rates = {result["name"]: result["tokens_per_second"] for result in results}
    ratios = {f"ours / {name}": rates["ours"] / rate for name, rate in rates.items() if name != "ours"}
    if {SERVED, "vllm"} <= rates.keys():
        ratios[f"{SERVED} / vllm"] = rates[SERVED] / rates["vllm"]
    return ratios


def read_options() -> argparse.Namespace:
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
    return parser.parse_args()


def main() -> None:
    options = read_options()
    asked = make_asked(options)
    # 1. ours, and the model's own `generate`
    results, absent = measure_here(asked, options.batch_size, options.rows_one_by_one), []
    # 2. vLLM, if that interpreter has it
    version = vllm_version(options.vllm_python)
    if version is None:
        names = [name for names, _ in OFFLINE_RUNS for name in names]
        absent = [{"name": name, "why": f"{options.vllm_python} has no vLLM"} for name in (*names, SERVED)]
    else:
        found, absent = measure_vllm(asked, options)
        results += found
    # 3. the record
    ratios = compared(results)
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f}")
    lengths, texts = asked.lengths, asked.texts
    shapes = {"rows": len(texts), "distinct_prompts": len(set(texts)),
              "prompt_tokens": [min(lengths), sum(lengths) / len(lengths), max(lengths)], "dtype": asked.words,
              "batch_size": options.batch_size, "concurrency": options.concurrency}  # fmt: skip
    write_json(options.output, {
        "results": results, "ratios": ratios, "absent": absent, "shapes": shapes, "sampling": asdict(asked.sampling),
        "teacher": options.teacher, "threads": torch.get_num_threads(), "load_average": os.getloadavg(),
        "vllm_version": version, "provenance": provenance(),
    })  # fmt: skip


if __name__ == "__main__":
    run_cli(main)
