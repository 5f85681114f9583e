"""A profile and a command line say the same in the same words; a wrong word is refused and the nearest one named."""

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Literal

import pytest
import yaml

from src.distillation.kd import KDConfig
from src.distillation.kd_config import Conduct
from src.evaluation.evaluator import EvaluateConfig
from src.launch.commands import ALIASES
from src.planning.stages import Evaluation, Generation, Prompts
from src.utils.common import UserError
from src.utils.config import (
    OVERLAID,
    OVERLAID_ABOVE,
    SECTIONS,
    STEP_ROWS,
    build_config,
    load_config,
    read_merged,
    read_profile,
    rows_of_a_step,
    setting,
)

ROOT = Path(__file__).resolve().parents[2]
PROFILES = sorted((ROOT / "configs").glob("*.yaml"))
OVERLAYS = sorted(path.stem for path in (ROOT / "configs" / "hardware").glob("*.yaml"))
REFERENCE = ROOT / "configs" / "qwen3_30b_to_8b.yaml"


@pytest.fixture(scope="session")
def config_classes() -> dict[str, type]:
    """Section of a profile -> the config class of the script that reads it."""
    classes = {"run_improved_kd": KDConfig, "evaluate_distillation": EvaluateConfig}
    for section in SECTIONS:
        if section not in classes:
            spec = importlib.util.spec_from_file_location(f"script_{section}", ROOT / "scripts" / f"{section}.py")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            classes[section] = getattr(module, section.title().replace("_", "") + "Config")
    return classes


@pytest.fixture
def load(tmp_path):
    """`load(yaml_text, *arguments)`: a KDConfig from a profile's section run_improved_kd and a command line."""

    def load(text: str = "", *arguments: str, config_class: type = KDConfig, section: str = "run_improved_kd"):
        path = tmp_path / "profile.yaml"
        path.write_text(text)
        return load_config(config_class, section, ["--config", str(path), *arguments])

    return load


def section(**values) -> str:
    return yaml.safe_dump({"run_improved_kd": values})


def test_yaml_without_a_point_is_still_a_number(load):
    text = "run_improved_kd:\n  learning_rate: 2e-5\n  weight_decay: 1e1\n"
    assert isinstance(yaml.safe_load(text)["run_improved_kd"]["learning_rate"], str)  # YAML 1.1 wants 2.0e-5
    config = load(text)
    assert config.learning_rate == 2e-5
    assert config.weight_decay == 10


@pytest.mark.parametrize(("name", "value", "field", "typed"), [
    ("kd_alpha", 0.3, "alpha", 0.3),
    ("kd_ratio", 0.3, "alpha", 0.3),
    ("kd_temperature", 4, "temperature", 4.0),
    ("batch_size", 7, "per_device_train_batch_size", 7),
    ("per_device_train_batch_size", 7, "per_device_train_batch_size", 7),
    ("epochs", 2, "num_train_epochs", 2.0),
    ("teacher_model", "some/teacher", "teacher_model_name_or_path", "some/teacher"),
    ("student_name_or_path", "some/student", "model_name_or_path", "some/student"),
])  # fmt: skip
def test_aliases_in_the_file_and_on_the_command_line(load, name, value, field, typed):
    for config in (load(section(**{name: value})), load("", f"--{name}", str(value)), load("", f"--{name}={value}")):
        assert getattr(config, field) == typed
        assert type(getattr(config, field)) is type(typed)


@pytest.mark.parametrize(("text", "arguments", "expected"), [
    ({"lora_target_modules": ["q_proj", "v_proj"]}, [], ["q_proj", "v_proj"]),
    ({}, ["--lora_target_modules", "q_proj", "v_proj", "--alpha", "1"], ["q_proj", "v_proj"]),
    ({"lora_target_modules": ["q_proj"]}, ["--lora_target_modules", "o_proj", "k_proj"], ["o_proj", "k_proj"]),
    ({"lora_target_modules": "q_proj"}, [], ["q_proj"]),
])  # fmt: skip
def test_lists(load, text, arguments, expected):
    assert load(section(**text), *arguments).lora_target_modules == expected


def test_a_list_keeps_its_type(load):
    config = load(section(student_devices=[6, 7]), "--teacher_devices", "0", "1")
    assert (config.student_devices, config.teacher_devices) == ([6, 7], [0, 1])


def test_two_configs_do_not_share_a_list():
    one, other = build_config(KDConfig), build_config(KDConfig)
    one.lora_target_modules.append("embed_tokens")
    assert "embed_tokens" not in other.lora_target_modules


@dataclasses.dataclass
class Other:
    """Kinds of settings that training has none of."""

    arguments: str = setting("{}", "JSON, or a mapping")
    strategy: str = setting("steps", "a word")


def test_a_mapping_is_a_setting():
    assert json.loads(build_config(Other, {"arguments": {"min_lr": 1e-6}}).arguments) == {"min_lr": 1e-6}


@pytest.mark.parametrize(("arguments", "field", "expected"), [
    (["--no_resume"], "resume", False),
    (["--resume"], "resume", True),
    (["--resume", "false"], "resume", False),
    (["--resume=True"], "resume", True),
    ([], "resume", True),
    (["--overwrite"], "overwrite", True),
    ([], "overwrite", False),
])  # fmt: skip
def test_switches(load, arguments, field, expected):
    assert getattr(load("", *arguments), field) is expected


@pytest.mark.parametrize("word", ["true", "false"])
def test_switches_in_the_file(load, word):
    config = load(f"run_improved_kd:\n  overwrite: {word}\n  resume: {word}\n")
    assert config.overwrite is config.resume is (word == "true")


def test_an_empty_value_leaves_the_default(load):
    assert load("run_improved_kd:\n  alpha:\n  output_dir: null\n").alpha == 0.8
    assert load("run_improved_kd:\n").alpha == 0.8
    assert load("").alpha == 0.8


def test_a_flag_beats_the_file(load):
    text = section(alpha=0.3, temperature=1.0)
    assert load(text, "--alpha", "0.5").alpha == 0.5
    assert load(text, "--kd_ratio", "0.5").alpha == 0.5
    assert load(section(kd_alpha=0.3), "--alpha", "0.5").alpha == 0.5
    assert load(text, "--alpha", "0.5").temperature == 1.0


@pytest.mark.parametrize("name", ["model_name_or_path", "student_name_or_path"])
def test_a_section_beats_a_shared_key(load, name):
    shared = {"seed": 7, "model_name_or_path": "shared", "teacher_model_name_or_path": "teacher"}
    config = load(yaml.safe_dump(shared | {"run_improved_kd": {name: "own"}}))
    assert config.model_name_or_path == "own"
    assert config.teacher_model_name_or_path == "teacher"
    assert config.seed == 7
    assert load(yaml.safe_dump(shared), "--seed", "8").seed == 8


def test_a_shared_key_passes_by_a_stage_that_has_no_such_setting(load):
    @dataclasses.dataclass
    class Config:
        rows: int = setting(1, "rows")

    assert load("seed: 7\ndata_dir: data/x\n", config_class=Config) == Config(1)


def refused(words: str, call, *arguments, **named) -> None:
    with pytest.raises(UserError, match=words) as caught:
        call(*arguments, **named)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "words"), [
    ("run_improved_kd: {learning_rat: 1}", r"yaml \(run_improved_kd\): unknown .* mean learning_rate\?"),
    ("run_improved_kd: {kd_alfa: 1}", "unknown setting 'kd_alfa'; did you mean kd_alpha"),
    ("run_improved_kd: {temp: 1}", "unknown setting 'temp'"),
    ("run_improved_kd: {hub_revision: v1}", "unknown setting 'hub_revision'; every data set has a revision of its own"),
    ("run_improved: {alpha: 1}", r"profile\.yaml: unknown key 'run_improved'; did you mean run_improved_kd"),
    ("sead: 1", "unknown key 'sead'; did you mean seed"),
    ("learning_rate: 1", "unknown key 'learning_rate'"),
    ("7: 1", "unknown key 7"),
    ("run_improved_kd: [1]", "section run_improved_kd must be a mapping, found list"),
    ("- 1", "a profile is a mapping of settings and sections, found list"),
    ("a: [1", "not valid YAML"),
    ("[a]: 1", "not valid YAML: .*unhashable key"),
    ("seed: 1\nrun_improved_kd: {alpha: 1}\nseed: 2", "not valid YAML: seed stands twice.*line 3"),
    ("run_improved_kd: {alpha: 1, alpha: 0.5}", "not valid YAML: alpha stands twice"),
    ("run_improved_kd: {alpha: 0.5, kd_alpha: 0.5}", "alpha and kd_alpha are the same setting; keep one"),
    ("run_improved_kd: {batch_size: 1, per_device_train_batch_size: 2}", "are the same setting; keep one"),
    ("run_improved_kd: {alpha: much}", "alpha.*invalid float value: 'much'"),
    ("run_improved_kd: {max_steps: 1.5}", r"--max_steps.*invalid int value: '1\.5'"),
    ("run_improved_kd: {alpha: [0.1, 0.2]}", "unexpected argument '0.2'"),
    ("run_improved_kd: {overwrite: perhaps}", "[Tt]ruthy value expected"),
    ("run_improved_kd: {divergence: kl}", "invalid choice: 'kl'"),
    ("run_improved_kd: {lr_scheduler_type: cosin}", "cosin"),
    ("run_improved_kd: {alpha: 1.5}", "alpha must be between 0 and 1, got 1.5"),
])  # fmt: skip
def test_a_wrong_profile(load, text, words):
    refused(words, load, text)


@pytest.mark.parametrize(("arguments", "words"), [
    (["--temp", "1"], "unknown flag --temp"),
    (["--learning-rat=1"], "unknown flag --learning-rat; did you mean --learning_rate"),
    (["--alfa", "1"], r"unknown flag --alfa; did you mean --alpha\?"),
    (["--overwrit"], "unknown flag --overwrit; did you mean --overwrite"),
    (["--alpha", "much"], "invalid float value: 'much'"),
    (["--alpha"], "expected one argument"),
    (["--hub_revision", "v1"], "unknown flag --hub_revision; every data set has a revision of its own: gsm8k_path"),
    (["stray"], "unexpected argument 'stray'"),
    (["--divergence", "kl"], r"invalid choice: 'kl'.*forward_kl"),
])  # fmt: skip
def test_a_wrong_command_line(load, arguments, words):
    refused(words, load, section(alpha=0.5), *arguments)


@pytest.mark.parametrize("arguments", [["--config", "no/such.yaml"], ["--config=no/such.yaml"]])
def test_a_missing_profile(arguments):
    refused(r"no/such\.yaml: no such profile", load_config, KDConfig, "run_improved_kd", arguments)
    refused("no such profile", load_config, KDConfig, "run_improved_kd", ["--config"])


def test_a_python_caller_is_checked_the_same_way():
    @dataclasses.dataclass
    class Config:
        mode: Literal["quick", "full"] = setting("full", "mode")
        rows: list[int] = setting([], "rows", "lines")

    assert build_config(Config, {"lines": [1, 2], "mode": "quick"}) == Config("quick", [1, 2])
    assert build_config(Config, {"lines": (1, 2)}).rows == [1, 2]
    refused("unknown setting 'row'; did you mean rows", build_config, Config, {"row": [1]})
    refused("invalid int value: 'a'", build_config, Config, {"rows": ["a"]})


def test_help_shows_the_settings(load, capsys):
    with pytest.raises(SystemExit) as caught:
        load("", "--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for words in ("--kd_alpha", "--no_resume", "KD softmax temperature", "--config PROFILE.yaml", "--hardware NAME",
                  "--print_config", "--debug"):  # fmt: skip
        assert words in text


@pytest.mark.parametrize("name", SECTIONS)
@pytest.mark.parametrize("hardware", [*OVERLAYS, "none"])
@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.stem)
def test_every_shipped_profile_and_overlay_fits_every_stage(config_classes, profile, hardware, name):
    config = load_config(config_classes[name], name, ["--config", str(profile), "--hardware", hardware])
    written = read_profile(profile, name, config_classes[name], hardware)
    aliases = {"batch_size": "per_device_train_batch_size", "epochs": "num_train_epochs"}
    for key, value in written.items():
        field = aliases.get(key, key) if name == "run_improved_kd" else key
        found = getattr(config, field)
        assert (json.loads(found) if isinstance(value, dict) else found) == value, key


@pytest.mark.parametrize(("name", "planned"), [
    ("download_datasets", Prompts), ("generate_sft_data", Generation), ("evaluate_distillation", Evaluation),
])  # fmt: skip
def test_a_plan_reads_the_settings_that_the_stage_has(config_classes, name, planned):
    theirs = {field.name: field for field in dataclasses.fields(config_classes[name])}
    for field in dataclasses.fields(planned):
        own = theirs[field.name]
        assert (field.type, field.metadata.get("aliases")) == (own.type, own.metadata.get("aliases")), field.name
        assert getattr(planned(), field.name) == getattr(config_classes[name](), field.name), field.name


def test_the_pipeline_knows_the_further_names_of_the_models(config_classes):
    for config_class in config_classes.values():
        for field in dataclasses.fields(config_class):
            if field.name in ALIASES and "aliases" in field.metadata:
                assert field.metadata["aliases"] == [f"--{ALIASES[field.name]}"]


def test_the_reference_profile_has_the_missions_numbers(config_classes):
    config = {name: load_config(made, name, ["--config", str(REFERENCE)]) for name, made in config_classes.items()}
    kd = config["run_improved_kd"]
    expected = {
        "learning_rate": 2e-5, "temperature": 2.5, "alpha": 0.8, "divergence": "forward_kl",
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 32, "rows_per_step": 32, "max_length": 1024,
        "num_train_epochs": 1, "max_steps": 100, "warmup_steps": 20, "weight_decay": 0.01, "max_grad_norm": 1.0,
        "lora_r": 64, "lora_alpha": 128, "lora_dropout": 0.0, "lr_scheduler_type": "cosine", "seed": 42,
        "save_steps": 25, "student_devices": [],
        "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "model_name_or_path": "Qwen/Qwen3-8B", "teacher_model_name_or_path": "Qwen/Qwen3-30B-A3B-Instruct-2507",
        "experiment_dir": "outputs/experiment/qwen3_30b_to_8b_ultrabatch_512",
    }  # fmt: skip
    assert {name: getattr(kd, name) for name in expected} == expected
    answers = config["generate_sft_data"]
    assert (answers.temperature, answers.top_p, answers.top_k, answers.max_new_tokens) == (0.7, 0.8, 20, 768)
    assert answers.teacher_devices == [0, 1, 2, 3, 4, 5]
    data = config["download_datasets"]
    train = [data.gsm8k_train_rows, data.humaneval_train_rows, *data.domain_train_rows]
    evaluation = [data.gsm8k_eval_rows, data.mbpp_eval_rows, *data.domain_eval_rows]
    assert (train, evaluation) == ([2000, 164, 1000], [200, 50, 100])
    assert (sum(train), sum(evaluation) + data.humaneval_eval_rows) == (3164, 350)
    assert data.domains == ["aiops"]
    assert data.data_dir == "data/processed"
    assert config["fix_sft_data"].select == "all_correct"
    evaluate = config["evaluate_distillation"]
    assert (evaluate.mode, evaluate.temperatures, evaluate.max_new_tokens) == ("full", [0.1, 0.7, 1.2], 768)
    assert (evaluate.teacher_devices, evaluate.student_devices) == ([0, 1, 2, 3, 4, 5], list(range(8)))


def test_the_defaults_are_the_reference_recipe(config_classes):
    """A run without a profile differs from the reference in names alone."""
    reference = load_config(KDConfig, "run_improved_kd", ["--config", str(REFERENCE), "--hardware", "none"])
    plain = build_config(KDConfig)
    different = {f.name for f in dataclasses.fields(KDConfig) if getattr(plain, f.name) != getattr(reference, f.name)}
    assert different == {"model_name_or_path", "teacher_model_name_or_path", "experiment_dir", "max_steps"}


def test_an_empty_list_is_a_list(load):
    assert load(section(teacher_devices=[])).teacher_devices == []


def test_the_word_no_is_a_word_where_one_is_wanted():
    assert build_config(Other, yaml.safe_load("strategy: no")).strategy == "no"


@pytest.mark.parametrize("text", ["{max_steps: 1.5}", "{divergence: kl}", "{alpha: much}"])
def test_a_wrong_type_in_the_profile_names_the_profile(load, text):
    refused(r"profile\.yaml \(run_improved_kd\): ", load, f"run_improved_kd: {text}")


# Hardware overlays


@pytest.fixture
def lay(tmp_path):
    """`lay(profile, overlay)`: the merged profile; both as mappings, the overlay named by its path."""

    def lay(profile: dict, overlay: dict, hardware: str | None = None) -> dict:
        paths = tmp_path / "profile.yaml", tmp_path / "machine.yaml"
        for path, values in zip(paths, (profile, overlay), strict=True):
            path.write_text(yaml.safe_dump(values))
        return read_merged(paths[0], str(paths[1]) if hardware is None else hardware)

    return lay


def test_an_overlay_is_laid_over_key_by_key(lay):
    profile = {"seed": 7, "cache_teacher": {"signal": "topk", "tokens_per_batch": 8},
               "run_improved_kd": {"alpha": 0.5, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
               "serve": {"command": "sglang"}}  # fmt: skip
    overlay = {"gpus": "2x24", "launch": {"processes": 2}, "serve": {"command": "vllm", "port": 8001},
               "cache_teacher": {"tokens_per_batch": 16},
               "run_improved_kd": {"batch_size": 1, "gradient_accumulation_steps": 8}}  # fmt: skip
    merged = lay(profile, overlay)
    assert Path(merged.pop("hardware")).name == "machine.yaml"
    assert merged == {
        "seed": 7, "gpus": "2x24", "launch": {"processes": 2}, "serve": {"command": "vllm", "port": 8001},
        "cache_teacher": {"signal": "topk", "tokens_per_batch": 16},
        "run_improved_kd": {"alpha": 0.5, "batch_size": 1, "gradient_accumulation_steps": 8},
    }  # fmt: skip


def test_which_overlay(lay, tmp_path):
    """The profile's own, unless the flag names another, or none."""
    own = {"hardware": str(tmp_path / "machine.yaml"), "seed": 1}
    (tmp_path / "other.yaml").write_text("gpus: 4x40")
    lay(own, {"gpus": "1x80"})
    profile = tmp_path / "profile.yaml"
    assert read_merged(profile)["gpus"] == "1x80"
    assert read_merged(profile, str(tmp_path / "other.yaml"))["gpus"] == "4x40"
    assert read_merged(profile, "8x40")["gpus"] == "8x40"
    assert read_merged(profile, "none") == read_merged(profile, "") == {"seed": 1}
    refused("--hardware 3x3: no such overlay; there are 1x80, 2x24, 4x40, 8x40, and none", read_merged, profile, "3x3")


@pytest.mark.parametrize(("said", "sizes"), [
    ({}, {"batch_size": 4, "gradient_accumulation_steps": 8}),
    ({"gradient_accumulation_steps": None}, {"batch_size": 4, "gradient_accumulation_steps": 8}),
    ({"per_device_train_batch_size": None}, {"batch_size": 4, "gradient_accumulation_steps": 8}),
    ({"gradient_accumulation_steps": 32}, {"gradient_accumulation_steps": 32}),
    ({"batch_size": 2}, {"batch_size": 2}),
    ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 16},
     {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 16}),
    ({"batch_size": 8, "gradient_accumulation_steps": 8}, {"batch_size": 8, "gradient_accumulation_steps": 8}),
])  # fmt: skip
def test_a_step_has_the_rows_of_the_profile_that_names_its_overlay(lay, tmp_path, said, sizes):
    """One size of the profile's with the other of the overlay's would be steps of other rows."""
    profile = {"hardware": str(tmp_path / "machine.yaml"), "run_improved_kd": {"tokens_per_batch": 9} | said}
    overlay = {"batch_size": 4, "gradient_accumulation_steps": 8, "gradient_checkpointing": True, "tokens_per_batch": 7}
    lay(profile, {"run_improved_kd": overlay})
    merged = read_merged(tmp_path / "profile.yaml")["run_improved_kd"]
    assert merged == {"tokens_per_batch": 9, "gradient_checkpointing": True} | sizes
    assert build_config(KDConfig, merged).rows_per_step == rows_of_a_step(profile["run_improved_kd"])
    (tmp_path / "machine.yaml").write_text("run_improved_kd: {batch_size: 7}")
    if not any(said.values()):
        refused("steps of 224 rows, the profile has 32", read_merged, tmp_path / "profile.yaml")
    else:
        assert rows_of_a_step(read_merged(tmp_path / "profile.yaml")["run_improved_kd"]) == rows_of_a_step(said)


def test_the_flag_reaches_a_stage_and_wants_a_profile(load, tmp_path):
    overlay = tmp_path / "machine.yaml"
    overlay.write_text("run_improved_kd: {tokens_per_batch: 77}")
    assert load("", "--hardware", str(overlay)).tokens_per_batch == 77
    assert load("", f"--hardware={overlay}", "--tokens_per_batch", "78").tokens_per_batch == 78
    assert load(f"hardware: {overlay}").tokens_per_batch == 77
    assert load(f"hardware: {overlay}", "--hardware", "none").tokens_per_batch is None
    arguments = ["--hardware", "8x40"]
    refused("is laid over a profile; name one with --config", load_config, KDConfig, "run_improved_kd", arguments)


@pytest.mark.parametrize(("training", "rows"), [
    ({}, 32), ({"batch_size": 4}, 128), ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, 8),
    ({"batch_size": None, "gradient_accumulation_steps": 3}, 3), ({"batch_size": "four"}, None),
])  # fmt: skip
def test_rows_of_a_step(training, rows):
    assert rows_of_a_step(training) == rows


@pytest.mark.parametrize(("overlay", "words"), [
    ({"run_improved_kd": {"learning_rate": 1}}, r"machine\.yaml \(run_improved_kd\): learning_rate can change"),
    ({"run_improved_kd": {"model_name_or_path": "x"}}, "model_name_or_path can change what is learned"),
    ({"run_improved_kd": {"gradient_checkpoint": True}}, "did you mean gradient_checkpointing"),
    ({"cache_teacher": {"bf16": True}}, "bf16 can change what is learned"),
    ({"generate_sft_data": {"max_new_tokens": 9}}, "max_new_tokens can change what is learned"),
    ({"fix_sft_data": {"select": "all"}}, "fix_sft_data belongs in the profile"),
    ({"seed": 1}, "seed belongs in the profile"),
    ({"hardware": "8x40"}, "hardware belongs in the profile"),
    ({"gpu": "8x40"}, "unknown key 'gpu'; did you mean gpus"),
    ({"run_improved_kd": {"batch_size": 2}}, "steps of 64 rows, the profile has 32; .* whose product is 32"),
    ({"run_improved_kd": {"gradient_accumulation_steps": 4}}, "steps of 4 rows, the profile has 32"),
])  # fmt: skip
def test_an_overlay_that_says_what_is_learned(lay, overlay, words):
    refused(words, lay, {"run_improved_kd": {"alpha": 0.5}}, overlay)


def test_what_an_overlay_may_say_of_training_is_what_cannot_change_what_is_learned(config_classes):
    """Conduct says which settings those are; names and places are the profile's. Memory demands one that does."""
    conduct = {field.name for field in dataclasses.fields(Conduct)}
    models = {"model_name_or_path", "teacher_model_name_or_path", "init_from"}
    names = models | {"experiment_dir", "output_dir", "resume", "overwrite"}
    assert names < conduct
    short = {"per_device_train_batch_size": "batch_size"}
    assert set(OVERLAID["run_improved_kd"]) == {short.get(n, n) for n in conduct - names} | {"load_in_4bit"}
    for kind in ({}, {"load_in_4bit": True}):  # and that one is seen
        assert build_config(KDConfig, kind).identity().get("load_in_4bit", False) is bool(kind)
    plain = build_config(KDConfig)
    sizes = {short.get(name, name): getattr(plain, name) for name in (*short, "gradient_accumulation_steps")}
    assert sizes == STEP_ROWS


@pytest.mark.parametrize("name", OVERLAID)
def test_an_overlay_may_say_what_there_is(config_classes, name):
    fields = {field.name for field in dataclasses.fields(config_classes[name])}
    assert set(OVERLAID[name]) - {"batch_size"} <= fields
    assert not {"seed", "data_dir", "experiment_dir", "output_dir", "overwrite"} & set(OVERLAID[name])


@pytest.mark.parametrize("hardware", OVERLAYS)
def test_shipped_overlays_leave_the_science_alone(hardware):
    """Of every key that an overlay changes, none is the profile's own; the steps have the profile's rows."""
    plain, merged = read_merged(REFERENCE, "none"), read_merged(REFERENCE, hardware)
    assert merged["gpus"] == hardware
    assert rows_of_a_step(merged["run_improved_kd"]) == 32
    for key, value in plain.items():
        if key in SECTIONS:
            assert {name: merged[key][name] for name in value} == value, key
        else:
            assert merged[key] == value
    assert merged.keys() - plain.keys() == {"hardware", *OVERLAID_ABOVE}


# --print_config


@pytest.mark.parametrize("name", SECTIONS)
@pytest.mark.parametrize("hardware", ["8x40", "2x24"])
def test_printed_settings_can_be_passed_back(config_classes, tmp_path, capsys, hardware, name):
    arguments = ["--config", str(REFERENCE), "--hardware", hardware, "--overwrite"]
    wanted = load_config(config_classes[name], name, arguments)
    with pytest.raises(SystemExit) as ended:
        load_config(config_classes[name], name, [*arguments, "--print_config"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    path = tmp_path / "printed.yaml"
    path.write_text(printed)
    assert load_config(config_classes[name], name, ["--config", str(path)]) == wanted
    [values] = yaml.safe_load(printed).values()
    assert values.keys() == {field.name for field in dataclasses.fields(config_classes[name])}


def test_what_is_left_to_the_machine_is_printed_as_left(load, capsys):
    with pytest.raises(SystemExit):
        load("", "--print_config")
    values = yaml.safe_load(capsys.readouterr().out)["run_improved_kd"]
    assert (values["bf16"], values["data_seed"], values["use_cpu"]) == (None, None, False)
