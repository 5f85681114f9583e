"""Run stages in this process and print how much memory each took: `python tests/planning/measure.py STAGES`.

STAGES is JSON, a list of `[stage, settings]`; the stages are cache, train, answer, merge and step. Prints a list of
`{"before": bytes, "peak": bytes}`: resident memory before a stage, and the most that it was until its end.
"""

import ctypes
import gc
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from src.distillation.base import EncodedRow, causal_lm, head_weight, load_model, load_tokenizer, response_hidden
from src.distillation.kd import run_kd_pipeline
from src.distillation.lora import adapters_cast, add_lora, merge_adapter
from src.distillation.losses import kd_loss
from src.distillation.packing import ATTENTION, pack
from src.distillation.sft import Sampling, generate, make_requests
from src.distillation.teacher_cache import CacheTeacherConfig, make_cache

torch.set_num_threads(1)


def resident(name: str) -> int:
    """VmRSS (now) or VmHWM (at the most), in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {name}")


def cache(settings):
    make_cache(CacheTeacherConfig(**settings))


def train(settings):
    run_kd_pipeline(settings)


def answer(settings):
    """Random models go on to the limit."""
    model, tokenizer = load_model(settings["model"], torch.float32), load_tokenizer(settings["model"])
    rows = [{"id": str(n), "prompt": f"{n:03d} " * settings["words"]} for n in range(settings["rows"])]
    sampling = Sampling(1.0, 1.0, 0, settings["new_tokens"])
    for _ in generate(model, tokenizer, make_requests(rows, 1, 0, sampling), settings["rows"]):
        pass


def merge(settings):
    merged = merge_adapter(load_model(settings["model"], torch.float32), settings["adapter"])
    merged.save_pretrained(settings["to"])


def step(settings):
    """Two steps at the shapes of a configuration, its whole vocabulary in the loss."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(settings["config"]), dtype=torch.float32)
    model = add_lora(model, settings["rank"], settings["rank"], 0.0)
    causal_lm(model).set_attn_implementation(ATTENTION)
    if settings["checkpointing"]:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    length = settings["length"]
    rows = [EncodedRow(str(n), (n,) * (length // 2), (n,) * (length // 2)) for n in range(settings["rows"])]
    batch = pack(rows, 0)
    head = torch.zeros(model.config.vocab_size, settings["teacher_width"])  # a cached teacher's
    states = torch.zeros(len(rows) * (length // 2), settings["teacher_width"])
    model.train()
    for _ in range(2):
        with adapters_cast(model, torch.float32):
            hidden, labels = response_hidden(model, batch)
            kd_loss(hidden, head_weight(model), states, head, labels, temperature=2.0, alpha=0.5).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


STAGES = {"cache": cache, "train": train, "answer": answer, "merge": merge, "step": step}


def measured(stage, settings):
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the stage before has freed is given back
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the most so far is forgotten (man 5 proc)
    STAGES[stage](settings)
    return {"before": before, "peak": resident("VmHWM")}


if __name__ == "__main__":
    torch.ones(64, 64) @ torch.ones(64, 64)  # the product library is there
    print(json.dumps([measured(*stage) for stage in json.loads(sys.argv[1])]))
