"""GPUs by number and size, by name, or as they are found."""

import pytest
import torch

from src.distillation import losses
from src.planning.hardware import GPUS, detect, parse_gpus, this_machine
from src.planning.memory import loss_bytes
from src.utils.common import UserError


@pytest.mark.parametrize(
    ("text", "count", "name", "memory_gb"),
    [
        ("8x40", 8, "A100 40 GB", 40),
        ("2 x 24 GB", 2, "A10", 24),
        ("1x80", 1, "A100 80 GB", 80),
        ("1xH100", 1, "H100 SXM", 80),
        ("8xA100-40", 8, "A100 40 GB", 40),
        ("4xa10040", 4, "A100 40 GB", 40),
        ("1x141", 1, "H200", 141),
        ("1x32", 1, "GPU as fast as an A10", 32),
        ("1x16", 1, "GPU as fast as an A10", 16),
    ],
)
def test_gpus_in_words(text, count, name, memory_gb):
    found = parse_gpus(text)
    assert (found.count, found.device.name, found.device.memory_gb) == (count, name, memory_gb)


@pytest.mark.parametrize("text", ["", "40", "0x40", "8x", "x40", "8x0", "8 GPUs", "1xA9000", "-1x40"])
def test_what_is_no_gpu_is_one_line(text):
    with pytest.raises(UserError, match=r"^--gpus"):
        parse_gpus(text)


class Properties:
    def __init__(self, name, total_memory):
        self.name, self.total_memory = name, total_memory


def test_gpus_of_this_machine(monkeypatch):
    found = [Properties("NVIDIA A100-SXM4-40GB", int(42.3e9)), Properties("NVIDIA A100-SXM4-40GB", int(42.2e9))]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found[index])
    hardware = detect()
    assert (hardware.count, hardware.device.memory_gb) == (2, 42.2)
    assert hardware.device.tflops == GPUS["A100-40"].tflops
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--detect: torch finds no GPU here"):
        detect()


def test_a_processor_is_measured():
    hardware = this_machine()
    assert hardware.is_cpu
    assert hardware.device.tflops > 1e-4
    assert 0.05 < hardware.device.overhead_gb < hardware.device.memory_gb


@pytest.mark.parametrize("name", ["A10", "A100-40", "H200"])
@pytest.mark.parametrize("compiled", [False, True])
def test_chunks_of_logits_are_those_of_the_loss(name, compiled, monkeypatch):
    """`losses.chunk_tokens` asks the card for its memory; the plan knows it by the data sheet."""
    vocab, bytes_an_entry = 151_936, losses.KERNEL_BYTES if compiled else 4 * losses.CHUNK_TENSORS
    hardware = parse_gpus(f"1x{name}")
    properties = Properties(name, int(hardware.device.memory_gb * 1e9))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    chunk = losses.chunk_tokens(vocab, compiled, "cuda") * vocab * bytes_an_entry
    assert loss_bytes(hardware, vocab, 1e9, compiled) == pytest.approx(chunk, rel=0.3)
    assert loss_bytes(hardware, vocab, 10, compiled) == 10 * vocab * bytes_an_entry
