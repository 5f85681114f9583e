"""What the teacher's cached beliefs cost to make and to read, how true they are, and when they have paid.

    python benchmarks/teacher_cache.py --output benchmarks/results/teacher_cache.json

`online` asks the resident teacher, `hidden` and `topk` read their cache. `seconds` is what the beliefs about one
optimisation step's rows cost, `opening_seconds` what is paid once a run; `loss` and `grad_rel_error` are those of the
forward KL on some rows, held against a teacher in fp32 and the objective in fp64.
"""

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness
from benchmarks.kd_reference import project, reference
from benchmarks.train_job import add_flags, cache_config, encoded, make_caches, make_job, train_ours
from src.distillation.base import compute_dtype, head_weight, load_model, load_tokenizer, response_hidden
from src.distillation.batching import Pair, TrainingData, load_training_data
from src.distillation.kd import KDConfig
from src.distillation.losses import TopK, kd_loss
from src.distillation.packing import batch_of
from src.distillation.teacher import Reader, model_reader
from src.distillation.teacher_cache import make_cache, open_cache
from src.utils.common import UserError
from src.utils.config import build_config

SIGNALS = ("online", "hidden", "topk")
TEMPERATURES = (1.0, 2.5)
LOOKED_AT = 16  # rows on which loss and gradient are compared, at least: of 40 every 2nd, 20


def teacher_of(job: dict[str, Any], dtype: torch.dtype) -> Any:
    return load_model(job["profile"]["teacher_model_name_or_path"], dtype).requires_grad_(False)


def open_signal(name: str, job: dict[str, Any], rows: list[Any], pad_id: int, temperature: float) -> Reader:
    if name == "online":
        return model_reader(teacher_of(job, compute_dtype("cpu")), pad_id, packing=True)
    # no validation and no held-out rows: nothing is measured by it
    data = TrainingData([Pair(row, row) for row in rows], [], [], {}, 0)
    return open_cache(Path(job[name]) / "teacher_cache", name, temperature, data)


def beliefs(signal: Reader, rows: list[Any]) -> Any:
    return signal.topk(rows) if signal.topk is not None else signal.hidden(rows)


def student_states(job: dict[str, Any], rows: list[Any], pad_id: int, size: int) -> tuple[Any, Any, Any]:
    """The untrained student's hidden states on the rows one by one, their labels, and its output matrix, all fp32."""
    # as a run loads it, rounded to bf16 where the machine has that; then fp32, so that no more is rounded
    student = load_model(job["profile"]["model_name_or_path"], compute_dtype("cpu")).float()
    with torch.no_grad():
        pairs = [response_hidden(student, batch_of([row], pad_id, packing=False)) for row in rows]
    # [N, H] and [N], row after row
    hidden, labels = (torch.cat(column) for column in zip(*pairs, strict=True))
    return hidden, labels, head_weight(student, size).detach()


def make_references(job: dict[str, Any]) -> dict[str, Any]:
    """The student's states, and at each temperature the gradient and loss against a teacher in fp32."""
    tokenizer, rows, _ = encoded(job, Path(job["data"]))
    # every k-th: rows lie in order of their length, so that all lengths are among them
    rows = rows[:: max(1, len(rows) // LOOKED_AT)]
    pad_id, size = tokenizer.pad_token_id, max(tokenizer.get_vocab().values()) + 1
    teacher = model_reader(teacher_of(job, compute_dtype("cpu")).float(), pad_id, packing=False)
    # [N, G], from rows one by one: no padding, no shared beginnings
    beliefs_NG = torch.cat([teacher.hidden([row]) for row in rows])
    states = student_states(job, rows, pad_id, size)
    logits = project(states[0], states[2]), project(beliefs_NG, teacher.head()[:size])
    # alpha 1: the divergence alone
    truth = {t: reference(*logits, states[2], states[1], t, 1.0) for t in TEMPERATURES}
    torch.save({"states": states, "truth": truth, "rows": rows}, job["reference"])
    return {"seconds": 0.0, "rows": len(rows)}


def bytes_by_kind(folder: Path, index: dict[str, Any]) -> dict[str, float]:
    """Bytes of a response position in the files of each kind: a top-k cache keeps the rows that measure as hidden
    states."""
    # kind -> bytes, and positions
    found: dict[str, list[int]] = {}
    for name, facts in index["shards"].items():
        with safe_open(folder / name, "pt") as file:
            kind = "hidden" if "hidden" in file.keys() else "topk"  # noqa: SIM118 - a file, which is no mapping
            positions = file.get_slice("hidden" if kind == "hidden" else "ids").get_shape()[0]
        sums = found.setdefault(kind, [0, 0])
        sums[0] += facts["bytes"]
        sums[1] += positions
    return {kind: size / positions for kind, (size, positions) in found.items()}


def steps_of_a_run(config: KDConfig) -> int:
    """Optimisation steps of the profile's own run, over all of its clean rows, as the trainer counts them."""
    if config.max_steps > 0:
        return config.max_steps
    tokenizers = (load_tokenizer(name) for name in (config.model_name_or_path, config.teacher_model_name_or_path))
    data = load_training_data(
        Path(config.experiment_dir) / "sft", *tokenizers, config.max_length, config.validation_fraction,
        config.rows_per_step,
    )  # fmt: skip
    return math.ceil(len(data.train) // config.rows_per_step * config.num_train_epochs)


def make(name: str, job: dict[str, Any]) -> dict[str, Any]:
    """One pass of the teacher over all clean rows of the experiment, loading it included."""
    resident = harness.resident_mb()
    start = time.perf_counter()
    index = make_cache(cache_config(job, job[name], signal=name))
    keep = ("bytes_per_token", "tokens_per_second", "share_outside_top_k", "tokens")
    seconds, peak = time.perf_counter() - start, harness.peak_mb() - resident
    kinds = bytes_by_kind(Path(job[name]) / "teacher_cache", index)
    return {"seconds": seconds, "peak_mb": peak, "bytes_by_kind": kinds, **{key: index[key] for key in keep}}


def measure(name: str, job: dict[str, Any]) -> dict[str, Any]:
    # "make:topk" -> "make", "topk"; "online" -> "", "online"
    what, _, signal_name = name.rpartition(":")
    if what == "make":
        return make(signal_name, job)
    # 1. what is done once, each in a process of its own
    if what == "curve":
        losses = train_ours(job, Path(job["data"]), signal_name, job["profile"]["alpha"])
        return {"seconds": 0.0, "losses": losses}
    if name == "caches":
        return make_caches(job)
    if name == "reference":
        return make_references(job)
    # 2. opening: loading the teacher, or hashing the cache's files
    tokenizer, rows, _ = encoded(job, Path(job["data"]))
    saved = torch.load(job["reference"], weights_only=False)
    resident = harness.resident_mb()
    start = time.perf_counter()
    signal = open_signal(name, job, rows, tokenizer.pad_token_id, TEMPERATURES[0])
    opening = time.perf_counter() - start
    # 3. reading: as many batches as steps, in random order as in training
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    batches = [[rows[i] for i in order[at :: job["steps"]]] for at in range(job["steps"])]
    # once untimed: from here on the files are in the page cache
    beliefs(signal, batches[0])
    harness.forget_peak()
    seconds = harness.best_seconds(lambda: [beliefs(signal, batch) for batch in batches], 2) / job["steps"]
    result = {"seconds": seconds, "opening_seconds": opening, "peak_mb": harness.peak_mb() - resident, "accuracy": []}
    # 4. loss and gradient with these beliefs, by the student's states in fp32
    hidden, labels, head = saved["states"]
    for temperature in TEMPERATURES:
        # a top-k reader is for one temperature
        signal = open_signal(name, job, rows, tokenizer.pad_token_id, temperature)
        found = beliefs(signal, saved["rows"])
        # the teacher's head is cut to the tokens that exist, as the student's is
        theirs = (found, None) if isinstance(found, TopK) else (found.float(), signal.head()[: len(head)].float())
        student = hidden.detach().requires_grad_()
        sums = kd_loss(student, head, *theirs, labels, temperature=temperature, alpha=1.0)
        sums.loss.backward()
        gradient, value = saved["truth"][temperature]
        result["accuracy"].append(
            {"temperature": temperature, "loss": sums.loss.item() / len(labels), "loss_fp64": value,
             "grad_rel_error": harness.relative_error(student.grad, gradient)}
        )  # fmt: skip
    # the first temperature, 1, stands for the signal in the record
    return result | {key: result["accuracy"][0][key] for key in ("loss", "grad_rel_error")}


def paid(results: list[harness.Result], making: float, steps: int) -> dict[str, float]:
    """What reading hidden states spares a run of so many steps, and after how many runs their making has paid."""
    online, hidden = (next(r for r in results if r["name"] == name) for name in ("online", "hidden"))
    saved = steps * (online["seconds"] - hidden["seconds"]) + online["opening_seconds"] - hidden["opening_seconds"]
    return {"online_over_hidden_seconds": online["seconds"] / hidden["seconds"], "seconds_saved_a_run": saved,
            "steps_a_run": steps, "runs_until_it_has_paid": making / saved}  # fmt: skip


def print_findings(report: dict[str, Any]) -> None:
    # accuracy is a list; the table wants columns
    for result in report["results"]:
        for each in result.get("accuracy", []):
            at = f"{each['temperature']:g}"
            result |= {f"loss_at_{at}": each["loss"], f"error_at_{at}": each["grad_rel_error"]}
    columns = {"seconds": ".4f", "opening_seconds": ".2f", "peak_mb": ".0f"}
    for t in TEMPERATURES:
        columns |= {f"loss_at_{t:g}": ".4f", f"error_at_{t:g}": ".2e"}
    harness.print_table(report["results"], columns)
    for name, found in report["made"].items():
        kept = ", ".join(f"{size:.0f} bytes a position kept as {kind}" for kind, size in found["bytes_by_kind"].items())
        print(f"{name}: {found['seconds']:.1f} s to make with the teacher's loading, {found['tokens_per_second']:.0f} "
              f"tokens/s, {kept}")  # fmt: skip
    shares = ", ".join(f"{s:.1%} at T = {t}" for t, s in report["made"]["hidden"]["share_outside_top_k"].items())
    print(f"teacher outside its top 64: {shares}")
    apart = report["curves"]["largest_relative_difference"]
    print(f"loss curves, hidden against online: {apart:.1e} apart at most; {report.get('ratios')}")


def parent(arguments: argparse.Namespace) -> None:
    before = harness.machine()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = make_job(arguments, folder)
        config = build_config(KDConfig, job["profile"])
        # a cache of either kind, of all clean rows of the profile's experiment
        for kind in ("hidden", "topk"):
            job[kind] = str(folder / kind)
            (folder / kind).mkdir()
            (folder / kind / "sft").symlink_to(Path(job["profile"]["experiment_dir"]).resolve() / "sft")
        job["reference"] = str(folder / "reference.pt")
        # 1. what is done once; `curve` trains on the job's rows
        once = ("make:hidden", "make:topk", "caches", "reference", "curve:hidden", "curve:online")
        did = {task: harness.run_worker(sys.executable, task, job) for task in once}
        for task, found in did.items():
            if "absent" in found:
                raise UserError(f"{task} failed: {found['absent']}")
        # 2. the three signals in turn
        results = harness.round_robin(dict.fromkeys(SIGNALS, sys.executable), lambda _: job, arguments.repeats)
    # 3. both runs take the same rows in the same order, so that their losses can differ by the beliefs alone
    curves = {signal: did[f"curve:{signal}"]["losses"] for signal in ("hidden", "online")}
    apart = max(abs(a - b) / abs(b) for a, b in zip(*curves.values(), strict=True))
    made = {kind: did[f"make:{kind}"] for kind in ("hidden", "topk")}
    report: dict[str, Any] = {
        "results": results, "made": made, "curves": curves | {"largest_relative_difference": apart},
        "floor_seconds": None, "shapes": {key: job[key] for key in ("profile", "steps", "rows", "tokens", "answers")}
        | {"rows_looked_at": did["reference"]["rows"]},
    }  # fmt: skip
    # 4. what reading spares a run, and after how many runs making has paid
    if not any("absent" in result for result in results):
        report["ratios"] = paid(results, made["hidden"]["seconds"], steps_of_a_run(config))
    print_findings(report)
    harness.write_report(arguments.output, report, before)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    harness.main(parser, parent, measure)
