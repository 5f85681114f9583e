"""Of stages whose own classes planning may not import, the settings that a plan reads; a test holds them to those."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from src.distillation.engines import EngineSettings
from src.utils.config import read_section, setting


@dataclass
class Prompts:
    """Of download_datasets."""

    gsm8k_train_rows: int = 0
    gsm8k_eval_rows: int = 0
    humaneval_train_rows: int = 0
    humaneval_eval_rows: int = 0
    mbpp_eval_rows: int = 0
    domains: list[str] = setting([], "")
    domain_train_rows: list[int] = setting([], "")
    domain_eval_rows: list[int] = setting([], "")
    prompts_file: str = ""


@dataclass
class Generation(EngineSettings):
    """Of generate_sft_data."""

    num_samples: int = 1
    max_new_tokens: int = 768


@dataclass
class Evaluation(Generation):
    """Of evaluate_distillation."""

    arms: list[str] = setting(["base", "sft", "kd", "teacher"], "")
    mode: Literal["quick", "medium", "full"] = "full"
    temperatures: list[float] = setting([0.1, 0.7, 1.2], "", "temperature")
    presets: list[str] = setting(["recommended"], "")
    student_devices: list[int] = setting([], "")
    teacher_base_url: str = ""


def prompts_of(profile: Mapping[str, Any]) -> Prompts:
    return read_section(Prompts, profile, "download_datasets")


def generation_of(profile: Mapping[str, Any]) -> Generation:
    return read_section(Generation, profile, "generate_sft_data")


def evaluation_of(profile: Mapping[str, Any]) -> Evaluation:
    return read_section(Evaluation, profile, "evaluate_distillation")
