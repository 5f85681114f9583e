"""Bytes of each kind of work on each GPU: what the engine's own rules say, and passes as trace.py counts them."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from src.distillation.base import layer_device_map
from src.distillation.losses import ALIGNED, CHUNK_TENSORS, KERNEL_BYTES, chunk_tokens
from src.planning.hardware import Hardware
from src.planning.result import PARTS, Memory, Use
from src.planning.shapes import Shapes, open_meta
from src.planning.trace import Pass, trace

GB = 1e9
# Bits of a weight in 4 bits (NF4) with its constants, themselves in 8 bits: Dettmers et al. 2023, QLoRA, section 3
NF4_BYTES = (4 + 0.127) / 8
PROBABILITIES = 512  # rows up to which packed attention on a processor keeps them (packing.SHORT)
SAMPLED_POSITIONS = 512  # of a file of hidden states whose top k is looked at, at most (teacher_cache.SAMPLED)
SERVER_FILLS = 0.9  # vLLM's gpu_memory_utilization by default, of a GPU's memory
SERVER_WORK_GB = 2.0  # vLLM's profile run: activations of 8,192 tokens, logits of all sequences


@dataclass(frozen=True)
class Share:
    """A model's part on one GPU: weights (numbers) and layers; `last` has the head."""

    device: int
    weights: int
    layers: int
    last: bool = True


@functools.lru_cache(maxsize=32)
def spread(shapes: Shapes, devices: tuple[int, ...]) -> tuple[Share, ...]:
    """A model's layers over GPUs, as `layer_device_map` lays them.

    Raises:
        UserError: fewer layers than GPUs.
    """
    # all of it in one place
    if len(devices) <= 1:
        return (Share(devices[0] if devices else 0, shapes.weights, shapes.layers),)
    model = open_meta(shapes.name)
    placed = layer_device_map(model, devices, torch.bfloat16, budget_gb=float("inf"))
    layers, weights = dict.fromkeys(devices, 0), dict.fromkeys(devices, 0)
    for name, device in placed.items():
        module = model.get_submodule(name)
        # a tied head is the embedding, which is counted where that is
        tied_head = shapes.tied and module is model.get_output_embeddings()
        weights[device] += 0 if tied_head else sum(p.numel() for p in module.parameters())
        layers[device] += ".layers." in name  # True is 1: "model.layers.3" is a layer, "model.norm" is none
    return tuple(Share(d, weights[d], layers[d], d == devices[-1]) for d in devices)


def loaded_bytes(shapes: Shapes, share: Share, dtype: torch.dtype, hardware: Hardware) -> float:
    """Bytes of a model's weights where they are.

    A processor reads weights of the type that is stored from the mapped file; experts, which are stored one by one, are
    stacked into new memory while the file stays mapped. Weights of another type are copied, and the file is let go.
    """
    weights = share.weights
    if hardware.is_cpu and shapes.stored is dtype:
        weights += shapes.expert_weights
    return weights * dtype.itemsize


def attention_kind(hardware: Hardware, row_tokens: float) -> str:
    """What packed attention keeps: `packing.packed_attention` chooses by device and length."""
    if not hardware.is_cpu:
        return "varlen"
    return "short_rows" if row_tokens <= PROBABILITIES else "row_by_row"


def loss_bytes(hardware: Hardware, vocab: int, tokens: float, compiled: bool) -> float:
    """The `[chunk, vocab]` tensors of the loss, see `losses.chunk_tokens`."""
    if hardware.is_cpu:
        # bytes an entry of [chunk, vocab]: `losses.chunk_tokens` divides by the same
        entry = CHUNK_TENSORS if compiled else 4 * CHUNK_TENSORS
        return min(tokens, chunk_tokens(vocab, compiled)) * vocab * entry
    entry = KERNEL_BYTES if compiled else 4 * CHUNK_TENSORS
    return min(tokens * vocab * entry, hardware.device.memory_gb * GB / 64, 1.2 * 2**30)


@dataclass(frozen=True)
class Step:
    """A training step's memory, as far as it does not depend on how many tokens a pass holds.

    adapters: trainable weights.
    teacher_head: the teacher's output layer is beside the student's, if only to measure.
    beliefs: so are its hidden states of a pass.
    resident: an online teacher is on the student's GPU, with its own output layer.
    optimiser_bytes: a trainable weight's moments.
    """

    student: Shapes
    teacher: Shapes
    traced: Pass
    answer_share: float
    adapters: int
    teacher_head: bool
    beliefs: bool
    resident: bool
    optimiser_bytes: int
    compiled: bool
    four_bit: bool
    ranks_sharing: int = 1  # FSDP2: each holds this part of everything


def training_memory(step: Step, share: Share, tokens: float, hardware: Hardware) -> Memory:
    """What a GPU with this share of the student holds in passes of this many tokens."""
    # 1. what is there all the time
    student, teacher, parts = step.student, step.teacher, step.ranks_sharing
    size, answers = step.traced.dtype.itemsize, tokens * step.answer_share
    adapters = step.adapters * share.layers / student.layers
    weights = _training_weights(step, share)
    copies = 0 if parts > 1 else size * adapters  # cast once for all passes of a step
    # -(-V // 128) * 128: rounded up to the next multiple of 128, as `losses.shared_head` pads it
    head = -(-student.vocab // ALIGNED) * ALIGNED * teacher.hidden * size if step.teacher_head and share.last else 0
    whole = Share(0, teacher.weights, teacher.layers)
    resident = loaded_bytes(teacher, whole, step.traced.dtype, hardware) if step.resident else 0

    # the peak is where the forward pass ends, in the loss, or in the backward pass
    # 2. what comes and goes: (activations, loss) at each of these moments, of which the largest counts
    counted = trace(step.traced).at(share.layers, tokens)
    states, beliefs = answers * student.hidden * size, answers * teacher.hidden * size if step.beliefs else 0
    chunk = loss_bytes(hardware, student.vocab, answers, step.compiled) if share.last else 0
    moments = [(counted.forward, beliefs), (counted.kept, chunk + states + beliefs), (counted.backward, states)]
    if step.resident:  # its pass comes first, before the student's activations are made
        reading = Pass(teacher.name, step.traced.dtype, step.traced.row_tokens, step.traced.attention)
        moments.append((trace(reading).at(teacher.layers, tokens).forward, 0))
    activations, loss = max(moments, key=sum)
    if step.four_bit:
        activations += 2 * student.widest * size  # a matrix unpacked for its product, and the next
    return Memory(
        weights=weights / GB,
        adapters=(4 * adapters / parts + copies) / GB,  # fp32
        gradients=4 * adapters / parts / GB,
        optimiser=step.optimiser_bytes * adapters / parts / GB,
        activations=activations / GB,
        loss=loss / GB,
        teacher=(head + resident) / GB,
        overhead=hardware.device.overhead_gb,
    )


def _training_weights(step: Step, share: Share) -> float:
    """Bytes of the student's frozen weights: in 4 bits, sharded, or as they are."""
    student, size = step.student, step.traced.dtype.itemsize
    whole = share.weights * size
    if step.four_bit:
        # embedding, head and norms stay as they are
        packed = student.layer_weights * share.layers / student.layers
        whole = (share.weights - packed) * size + packed * NF4_BYTES
    if step.ranks_sharing == 1:
        return whole
    # what is gathered: embedding, head and, for the loss, the head once more; a layer, and the next one ahead of time
    gathered = (student.weights - student.layer_weights) + student.hidden * student.vocab
    return whole / step.ranks_sharing + (gathered + 2 * student.layer_weights / student.layers) * size


def reading_memory(shapes: Shapes, share: Share, traced: Pass, tokens: float, shard_tokens: int,
                   hardware: Hardware) -> Memory:  # fmt: skip
    """What a GPU with this share of a teacher holds while it reads rows for the cache.

    Args:
        shard_tokens: response tokens of one file of the cache, which on a processor lie beside the model.
    """
    size = traced.dtype.itemsize
    activations = trace(traced).at(share.layers, tokens).forward
    sampled = min(SAMPLED_POSITIONS, shard_tokens)
    chunk = loss_bytes(hardware, shapes.vocab, sampled, compiled=False) if share.last else 0
    stored = 0
    if hardware.is_cpu:  # a file's states in parts and joined
        stored = 2 * shard_tokens * shapes.hidden * size
    # two moments: the passes, with the parts that they have made; then the top k, with parts and whole
    passes, top_k = activations + stored / 2, chunk + stored
    return Memory(
        weights=loaded_bytes(shapes, share, traced.dtype, hardware) / GB,
        activations=(activations if passes >= top_k else 0) / GB,
        loss=(stored / 2 if passes >= top_k else top_k) / GB,
        overhead=hardware.device.overhead_gb,
    )


def answering_memory(shapes: Shapes, share: Share, traced: Pass, rows: int, new_tokens: int,
                     hardware: Hardware) -> Memory:  # fmt: skip
    """What a GPU with this share of a model holds while transformers answers `rows` prompts together.

    Prompts are as long as `traced.row_tokens`, answers as long as they may be.
    """
    part, prompt = share.layers / shapes.layers, traced.row_tokens
    token_bytes = shapes.kv_bytes(traced.dtype)
    # a layer's cache is copied to grow by a token, and its heads are repeated for those that share them
    copies = token_bytes / shapes.layers * (1 + shapes.heads // shapes.kv_heads)
    logits = 6 * rows * shapes.vocab * 4 if share.last else 0  # fp32, with the copies that are filtered
    reading = trace(traced).at(share.layers, rows * prompt).forward
    prompts, whole = rows * prompt, rows * (prompt + new_tokens)
    # (cache, activations, logits) while the prompts are read, and at the last token; the larger of the two
    read = (prompts * token_bytes * part, reading, 0)
    decode = (whole * token_bytes * part, whole * copies, logits)
    cache, activations, loss = max(read, decode, key=sum)
    return Memory(
        weights=loaded_bytes(shapes, share, traced.dtype, hardware) / GB,
        activations=activations / GB,
        kv_cache=cache / GB,
        loss=loss / GB,
        overhead=hardware.device.overhead_gb,
    )


def served_memory(shapes: Shapes, weight_bytes: float, gpus_a_replica: int, hardware: Hardware) -> Memory:
    """What each GPU of a server holds: it takes a set share of the memory, and gives to the cache what is left."""
    weights = shapes.weights * weight_bytes / gpus_a_replica / GB
    device = hardware.device
    cache = SERVER_FILLS * device.memory_gb - weights - SERVER_WORK_GB - device.overhead_gb
    return Memory(weights=weights, activations=SERVER_WORK_GB, kv_cache=max(0.0, cache), overhead=device.overhead_gb)


def merging_memory(shapes: Shapes, adapters: int, dtype: torch.dtype, hardware: Hardware) -> Memory:
    """What it takes to add adapters into the weights: `lora.merge_adapter` a matrix at a time, in fp32."""
    return Memory(
        weights=shapes.weights * dtype.itemsize / GB,
        adapters=4 * adapters / GB,
        activations=3 * 4 * shapes.widest / GB,  # the product of the factors, scaled, and the weights it is added to
        overhead=hardware.device.overhead_gb,
    )


def together(one: Memory, other: Memory) -> Memory:
    """Two models of one process on one GPU, of which one works at a time."""
    both = {part: getattr(one, part) + getattr(other, part) for part in PARTS}
    # one works while the other waits; there is one process
    alone = {part: max(getattr(one, part), getattr(other, part)) for part in ("activations", "overhead")}
    return Memory(**(both | alone))


def grouped(named: Sequence[tuple[int, Memory]], hardware: Hardware, of: str = "") -> tuple[Use, ...]:
    """GPUs that hold the same, as one line: "GPUs 1-4 (teacher)"."""
    capacity = hardware.device.memory_gb
    suffix = f" ({of})" if of else ""
    if hardware.is_cpu:
        return tuple(Use(f"this machine{suffix}", memory, capacity) for _, memory in named)
    uses: list[Use] = []
    numbers: list[list[int]] = []
    for number, memory in named:
        # neighbours that differ by less than a hundredth are one line, with the larger of the two
        if uses and abs(uses[-1].memory.peak - memory.peak) < 0.01 * memory.peak:
            numbers[-1].append(number)
            larger = max(uses[-1].memory, memory, key=lambda one: one.peak)
            uses[-1] = Use("", larger, capacity)
        else:
            numbers.append([number])
            uses.append(Use("", memory, capacity))
    return tuple(Use(_numbered(own) + suffix, use.memory, capacity) for own, use in zip(numbers, uses, strict=True))


def _numbered(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return f"GPU {numbers[0]}"
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"GPUs {numbers[0]}-{numbers[-1]}"
    return "GPUs " + ", ".join(map(str, numbers))


def weights_problem(shares: tuple[Share, ...], budget_gb: float, size: float, hardware: Hardware) -> tuple[str, ...]:
    """`layer_device_map` refuses to give a GPU more than its budget."""
    most = max(share.weights for share in shares) * size / GB
    if hardware.is_cpu or len(shares) == 1 or most <= budget_gb:
        return ()
    return (f"a GPU would hold {most:.1f} GB of weights, gpu_memory_gb allows {budget_gb:g}",)


def over(devices: tuple[int, ...], hardware: Hardware) -> str:
    if hardware.is_cpu:
        return "on the processor"
    return f"layers over {len(devices)} GPUs" if len(devices) > 1 else "on one GPU"
