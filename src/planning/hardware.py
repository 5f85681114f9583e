"""What a plan is made for: a number of equal GPUs, or this machine's processor."""

import re
import time
from dataclasses import dataclass, replace

import psutil
import torch

from src.distillation.base import compute_dtype
from src.utils.common import UserError


@dataclass(frozen=True)
class Device:
    """One GPU, or the processor.

    memory_gb: 1e9 bytes, as all sizes here.
    tflops: dense products in the type that is computed in, 1e12 operations a second.
    bandwidth_gb_s: of its memory.
    overhead_gb: what a process takes before it holds a tensor: CUDA's context and its libraries' workspaces, or the
        interpreter and what is imported.
    dtype: of frozen weights and products.
    """

    name: str
    memory_gb: float
    tflops: float
    bandwidth_gb_s: float
    overhead_gb: float
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Hardware:
    """`count` equal GPUs; 0 for the processor alone."""

    count: int
    device: Device

    @property
    def is_cpu(self) -> bool:
        return self.count == 0

    def __str__(self) -> str:
        if self.is_cpu:
            return f"no GPU: {self.device.name}, {self.device.memory_gb:.0f} GB"
        return f"{self.count} x {self.device.name}, {self.device.memory_gb:g} GB each"


CONTEXT_GB = 0.5  # CUDA's context and cuBLAS's workspaces, in `nvidia-smi` beside a tensor of a few bytes


def _gpu(name: str, memory_gb: float, tflops: float, bandwidth_gb_s: float) -> Device:
    return Device(name, memory_gb, tflops, bandwidth_gb_s, CONTEXT_GB)


# Dense bf16 (without sparsity) and memory of the vendors' data sheets, as NVIDIA publishes one for each product
GPUS = {
    "A10": _gpu("A10", 24, 125, 600),
    "L4": _gpu("L4", 24, 121, 300),
    "4090": _gpu("RTX 4090", 24, 165, 1008),
    "3090": _gpu("RTX 3090", 24, 71, 936),
    "A100-40": _gpu("A100 40 GB", 40, 312, 1555),
    "L40S": _gpu("L40S", 48, 362, 864),
    "A100-80": _gpu("A100 80 GB", 80, 312, 2039),
    "H100": _gpu("H100 SXM", 80, 989, 3350),
    "H200": _gpu("H200", 141, 989, 4800),
    "B200": _gpu("B200", 180, 2250, 7700),
}
# What a plain number of GB stands for, smallest first: the most common of that size, not the fastest
BY_SIZE = ("A10", "A100-40", "L40S", "A100-80", "H200", "B200")

# "8x40", "2 x 24", "8xA100-40", "1xH100", "8xA100"
GPUS_WORD = re.compile(r"\s*(\d+)\s*[xX*]\s*([\w.-]+)\s*(?:GB)?\s*")


def parse_gpus(text: str) -> Hardware:
    """`NUMBERxGB` or `NUMBERxNAME`: "8x40", "1xH100".

    Raises:
        UserError: neither, or a name that is not in the table.
    """
    match = GPUS_WORD.fullmatch(str(text))
    if not match or int(match[1]) < 1:
        raise UserError(
            f"--gpus {text}: expected how many and of how many GB or which, such as 8x40 or 8xA100-40; the names are "
            + ", ".join(GPUS)
        )
    count, what = int(match[1]), match[2]
    try:
        memory_gb = float(what)  # "40", not "H100"
    except ValueError:
        return Hardware(count, _named(what))
    if memory_gb <= 0:
        raise UserError(f"--gpus {text}: a GPU has more than 0 GB")
    return Hardware(count, _of_size(memory_gb))


def _named(name: str) -> Device:
    for key, device in GPUS.items():
        # "A100-40", "a10040"
        if name.lower() in (key.lower(), key.lower().replace("-", "")):
            return device
    raise UserError(f"--gpus: no data of a GPU {name!r}; there are {', '.join(GPUS)}, or say its GB, such as 8x40")


def _of_size(memory_gb: float) -> Device:
    """The largest of `BY_SIZE` that is not larger, with this memory; the smallest where all are."""
    known = [GPUS[name] for name in BY_SIZE if GPUS[name].memory_gb <= memory_gb]
    device = known[-1] if known else GPUS[BY_SIZE[0]]
    if device.memory_gb == memory_gb:
        return device
    return replace(device, name=f"GPU as fast as an {device.name}", memory_gb=memory_gb)


def detect() -> Hardware:
    """The GPUs of this machine, by the data of the one whose name and memory fit.

    Raises:
        UserError: there is none.
    """
    if not torch.cuda.is_available():
        raise UserError("--detect: torch finds no GPU here; leave it out to plan for the processor, or say --gpus 8x40")
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    # a plan is for equal GPUs: of unequal ones for the one with the least memory
    smallest = min(found, key=lambda properties: properties.total_memory)
    memory_gb = smallest.total_memory / 1e9
    # the word that tells the card, "4090" of "RTX 4090", "A100" of "A100 40 GB", in torch's "NVIDIA A100-SXM4-40GB"
    alike = [device for device in GPUS.values() if device.name.split()[-1 if "RTX" in device.name else 0]
             in smallest.name and abs(device.memory_gb - memory_gb) < 0.15 * memory_gb]  # fmt: skip
    device = alike[0] if alike else _of_size(memory_gb)
    return Hardware(len(found), replace(device, name=smallest.name, memory_gb=round(memory_gb, 1)))


def this_machine() -> Hardware:
    """The processor and its memory; its rate is measured, in a fifth of a second."""
    dtype = compute_dtype("cpu")
    a, b = torch.ones(512, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    torch.mm(a, b)  # the first call makes threads
    started, runs = time.perf_counter(), 0
    while time.perf_counter() - started < 0.2:
        torch.mm(a, b)
        runs += 1
    # [512, 1024] @ [1024, 1024]
    rate = runs * 2 * 512 * 1024 * 1024 / (time.perf_counter() - started)
    name = f"{torch.get_num_threads()} threads, products at {rate / 1e9:.0f} GFLOP/s"
    # what this process has imported is what a stage imports
    own = psutil.Process().memory_info().rss / 1e9
    # 20 GB/s: two channels of DDR4-2666 give 42 (JEDEC 79-4), half of that in practice; decoding here is bound by work
    return Hardware(0, Device(name, psutil.virtual_memory().total / 1e9, rate / 1e12, 20.0, own, dtype))
