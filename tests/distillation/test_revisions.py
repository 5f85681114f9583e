"""Models pinned to a revision of the hub, `owner/name@revision`: out of a cache of it that is laid out by hand."""

from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import GenerationConfig

from src.distillation.base import (
    base_of_adapter,
    load_model,
    load_model_config,
    load_tokenizer,
    meta_model,
    model_fingerprint,
    model_name,
)
from src.distillation.engines import end_ids
from src.distillation.kd import run_kd_pipeline
from src.distillation.teacher_cache import CacheTeacherConfig, make_cache
from src.evaluation.arms import resolve_arms
from src.evaluation.evaluator import EvaluateConfig
from src.utils.common import UserError, read_json

OLD, NEW = "0" * 39 + "1", "0" * 39 + "2"  # commits
ID = "owner/name"


@pytest.fixture
def hub(tmp_path, monkeypatch, make_model, make_tokenizer, save_model):
    """Two commits of owner/name that differ in everything: the tag v1 is at the older one, branch main at the newer."""
    root = tmp_path / "hub" / "models--owner--name"
    for number, commit in enumerate((OLD, NEW)):
        model = make_model(seed=10 + number, layers=2 + number)
        model.generation_config = GenerationConfig(eos_token_id=[258, number])
        tokenizer = make_tokenizer()
        tokenizer.chat_template += f"{{# commit {number} #}}"
        save_model(root / "snapshots" / commit, model, tokenizer)
    for name, commit in (("v1", OLD), ("main", NEW), ("refs/pr/3", OLD)):
        path = root / "refs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return root / "snapshots"


def test_a_name_and_its_parts(tmp_path, monkeypatch):
    assert (model_name("owner/name@v1").id, model_name("owner/name@v1").revision) == (ID, "v1")
    assert (model_name("owner/name@refs/pr/3").id, model_name("owner/name@refs/pr/3").revision) == (ID, "refs/pr/3")
    assert (model_name(ID).id, model_name(ID).revision) == (ID, None)
    for text in ("owner/name@v1", ID, "a/folder"):
        assert model_name(text).full == text
    monkeypatch.chdir(tmp_path)
    Path("owner/name@v1").mkdir(parents=True)
    assert (model_name("owner/name@v1").id, model_name("owner/name@v1").revision) == ("owner/name@v1", None)
    for text in ("owner/name@", "@v1"):
        with pytest.raises(UserError, match="a hub id before the @ and a commit"):
            model_name(text)


@pytest.mark.parametrize(("revision", "commit"), [("", NEW), ("@main", NEW), ("@v1", OLD), (f"@{OLD}", OLD),
                                                  ("@refs/pr/3", OLD)])  # fmt: skip
def test_a_revision_is_what_is_loaded(hub, revision, commit):
    """Weights, config, template, generation settings: all of the same commit."""
    name = ID + revision
    own = str(hub / commit)
    assert load_tokenizer(name).chat_template == load_tokenizer(own).chat_template
    assert load_model_config(name).num_hidden_layers == load_model_config(own).num_hidden_layers
    assert len(meta_model(name).model.layers) == len(meta_model(own).model.layers)
    loaded, wanted = load_model(name, torch.float32), load_model(own, torch.float32)
    assert torch.equal(loaded.lm_head.weight, wanted.lm_head.weight)
    assert end_ids(name, load_tokenizer(name)) == end_ids(own, load_tokenizer(own))
    assert model_fingerprint(name) == f"{ID}@{commit}"


@pytest.mark.parametrize("load", [lambda name: load_model(name, torch.float32), load_tokenizer, model_fingerprint])
def test_a_revision_that_is_not_there_is_one_line(hub, load):
    with pytest.raises(UserError, match="owner/name@v9") as caught:
        load("owner/name@v9")
    assert "\n" not in str(caught.value)


def test_a_folder_with_an_at_sign_stays_a_folder(tmp_path, monkeypatch, make_model, make_tokenizer, save_model):
    monkeypatch.chdir(tmp_path)
    save_model(Path("models@home"), make_model(), make_tokenizer())
    assert load_model("models@home", torch.float32).name_or_path == str(tmp_path / "models@home")
    assert "@" not in model_fingerprint("models@home")


@pytest.fixture
def settings(tmp_path, tiny_teacher, clean_rows, write_sft):
    experiment = write_sft(tmp_path / "experiment" / "tiny", clean_rows(12), clean_rows(3, start=100))
    return {
        "model_name_or_path": f"{ID}@v1",
        "teacher_model_name_or_path": tiny_teacher,
        "experiment_dir": str(experiment),
        "gradient_accumulation_steps": 4,
        "max_steps": 1,
        "save_steps": 0,
        "eval_steps": 0,
        "max_length": 256,
        "lora_r": 2,
        "bf16": False,
        "teacher_signal": "online",
        "compile_loss": False,
    }


def test_a_run_names_the_revision_and_others_load_it(hub, settings):
    """main has moved on: whoever loads the adapter must get the weights that it was trained on."""
    results = run_kd_pipeline(settings)
    adapter = read_json(Path(results["final_model"]) / "adapter_config.json")
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == (ID, "v1")
    assert base_of_adapter(adapter) == f"{ID}@v1"
    kd_config = read_json(Path(results["run_dir"]) / "kd_config.json")
    assert kd_config["fingerprint"]["student"] == f"{ID}@{OLD}"
    card = (Path(results["final_model"]) / "README.md").read_text()
    assert f"\nbase_model: {ID}\n" in card
    assert f"`{ID}` (revision `v1`)" in card
    loaded = AutoPeftModelForCausalLM.from_pretrained(results["final_model"])
    assert torch.equal(loaded.get_output_embeddings().weight, load_model(str(hub / OLD), torch.float32).lm_head.weight)
    (Path(results["run_dir"]) / "kd_config.json").unlink()  # an adapter that came alone
    arms = resolve_arms(EvaluateConfig(model_path=results["final_model"]))
    assert arms.base == f"{ID}@v1"
    # the same weights by another name are the same run
    again = run_kd_pipeline(settings | {"model_name_or_path": f"{ID}@{OLD}", "output_dir": None})
    assert model_fingerprint(f"{ID}@{OLD}") == kd_config["fingerprint"]["student"]
    assert again["after"] == results["after"]


def test_a_cache_knows_its_teacher_by_the_commit(hub, settings, tiny_student):
    """Pinned to the commit that main was at: the same teacher. Another revision: another."""
    made = {"experiment_dir": settings["experiment_dir"], "max_length": 256, "bf16": False}
    index = make_cache(CacheTeacherConfig(teacher_model_name_or_path=ID, **made))
    assert index["teacher"] == f"{ID}@{NEW}"
    settings |= {"model_name_or_path": tiny_student, "teacher_signal": "hidden"}
    run_kd_pipeline(settings | {"teacher_model_name_or_path": f"{ID}@{NEW}"})
    with pytest.raises(UserError, match="owner/name@v1"):
        run_kd_pipeline(settings | {"teacher_model_name_or_path": f"{ID}@v1"})
