"""What only a GPU needs: how many tokens fit into its memory, and Liger's kernels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from src.utils.common import UserError, logger

PROBED = (1024, 4096)  # tokens of the two passes that tell what a token takes
FILLED = 0.85  # of the free memory: the allocator's blocks do not fit without gaps
CLOSE = 0.05  # relative distance of bf16 gradients from kernels that round in other places
FUSED = {"rope": True, "rms_norm": True, "swiglu": True, "cross_entropy": False, "fused_linear_cross_entropy": False}


@dataclass(frozen=True)
class Memory:
    """Of the GPUs that a model is on."""

    devices: list[torch.device]

    def free(self) -> list[int]:
        """Bytes that each has left, what the allocator holds unused included."""
        found = []
        for device in self.devices:
            # what torch keeps of the card without using it is free for torch, and in use for the driver
            unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            found.append(torch.cuda.mem_get_info(device)[0] + unused)
        return found

    def peak_of(self, work: Callable[[], object]) -> list[int]:
        """Bytes that each needs at most while something runs, beyond those in use before."""
        before = [torch.cuda.memory_allocated(device) for device in self.devices]
        for device in self.devices:
            torch.cuda.reset_peak_memory_stats(device)
        work()
        peaks = [torch.cuda.max_memory_allocated(device) for device in self.devices]
        return [peak - start for peak, start in zip(peaks, before, strict=True)]


def memory_of(model: nn.Module) -> Memory | None:
    """None for a model that is not on GPUs."""
    devices = sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
    return Memory(devices) if devices else None


def tokens_that_fit(
    lengths: Sequence[int], work: Callable[[list[int]], object], memory: Memory, reserved: int = 0
) -> int | None:
    """Most tokens of a pass, measured: what two passes take tells what a token takes, and a pass without any.

    Args:
        lengths: tokens of every row.
        work: runs a pass of the rows of these indices.
        reserved: bytes that will be taken later and are not yet.

    Returns:
        None where the rows are too few or too short to tell.
    """
    # 1. two passes of the longest rows, about 1,024 and 4,096 tokens; a row of more by itself, and then with another
    small = _longest(lengths, PROBED[0])
    least = sum(lengths[index] for index in small) + 1
    large = _longest(lengths, max(PROBED[1], least))
    sizes = [sum(lengths[index] for index in rows) for rows in (small, large)]
    # all rows together are in both: a line needs two points
    if sizes[0] == sizes[1]:
        return None
    # 2. the peak of each, on every GPU
    peaks: list[list[int]] = []
    try:
        work(small)  # kernels are compiled and libraries take their workspaces
        for rows in (small, large):
            peaks.append(memory.peak_of(lambda rows=rows: work(rows)))
    except torch.OutOfMemoryError:
        pass  # its traceback holds what was made, so that nothing is freed in here
    torch.cuda.empty_cache()
    # it ran out: the smaller pass fits if it was measured, else as much as the longest row is tried
    if len(peaks) < 2:
        return sizes[0] if peaks else max(lengths)
    # 3. a line through both: 2 GB at 1,000 tokens and 5 GB at 4,000 are 1 MB a token and 1 GB besides
    fits = []
    for free, one, other in zip(memory.free(), *peaks, strict=True):
        per_token = max((other - one) / (sizes[1] - sizes[0]), 1.0)  # bytes; never 0, which would fit without end
        without_any = one - per_token * sizes[0]
        fits.append(int((FILLED * free - reserved - without_any) / per_token))
    # the tightest GPU decides; what has run fits in any case
    return max(min(fits), sizes[0])


def _longest(lengths: Sequence[int], tokens: int) -> list[int]:
    """The longest rows, as many as make up `tokens`."""
    chosen: list[int] = []
    held = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if held >= tokens:
            break
        chosen.append(index)
        held += lengths[index]
    return chosen


def use_liger(model: PreTrainedModel, wanted: bool | None, probe: Callable[[], list[Tensor]], alone: bool) -> bool:
    """Patch the model's norms, RoPE and SwiGLU with Liger's kernels, and see that it still learns the same.

    Returns whether it was done.

    Args:
        wanted: None for wherever the package is installed and the model is on a GPU.
        probe: gives the adapters' gradients on a few rows.
        alone: no other model of the kind is on another GPU. Liger's RoPE is patched for the kind, and runs on the
            current GPU alone, whatever its tensors are on.

    Raises:
        UserError: they are wanted but cannot be had, or give other gradients.
    """
    installed, on_gpu = find_spec("liger_kernel") is not None, memory_of(model) is not None
    if wanted is None:
        wanted = installed and on_gpu
        if on_gpu and not installed:
            logger.info("norms, RoPE and SwiGLU as transformers has them; pip install '.[gpu]' makes them faster")
    if not wanted:
        return False
    if not installed:
        raise UserError("--liger: the package is not here; pip install '.[gpu]', or leave --liger out")
    if not on_gpu:
        raise UserError("--liger: its kernels run on a GPU; leave --liger out")
    from transformers.integrations.liger import apply_liger_kernel

    # 1. gradients by transformers' own layers, then by Liger's on the same rows
    before = probe()
    here = memory_of(model).devices == [torch.device("cuda", torch.cuda.current_device())]
    apply_liger_kernel(model, FUSED | {"rope": alone and here})
    after = probe()
    # 2. they may differ as bf16 rounds, and no more; `not <` is true of NaN too
    off = _distance(after, before)
    if not off < CLOSE:
        raise UserError(f"Liger's kernels change the gradient of this model by {off:.1%}; pass --liger false")
    logger.info("norms, RoPE and SwiGLU by Liger; its gradient differs by %.2f %%, as bf16 rounds", 100 * off)
    return True


def _distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Relative distance of two lists of tensors, as if each were one vector."""
    difference = sum((a.float() - b.float()).square().sum().item() for a, b in zip(found, wanted, strict=True))
    return (difference / max(sum(b.float().square().sum().item() for b in wanted), 1e-30)) ** 0.5  # |a - b| / |b|
