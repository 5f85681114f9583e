"""The Triton kernel of the loss on machines without a GPU; test_on_gpu.py runs it where there is one."""

import os
import subprocess
import sys

import pytest

from src.utils.common import ROOT

pytest.importorskip("triton", reason="requirements-dev.txt has it")

COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from src.distillation.loss_kernel import _kernel

types = dict.fromkeys(("student", "teacher", "kd_out", "ce_out"), "*fp32")
types |= {"gradient": "*bf16", "labels": "*i64", "vocab_size": "i32", "width": "i32"}
types |= dict.fromkeys(("student_stride", "teacher_stride", "gradient_stride"), "i32")
for card in (80, 90):
    for kind in range(4):
        constants = {"KIND": kind, "S_CAPPED": kind == 2, "T_CAPPED": False, "BLOCK": 2048}
        signature = {n: "constexpr" if n in constants else types.get(n, "fp32") for n in _kernel.arg_names}
        source = ASTSource(fn=_kernel, signature=signature, constexprs=constants)
        made = triton.compile(source, target=GPUTarget("cuda", card, 32), options={"num_warps": 8})
        print(card, kind, len(made.asm["cubin"]))
"""


def test_it_compiles_for_the_cards_of_the_mission():
    """To machine code of an A100 and an H100, without one; in a process where Triton does not interpret."""
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sizes = [line.split() for line in done.stdout.splitlines()]
    assert [size[:2] for size in sizes] == [[str(card), str(kind)] for card in (80, 90) for kind in range(4)]
    assert all(int(size) > 1000 for *_, size in sizes)


def test_in_the_interpreter_it_gives_what_plain_torch_gives():
    command = [sys.executable, "-m", "pytest", "tests/distillation/interpreted_kernel.py"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    assert "15 passed" in done.stdout
