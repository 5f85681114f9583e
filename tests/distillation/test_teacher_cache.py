"""The cache gives what the teacher gives, goes on where it was killed, and is refused where it is of something else."""

import json
import re
from pathlib import Path

import pytest
import torch

from src.distillation import teacher_cache
from src.distillation.base import collate, encode_row, head_weight, load_model, load_tokenizer, response_hidden
from src.distillation.batching import Pair, TrainingData
from src.distillation.teacher_cache import CacheTeacherConfig, cached_tokenizer, make_cache, open_cache
from src.utils.common import UserError, read_json, read_jsonl

VOCABULARY = 261


@pytest.fixture
def config(tmp_path, tiny_teacher, clean_rows, write_sft):
    experiment = write_sft(tmp_path / "tiny", clean_rows(30), clean_rows(6, start=100))

    def make(**changes):
        plain = {
            "tokens_per_batch": 200,
            "tokens_per_shard": 150,
            "top_k": 8,
            "temperatures": [1.0, 2.5],
            "bf16": False,
        }
        return CacheTeacherConfig(tiny_teacher, str(experiment), **plain | changes)

    return make


def rows_of(config, split):
    tokenizer = load_tokenizer(config.teacher_model_name_or_path)
    path = Path(config.experiment_dir) / "sft" / f"sft_{split}_data_clean.jsonl"
    return [encode_row(tokenizer, row, 258) for row in read_jsonl(path)]


def training_data(train, heldout, hashes):
    pairs = [[Pair(row, row) for row in rows] for rows in (train, heldout)]
    return TrainingData(pairs[0], [], pairs[1], hashes, 0)


def opened(config, train=None, signal=None, temperature=2.5, **hashes):
    folder = Path(config.experiment_dir) / "teacher_cache"
    hashes = read_json(folder / "index.json")["data"] | hashes
    train = rows_of(config, "train") if train is None else train
    return open_cache(
        folder, signal or config.signal, temperature, training_data(train, rows_of(config, "eval"), hashes)
    )


def expected_logits(config, rows):
    teacher = load_model(config.teacher_model_name_or_path, torch.float32)
    with torch.no_grad():
        hidden = torch.cat([response_hidden(teacher, collate([row], 256))[0] for row in rows])
        return hidden, hidden @ head_weight(teacher, VOCABULARY).T


@pytest.mark.parametrize("packing", [True, False])
def test_hidden_states_are_the_teachers(config, packing):
    """Of any rows in any order."""
    config = config(packing=packing)
    index = make_cache(config)
    signal = opened(config)
    rows = rows_of(config, "train")[::-3] + rows_of(config, "eval")[:2]
    hidden, logits = expected_logits(config, rows)
    torch.testing.assert_close(signal.hidden(rows), hidden, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(signal.hidden(rows) @ signal.head().T, logits, atol=1e-3, rtol=1e-4)
    assert 48 * 4 <= index["bytes_per_token"] < 48 * 4 + 20


def test_bf16_states_take_half_the_space(config):
    index = make_cache(config(bf16=True))
    assert 48 * 2 <= index["bytes_per_token"] < 48 * 2 + 20
    assert opened(config(bf16=True)).hidden(rows_of(config(), "eval")).dtype == torch.bfloat16


def test_top_k_and_the_share_outside_it(config):
    """Training rows keep their top k, rows that measure their hidden states."""
    config = config(signal="topk", temperatures=[1.0, 2.5, 4.0])
    index = make_cache(config)
    train = [row for row in rows_of(config, "train") if not teacher_cache.is_validation(row.id, 0.05)]
    signal, rows = opened(config, train), train[:5]
    _, logits = expected_logits(config, rows)
    kept = signal.topk(rows)
    log_p = torch.log_softmax(logits, -1)
    torch.testing.assert_close(kept.log_p_NK.float(), log_p.topk(8)[0], atol=0.01, rtol=0.001)
    torch.testing.assert_close(kept.log_sum_N, (log_p / 2.5).logsumexp(-1), atol=0.01, rtol=0.001)
    assert (log_p.gather(1, kept.ids_NK) >= log_p.topk(8)[0][:, -1:] - 1e-4).all()
    shares = [index["share_outside_top_k"][t] for t in ("1.0", "2.5", "4.0")]
    assert 0 < shares[0] < shares[1] < shares[2] < 1
    whole = rows_of(config, "train") + rows_of(config, "eval")
    soft = torch.softmax(expected_logits(config, whole)[1] / 2.5, -1)
    exact = 1 - soft.topk(8)[0].sum(-1).mean().item()
    assert shares[1] == pytest.approx(exact, abs=0.05)
    assert signal.hidden(rows_of(config, "eval")).shape[1] == 48
    with pytest.raises(UserError, match=r"top k for T = 1, 2\.5, 4, not 3"):
        opened(config, train, temperature=3.0)
    with pytest.raises(UserError, match="was made with another validation_fraction"):
        opened(config)


def test_a_killed_pass_goes_on_with_the_first_missing_file(config, monkeypatch):
    config = config()
    whole = make_cache(config)
    folder = Path(config.experiment_dir) / "teacher_cache"
    stored = {path.name: path.read_bytes() for path in folder.glob("shard_*")}
    assert len(stored) > 3
    write, written = teacher_cache._write_shard, []

    def third_is_the_last(path, *rest):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, *rest)

    config.overwrite = True
    with monkeypatch.context() as patch:
        patch.setattr(teacher_cache, "_write_shard", third_is_the_last)
        with pytest.raises(KeyboardInterrupt):
            make_cache(config)
    assert len(list(folder.glob("shard_*"))) == 3
    config.overwrite = False
    monkeypatch.setattr(
        teacher_cache, "_write_shard", lambda path, *rest: (written.append(path.name), write(path, *rest))
    )
    again = make_cache(config)
    assert len(written) == len(set(written)) == len(stored)
    assert {path.name: path.read_bytes() for path in folder.glob("shard_*")} == stored
    assert {k: v for k, v in again.items() if k not in ("provenance", "tokens_per_second")} == {
        k: v for k, v in whole.items() if k not in ("provenance", "tokens_per_second")
    }
    monkeypatch.setattr(teacher_cache, "load_model", lambda *_: pytest.fail("a finished cache was made again"))
    assert make_cache(config) == again


def test_a_cache_of_something_else_is_refused(config, clean_rows, write_sft):
    config = config()
    folder = Path(config.experiment_dir) / "teacher_cache"
    with pytest.raises(UserError, match=r"no finished teacher cache; run scripts/cache_teacher.py.*online"):
        open_cache(folder, "hidden", 1.0, training_data([], [], {}))
    make_cache(config)
    tokenizer = load_tokenizer(config.teacher_model_name_or_path)
    strange = encode_row(tokenizer, clean_rows(1, start=900)[0], 258)
    with pytest.raises(UserError, match=r"row sum-00900/0 is not in it; run scripts/cache_teacher.py --overwrite"):
        opened(config, [strange])
    tokenizer.chat_template = "Be kind." + tokenizer.chat_template
    other_template = encode_row(tokenizer, clean_rows(1)[0], 258)
    with pytest.raises(UserError, match=r"row sum-00000/0 has other tokens there \(data, tokenizer or template"):
        opened(config, [other_template])
    with pytest.raises(UserError, match="signal = hidden, this run has topk"):
        opened(config, signal="topk")
    with pytest.raises(UserError, match=r"sft_train_data_clean\.jsonl = .*this run has abc"):
        opened(config, **{"sft_train_data_clean.jsonl": "abc"})
    with pytest.raises(UserError, match=r"made with top_k = 8, this run has 9; pass --overwrite"):
        make_cache(CacheTeacherConfig(**{**vars(config), "top_k": 9}))
    shard = folder / "shard_00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"shard_00001\.safetensors: missing or not as it was written"):
        opened(config)
    index = read_json(folder / "index.json")
    (folder / "index.json").write_text(json.dumps(index | {"format": 0}))
    with pytest.raises(UserError, match=r"format 0, this version reads 2; run scripts/cache_teacher.py --overwrite"):
        opened(config)


def _zero_the_tensors(path):
    """Zeros where the numbers are, under the header that was written: the file has its size and can be read."""
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start:] = bytes(len(data) - start)
    path.write_bytes(data)


def _flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [_zero_the_tensors, _flip_a_byte])
@pytest.mark.parametrize("name", ["shard_00001.safetensors", "head.safetensors"])
def test_a_file_of_the_right_size_and_other_bytes_is_refused(config, name, damage):
    """It would train without a word, and a held-out KL to zeros is easily small."""
    config = config()
    index = make_cache(config)
    path = Path(config.experiment_dir) / "teacher_cache" / name
    size = path.stat().st_size
    assert {**index["shards"], "head.safetensors": index["head"]}[name]["bytes"] == size
    damage(path)
    assert path.stat().st_size == size
    with pytest.raises(UserError, match=rf"{name}: not as it was written, its hash is another; run scripts/cache_t"):
        opened(config)
    path.unlink()
    with pytest.raises(UserError, match=rf"{name}: missing or not as it was written"):
        opened(config)
    config.overwrite = True
    make_cache(config)
    opened(config)


def test_a_long_hashing_is_said(config, monkeypatch, caplog):
    config = config()
    make_cache(config)
    with caplog.at_level("INFO", logger="kd"):
        opened(config)
        assert "hashed" not in caplog.text
        monkeypatch.setattr(teacher_cache, "NOTICED", -1)
        opened(config)
    assert re.search(r"teacher_cache: 0\.0 GB are as they were written, hashed in 0 s", caplog.text)


def test_the_tokenizer_of_a_cache_is_the_one_it_was_made_with(config):
    config = config()
    index = make_cache(config)
    folder = Path(config.experiment_dir) / "teacher_cache"
    tokenizer = cached_tokenizer(folder, index, config.experiment_dir)
    assert tokenizer.get_vocab() == load_tokenizer(config.teacher_model_name_or_path).get_vocab()
    kept = tokenizer.chat_template
    tokenizer.chat_template = "Be kind." + kept
    tokenizer.save_pretrained(folder / "tokenizer")
    with pytest.raises(UserError, match=r"teacher_cache/tokenizer: not as it was written, its template is another"):
        cached_tokenizer(folder, index)
    tokenizer.chat_template = kept
    tokenizer.add_tokens(["one_more"])
    tokenizer.save_pretrained(folder / "tokenizer")
    with pytest.raises(UserError, match="its tokenizer is another"):
        cached_tokenizer(folder, index)


@pytest.mark.parametrize("own_answers", [False, True])
@pytest.mark.parametrize(
    "changes", [{"signal": "topk"}, {"signal": "topk", "bf16": True, "temperatures": [1.0]}, {"bf16": True}]
)
def test_the_disk_is_asked_for_what_is_written(config, monkeypatch, changes, own_answers):
    """Rows that measure keep hidden states beside the top k of the others, which has a sum for each temperature; a
    round's own rows measure nothing, and its cache has no head."""
    asked = []
    monkeypatch.setattr(teacher_cache, "require_disk", lambda folder, needed, what: asked.append(needed))
    config = config(validation_fraction=0.2, tokens_per_shard=10**6, **changes)
    make_cache(config, own_answers)
    files = list(Path(config.experiment_dir).glob("teacher_cache/*.safetensors"))
    written = sum(path.stat().st_size for path in files)
    [needed] = asked
    assert needed / 1.1 <= written <= needed / 1.1 + 1000 * len(files), "each has a header of less than 1 kB"


def test_two_rows_of_one_name_and_a_full_disk(config, clean_rows, write_sft, monkeypatch):
    config = config()
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match=r"GB free, the teacher cache needs"):
        make_cache(config)
    write_sft(config.experiment_dir, clean_rows(3), clean_rows(2, start=2))
    with pytest.raises(UserError, match="two clean rows share an id and a sample_index, one in each split"):
        make_cache(config)
    write_sft(config.experiment_dir, clean_rows(3) + clean_rows(1), clean_rows(2, start=50))
    with pytest.raises(UserError, match="two clean rows share an id and a sample_index"):
        make_cache(config)


def test_a_killed_pass_trusts_no_file_that_changed_since(config, monkeypatch, caplog):
    """A shard that was zeroed between a kill and the next start is made again, not hashed as good."""
    whole = make_cache(config())["shards"]
    write, made = teacher_cache._write_shard, []

    def killed_at_the_third(path, *rest):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(path)
        write(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(teacher_cache, "_write_shard", killed_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            make_cache(config(overwrite=True))
    _zero_the_tensors(made[1])
    monkeypatch.setattr(teacher_cache, "_write_shard", lambda path, *rest: (made.append(path), write(path, *rest)))
    assert make_cache(config())["shards"] == whole
    assert made[3] == made[1], "the first that is made again"
    assert f"{made[1]} is not as it was written; it is made again" in caplog.text
    assert not (made[1].parent / teacher_cache.WRITTEN).exists()


def test_an_edited_index_is_refused(config):
    """The places of rows and the map of logits are trusted as the shards are."""
    make_cache(config())
    path = teacher_cache.Path(config().experiment_dir) / "teacher_cache" / "index.json"
    path.write_text(path.read_text().replace('"logit_map": [\n    1.0', '"logit_map": [\n    0.5'))
    with pytest.raises(UserError, match=r"index\.json: not as it was written.*--overwrite"):
        opened(config())
