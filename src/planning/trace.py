"""How many bytes a pass holds, counted while the engine's own code runs on the meta device, where tensors have shapes
and no contents.

Two models of two and three layers and two packs of different sizes tell what a layer and a token add; everything in a
packed pass is linear in both. Kernels that the meta device lacks, or that a GPU has and it has not, have stand-ins here
that keep what the real ones keep.
"""

import contextlib
import functools
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import AttentionInterface

from src.distillation.base import EncodedRow, response_hidden
from src.distillation.lora import adapters_cast, add_lora
from src.distillation.packing import Layout, pack
from src.planning.shapes import open_meta

LAYERS = (2, 3)  # of the two models that are traced; the first layer's input is nobody's output
ROWS = (2, 4)  # in the two packs


class LiveBytes(TorchDispatchMode):
    """Bytes of the meta tensors that are alive, `now` and at the `peak`, as far as they were made within the block."""

    def __init__(self, owned: list[Tensor]) -> None:
        """`owned` are there already, and are not counted."""
        super().__init__()
        self.now = self.peak = 0
        # storages by their address: views share one
        self._seen = {tensor.untyped_storage()._cdata for tensor in owned}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._grouped_mm.default:  # on the meta device it takes bf16 alone
            made = args[0].new_empty(len(args[0]), args[1].shape[-1])
        else:
            made = function(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._count, made)  # also of operators that give several
        return made

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if tensor.device.type != "meta" or storage._cdata in self._seen:  # a view, or changed in place
            return
        self._seen.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        # when nobody holds the storage any more, its bytes are free: so the count follows autograd's own keeping
        weakref.finalize(storage, self._release, storage._cdata, storage.nbytes())

    def _release(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


class _Varlen(torch.autograd.Function):
    """Torch's varlen attention: keeps query, key, value, result and a number a query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        _, heads, length, _ = query.shape
        out = value.new_empty(1, length, heads, value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(heads, length, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(states) for states in ctx.saved_tensors[:3])


class _ShortRows(torch.autograd.Function):
    """`packing._ShortRows`: keeps query, key, value and the probabilities; scores and gradients of a row in fp32."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
        _, heads, length, _ = query.shape
        out = value.new_empty(1, length, heads, value.shape[-1])
        for row in lengths:
            query.new_empty(3 * heads * row * row, dtype=torch.float32)  # scores, softmax, and one being scaled
        kept = [query.new_empty(heads * row * row) for row in lengths]
        ctx.save_for_backward(query, key, value, *kept)
        ctx.lengths = lengths
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        sums = [torch.empty_like(states, dtype=torch.float32) for states in (key, value)]
        for row in ctx.lengths:
            query.new_empty(3 * query.shape[1] * row * row, dtype=torch.float32)
        found = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        del sums
        return *found, None


class _RowByRow(torch.autograd.Function):
    """A fused kernel a row: keeps copies of query, key and value, and its own result beside the joined one."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        _, heads, length, _ = query.shape
        copies = [torch.empty_like(states) for states in (query, key, value)]
        own = value.new_empty(1, heads, length, value.shape[-1])
        ctx.save_for_backward(*copies, own, query.new_empty(heads, length, dtype=torch.float32))
        return value.new_empty(1, length, heads, value.shape[-1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(states) for states in ctx.saved_tensors[:3])


def _attend(kind: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *, layout: Layout,
            **_: object) -> tuple[Tensor, None]:  # fmt: skip
    query, key = query.to(value.dtype), key.to(value.dtype)
    if kind == "short_rows":
        return _ShortRows.apply(query, key, value, layout.lengths), None
    return (_Varlen if kind == "varlen" else _RowByRow).apply(query, key, value), None


ATTENTIONS = ("varlen", "short_rows", "row_by_row")
for _kind in ATTENTIONS:
    AttentionInterface.register(f"planned_{_kind}", functools.partial(_attend, _kind))


class _LigerNorm(torch.autograd.Function):
    """Liger's RMSNorm: keeps its input and a number a token, where plain torch keeps three copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return torch.empty_like(gradient), None


class _LigerGate(torch.autograd.Function):
    """Liger's SwiGLU: keeps its two inputs and writes their gradients over them."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return ctx.saved_tensors


def _as_liger(model: nn.Module) -> None:
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = functools.partial(lambda norm, x: _LigerNorm.apply(x, norm.weight), module)
        elif all(isinstance(getattr(module, name, None), nn.Module) for name in ("gate_proj", "up_proj", "down_proj")):
            module.forward = functools.partial(
                lambda mlp, x: mlp.down_proj(_LigerGate.apply(mlp.gate_proj(x), mlp.up_proj(x))), module
            )


@dataclass(frozen=True)
class Counted:
    """Bytes of a pass, beside weights, adapters and what outlives it.

    forward: at the most in the forward pass.
    kept: after it, for the backward pass.
    backward: at the most in the backward pass.
    """

    forward: float
    kept: float
    backward: float


@dataclass(frozen=True)
class PassBytes:
    """`Counted` as a function of layers and tokens: `fixed + layer L + token T + both L T`, of each of its fields."""

    fixed: Counted
    layer: Counted
    token: Counted
    both: Counted

    def at(self, layers: int, tokens: float) -> Counted:
        def one(name: str) -> float:
            fixed, layer, token, both = (getattr(c, name) for c in (self.fixed, self.layer, self.token, self.both))
            # a line through two points may pass below 0
            return max(0.0, fixed + layer * layers + token * tokens + both * layers * tokens)

        return Counted(one("forward"), one("kept"), one("backward"))


@dataclass(frozen=True)
class Pass:
    """What is traced.

    row_tokens: of every row.
    rank: of the adapters; 0 for a model that only reads.
    fused: adapters run as this engine runs them, not as peft does.
    """

    model: str
    dtype: torch.dtype
    row_tokens: int
    attention: str
    rank: int = 0
    targets: tuple[str, ...] = ()
    checkpointing: bool = False
    liger: bool = False
    fused: bool = True


@functools.lru_cache(maxsize=64)  # a plan looks for the nearest change that fits, and asks for most of them again
def trace(wanted: Pass) -> PassBytes:
    """The bytes of a pass over rows of the wanted length, however many."""
    found = {}
    for layers in LAYERS:
        for rows in ROWS:
            found[layers, rows] = _count(wanted, layers, rows)
    # tokens of the two packs
    low, high = (rows * wanted.row_tokens for rows in ROWS)
    parts: dict[str, list[float]] = {"fixed": [], "layer": [], "token": [], "both": []}
    for name in ("forward", "kept", "backward"):
        # four measurements, four unknowns: bytes(L, T) = fixed + layer L + token T + both L T
        #           2 layers  3 layers
        #     low       a         b
        #     high      c         d
        (a, c), (b, d) = ([getattr(found[layers, rows], name) for rows in ROWS] for layers in LAYERS)
        both = (d - c - b + a) / (high - low)  # LAYERS are one apart
        layer = b - a - both * low
        token = (c - a) / (high - low) - both * LAYERS[0]
        fixed = a - layer * LAYERS[0] - token * low - both * LAYERS[0] * low
        for part, value in zip(parts.values(), (fixed, layer, token, both), strict=True):
            part.append(value)
    return PassBytes(**{name: Counted(*values) for name, values in parts.items()})


def _count(wanted: Pass, layers: int, rows: int) -> Counted:
    # 1. the model and rows, on the meta device
    model = open_meta(wanted.model, wanted.dtype, layers)
    # the stand-ins above, in place of kernels that want real tensors
    model.set_attn_implementation(f"planned_{wanted.attention}")
    if wanted.liger:
        _as_liger(model)
    half = max(1, wanted.row_tokens // 2)
    # no two begin alike: what rows share would be run once
    encoded = [EncodedRow(str(n), (n,) * half, (n,) * (wanted.row_tokens - half)) for n in range(rows)]
    batch = pack(encoded, pad_id=0, multiple=1)
    # 2. what is there before the pass is not counted
    with contextlib.ExitStack() as stack:
        owned = [*model.parameters(), *model.buffers()]
        if wanted.rank:
            model = _with_adapters(model, wanted)
            stack.enter_context(adapters_cast(model, wanted.dtype))
            owned = [*model.parameters(), *model.buffers(), *_gradients_and_copies(model)]
        else:
            stack.enter_context(torch.no_grad())
        # 3. forward: the most that was alive, and what is kept when it is over
        live = stack.enter_context(LiveBytes(owned))
        hidden, _ = response_hidden(model, batch)
        forward, kept = live.peak, live.now
        if not wanted.rank:
            return Counted(forward, kept, 0)
        # 4. backward, counted anew
        live.peak = live.now
        # the gradient that the loss gives; its contents do not matter here
        hidden.backward(torch.empty_like(hidden))
        return Counted(forward, kept, live.peak)


def _with_adapters(model: Any, wanted: Pass) -> Any:
    with torch.device("meta"):
        adapted = add_lora(model, wanted.rank, wanted.rank, 0.0, wanted.targets, wanted.fused)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            parameter.grad = torch.empty_like(parameter)  # as in every pass of a step but the first
    if wanted.checkpointing:
        adapted.activation_checkpointing_enable({"use_reentrant": False})
        adapted.enable_input_require_grads()
    return adapted.train()


def _gradients_and_copies(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        yield from getattr(module, "copies", None) or ()
    for parameter in model.parameters():
        if parameter.grad is not None:
            yield parameter.grad
