import contextlib

import pytest
import torch
import torch.nn.attention.varlen
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from src.distillation import packing
from src.distillation.base import IGNORED, EncodedRow, collate, response_hidden
from src.distillation.packing import LEAST, MULTIPLE, attention_of_packs, check_packing, pack
from src.utils.common import UserError

SIZES = {
    "vocab_size": 261, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3,
}  # fmt: skip


def make_rows(lengths):
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randint(0, 250, (n,), generator=generator).tolist() for n in lengths]
    return [EncodedRow(str(i), tuple(ids[: len(ids) // 2]), tuple(ids[len(ids) // 2 :])) for i, ids in enumerate(draw)]


def test_a_pack_is_its_rows_end_to_end():
    rows = [EncodedRow("a", (1, 2), (3,)), EncodedRow("b", (4,), (5, 6))]
    batch = pack(rows, pad_id=9)
    assert batch["layout"].lengths == [3, 3, MULTIPLE - 6]
    assert batch["layout"].parents == [-1, -1, -1]
    assert batch["input_ids"][0].tolist() == [1, 2, 3, 4, 5, 6] + [9] * (MULTIPLE - 6)
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 0, 1, 2, *range(MULTIPLE - 6)]
    assert batch["labels"][0, :6].tolist() == [IGNORED, IGNORED, 3, IGNORED, 5, 6]
    assert (batch["labels"][0, 6:] == IGNORED).all()
    assert pack([rows[0]], 9, multiple=3)["layout"].lengths == [3]


def test_prompts_that_each_go_on_from_the_one_before():
    """Prompts of 1 to 119 tokens, each the beginning of the next."""
    found = packing.segments([EncodedRow(str(n), tuple(range(n)), (0,)) for n in range(1, 120)])
    shared = [segment for segment in found if segment.end < segment.row + 2]  # not to the end of its row
    assert [(start, end) for _, start, end, _ in shared] == [(n, n + LEAST) for n in range(0, 117 - LEAST, LEAST)]
    assert len(found) == 119 + len(shared)


START = tuple(range(100, 110))
FAMILY = [
    EncodedRow("a", (*START, 1, 2, 3, 4, 5, 6, 7, 8, 9), (50, 51)),
    EncodedRow("b", (9, 9, 9), (52,)),
    EncodedRow("c", (*START, 1, 2, 3, 4, 5, 6, 7, 8, 11, 12), (53, 54, 55)),
    EncodedRow("d", (*START, 2, 2), (56,)),
    EncodedRow("e", (*START, 1, 2, 3, 4, 5, 6, 7, 8, 9), (57, 58, 59)),
    EncodedRow("f", START, (60,)),
]


def test_what_rows_begin_alike_with_is_there_once():
    """A tree of beginnings: nine tokens for all but b (the last of f's prompt predicts its answer, so it stays f's),
    nine more for a, c and e; a's and e's last prompt token is their own."""
    found = packing.segments(FAMILY)
    assert [(row, start, end, parent) for row, start, end, parent in found] == [
        (0, 0, 9, -1), (0, 9, 18, 0), (0, 18, 21, 1), (1, 0, 4, -1), (2, 18, 23, 1), (3, 9, 13, 0), (4, 18, 22, 1),
        (5, 9, 11, 0),
    ]  # fmt: skip
    batch = pack(FAMILY, 0, multiple=1)
    layout = batch["layout"]
    assert layout.lengths == [9, 9, 3, 4, 5, 4, 4, 2]
    assert layout.parents == [-1, 0, 1, -1, 1, 0, 1, 0]
    assert layout.chains == [[0], [0, 1], [0, 1, 2], [3], [0, 1, 4], [0, 5], [0, 1, 6], [0, 7]]
    assert layout.longest == 9 + 9 + 5
    assert batch["position_ids"][0, 18:30].tolist() == [18, 19, 20, 0, 1, 2, 3, 18, 19, 20, 21, 22]
    labels = batch["labels"][0]
    assert labels[labels != IGNORED].tolist() == [token for row in FAMILY for token in row.response_ids]


def test_short_beginnings_are_not_worth_a_segment():
    rows = [EncodedRow(str(i), (*range(LEAST - 1), 90 + i, 5), (1,)) for i in range(3)]
    assert [segment.parent for segment in packing.segments(rows)] == [-1, -1, -1]
    rows = [EncodedRow(str(i), (*range(LEAST), 90 + i, 5), (1,)) for i in range(3)]
    assert [segment.parent for segment in packing.segments(rows)] == [-1, 0, 0, 0]
    assert packing.segments(rows[:1]) == [(0, 0, LEAST + 3, -1)]


@pytest.fixture(params=["qwen3", "qwen3_moe", "mistral"])
def model(request, make_model):
    """Grouped heads, experts, and a sliding window of 5 tokens."""
    if request.param == "mistral":
        torch.manual_seed(0)
        return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=5)).eval()
    return make_model(moe=request.param == "qwen3_moe")


def body(model):
    return model.get_decoder().named_parameters()


@pytest.mark.parametrize("short", [0, 512], ids=["fused kernel", "plain products"])
@pytest.mark.parametrize("rows", [make_rows([7, 23, 12, 40]), FAMILY], ids=["strangers", "family"])
def test_each_row_reads_itself_alone(model, short, rows, monkeypatch):
    """States and gradients as one row at a time gives them, in any company, also where rows share a beginning."""
    monkeypatch.setattr(packing, "SHORT", short)
    alone = torch.cat([response_hidden(model, collate([row], 0))[0] for row in rows])
    alone.pow(3).sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in body(model)}
    model.zero_grad()
    with attention_of_packs(model, True):
        packed, labels = response_hidden(model, pack(rows, 0))
    packed.pow(3).sum().backward()
    assert labels.tolist() == [token for row in rows for token in row.response_ids]
    torch.testing.assert_close(packed, alone, atol=1e-4, rtol=1e-4)
    for name, parameter in body(model):
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-2, rtol=1e-3)
    check_packing(model, rows, 0)


def bottom_right(query, key, value, query_ends, key_ends, longest_query, longest_key, *, scale, window_size,
                 enable_gqa):  # fmt: skip
    """`torch.nn.attention.varlen.varlen_attn` as it is documented, a row at a time: the last query sees every key."""
    parts, (back, _) = [], window_size
    assert (longest_query, longest_key) == (query_ends.diff().max(), key_ends.diff().max())
    spans = zip(query_ends[:-1], query_ends[1:], key_ends[:-1], key_ends[1:], strict=True)
    for q_start, q_end, k_start, k_end in (tuple(int(end) for end in span) for span in spans):
        q, k, v = query[q_start:q_end], key[k_start:k_end], value[k_start:k_end]
        k, v = (states.repeat_interleave(q.shape[1] // k.shape[1], 1) for states in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[2] ** -0.5 if scale is None else scale)
        distance = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
        hidden = (distance < 0) | ((distance > back) if back >= 0 else False)
        parts.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v))
    return torch.cat(parts)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("parents", [[-1, -1, -1, -1], [-1, 0, 0, -1], [-1, 0, 1, 0]])
def test_varlen_attention_is_told_where_everything_is(monkeypatch, parents, window):
    """Queries, keys and their gradients as one call a row gives them; on a GPU the kernel itself stands here."""
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", bottom_right)
    layout = packing.Layout([9, 4, 12, 7], parents)
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, 32, 8) for heads in (4, 2, 2)]
    states = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    weights = torch.randn(1, 32, 4, 8, generator=generator)
    found, wanted = (way(*states, layout, 0.3, window) for way in (packing._varlen, packing._row_by_row))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad((out * weights).sum(), states) for out in (found, wanted)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert (layout.on(states[0].device).keys is None) == (max(parents) < 0)
    assert layout.on(states[0].device) is layout.on(states[0].device), "made once for all layers"


def test_values_may_be_narrower_than_queries():
    """As in multi-head latent attention: no plain products, whose result would be as wide as a query."""
    layout = packing.Layout([5, 3], [-1, 0])
    query, key, value = (torch.randn(1, heads, 8, width) for heads, width in ((4, 6), (2, 6), (2, 4)))
    out, _ = packing.packed_attention(torch.nn.Identity(), query, key, value, None, layout=layout)
    assert out.shape == (1, 8, 4, 4)


def test_where_there_is_no_varlen_attention_a_call_a_row_does_it(monkeypatch, caplog):
    """It is tried once, and an answer that differs counts as none."""
    packing.varlen_works.cache_clear()
    with caplog.at_level("INFO"):
        assert not packing.varlen_works(torch.device("cpu"), torch.bfloat16, 16)
    assert "no varlen attention" in caplog.text
    packing.varlen_works.cache_clear()

    def top_left(query, key, value, *rest, **settings):
        return bottom_right(query, key, value, *rest, **settings | {"scale": 0.01})

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", top_left)
    with caplog.at_level("INFO"):
        assert not packing.varlen_works(torch.device("cpu"), torch.float32, 16)
    assert "varlen attention is off by" in caplog.text
    packing.varlen_works.cache_clear()

    def without_gradients(query, key, value, *rest, **settings):
        out = bottom_right(query, key, value, *rest, **settings)
        return out + 0 * (query - query.detach()).sqrt().sum()  # 0, whose gradient is 0 times infinity, NaN

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", without_gradients)
    assert not packing.varlen_works(torch.device("cpu"), torch.float32, 16)
    packing.varlen_works.cache_clear()
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", bottom_right)
    for inside in (contextlib.nullcontext, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)):
        packing.varlen_works.cache_clear()
        with inside():  # whoever asks first: a model that is trained, or one that is only read
            assert packing.varlen_works(torch.device("cpu"), torch.float32, 16)
    packing.varlen_works.cache_clear()

    def layer(states):
        assert packing.varlen_works(torch.device("cpu"), torch.float32, 16)
        return states.sin().exp()

    states = torch.randn(3, requires_grad=True)  # what the trial saves is none of the checkpoint's
    torch.utils.checkpoint.checkpoint(layer, states, use_reentrant=False).sum().backward()
    packing.varlen_works.cache_clear()


class Fetches(TorchDispatchMode):
    """Counts what would make a CPU wait for a GPU: values that Python asks for, sizes that depend on them."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "unique_consecutive", "_unique2"):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("short", [0, 512], ids=["fused kernel", "plain products"])
def test_layers_fetch_nothing_off_the_device(make_model, monkeypatch, short):
    """However many layers there are: what a batch needs is known before it is run."""
    monkeypatch.setattr(packing, "SHORT", short)
    counts = []
    for layers in (1, 4):
        model = make_model(layers=layers)
        batch = pack(FAMILY, 0)
        with attention_of_packs(model, True), Fetches() as seen:
            states, _ = response_hidden(model, batch)
            states.sum().backward()
        counts.append(len(seen.names))
    assert counts[0] == counts[1]


def test_the_attention_comes_back(make_model):
    model = make_model()
    before = model.config._attn_implementation
    with attention_of_packs(model, False):
        assert model.config._attn_implementation == before
    with attention_of_packs(model, True):
        assert model.config._attn_implementation != before
    assert model.config._attn_implementation == before


def test_models_that_mix_rows_elsewhere_are_refused():
    """A state-space layer runs on from one row into the next; Gemma 2 caps its scores, which no fused kernel does."""
    torch.manual_seed(0)
    hybrid = FalconH1ForCausalLM(
        FalconH1Config(**SIZES, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1)
    ).eval()
    with pytest.raises(UserError, match=r"not kept apart by this model .*--no_packing"):
        check_packing(hybrid, make_rows([9, 12]), 0)
    capped = Gemma2ForCausalLM(Gemma2Config(**SIZES, attn_implementation="eager")).eval()
    with pytest.raises(UserError, match=r"Gemma2ForCausalLM cannot read packed rows .*--no_packing"):
        check_packing(capped, make_rows([9, 12]), 0)
