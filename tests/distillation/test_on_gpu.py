"""What only a GPU can show. Skipped, and said so, where there is none."""

import contextlib
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import load_peft_weights

from src.distillation import losses, training
from src.distillation.base import EncodedRow, collate, response_hidden
from src.distillation.kd import run_kd_pipeline
from src.distillation.losses import DIVERGENCES, compiler_works, kd_loss, plain_kd_loss, shared_head
from src.distillation.packing import attention_of_packs, pack, varlen_works
from src.utils.common import read_jsonl

pytestmark = pytest.mark.gpu
V, H, G, N = 15_169, 128, 64, 700  # as odd as Qwen3's number of tokens


def distance(found, wanted):
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def case(stored):
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device="cuda")

    heads = [(normal(stored, width) * 2.5 / width**0.5).bfloat16() for width in (H, G)]
    labels = torch.randint(V, (N,), generator=generator, device="cuda")
    return normal(N, H).bfloat16(), heads[0], normal(N, G).bfloat16(), heads[1], labels


@pytest.mark.parametrize("stored", [V, 15_360], ids=["stored odd", "stored aligned"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_loss_and_gradient_against_fp64(kind, compiled, stored):
    assert not compiled or compiler_works("cuda")
    hidden, head, theirs, their_head, labels = case(stored)
    wide = [shared_head(weight, V) for weight in (head, their_head)]
    assert all(len(weight) % losses.ALIGNED == 0 for weight in wide)
    settings = {"temperature": 2.5, "alpha": 0.8, "kind": kind, "beta": 0.3}
    student = hidden.clone().requires_grad_()
    sums = kd_loss(student, wide[0], theirs, wide[1], labels, **settings, compiled=compiled, vocab_size=V)
    sums.loss.backward()
    exact = hidden.double().requires_grad_()
    logits = (exact @ head[:V].double().T, theirs.double() @ their_head[:V].double().T)
    # the reference reads fp32 logits; those of fp64 states differ from it by their rounding alone
    wanted = plain_kd_loss(*logits, labels, **settings)
    wanted.loss.backward()
    assert sums.loss.item() == pytest.approx(wanted.loss.item(), rel=1e-4)
    assert distance(student.grad, exact.grad) < 4e-3  # bf16 gradients of bf16 states


FAMILY = [
    EncodedRow("a", (*range(100, 150), 1, 2, 3), tuple(range(40))),
    EncodedRow("b", tuple(range(30)), tuple(range(50, 70))),
    EncodedRow("c", (*range(100, 150), 7), tuple(range(60))),
]


def test_varlen_attention_is_what_runs():
    assert varlen_works(torch.device("cuda"), torch.bfloat16, 128)


@pytest.mark.parametrize("rows", [FAMILY, FAMILY[1:]], ids=["shared beginning", "strangers"])
def test_packed_rows_read_themselves_alone(make_model, rows):
    model = make_model(head_dim=64).to("cuda", torch.bfloat16)
    gradients = []
    for packed in (False, True):
        model.zero_grad()
        with attention_of_packs(model, packed):
            batches = [pack(rows, 0)] if packed else [collate([row], 0) for row in rows]
            states = torch.cat([response_hidden(model, batch)[0] for batch in batches])
        states.float().pow(2).sum().backward()
        gradients.append((states.detach(), model.model.layers[0].self_attn.k_proj.weight.grad.clone()))
    (alone, alone_grad), (together, together_grad) = gradients
    assert distance(together, alone) < 0.02
    assert distance(together_grad, alone_grad) < 0.05


@pytest.fixture
def settings(tmp_path, tiny_teacher, tiny_student, clean_rows, write_sft):
    experiment = write_sft(tmp_path / "experiment" / "tiny", clean_rows(40), clean_rows(8, start=100))
    return {
        "model_name_or_path": tiny_student, "teacher_model_name_or_path": tiny_teacher,
        "experiment_dir": str(experiment), "learning_rate": 1e-2, "warmup_steps": 0, "batch_size": 8,
        "gradient_accumulation_steps": 2, "max_steps": 6, "lora_r": 8, "teacher_signal": "online", "save_steps": 2,
        "liger": False,
    }  # fmt: skip


def rows_of(results):
    return [row["loss"] for row in read_jsonl(Path(results["run_dir"]) / "metrics.jsonl") if "loss" in row]


def test_a_whole_run_that_is_killed_and_goes_on(settings, tmp_path, monkeypatch):
    whole = run_kd_pipeline(settings | {"output_dir": str(tmp_path / "whole")})
    assert whole["after"]["kl_to_teacher"] < whole["before"]["kl_to_teacher"]
    take_step = training.take_step

    def killed(run):
        if run.step == 3:
            raise KeyboardInterrupt
        return take_step(run)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(training, "take_step", killed)
        run_kd_pipeline(settings | {"output_dir": str(tmp_path / "cut")})
    again = run_kd_pipeline(settings | {"output_dir": str(tmp_path / "cut")})
    # the sums of a GPU's attention backward are in no fixed order
    assert rows_of(again) == pytest.approx(rows_of(whole), rel=1e-3)
    ours, theirs = (load_peft_weights(results["final_model"]) for results in (again, whole))
    assert distance(torch.cat([t.flatten() for t in ours.values()]),
                    torch.cat([theirs[name].flatten() for name in ours])) < 0.05  # fmt: skip


@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="pip install '.[gpu]'")
def test_ligers_kernels_learn_the_same(settings):
    off, on = (run_kd_pipeline(settings | {"liger": liger, "overwrite": True}) for liger in (False, True))
    assert rows_of(on) == pytest.approx(rows_of(off), rel=0.02)
