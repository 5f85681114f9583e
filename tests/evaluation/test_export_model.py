"""scripts/export_model.py on a finished run: what it writes, what it refuses, and what a kill leaves."""

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from src.distillation import engines, export
from src.distillation.base import load_tokenizer
from src.evaluation.evaluator import run_evaluation
from src.utils import common
from src.utils.common import read_json, write_json
from src.utils.stages import hold
from tests.distillation.test_export import CONVERTER, TURN_END
from tests.evaluation.test_evaluation_scripts import load_script
from tests.evaluation.tiny import config_for, run_of, stored
from tests.reading import content, tensors
from tests.stages.conftest import fails, run, succeeds  # noqa: F401


@pytest.fixture
def scripts():
    return {"export_model": load_script("scripts/export_model.py")}


@pytest.fixture
def profile(trained, tmp_path) -> list[str]:
    """`--config` and the folders of a test's own; no evaluation is found there."""
    path = tmp_path / "profile.yaml"
    folders = {"data_dir": str(trained / "data"), "experiment_dir": str(trained / "tiny")}
    own = {"evaluation_dir": str(tmp_path / "none"), "output_dir": str(tmp_path / "made" / "student")}
    path.write_text(yaml.safe_dump(folders | {"export_model": own}))
    return ["--config", str(path)]


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "made" / "student"


@pytest.fixture
def evaluation(trained, scripted, tmp_path):
    """A finished evaluation of the run at two temperatures, its answers made up: its config and its results."""
    config = config_for(trained, tmp_path / "evaluated", temperatures=[0.1, 0.7], arms=["base", "kd"])
    return config, run_evaluation(config)


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory) -> dict[str, Path]:
    """Exports that nothing has interrupted, by the type of their weights."""
    folders, script = {}, load_script("scripts/export_model.py")
    for dtype in ("bfloat16", "float32"):
        root = tmp_path_factory.mktemp(dtype)
        folders[dtype] = root / "student"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [
                "scripts/export_model.py", "--data_dir", str(trained / "data"), "--experiment_dir",
                str(trained / "tiny"), "--evaluation_dir", str(root / "none"), "--output_dir", str(folders[dtype]),
                "--dtype", dtype,
            ])  # fmt: skip
            script.main()
    return folders


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def test_a_finished_run_becomes_a_model_folder(succeeds, profile, target, trained):  # noqa: F811
    said = succeeds("export_model", *profile)
    files = {"README.md", "chat_template.jinja", "config.json", "export.json", "generation_config.json",
             "model.safetensors", "tokenizer.json", "tokenizer_config.json"}  # fmt: skip
    assert set(left(target)) == files
    assert left(target.parent) == ["student"]
    assert {weight.dtype for weight in tensors(target).values()} == {torch.bfloat16}
    marker = read_json(target / "export.json")
    assert marker["finished"]
    assert set(marker["files"]) == files - {"export.json"}
    assert marker["check"]["error"] <= 1.5 * marker["check"]["rounding"] < marker["check"]["effect"]
    assert "checked: logits differ from the adapter's by" in said
    assert f"vllm serve {target}" in said
    card = ModelCard.load(target / "README.md")
    assert "base_model" not in card.data.to_dict()
    assert "**Not evaluated.**" in card.text
    adapter = read_json(run_of(trained) / "kd_config.json")
    assert f"{adapter['rows']['train']} answers of the teacher to train on" in card.text
    assert "sampling defaults, for none were evaluated" in card.text


def test_it_answers_the_evaluations_greedy_text(succeeds, profile, target, trained, tmp_path, monkeypatch):  # noqa: F811
    """The folder by itself, against the evaluation's engine with the adapter merged; the example on its card runs."""
    monkeypatch.setattr(engines, "compute_dtype", lambda: torch.float32)
    config = config_for(trained, tmp_path / "none" / "of it", temperatures=[0.0], arms=["base", "kd"])
    results = run_evaluation(config)
    evaluated = {row["id"]: row for row in stored(config, "samples") if row["arm"] == "kd"}
    succeeds("export_model", *profile, "--dtype", "float32")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(target), load_tokenizer(str(target))
    for row in evaluated.values():
        question = [{"role": "user", "content": row["prompt"]}]
        ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        answer = model.generate(input_ids=ids, max_new_tokens=config.max_new_tokens)[0, ids.shape[1] :]
        assert tokenizer.decode(answer, skip_special_tokens=True) == row["response"]

    # its card is about that evaluation, and its example runs
    card = (target / "README.md").read_text()
    assert f"(prompts {results['settings']['prompts']}, mode quick" in card
    [example] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(target.parent)
    example = example.replace("max_new_tokens=256", "max_new_tokens=4").replace("PATH_OR_HUB_ID", target.name)
    exec(compile(example, "README.md", "exec"), {})

    # greedy decoding is no sampling default of the folder, and the card does not say that it is
    assert "temperature" not in read_json(target / "generation_config.json")
    assert "Its sampling defaults are" not in card
    assert "It has no sampling defaults: the evaluation's first sentence is about greedy decoding" in card


def test_sampling_defaults_are_those_of_the_evaluation(succeeds, profile, target, evaluation):  # noqa: F811
    config, results = evaluation
    succeeds("export_model", *profile, "--evaluation_dir", config.output_dir)
    settings = read_json(target / "generation_config.json")
    assert (settings["do_sample"], settings["temperature"], settings["top_p"], settings["top_k"]) == (
        True,
        0.1,
        0.8,
        20,
    )
    card = (target / "README.md").read_text()
    assert "temperature 0.1, top-p 0.8, top-k 20" in card
    held = results["heldout"]["arms"]["kd"]["kl_to_teacher"]
    assert f"| distilled | {held:.4f} |" in card
    assert "Graded in code by python\\_tests" in card


def test_again_is_nothing_to_do_and_another_is_refused(succeeds, fails, profile, target, evaluation):  # noqa: F811
    succeeds("export_model", *profile)
    before = {path: path.stat().st_mtime_ns for path in target.iterdir()}
    assert "is complete; nothing to do" in succeeds("export_model", *profile)
    assert "was made with dtype = 'bfloat16', this run has 'float32'; pass --overwrite" in fails(
        "export_model", *profile, "--dtype", "float32"
    )
    line = fails("export_model", *profile, "--evaluation_dir", evaluation[0].output_dir)
    assert "was made with results.json = None, this run has" in line
    assert {path: path.stat().st_mtime_ns for path in target.iterdir()} == before
    succeeds("export_model", *profile, "--dtype", "float32", "--overwrite")
    assert {weight.dtype for weight in tensors(target).values()} == {torch.float32}
    assert left(target.parent) == ["student"]


def test_what_was_lost_is_made_again(succeeds, profile, target, exported):  # noqa: F811
    shutil.copytree(exported["bfloat16"], target)
    before = content(target)
    (target / "model.safetensors").unlink()
    succeeds("export_model", *profile)
    assert {name: data for name, data in content(target).items() if name != "export.json"} == {
        name: data for name, data in before.items() if name != "export.json"
    }


@pytest.mark.parametrize("harm", ["cut", "flipped"])
def test_an_export_that_is_not_as_it_was_written_is_made_again(succeeds, profile, target, exported, harm):  # noqa: F811
    shutil.copytree(exported["bfloat16"], target)
    path = target / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] if harm == "cut" else whole[:-1] + bytes([whole[-1] ^ 1]))
    succeeds("export_model", *profile)
    assert path.read_bytes() == whole
    written = read_json(target / "export.json")["files"][path.name]
    assert written == {"size": len(whole), "sha256": hashlib.sha256(whole).hexdigest()}


def test_the_export_names_no_place_of_this_machine(exported, trained):
    for name in ("export.json", "README.md"):
        assert str(trained) not in (exported["bfloat16"] / name).read_text()


def test_an_adapter_changed_after_it_was_measured_is_refused(succeeds, fails, profile, target, copied):  # noqa: F811
    adapter, results = run_of(copied) / "final_model", run_of(copied) / "kd_results.json"
    path = adapter / "adapter_model.safetensors"
    save_file({name: 3 * weight for name, weight in load_file(path).items()}, path, {"format": "pt"})
    flags = [*profile, "--model_path", adapter]
    assert "was changed after it was measured" in fails("export_model", *flags)
    assert left(target.parent) == []
    write_json(results, {name: value for name, value in read_json(results).items() if name != "adapter_sha256"})
    succeeds("export_model", *flags)
    assert "The run did not record the hash of its adapter" in (target / "README.md").read_text()


def test_an_adapter_of_another_scale_is_refused(fails, profile, copied):  # noqa: F811
    path = run_of(copied) / "final_model" / "adapter_config.json"
    own = read_json(path)
    write_json(path, own | {"lora_alpha": 3 * own["lora_alpha"]})
    line = fails("export_model", *profile, "--model_path", path.parent)
    assert f"has lora_alpha = {3 * own['lora_alpha']}, the run {own['lora_alpha']}" in line


def test_a_manifest_of_other_prompts_is_not_on_the_card(succeeds, profile, target, tmp_path):  # noqa: F811
    """It lies in the data folder now; nothing says that this run was trained on what it lists."""
    origin = "model hub, openai/gsm8k main train at revision 740312a"
    entry = {"source": "gsm8k", "split": "train", "rows": 2, "licence": "MIT", "origin": origin, "sha256": "0" * 64}
    write_json(tmp_path / "foreign" / "manifest.json", {"sources": [entry]})
    succeeds("export_model", *profile, "--data_dir", tmp_path / "foreign")
    card = ModelCard.load(target / "README.md")
    assert "gsm8k" not in str(card)
    assert "Where the prompts come from is not recorded: there is no fix\\_sft\\_data.json" in card.text
    assert "manifest.json" not in read_json(target / "export.json")["fingerprint"]


def test_a_folder_of_other_things_is_never_replaced(fails, profile, target):  # noqa: F811
    target.mkdir(parents=True)
    (target / "thesis.txt").write_text("years of work")
    for flags in ((), ("--overwrite",)):
        assert "so it is no export; name another --output_dir" in fails("export_model", *profile, *flags)
    assert (target / "thesis.txt").read_text() == "years of work"


def test_a_wrong_merge_leaves_nothing(succeeds, fails, profile, target, monkeypatch):  # noqa: F811
    monkeypatch.setattr(export, "merge_adapter", lambda model, folder: model)
    assert "the merged model is not the student" in fails("export_model", *profile)
    assert left(target.parent) == []


def test_a_wrong_merge_leaves_the_export_that_was_there(fails, profile, target, exported, monkeypatch):  # noqa: F811
    shutil.copytree(exported["bfloat16"], target)
    before = content(target)
    monkeypatch.setattr(export, "merge_adapter", lambda model, folder: model)
    fails("export_model", *profile, "--dtype", "float32", "--overwrite")
    assert content(target) == before


def test_the_second_of_two_is_refused(fails, profile, target):  # noqa: F811
    with hold(target.parent, "the first", target.name):
        assert f"the first (process {os.getpid()} on " in fails("export_model", *profile)
    assert not target.exists()


@pytest.mark.parametrize(("flags", "words"), [
    (("--model_path", "{control}"), None),
    (("--model_path", "{run}", "--experiment_dir", "{root}/other"), "is a run of tiny, not of other"),
    (("--experiment_dir", "{root}/other"), "no finished run of other"),
    (("--base", "{teacher}"), "is not the model that"),
    (("--base", "{run}/final_model"), "is not the model that"),
    (("--gguf",), "--gguf needs convert_hf_to_gguf.py of llama.cpp"),
    (("--data_dir", "{root}/nowhere"), None),
])  # fmt: skip
def test_which_run_is_exported(succeeds, fails, profile, target, trained, tiny_teacher, flags, words):  # noqa: F811
    [control] = trained.glob("sft_control_*")
    places = {"control": control, "run": run_of(trained), "root": trained, "teacher": tiny_teacher}
    flags = [flag.format(**places) for flag in flags]
    if words is None:
        succeeds("export_model", *profile, *flags)
    else:
        assert words in fails("export_model", *profile, *flags)
        assert left(target.parent) == []
    if "--model_path" in flags and words is None:
        assert "fine-tuned on the answers of" in (target / "README.md").read_text()


def test_an_adapter_without_weights_is_refused_in_a_line(fails, profile, target, copied):  # noqa: F811
    adapter = run_of(copied) / "final_model"
    (adapter / "adapter_model.safetensors").unlink()
    line = fails("export_model", *profile, "--model_path", adapter)
    assert f"{adapter}: no adapter_model.safetensors there; bring the run's own file back" in line


def test_an_unfinished_run_is_refused(fails, profile, copied):  # noqa: F811
    (run_of(copied) / "kd_results.json").unlink()
    line = fails("export_model", *profile, "--model_path", str(run_of(copied)))
    assert "no finished run (kd_config.json, kd_results.json); let run_improved_kd.py finish it" in line


def die_at(step: str, arguments: list[str]) -> None:
    """Run the script up to the call of a step and die there, as by SIGKILL; `set aside` is done first."""
    script = load_script("scripts/export_model.py")

    def die(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    replace = os.replace

    def set_aside(path: Path, other: Path) -> None:
        replace(path, other)
        if str(other).endswith(".old.tmp"):
            die()

    if step == "set aside":
        os.replace = set_aside
    elif step == "rmtree":
        # the module's own: finalizers call shutil's at any time
        common.shutil = SimpleNamespace(rmtree=die, disk_usage=shutil.disk_usage)
    else:
        setattr(script, step, die)
    sys.argv = ["scripts/export_model.py", *arguments]
    script.main()


@pytest.mark.slow
@pytest.mark.parametrize(("step", "kept"), [
    ("check_export", "float32"), ("card_of", "float32"), ("finish_stage", "float32"), ("set aside", None),
    ("rmtree", "bfloat16"),
])  # fmt: skip
def test_killed_at_any_step_and_run_again(succeeds, profile, target, exported, step, kept):  # noqa: F811
    """The folder that is replaced stays whole, here or set aside, or is the new one; the next run ends as one alone."""
    shutil.copytree(exported["float32"], target)
    arguments = [*profile, "--overwrite"]
    context = multiprocessing.get_context("forkserver")  # torch's threads do not outlive a fork of this process
    context.set_forkserver_preload(["src.distillation.export", "src.evaluation.evaluator"])
    child = context.Process(target=die_at, args=(step, arguments))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert any(name.startswith(".student.") and name.endswith(".tmp") for name in left(target.parent))
    assert target.exists() == (kept is not None)
    [there] = [target] if kept else target.parent.glob(".student.*.old.tmp")
    marker = read_json(there / "export.json")
    assert (marker["fingerprint"]["dtype"], {*marker["files"], "export.json"}) == (kept or "float32", set(left(there)))
    succeeds("export_model", *arguments)
    assert left(target.parent) == ["student"]
    found, whole = content(target), content(exported["bfloat16"])
    assert found.keys() == whole.keys()
    assert {name for name in whole if found[name] != whole[name]} == {"export.json"}  # it says when


def test_a_gguf_file_lies_beside_the_weights(succeeds, profile, target, tmp_path):  # noqa: F811
    """By a converter that writes the words of the file alone; the real one is llama.cpp's."""
    (tmp_path / "convert_hf_to_gguf.py").write_text(CONVERTER)
    (tmp_path / "wanted.json").write_text(json.dumps({"eos": TURN_END}))
    said = succeeds("export_model", *profile, "--gguf", "--llama_cpp", tmp_path)
    fields = gguf.GGUFReader(target / "student.gguf").fields
    assert fields["general.name"].contents() == "student bf16"
    assert fields["tokenizer.ggml.eos_token_id"].contents() == TURN_END
    assert fields["tokenizer.chat_template"].contents() == (target / "chat_template.jinja").read_text()
    assert "student.gguf" in read_json(target / "export.json")["files"]
    assert f"llama-server -m {target / 'student'}.gguf" in said
