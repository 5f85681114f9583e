"""Why a divergence on own answers falls: does the student agree more with its teacher, or does it write other text?

    python benchmarks/whose_text.py --output benchmarks/results/whose_text.json   # after `recipes.py table`; an hour
    python benchmarks/whose_text.py --only soft_begun --output PATH   # the arms that go on from this one alone

After on-policy rounds the divergence a token on the student's own answers is lower (docs/recipes.md). Two things can
make it so: on the same text the student is nearer to its teacher, or its text has moved to where the two are near
anyway. So the student that the rounds began with, and the one after them, read each other's answers as well:

    D(after, its text) - D(before, its text) = learnt + moved
    learnt   after less before on the same text, averaged over both texts
    moved    after's text less before's, read by the same student, averaged over both students

(Kitagawa 1955, a difference of rates and of composition). The same for the control, which had as many steps on the
teacher's text. D is the divergence that the rounds lower, towards their target, in nats a token; the text is drawn at T
= 1, with the seeds of `recipes.py table`, for evaluation prompts, which nobody has learned from. It is read by the ids
that were sampled: the table's own reverse KL is of the text, which may be cut into other tokens.

What is drawn and each reading are kept in RECIPES/whose_text/, so that a killed comparison goes on.
"""

import argparse
import functools
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks import recipe_runs
from benchmarks.recipe_arms import Arm
from benchmarks.recipe_report import linearised
from benchmarks.recipe_runs import Job
from src.distillation.base import load_model, load_tokenizer, model_fingerprint
from src.distillation.engines import EngineSettings, make_engine, opened
from src.distillation.kd import KDConfig
from src.distillation.lora import merge_adapter
from src.distillation.teacher import Reader, model_reader
from src.evaluation.statistics import crossed
from src.grading.rows import family_of
from src.utils.common import (
    ROOT,
    UserError,
    append_jsonl,
    logger,
    provenance,
    read_jsonl,
    repair_jsonl_tail,
    run_cli,
    sha256_file,
    write_json,
    write_jsonl,
)
from src.utils.config import build_config

OBJECTIVE = ("divergence", "beta", "temperature", "teacher_temperature", "teacher_top_k", "teacher_top_p")


@dataclass(frozen=True)
class Group:
    """An arm, and those that go on from it: on-policy rounds and their control, all with one divergence and target."""

    begun: Arm
    later: list[Arm]

    @property
    def arms(self) -> list[Arm]:
        return [self.begun, *self.later]

    def readings(self) -> list[tuple[Arm, Arm]]:
        """Who reads whose text: everybody their own, and each later arm and the beginning each other's."""
        pairs = [(self.begun, self.begun)]
        for arm in self.later:
            pairs += [(self.begun, arm), (arm, self.begun), (arm, arm)]
        return pairs


def groups() -> list[Group]:
    found = []
    for begun in recipe_runs.ARMS:
        later = [arm for arm in recipe_runs.ARMS if arm.after == begun.name]
        if later:
            found.append(Group(begun, later))
    return found


# --- what is read


class Models:
    """The teacher and one seed's students, each loaded when it is asked for."""

    def __init__(self, profile: dict[str, Any]) -> None:
        self.profile = profile
        self.tokenizer = load_tokenizer(profile["model_name_or_path"])
        self.students: dict[str, Reader] = {}  # by the folder of their run

    @functools.cached_property
    def teacher(self) -> Reader:
        return self._reader(load_model(self.profile["teacher_model_name_or_path"], torch.float32))

    def student(self, run: Path) -> Reader:
        if str(run) not in self.students:
            bare = load_model(self.profile["model_name_or_path"], torch.float32)
            self.students[str(run)] = self._reader(merge_adapter(bare, str(run / "final_model")))
        return self.students[str(run)]

    def _reader(self, model: torch.nn.Module) -> Reader:
        size = recipe_runs.shared_size(self.tokenizer)
        return model_reader(model, self.tokenizer.pad_token_id, packing=False).cut(size)


def draw(job: Job, path: Path) -> None:
    """The arm's answers at T = 1, with the ids that were sampled."""
    logger.info("%s answers", job.name)
    requests = [request for request in recipe_runs.requests_of(job) if request.sampling == recipe_runs.OWN]
    adapter = str(job.run_of(job.arm.name) / "final_model")
    settings = EngineSettings(batch_size=recipe_runs.BATCH)
    drawn: list[dict[str, Any]] = []
    with opened(make_engine(settings, job.profile["model_name_or_path"], (), adapter=adapter, keep_ids=True)) as answer:
        for part in answer(requests, frozenset()):
            drawn += part
    write_jsonl(path, drawn)  # all or nothing: it takes less than a minute


def read_all(folder: Path, group: Group, jobs: dict[tuple[str, int], Job], seed: int) -> list[dict[str, Any]]:
    """Every reading of a group with one seed; those that are there already are not made again."""
    profile = jobs[group.begun.name, seed].profile
    config = build_config(KDConfig, profile | group.later[0].settings)
    objective = {name: getattr(config, name) for name in OBJECTIVE}
    teacher = model_fingerprint(profile["teacher_model_name_or_path"])
    # 1. what there is, as far as a kill has left it whole
    path = folder / "whose_text" / "readings.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.touch()
    repair_jsonl_tail(path)
    stored = read_jsonl(path) if path.stat().st_size else []
    models, found = Models(profile), []
    # 2. what everybody writes; a file's name has the hash of the weights
    weights, texts = {}, {}
    for arm in group.arms:
        job = jobs[arm.name, seed]
        weights[arm.name] = sha256_file(job.run_of(arm.name) / "final_model" / "adapter_model.safetensors")
        texts[arm.name] = path.parent / f"{job.name}_{weights[arm.name][:12]}.jsonl"
        if not texts[arm.name].is_file():
            draw(job, texts[arm.name])
    teacher_read: dict[str, torch.Tensor] = {}  # whose text -> the teacher's states of it
    for student, text in group.readings():
        # 3. a reading is of weights, text and an objective, whatever they are called
        made_of = {
            "weights": weights[student.name],
            "text": sha256_file(texts[text.name]),
            "teacher": teacher,
            "objective": objective,
        }
        names = {"student": student.name, "text": text.name, "seed": seed}
        known = next((row for row in stored if row["made_of"] == made_of), None)
        if known is None:
            # 4. the states of both, then their divergence, summed over the tokens of each answer
            logger.info("%s reads the text of %s, seed %d", student.name, text.name, seed)
            rows = recipe_runs.encoded(read_jsonl(texts[text.name]), models.tokenizer)
            if text.name not in teacher_read:
                teacher_read[text.name] = recipe_runs.hidden_of(models.teacher, rows)
            reader = models.student(jobs[student.name, seed].run_of(student.name))
            counts = [len(row.response_ids) for row in rows]
            states = recipe_runs.hidden_of(reader, rows), teacher_read[text.name]
            sums = recipe_runs.divergences(reader, models.teacher, *states, counts, config)
            known = {"made_of": made_of, "ids": [row.id for row in rows], "tokens": counts, "sums": sums}
            append_jsonl(path, [names | known])
        found.append(known | names)
    return found


# --- what comes of it


@dataclass(frozen=True)
class Table:
    """All readings of a group, as `[seeds, answers]`.

    ids: the answers that every reading has: one that was cut before it said a word is not read.
    """

    readings: Sequence[dict[str, Any]]
    ids: Sequence[str]

    def of(self, key: str, student: str, text: str) -> np.ndarray:
        """`key`: "sums" or "tokens" of the answers."""
        rows = []
        for reading in self.readings:
            if (reading["student"], reading["text"]) == (student, text):
                by_id = dict(zip(reading["ids"], reading[key], strict=True))
                rows.append([by_id[row_id] for row_id in self.ids])
        return np.array(rows, float)

    def a_token(self, student: str, text: str) -> np.ndarray:
        """Its mean is the divergence a token (see `linearised`)."""
        return linearised(self.of("sums", student, text), self.of("tokens", student, text))


def split_change(readings: Sequence[dict[str, Any]], group: Group, families: dict[str, str]) -> list[dict[str, Any]]:
    """Of each later arm: the four divergences a token, the change in its two parts, and what it is beside the control,
    with intervals."""
    table = Table(readings, sorted(set.intersection(*(set(row["ids"]) for row in readings))))
    family = [families[row_id] for row_id in table.ids]
    begun = group.begun.name
    [control] = [arm.name for arm in group.later if "on_policy_rounds" not in arm.settings]
    found = []
    for arm in group.later:
        name = arm.name
        before_before, before_after = table.a_token(begun, begun), table.a_token(begun, name)
        after_before, after_after = table.a_token(name, begun), table.a_token(name, name)
        differences = {
            "change": after_after - before_before,
            "learnt": (after_before - before_before + after_after - before_after) / 2,
            "moved": (before_after - before_before + after_after - after_before) / 2,
        }
        if name != control:
            differences["less_control_a_token"] = after_after - table.a_token(control, control)
            differences["less_control_an_answer"] = table.of("sums", name, name) - table.of("sums", control, control)
        found.append(
            {
                "arm": name,
                "begun": begun,
                "control": control,
                "objective": readings[0]["made_of"]["objective"],
                "answers": len(table.ids),
                "tokens": {
                    "before": table.of("tokens", begun, begun).mean(),
                    "after": table.of("tokens", name, name).mean(),
                },
                "before_on_its_text": before_before.mean(),
                "before_on_afters_text": before_after.mean(),
                "after_on_befores_text": after_before.mean(),
                "after_on_its_text": after_after.mean(),
                **{key: asdict(crossed(values_SP, family)) for key, values_SP in differences.items()},
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default="outputs/recipes", help="what recipes.py has written (outputs/recipes)")
    parser.add_argument("--output", required=True, help="the results' file")
    parser.add_argument("--only", nargs="+", metavar="ARM", help="the arms that go on from these alone")
    arguments = parser.parse_args()
    folder, output = Path(arguments.recipes).resolve(), Path(arguments.output).resolve()
    os.chdir(ROOT)  # the profile's folders are below it
    # 1. all arms that are read must have been measured
    jobs = {(job.arm.name, job.seed): job for job in recipe_runs.jobs_of("table", folder) if job.arm}
    wanted = [group for group in groups() if not arguments.only or group.begun.name in arguments.only]
    if not wanted:
        there = ", ".join(group.begun.name for group in groups())
        raise UserError(f"--only {' '.join(arguments.only)}: arms go on from {there}")
    for group in wanted:
        for arm in group.arms:
            for seed in recipe_runs.SEEDS:
                if not recipe_runs.is_made(jobs[arm.name, seed]):
                    raise UserError(f"{jobs[arm.name, seed].record}: not there yet; run `recipes.py table` first")
    prompts = recipe_runs.asked_rows("table", jobs[recipe_runs.ARMS[0].name, recipe_runs.SEEDS[0]].profile)
    families = {row["id"]: family_of(row) for row in prompts}
    # 2. everybody reads
    results = []
    for group in wanted:
        readings = []
        for seed in recipe_runs.SEEDS:
            readings += read_all(folder, group, jobs, seed)
        results += split_change(readings, group, families)
    # 3. what came of it
    for facts in results:
        parts = (f"{name} {facts[name]['value']:+.3f} ({facts[name]['low']:+.3f} to {facts[name]['high']:+.3f})"
                 for name in ("change", "learnt", "moved"))  # fmt: skip
        print(f"{facts['arm']:16} {facts['before_on_its_text']:.3f} -> {facts['after_on_its_text']:.3f}:", *parts)
    write_json(output, {"seeds": list(recipe_runs.SEEDS), "arms": results, "provenance": provenance()})


if __name__ == "__main__":
    run_cli(main)
