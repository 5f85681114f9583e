"""Teacher answers: what is asked for, and transformers' own batched `generate` as the engine that answers.

The evaluation generates with it too; `engines.py` puts it beside vLLM and a server. Every token is drawn from a uniform
number that belongs to its (row, sample) alone, so that an answer does not depend on which rows shared its batch.
"""

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer

from src.distillation.base import end_of_turn_id, opened_thought, prompt_ids, prompt_text
from src.distillation.filters import candidates
from src.utils.common import UserError

ENGINE = "transformers"
SHRINK = 0.75  # a batch is cut down to its unfinished rows once at most this share of them is left
PADDED = 1.25  # prompts are read together up to this many positions a token
MAX_BATCH = 256  # rows at most where the size is derived: a batch that is cut off is generated again whole


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
    """One answer that is wanted, and how it is to be drawn."""

    id: str
    sample_index: int
    system: str
    prompt: str
    seed: int
    sampling: Sampling

    @property
    def messages(self) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.prompt}]


def make_requests(
    rows: Sequence[dict[str, Any]], num_samples: int, seed: int, sampling: Sampling, salt: str = ""
) -> list[Request]:
    """`num_samples` requests a dataset row, each with a seed of its own made from (seed, salt, row id, sample)."""
    requests = []
    for row in rows:
        for index in range(num_samples):
            requests.append(make_request(row, index, seed, sampling, salt))
    return requests


def make_request(row: dict[str, Any], index: int, seed: int, sampling: Sampling, salt: str = "") -> Request:
    """The request for answer `index` to a dataset row, see `make_requests`."""
    digest = hashlib.sha256(f"{seed}/{salt}/{row['id']}/{index}".encode()).digest()
    # hashed and not counted: a row's seed does not depend on which other rows are asked
    own = int.from_bytes(digest[:6], "big")  # 48 bits, exact in any JSON reader
    return Request(row["id"], index, row.get("system", ""), row["prompt"], own, sampling)


def answer_row(
    request: Request,
    engine: str,
    response: str,
    finish_reason: str,
    num_tokens: int | None,
    token_ids: Sequence[int] | None = None,
) -> dict[str, Any]:
    """The stored row, the same from every engine.

    `finish_reason` is `stop` (the model ended its turn), `length` (it was cut), `refused` (the server would not have
    it answered), or a server's own word; `num_tokens` counts the end-of-turn token, and is None where nobody counted.
    `token_ids` are those that were sampled, without the end of the turn; the row has them only where they were asked
    for and are known.
    """
    row = {
        "id": request.id,
        "sample_index": request.sample_index,
        "prompt": request.prompt,
        "response": response,
        "finish_reason": finish_reason,
        "num_tokens": num_tokens,
        "engine": engine,
        "sampling": asdict(request.sampling),
        "seed": request.seed,
    }
    return row if token_ids is None else row | {"token_ids": list(token_ids)}


def fitting_batch_size(
    config: PreTrainedConfig, weight_bytes: float, memory_bytes: float, longest: int, dtype: torch.dtype
) -> int:
    """Rows whose key-value caches, logits and widest activations fit beside the weights in 80 % of the memory.

    Args:
        memory_bytes: of all devices in full, not what is free just now: a run that goes on must get the same number.
        longest: tokens of the longest prompt and its answer.

    Raises:
        UserError: not even one row fits.
    """
    # 1. bytes a token: keys and values of every layer, and the widest activations
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * (config.num_hidden_layers + 1) * heads * head_dim * dtype.itemsize  # + 1: copied layer by layer
    widest = 4 * max(config.intermediate_size, config.hidden_size) * dtype.itemsize
    # 2. bytes a row, and how many rows that makes
    row = longest * (cache + widest) + 6 * config.vocab_size * 4  # logits and their filtered copies, fp32
    rows = int((0.8 * memory_bytes - weight_bytes) // row)
    if rows < 1:
        raise UserError(
            f"weights of {weight_bytes / 1e9:.1f} GB and one row of {longest} tokens do not fit into "
            f"{memory_bytes / 1e9:.1f} GB; name more devices, or lower max_new_tokens"
        )
    return min(rows, MAX_BATCH)


def end_token_ids(tokenizer: PreTrainedTokenizerBase, own: int | list[int] | None) -> list[int]:
    """What ends an answer: the template's end of turn and `own`, the end tokens in the model's generation settings."""
    # `own` as generation_config.json may have it: 2, [2, 151645] or nothing
    return sorted({end_of_turn_id(tokenizer), *(own if isinstance(own, list) else [] if own is None else [own])})


def sample_tokens(logits_BV: Tensor, uniform_B: Tensor, sampling: Sampling) -> Tensor:
    """One token a row by inverse transform sampling, `[B]`, out of its `candidates`."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    ids, _, probabilities = candidates(logits_BV.float(), sampling.temperature, sampling.top_k, sampling.top_p)
    # [B, K]: where each candidate's stretch of the line from 0 to the kept mass ends; K = V where nothing is filtered
    mass = probabilities.double().cumsum(-1)
    # times the whole mass, for what top-p leaves is not normalised again; right=True passes over stretches of length 0,
    # so that a uniform number of exactly 0 draws no token that is left out
    index = torch.searchsorted(mass, uniform_B[:, None].double() * mass[:, -1:], right=True)
    # the last candidate with a probability: 0.6 0.4 0 -> 1 2 2, whose first maximum is at 1
    last = (probabilities > 0).long().cumsum(-1).argmax(-1, keepdim=True)  # where rounding lands past the end
    index = torch.minimum(index, last)
    # a place among the candidates -> its token id
    return (index if ids is None else ids.gather(-1, index))[:, 0]


class _SeededSampler(LogitsProcessor):
    """Leaves one finite logit a row: the token drawn with that row's settings and its uniform number of this place."""

    def __init__(self, samplings: Sequence[Sampling], uniforms_BL: Tensor, prompt_length: int, model: str) -> None:
        self.uniforms_BL, self.prompt_length, self.model = uniforms_BL, prompt_length, model
        # one (settings, [B] mask) for each kind of settings in the batch, for `candidates` filters a whole batch alike
        self.groups: list[tuple[Sampling, Tensor]] = []
        for sampling in dict.fromkeys(samplings):  # each once, in a fixed order
            rows_B = torch.tensor([own == sampling for own in samplings], device=uniforms_BL.device)
            self.groups.append((sampling, rows_B))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # the maximum of a row is NaN where any of its logits is
        if not scores.amax(-1).isfinite().all():
            raise UserError(
                f"{self.model}: its logits are not numbers (NaN or infinite); its weights are broken, or overflow"
            )
        # [B]: column t is for the t-th token of the answers, counted from the start over all rounds of `generate`
        uniform = self.uniforms_BL[:, input_ids.shape[1] - self.prompt_length]
        token = torch.empty_like(input_ids[:, 0])
        for sampling, rows in self.groups:
            token[rows] = sample_tokens(scores[rows], uniform[rows], sampling)
        # `generate` decodes greedily: of one finite logit a row it takes that one
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0)


class _StopWhenFew(StoppingCriteria):
    """Ends a round once at most `few` rows have not ended their turn."""

    def __init__(self, end_ids: Tensor, prompt_length: int, few: int) -> None:
        self.end_ids, self.prompt_length, self.few = end_ids, prompt_length, few

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        # rows whose answer has no end token anywhere; behind one `generate` writes padding
        going = int((~torch.isin(input_ids[:, self.prompt_length :], self.end_ids).any(1)).sum())
        return torch.full((len(input_ids),), going <= self.few, device=input_ids.device)  # stops all rows, or none


def _read_prompts(model: PreTrainedModel, pad_id: int, prompts: list[list[int]]) -> DynamicCache:
    """The key-value cache of all but the last token of every prompt, rows padded on the left.

    A prompt that several rows have is read once, beside those of about its length: a sweep over temperatures has every
    prompt several times, and one long prompt is no reason to pad all others.
    """
    # 1. is there something to read here, and can it be padded afterwards?
    cache = DynamicCache(config=model.config)
    distinct = sorted(set(map(tuple, prompts)), key=lambda ids: (len(ids), ids))
    # a prompt of one token has nothing before its last
    if len(distinct[0]) < 2 or not all(type(layer) is DynamicLayer for layer in cache.layers):
        return cache  # a sliding window or a recurrent state cannot be padded afterwards; `generate` reads all rows
    # 2. prompts of about one length are read together
    groups: list[list[tuple[int, ...]]] = []
    for ids in distinct:
        own = groups[-1] if groups else []
        # sorted by length, so this one is the longest of its group: padded positions <= 1.25 x tokens
        if own and (len(own) + 1) * len(ids) <= PADDED * (sum(map(len, own)) + len(ids)):
            own.append(ids)
        else:
            groups.append([ids])
    # 3. each group is read; the last token of a prompt is left to `generate`, which wants one to answer from
    parts = []
    for group in groups:
        rows, mask = _left_padded([ids[:-1] for ids in group], pad_id, model.get_input_embeddings().weight.device)
        part = DynamicCache(config=model.config)
        # 0 0 1 1 1 -> 0 0 0 1 2: a prompt's first token is at 0 wherever it stands
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        model.get_decoder()(
            input_ids=rows, attention_mask=mask, position_ids=positions, past_key_values=part, use_cache=True
        )
        parts.append([(layer.keys, layer.values) for layer in part.layers])
    # 4. the groups become one cache: padded on the left to the longest prompt, then a copy for every row that asks
    place = {ids: index for index, ids in enumerate(distinct)}
    index_of_rows = torch.tensor([place[tuple(ids)] for ids in prompts])
    longest = len(distinct[-1]) - 1
    for index in range(len(cache.layers)):
        columns = zip(*(part.pop(0) for part in parts), strict=True)  # a layer at a time: never two whole caches
        # [rows, heads, positions, head_dim]: zeros before the first position; the rows' mask hides them
        keys, values = (
            torch.cat([pad(own, (0, 0, longest - own.shape[2], 0)) for own in column]) for column in columns
        )
        # [distinct prompts, ...] -> [B, ...]
        cache.update(keys[index_of_rows], values[index_of_rows], index)
    return cache


def _left_padded(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, `[B, longest]` each."""
    longest = max(map(len, prompts))
    rows = torch.tensor([[pad_id] * (longest - len(ids)) + list(ids) for ids in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    return rows, mask


@torch.inference_mode()
def _answer_batch(
    model: PreTrainedModel, pad_id: int, end_ids: Tensor, prompts: list[list[int]], requests: list[Request]
) -> list[list[int]]:
    """The answers' token ids, each up to its end of turn or `max_new_tokens`, which is the same for all.

    Rounds of `generate` on one key-value cache: between two of them the rows that have ended leave the batch, so that a
    few long answers do not make all rows pay.
    """
    # 1. the prompts, and every row's own stream of uniform numbers: drawn on the CPU, the same on every device
    device = model.get_input_embeddings().weight.device
    end_ids = end_ids.to(device)
    rows, mask = _left_padded(prompts, pad_id, device)
    length = rows.shape[1]
    limit = requests[0].sampling.max_new_tokens  # the same for all of the batch
    generators = [torch.Generator().manual_seed(request.seed) for request in requests]
    uniforms = torch.stack([torch.rand(limit, generator=generator) for generator in generators]).to(device)
    answers: list[list[int]] = [[] for _ in prompts]
    going = torch.arange(len(prompts), device=device)  # places in `answers` of the rows still in the batch
    # 2. the prompts' keys and values
    cache = _read_prompts(model, pad_id, prompts)
    # 3. rounds: all rows write until a quarter of them has ended
    while len(going):
        room = limit - (rows.shape[1] - length)
        few = int(SHRINK * len(going))  # 48 rows -> 36; a last row alone -> 0: until it ends
        rows = model.generate(
            input_ids=rows,
            attention_mask=mask,
            past_key_values=cache,
            # rows that have ended are filled up with pad_id until the round ends
            generation_config=GenerationConfig(
                do_sample=False, num_beams=1, max_new_tokens=room, pad_token_id=pad_id, eos_token_id=end_ids.tolist()
            ),
            logits_processor=LogitsProcessorList(
                [_SeededSampler([requests[i].sampling for i in going.tolist()], uniforms, length, model.name_or_path)]
            ),
            stopping_criteria=StoppingCriteriaList([_StopWhenFew(end_ids, length, few)]),
        )
        # 4. rows that have ended, or have no room left, leave with their answer
        ended = torch.isin(rows[:, length:], end_ids)
        over = ended.any(1) | (rows.shape[1] - length >= limit)
        for index in over.nonzero()[:, 0].tolist():
            ids, marks = rows[index, length:].tolist(), ended[index].tolist()
            # up to and with the first end token; behind it is padding
            answers[going[index]] = ids[: marks.index(True) + 1] if True in marks else ids
        # 5. the others go on: their tokens, their numbers, their part of the mask and of the cache
        left = (~over).nonzero()[:, 0]
        rows, uniforms, going = rows[left], uniforms[left], going[left]
        # one 1 for every token that was written in this round
        mask = torch.cat([mask[left], mask.new_ones(len(left), rows.shape[1] - mask.shape[1])], 1)
        cache.batch_select_indices(left.cpu())  # a layer may live on another device
    return answers


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    batch_size: int,
    done: Collection[Request] = frozenset(),
    enable_thinking: bool = False,
    keep_ids: bool = False,
) -> Iterator[list[dict[str, Any]]]:
    """Answer every request; yields the rows of one batch at a time, so that they can be stored together.

    Requests are put in order of prompt length and cut into batches: a function of the whole list. A batch of which a
    row is missing from `done` is generated again whole, and only the missing rows are yielded, so that an interrupted
    run ends with the text of an uninterrupted one.

    Args:
        requests: all of them, also those answered by an earlier run; alike in max_new_tokens, a batch may mix
            temperatures.
        batch_size: rows in one forward pass.
        done: those whose answer is stored.
        enable_thinking: asked of hybrid models by their template.
        keep_ids: the rows have the `token_ids` that were sampled.

    Yields:
        Rows as `answer_row` makes them.

    Raises:
        UserError: the model's logits are not numbers.
    """
    # 1. the requests as the model reads them, in order of length: rows of a batch are alike, little is padded
    ends = end_token_ids(tokenizer, model.generation_config.eos_token_id)
    end_ids = torch.tensor(ends)
    texts = [prompt_text(tokenizer, request.messages, enable_thinking) for request in requests]
    encoded = prompt_ids(tokenizer, texts)
    order = sorted(range(len(requests)), key=lambda i: (len(encoded[i]), requests[i].id, requests[i].sample_index))
    # `generate` fills what it is not told from the model's own settings (top_k, penalties): there are none meanwhile
    kept_config, model.generation_config = model.generation_config, GenerationConfig()
    try:
        # 2. batches of the whole list, whatever is done: logits differ in their last bits with the shape of a batch
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            missing = [requests[i] not in done for i in part]
            if not any(missing):  # all of it is stored
                continue
            prompts, asked = [encoded[i] for i in part], [requests[i] for i in part]
            answers = _answer_batch(model, tokenizer.pad_token_id, end_ids, prompts, asked)
            rows = []
            # 3. the rows that were missing
            for i, ids, wanted in zip(part, answers, missing, strict=True):
                if not wanted:
                    continue
                text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                # an answer has one token at least: max_new_tokens is 1 or more
                said, word = (ids[:-1], "stop") if ids[-1] in ends else (ids, "length")
                kept = said if keep_ids else None
                # a thought that the prompt opened ("<think>" is its last word) is stored as one that the answer opens
                rows.append(answer_row(requests[i], ENGINE, opened_thought(texts[i]) + text, word, len(ids), kept))
            yield rows
    finally:
        model.generation_config = kept_config
