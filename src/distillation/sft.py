"""Teacher answers: requests in, answer rows out. The same call generates for the evaluation.

The engine is transformers' own batched `generate`. Every token is drawn from a uniform number that belongs to its
(row, sample) alone, so that an answer does not depend on which rows shared its batch.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from src.distillation.base import end_of_turn_id, prompt_text
from src.utils.common import UserError

ENGINE = "transformers"
SHRINK = 0.75  # a batch is cut down to its unfinished rows once at most this share of them is left


@dataclass(frozen=True)
class Sampling:
    """Every field that shapes an answer, always stated in full: a model's own generation_config is never consulted.

    `temperature` 0 is greedy; `top_p` 1 and `top_k` 0 switch those filters off; `max_new_tokens` counts the end token.
    """

    temperature: float = 0.7
    top_p: float = 0.8
    top_k: int = 20
    max_new_tokens: int = 768

    def __post_init__(self) -> None:
        if not self.temperature >= 0 or self.temperature == float("inf"):
            raise UserError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.top_k < 0:
            raise UserError(f"top_k must be 0 (off) or more, got {self.top_k}")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")


@dataclass(frozen=True)
class Request:
    """One answer that is wanted."""

    id: str
    sample_index: int
    system: str
    prompt: str
    seed: int

    @property
    def messages(self) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.prompt}]


def make_requests(rows: Sequence[dict[str, Any]], num_samples: int, seed: int, salt: str = "") -> list[Request]:
    """`num_samples` requests a dataset row, each with a seed of its own made from (seed, salt, row id, sample)."""
    requests = []
    for row in rows:
        for index in range(num_samples):
            digest = hashlib.sha256(f"{seed}/{salt}/{row['id']}/{index}".encode()).digest()
            own = int.from_bytes(digest[:6], "big")  # 48 bits, exact in any JSON reader
            requests.append(Request(row["id"], index, row.get("system", ""), row["prompt"], own))
    return requests


def sample_tokens(logits_BV: Tensor, uniform_B: Tensor, sampling: Sampling) -> Tensor:
    """One token a row by inverse transform sampling, `[B]`: temperature, then top_k, then top_p, as vLLM orders them.

    With top_k set, everything after it costs k candidates and not the vocabulary.
    """
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    scores = logits_BV.float() / sampling.temperature
    if sampling.top_k:
        scores, ids = scores.topk(min(sampling.top_k, scores.shape[-1]), dim=-1)
    elif sampling.top_p < 1:
        scores, ids = scores.sort(dim=-1, descending=True)
    else:
        ids = None
    probabilities = scores.softmax(-1)
    if sampling.top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= sampling.top_p, 0)
    mass = probabilities.double().cumsum(-1)
    index = torch.searchsorted(mass, uniform_B[:, None].double() * mass[:, -1:], right=True)
    last = (probabilities > 0).long().cumsum(-1).argmax(-1, keepdim=True)  # where rounding lands past the end
    index = torch.minimum(index, last)
    return (index if ids is None else ids.gather(-1, index))[:, 0]


class _SeededSampler(LogitsProcessor):
    """Leaves one finite logit a row: the token drawn with that row's own uniform number for this position."""

    def __init__(self, sampling: Sampling, uniforms_BL: Tensor, prompt_length: int) -> None:
        self.sampling, self.uniforms_BL, self.prompt_length = sampling, uniforms_BL, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform = self.uniforms_BL[:, input_ids.shape[1] - self.prompt_length]
        token = sample_tokens(scores, uniform, self.sampling)
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0)


class _StopWhenFew(StoppingCriteria):
    """Ends a round once at most `few` rows have not ended their turn."""

    def __init__(self, end_ids: Tensor, prompt_length: int, few: int) -> None:
        self.end_ids, self.prompt_length, self.few = end_ids, prompt_length, few

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        going = int((~torch.isin(input_ids[:, self.prompt_length :], self.end_ids).any(1)).sum())
        return torch.full((len(input_ids),), going <= self.few, device=input_ids.device)


@torch.inference_mode()
def _answer_batch(
    model: PreTrainedModel, pad_id: int, end_ids: Tensor, prompts: list[list[int]], seeds: list[int], sampling: Sampling
) -> list[list[int]]:
    """The answers' token ids, each up to its end of turn or `max_new_tokens`.

    Rounds of `generate` on one key-value cache: between two of them the rows that have ended leave the batch, so that a
    few long answers do not make all rows pay.
    """
    device = model.get_input_embeddings().weight.device
    end_ids = end_ids.to(device)
    length = max(map(len, prompts))
    rows = torch.full((len(prompts), length), pad_id, device=device)
    mask = torch.zeros_like(rows)
    for index, ids in enumerate(prompts):
        rows[index, length - len(ids) :] = torch.tensor(ids, device=device)
        mask[index, length - len(ids) :] = 1
    limit = sampling.max_new_tokens
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    uniforms = torch.stack([torch.rand(limit, generator=generator) for generator in generators]).to(device)
    answers: list[list[int]] = [[] for _ in prompts]
    going = torch.arange(len(prompts), device=device)
    cache = DynamicCache(config=model.config)
    while len(going):
        room = limit - (rows.shape[1] - length)
        few = int(SHRINK * len(going))
        rows = model.generate(
            input_ids=rows,
            attention_mask=mask,
            past_key_values=cache,
            generation_config=GenerationConfig(
                do_sample=False, num_beams=1, max_new_tokens=room, pad_token_id=pad_id, eos_token_id=end_ids.tolist()
            ),
            logits_processor=LogitsProcessorList([_SeededSampler(sampling, uniforms, length)]),
            stopping_criteria=StoppingCriteriaList([_StopWhenFew(end_ids, length, few)]),
        )
        ended = torch.isin(rows[:, length:], end_ids)
        over = ended.any(1) | (rows.shape[1] - length >= limit)
        for index in over.nonzero()[:, 0].tolist():
            ids, marks = rows[index, length:].tolist(), ended[index].tolist()
            answers[going[index]] = ids[: marks.index(True) + 1] if True in marks else ids
        left = (~over).nonzero()[:, 0]
        rows, uniforms, going = rows[left], uniforms[left], going[left]
        mask = torch.cat([mask[left], mask.new_ones(len(left), rows.shape[1] - mask.shape[1])], 1)
        cache.batch_select_indices(left.cpu())  # a layer may live on another device
    return answers


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    sampling: Sampling,
    batch_size: int,
    done: frozenset[tuple[str, int]] = frozenset(),
) -> Iterator[list[dict[str, Any]]]:
    """Answer every request; yields the rows of one batch at a time, so that they can be stored together.

    Requests are put in order of prompt length and cut into batches: a function of the whole list. A batch of which a
    row is missing from `done` is generated again whole, and only the missing rows are yielded, so that an interrupted
    run ends with the text of an uninterrupted one.

    Args:
        requests: all of them, also those answered by an earlier run.
        batch_size: rows in one forward pass.
        done: (id, sample_index) already stored.

    Yields:
        Rows `id, sample_index, prompt, response, finish_reason, num_tokens, engine, sampling, seed`; `finish_reason` is
        `stop` (the model ended its turn) or `length`; `num_tokens` counts the end-of-turn token.
    """
    end_id = end_of_turn_id(tokenizer)
    own = model.generation_config.eos_token_id
    ends = {end_id, *(own if isinstance(own, list) else [own] if own is not None else [])}
    end_ids = torch.tensor(sorted(ends))
    texts = [prompt_text(tokenizer, request.messages) for request in requests]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    order = sorted(range(len(requests)), key=lambda i: (len(encoded[i]), requests[i].id, requests[i].sample_index))
    kept_config, model.generation_config = model.generation_config, GenerationConfig()
    try:
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            missing = [(requests[i].id, requests[i].sample_index) not in done for i in part]
            if not any(missing):
                continue
            prompts, seeds = [encoded[i] for i in part], [requests[i].seed for i in part]
            answers = _answer_batch(model, tokenizer.pad_token_id, end_ids, prompts, seeds, sampling)
            yield [
                {
                    "id": requests[i].id,
                    "sample_index": requests[i].sample_index,
                    "prompt": requests[i].prompt,
                    "response": tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
                    "finish_reason": "stop" if ids[-1] in ends else "length",
                    "num_tokens": len(ids),
                    "engine": ENGINE,
                    "sampling": asdict(sampling),
                    "seed": requests[i].seed,
                }
                for i, ids, wanted in zip(part, answers, missing, strict=True)
                if wanted
            ]
    finally:
        model.generation_config = kept_config
