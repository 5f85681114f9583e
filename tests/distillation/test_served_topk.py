"""A teacher behind a server gives the top k that its weights give here; whatever else it says is refused."""

import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from src.distillation import openai_engine, teacher_cache
from src.distillation.base import load_tokenizer
from src.distillation.batching import Pair, TrainingData, is_validation
from src.distillation.engines import ELSEWHERE
from src.distillation.heldout import EXACT
from src.distillation.kd import run_kd_pipeline
from src.distillation.openai_engine import Server
from src.distillation.served_teacher import check_served
from src.distillation.server import answers as is_up
from src.distillation.teacher_cache import CacheTeacherConfig, make_cache, open_cache
from src.utils.common import UserError, read_json, read_jsonl

pytest.importorskip("openai")
K, TOKENS, FRACTION = 8, 261, 0.2
NAME = "served-teacher"
KEY = "sk-very-secret-0123456789"
# With a vLLM of your own: KD_VLLM_PYTHON=folder/bin/python pytest -m vllm tests/distillation/test_served_topk.py
VLLM = os.environ.get("KD_VLLM_PYTHON", "")


@dataclass(frozen=True)
class Body:
    """What the server sends instead of an answer: JSON, or bytes as they are."""

    said: object
    status: int = 200
    headers: dict = field(default_factory=dict)


@cache
@torch.no_grad()
def following(model, ids):
    """`[len(ids), V]`: row i is what follows token i; the servers of all tests have the same model."""
    return model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)


class TeacherServer(ThreadingHTTPServer):
    """Speaks as vLLM (/v1/completions) and as SGLang (/generate), with the logits of a model.

    `fault(ids, number)` says what happens at the number-th question of one row: None, a `Body`, or a function that
    changes the answer. `late` shifts every distribution to the token after the one that it is of.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, model, fault=lambda ids, number: None, late=0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.fault, self.late = model, fault, late
        self.max_logprobs, self.bodies, self.keys, self.lock = 64, [], set(), threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, client_address):
        pass  # a client that has heard enough

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def log_p(self, ids):
        """`[len(ids), V]`: row i is the distribution in place of token i; the first has none."""
        return following(self.model, tuple(ids)).roll(1 + self.late, 0)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def reply(self, body):
        data = body.said if isinstance(body.said, bytes) else json.dumps(body.said).encode()
        self.send_response(body.status)
        for name, value in {"Content-Length": len(data), **body.headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        assert self.path == "/v1/models"
        self.reply(Body({"object": "list", "data": [{"id": NAME, "object": "model"}]}))

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        is_vllm = self.path == "/v1/completions"
        ids = body["prompt"] if is_vllm else body["input_ids"]
        with server.lock:
            server.bodies.append(body)
            server.keys.add(self.headers["Authorization"])
            number = sum(other == body for other in server.bodies)
            fault = server.fault(tuple(ids), number)
            if isinstance(fault, Body):
                return self.reply(fault)
            said = self.as_vllm(ids, body) if is_vllm else self.as_sglang(ids, body)
        return self.reply(said if fault is None else Body(fault(said.said)))

    def as_vllm(self, ids, body):
        k = body["prompt_logprobs"]
        if k > self.server.max_logprobs:
            words = f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.server.max_logprobs}"
            return Body({"error": {"message": words, "type": "BadRequestError", "code": 400}}, 400)
        entries = [None]
        for token, log_p in zip(ids[1:], self.server.log_p(ids)[1:], strict=True):
            kept = {token: log_p[token].item()} | dict(zip(*[x.tolist() for x in log_p.topk(k)[::-1]], strict=True))
            entries.append({str(i): {"logprob": p, "rank": 1, "decoded_token": "?"} for i, p in kept.items()})
        choice = {"index": 0, "text": "?", "finish_reason": "length", "prompt_logprobs": entries}
        return Body({"object": "text_completion", "model": body["model"], "choices": [choice]})

    def as_sglang(self, ids, body):
        start, log_p = body["logprob_start_len"], self.server.log_p(ids)
        own, top = [[None, ids[start], None]], [None]
        for place in range(start + 1, len(ids)):
            own.append([log_p[place, ids[place]].item(), ids[place], None])
            values, tokens = log_p[place].topk(body["top_logprobs_num"])
            top.append([[p, i, None] for p, i in zip(values.tolist(), tokens.tolist(), strict=True)])
        return Body({"text": "", "meta_info": {"input_token_logprobs": own, "input_top_logprobs": top}})


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, make_model, make_tokenizer, save_model):
    """A teacher with as many logits as tokens: a server's softmax has columns beyond them in it, ours has not."""
    return save_model(
        tmp_path_factory.mktemp("served") / "teacher", make_model(True, 1, TOKENS, 48, 3), make_tokenizer()
    )


@pytest.fixture(scope="module")
def model(teacher):
    return AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()


@pytest.fixture
def serve(monkeypatch, model):
    """`serve(fault, late)`: a running TeacherServer; waits between tries are short."""
    monkeypatch.setattr(openai_engine, "FIRST_WAIT", 0.001)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    servers = []

    def start(*arguments, **settings):
        servers.append(TeacherServer(model, *arguments, **settings))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def experiment(tmp_path, clean_rows, write_sft):
    return write_sft(tmp_path / "runs" / "tiny", clean_rows(20), clean_rows(4, start=100))


@pytest.fixture
def config(tmp_path, teacher, experiment):
    """`config(url, kind)`: settings of a served cache; the teacher's folder here holds a tokenizer alone."""
    folder = tmp_path / "tokenizer"
    load_tokenizer(teacher).save_pretrained(folder)

    def make(url, kind="vllm", **changes):
        plain = {
            "signal": "topk", "top_k": K, "temperatures": [1.0], "tokens_per_shard": 250, "engine": "openai",
            "base_url": url, "server": kind, "served_model_name": NAME, "validation_fraction": FRACTION, "tries": 3,
        }  # fmt: skip
        return CacheTeacherConfig(str(folder), str(experiment), **plain | changes)

    return make


def local_config(teacher, experiment, **changes):
    plain = {"signal": "topk", "top_k": K, "temperatures": [1.0], "bf16": False, "validation_fraction": FRACTION}
    return CacheTeacherConfig(teacher, str(experiment), **plain | changes)


@cache
def _tokenizer(name):
    return load_tokenizer(name)


def rows_of(config, split):
    path = Path(config.experiment_dir) / "sft" / f"sft_{split}_data_clean.jsonl"
    tokenizer = _tokenizer(config.teacher_model_name_or_path)
    return [teacher_cache.encode_row(tokenizer, row, 258) for row in read_jsonl(path)]


def training_rows(config):
    return [row for row in rows_of(config, "train") if not is_validation(row.id, FRACTION)]


def opened(config, temperature=1.0):
    """The cache of `config` as a run reads it that trains on its training rows."""
    folder = Path(config.experiment_dir) / "teacher_cache"
    train, held = ([Pair(row, row) for row in rows] for rows in (training_rows(config), rows_of(config, "eval")))
    data = TrainingData(train, [], held, read_json(folder / "index.json")["data"], 0)
    return open_cache(folder, "topk", temperature, data)


def expected(model, rows):
    """The log-probabilities at the response positions, `[N, V]`."""
    return torch.cat(
        [following(model, row.prompt_ids + row.response_ids)[len(row.prompt_ids) - 1 : -1] for row in rows]
    )


def distance(kept, log_p):
    """The largest difference between the kept log-probabilities and the true ones, of the same ids and of the top k."""
    of_ids = (log_p.gather(1, kept.ids_NK) - kept.log_p_NK.float()).abs().max()
    return max(of_ids, (log_p.topk(K)[0] - kept.log_p_NK.float()).abs().max()).item()


HALF = 2**-11  # the relative rounding of half precision; these log-probabilities are above -16


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_served_cache_holds_what_a_local_one_holds(serve, config, kind, model, teacher, tmp_path):
    server = serve()
    served = config(server.url, kind)
    index = make_cache(served)
    assert index["teacher"] == f"served by {kind}: {NAME}"
    assert not (Path(served.experiment_dir) / "teacher_cache" / "head.safetensors").exists()
    assert len(server.bodies) == len(index["rows"]) == 24
    assert server.keys == {f"Bearer {KEY}"}

    # rows to train on: as rounded as local ones
    reader, rows = opened(served), training_rows(served)[::-2]
    kept, log_p = reader.topk(rows), expected(model, rows)
    assert kept.log_p_NK.dtype == torch.float16
    assert log_p.topk(K)[0].min() > -16
    assert distance(kept, log_p) < 16 * HALF
    shutil.copytree(Path(served.experiment_dir) / "sft", tmp_path / "local" / "sft")
    local = local_config(teacher, tmp_path / "local")
    there = make_cache(local)
    theirs = opened(local).topk(rows)
    torch.testing.assert_close(kept.log_p_NK.float(), theirs.log_p_NK.float(), atol=1e-5, rtol=2 * HALF)
    torch.testing.assert_close(kept.log_sum_N, theirs.log_sum_N, atol=1e-5, rtol=0)
    assert index["share_outside_top_k"]["1.0"] == pytest.approx(there["share_outside_top_k"]["1.0"], abs=0.02)

    # rows that measure: in full precision, with the log-probability of what was said
    held = rows_of(served, "eval")
    stated, log_p = reader.stated(held), expected(model, held)
    assert distance(stated.top, log_p) < 1e-4
    said = torch.tensor([token for row in held for token in row.response_ids])
    torch.testing.assert_close(stated.label_log_p_N, log_p.gather(1, said[:, None])[:, 0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_distribution_of_the_token_before_would_be_seen(serve, config, kind, model):
    """The test above can fail: a server that is late by one token, though it contradicts itself nowhere."""
    shifted = config(serve(late=1).url, kind)
    make_cache(shifted)
    rows = training_rows(shifted)
    assert distance(opened(shifted).topk(rows), expected(model, rows)) > 1


def test_nothing_is_tokenised_again_and_nothing_but_t_1_is_asked_for(serve, config):
    server = serve()
    served = config(server.url)
    make_cache(served)
    rows = {row.prompt_ids + row.response_ids for split in ("train", "eval") for row in rows_of(served, split)}
    assert {tuple(body["prompt"]) for body in server.bodies} == rows
    fixed = {"model": NAME, "prompt_logprobs": K, "temperature": 1.0, "top_p": 1.0, "add_special_tokens": False}
    assert all(fixed.items() <= body.items() for body in server.bodies)


def test_training_and_measuring_from_a_server(serve, config, teacher, tiny_student, experiment, tmp_path):
    """The same losses as from a local cache; what is measured is exact, or a bound that says so."""
    settings = {
        "model_name_or_path": tiny_student, "learning_rate": 1e-2, "warmup_steps": 0, "batch_size": 4,
        "gradient_accumulation_steps": 2, "max_steps": 2, "max_length": 256, "lora_r": 4, "bf16": False,
        "temperature": 1.0, "teacher_signal": "topk", "compile_loss": False, "validation_fraction": FRACTION,
    }  # fmt: skip
    local_experiment = tmp_path / "local" / "tiny"
    shutil.copytree(experiment / "sft", local_experiment / "sft")
    make_cache(local_config(teacher, local_experiment))
    served = config(serve().url)
    make_cache(served)
    of_local = {"teacher_model_name_or_path": teacher, "experiment_dir": str(local_experiment)}
    of_served = {"teacher_model_name_or_path": served.teacher_model_name_or_path, "experiment_dir": str(experiment)}
    ours, theirs = run_kd_pipeline(settings | of_served), run_kd_pipeline(settings | of_local)
    for mine, yours in zip(
        *(read_jsonl(Path(run["run_dir"]) / "metrics.jsonl") for run in (ours, theirs)), strict=True
    ):
        for name in {"loss", "kd_loss", "ce_loss", "validation_nll"} & mine.keys():
            assert mine[name] == pytest.approx(yours[name], rel=1e-3), name

    assert (ours["kl_is"], theirs["kl_is"]) == (f"lower bound over the top {K} and the rest", EXACT)
    assert theirs["expected_acceptance_is"] == EXACT != ours["expected_acceptance_is"]
    rows = read_jsonl(Path(ours["run_dir"]) / "heldout.jsonl")
    assert {row["kl_is"] for row in rows} == {ours["kl_is"]}
    for arm in ("before", "after"):
        for name in ("nll", "top1_agreement"):
            assert ours[arm][name] == pytest.approx(theirs[arm][name], rel=1e-3)
        for name in ("kl_to_teacher", "expected_acceptance"):
            assert 0 < ours[arm][name] < theirs[arm][name]
    assert ours["teacher"]["nll"] == pytest.approx(theirs["teacher"]["nll"], rel=1e-5)

    # the teacher's softmax is at T = 1 also where the student's alone is softened; at no other
    soft = settings | of_served | {"temperature": 2.5, "max_steps": 1}
    with pytest.raises(
        UserError, match=r"keeps the top k for T = 1, not 2\.5; train with --temperature 1 or --teacher_t"
    ):
        run_kd_pipeline(soft)
    assert run_kd_pipeline(soft | {"teacher_temperature": 1.0})["steps"] == 1
    with pytest.raises(UserError, match="is of the teacher"):
        run_kd_pipeline(settings | of_served | {"teacher_model_name_or_path": teacher})


def test_a_killed_run_goes_on_with_the_first_missing_file(serve, config):
    """The row at which the server fails is asked for in vain; what was written before is not asked for again."""
    broken = serve(lambda ids, number: Body({"error": "down"}, 500) if len(broken.bodies) > 12 else None)
    served = config(broken.url, tries=2, concurrency=1)
    with pytest.raises(UserError, match=rf"^{broken.url}: no answer to row sum-\d+ in 2 tries, the last: .*500.*kept$"):
        make_cache(served)
    folder = Path(served.experiment_dir) / "teacher_cache"
    written = {path.name: path.read_bytes() for path in folder.glob("shard_*")}
    assert written
    whole = serve()
    again = config(whole.url)
    index = make_cache(again)
    kept = [key for key, place in index["rows"].items() if place[0] in written]
    assert len(whole.bodies) == len(index["rows"]) - len(kept) < 24
    assert {name: (folder / name).read_bytes() for name in written} == written
    assert make_cache(again) == index
    again.overwrite = True
    assert make_cache(again)["shards"] == index["shards"]


GONE = (
    Body({"error": {"message": "slow down"}}, 429, {"Retry-After": "0.001"}),
    Body({"error": "broken"}, 500),
    Body({"error": {"message": "the engine is overloaded", "type": "overloaded_error"}}),
    Body(b'{"choices": [{"prompt_log'),
    Body(b"<html>bad gateway</html>", 502),
)


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_faults_that_pass_are_waited_for(serve, config, kind):
    server = serve(lambda ids, number: GONE[number - 1] if ids[-5] % 3 == 0 and number <= len(GONE) else None)
    served = config(server.url, kind, tries=len(GONE) + 1, concurrency=4)
    found = make_cache(served)
    assert len(server.bodies) > len(found["rows"])
    served = config(serve().url, kind, overwrite=True)
    assert make_cache(served)["shards"] == found["shards"]


def entries(said):
    return said["choices"][0]["prompt_logprobs"]


def vllm_changed(change):
    """The answer with its last position changed in place."""

    def made(said):
        change(entries(said))
        return said

    return made


def sglang_changed(change):
    def made(said):
        change(said["meta_info"]["input_token_logprobs"], said["meta_info"]["input_top_logprobs"])
        return said

    return made


def put(entry, **tokens):
    """`p7=0.1` sets the log-probability of token 7."""
    entry |= {name[1:]: {"logprob": value} for name, value in tokens.items()}


def likeliest(entry):
    return max(entry, key=lambda token: entry[token]["logprob"])


def rename(entry, token):
    entry[token] = entry.pop(next(name for name in entry if name != "258"))  # 258 ends every answer


VLLM_FAULTS = [
    (vllm_changed(lambda e: e.pop()), "positions for .* tokens"),
    (vllm_changed(lambda e: e.insert(0, None)), "positions for .* tokens"),
    (vllm_changed(lambda e: e.append(e.pop(1))), r"response position \d+ does not have token \d+, which was sent"),
    (vllm_changed(lambda e: e.__setitem__(-1, None)), "does not have token 258, which was sent"),
    (vllm_changed(lambda e: e[-1].pop("258")), "does not have token 258, which was sent"),
    (lambda said: {"choices": [{"prompt_logprobs": None}]}, "choices.0.prompt_logprobs: Input should be a valid list"),
    (lambda said: {"choices": []}, "choices: List should have at least 1 item"),
    (lambda said: ["no"], "Input should be a valid dictionary"),
    (
        vllm_changed(lambda e: e.__setitem__(-1, {"258": e[-1]["258"]})),
        "has 1 tokens, asked for were top_k",
    ),
    (vllm_changed(lambda e: rename(e[-1], "261")), "a token id beyond the 261 of the tokenizer"),
    (vllm_changed(lambda e: rename(e[-1], "-1")), "a token id beyond the 261 of the tokenizer"),
    (vllm_changed(lambda e: rename(e[-1], "x")), "Input should be a valid integer"),
    (vllm_changed(lambda e: put(e[-1], p258=0.5)), "a log-probability above 0"),
    (vllm_changed(lambda e: put(e[-1], p258=float("nan"))), "a log-probability that is no number"),
    (vllm_changed(lambda e: put(e[-1], p258=None)), "Input should be a valid number"),
    (vllm_changed(lambda e: put(e[-1], **{f"p{t}": -0.5 for t in e[-1]})), "probabilities that add up to more than 1"),
]
SGLANG_FAULTS = [
    (sglang_changed(lambda own, top: own.pop()), "positions for .* tokens"),
    (sglang_changed(lambda own, top: top.pop()), "positions for .* tokens"),
    (sglang_changed(lambda own, top: own.append(own.pop(1))), r"response position \d+ has token \d+, sent was \d+"),
    (sglang_changed(lambda own, top: own[-1].__setitem__(0, None)), "has no log-probability"),
    (sglang_changed(lambda own, top: top[-1].pop()), f"has {K - 1} tokens, asked for were top_k = {K}"),
    (sglang_changed(lambda own, top: top[-1].__setitem__(0, top[-1][1])), f"has {K - 1} tokens"),
    (sglang_changed(lambda own, top: top.__setitem__(-1, None)), "has 0 tokens"),
    (
        sglang_changed(lambda own, top: own[-1].__setitem__(0, -0.01)),
        "two log-prob|belongs to the top k, which lacks it",
    ),
    (sglang_changed(lambda own, top: top.append(top.pop(1))), "two log-prob|belongs to the top k, which lacks it"),
    (lambda said: {"text": "hello"}, "meta_info: Field required"),
    (
        lambda said: said | {"meta_info": {"input_token_logprobs": None}},
        "input_token_logprobs: Input should be a valid",
    ),
]


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [("vllm", *case) for case in VLLM_FAULTS] + [("sglang", *case) for case in SGLANG_FAULTS],
)
def test_an_answer_to_something_else_is_refused(serve, config, kind, change, words):
    server = serve(lambda ids, number: change)
    served = config(server.url, kind)
    with pytest.raises(UserError, match=words) as told:
        make_cache(served)
    assert re.match(rf"{server.url}: row sum-\d{{5}}: ", str(told.value))
    assert "\n" not in str(told.value)
    assert f"see that it serves {NAME} and is a {kind} server" in str(told.value)
    assert not list((Path(served.experiment_dir) / "teacher_cache").glob("shard_*"))


VLLM_TOO_LONG = "This model's maximum context length is 40 tokens. However, you requested 52 tokens. Please reduce it."
SGLANG_TOO_LONG = "The input (51 tokens) is longer than the model's context length (40 tokens)."


@pytest.mark.parametrize(
    ("kind", "body", "words"),
    [
        ("vllm", Body({"error": {"message": VLLM_TOO_LONG}}, 400), r"it has \d+ tokens: .*--max-model-len \d+ or more"),
        ("vllm", Body({"error": {"message": VLLM_TOO_LONG}}), r"it has \d+ tokens: .*--max_length"),
        ("sglang", Body({"error": {"message": SGLANG_TOO_LONG}}, 400), r"it has \d+ tokens: .*--context-length \d+ or"),
        ("vllm", Body({"error": {"message": "no such field"}}, 422), "no such field; see what the server wants"),
        (
            "vllm",
            Body({"error": {"message": f"wrong {KEY}"}}, 401),
            r"refuses the key in OPENAI_API_KEY: .*wrong \*\*\*",
        ),
        ("vllm", Body({"error": {"message": "no model x"}}, 404), "served_model_name to a model it has"),
    ],
)
def test_a_refusal_ends_the_run_with_one_line(serve, config, kind, body, words):
    server = serve(lambda ids, number: body)
    with pytest.raises(UserError, match=words) as told:
        make_cache(config(server.url, kind, concurrency=1))
    assert str(told.value).startswith(server.url)
    assert "\n" not in str(told.value)
    assert KEY not in str(told.value)
    assert len(server.bodies) == 1, "it was asked again"
    if body.status != 401:  # that is no row's fault
        assert re.search(r"refuses row sum-\d{5}: ", str(told.value))


def test_a_server_that_gives_fewer_log_probabilities_is_named_its_flag(serve, config):
    server = serve()
    server.max_logprobs = 5
    words = (
        rf"refuses row sum-\d+: .*greater than max allowed: 5; start the server with --max-logprobs {K}, or lower --to"
    )
    with pytest.raises(UserError, match=words):
        make_cache(config(server.url))


def test_a_server_with_another_model_is_refused_before_anything_is_asked(serve, config):
    server = serve()
    with pytest.raises(UserError, match=f"serves {NAME}, not other; set served_model_name"):
        make_cache(config(server.url, "sglang", served_model_name="other"))
    assert not server.bodies
    with pytest.raises(UserError, match=r"does not list its models \(.*\); see that the server runs there"):
        check_served(Server("http://127.0.0.1:9/v1", NAME))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"signal": "hidden"}, "gives no hidden states; pass --signal topk, or --engine transformers"),
        (
            {"temperatures": [1.0, 2.5]},
            r"T = 1 alone: pass --temperatures 1 and train with temperature \(or teacher_te",
        ),
        ({"kind": "llama_cpp"}, "llama_cpp gives no log-probabilities of a prompt; vllm and sglang do"),
        ({"tries": 0}, "tries must be at least 1"),
        ({"serve": '{"command": "vllm", "modle": "x"}'}, "serve: unknown key 'modle'; did you mean model?"),
    ],
)
def test_what_a_server_cannot_give_is_refused(config, changes, words):
    with pytest.raises(UserError, match=words):
        config("http://127.0.0.1:9/v1", **changes)


def test_a_top_k_of_the_whole_vocabulary_leaves_no_rest(config):
    with pytest.raises(UserError, match="top_k = 261 leaves nothing of 261 tokens"):
        make_cache(config("http://127.0.0.1:9/v1", top_k=TOKENS))


@pytest.mark.parametrize(
    ("serve", "flag", "kind"),
    [
        ({"command": "vllm"}, f"--max-logprobs {K}", "vllm"),
        ({"command": "vllm", "arguments": {"max-logprobs": 100}}, "--max-logprobs 100", "vllm"),
        ({"command": "sglang"}, None, "sglang"),
        ({"command": "vllm serve {teacher} --port 8123", "port": 8123}, None, "vllm"),
        (None, None, "vllm"),
    ],
)
def test_a_server_that_is_started_here_is_told_k(config, monkeypatch, tmp_path, serve, flag, kind):
    seen = []

    @contextmanager
    def started(planned, log):
        seen.append((planned, log))
        yield

    monkeypatch.setattr(teacher_cache, "started", started)
    own = config(ELSEWHERE, serve=json.dumps(serve) if serve else "")
    with teacher_cache._running(own, tmp_path) as server:
        assert (server.model, server.kind) == (NAME, kind)
    [(planned, log)] = seen
    assert log == tmp_path / "server.log"
    if serve is None:
        assert planned is None
        assert server.base_url == ELSEWHERE
        return
    line = " ".join(planned.words)
    assert flag in line if flag else "--max-logprobs" not in line
    assert server.base_url == planned.base_url


def test_a_profiles_server_is_asked_only_if_the_cache_is_to_be_served(config):
    assert config("http://127.0.0.1:9/v1", engine="transformers", serve='{"command": "vllm"}').started_server is None


def test_a_server_that_runs_is_not_passed_over_for_one_that_is_started(config):
    with pytest.raises(UserError, match=r"base_url http://127.0.0.1:9/v1 names another; keep one: --serve ''"):
        config("http://127.0.0.1:9/v1", serve='{"command": "vllm"}')


def test_what_stands_in_for_the_teacher_is_what_was_cached(config):
    serve = {"command": "vllm", "model": "owner/teacher-FP8"}
    own = config(ELSEWHERE, served_model_name="", serve=json.dumps(serve))
    assert teacher_cache._served_name(own) == "owner/teacher-FP8"


def test_where_a_server_is_tells_no_cache_from_another(serve, config, teacher, tmp_path, experiment):
    """A finished one is taken from anywhere; a local one knows no server; another name is another teacher."""
    make_cache(config(serve().url))
    assert make_cache(config("http://127.0.0.1:9/v1", concurrency=1))["top_k"] == K
    with pytest.raises(
        UserError, match=r"made with teacher = 'served by vllm: served-teacher', this run has '.*: other'"
    ):
        make_cache(config("http://127.0.0.1:9/v1", served_model_name="other"))
    shutil.copytree(experiment / "sft", tmp_path / "local" / "sft")
    make_cache(local_config(teacher, tmp_path / "local"))
    fingerprint = read_json(tmp_path / "local" / "teacher_cache" / "stage.json")["fingerprint"]
    assert not fingerprint.keys() & {"engine", "base_url", "server", "served_model_name", "concurrency"}


@pytest.mark.vllm
@pytest.mark.skipif(not VLLM, reason="KD_VLLM_PYTHON does not name a Python with vLLM")
def test_a_vllm_server_gives_the_local_top_k(config, teacher, tmp_path, model):
    """vLLM itself: its prompt log-probabilities are those of transformers, of the same tokens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/v1"
    command = [VLLM, "-m", "vllm.entrypoints.openai.api_server", "--model", teacher, "--served-model-name", NAME,
               "--port", str(port), "--host", "127.0.0.1", "--max-model-len", "512", "--dtype", "float32",
               "--gpu-memory-utilization", "0.3", "--max-logprobs", str(K)]  # fmt: skip
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(600):
            if is_up(url):
                break
            assert process.poll() is None, (tmp_path / "server.log").read_text()[-3000:]
            time.sleep(0.5)
        served = config(url)
        make_cache(served)
    finally:
        process.terminate()
        process.wait(60)
    rows = training_rows(served)
    assert distance(opened(served).topk(rows), expected(model, rows)) < 0.02
