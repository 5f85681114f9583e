"""What a teacher has to say of a student's wrong beginnings: how often it ends them right, and how often the student.

    python benchmarks/teacher_goes_on.py RUN... --output PATH   # on-policy runs of one comparison, finished

On-policy rounds can teach right answers only where the teacher's beliefs lead from what the student has written to one.
So each of its own answers in the runs' rounds is cut in the middle, and both go on from there, sampled as the teacher's
answers were; the student with the adapter that the run began with. Beside them: the whole answer, and what the teacher
answered by itself. Told apart by whether the student's answer was right. Intervals count families of prompts as
clusters (Wilson's of shares, a bootstrap of the difference); the runs' seeds are not counted as samples.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from src.distillation.base import end_of_turn_id, load_model, load_tokenizer, prompt_ids, prompt_text
from src.distillation.batching import clean_files
from src.distillation.lora import merge_adapter
from src.evaluation.statistics import difference, proportion
from src.grading.graders import grade, read_dataset
from src.grading.rows import Row, family_of
from src.utils.common import ROOT, UserError, provenance, read_json, read_jsonl, run_cli, write_json
from src.utils.config import read_merged

PROFILE = Path(__file__).with_name("recipes.yaml")
BATCH = 96  # beginnings in one forward pass


@dataclass
class Begun:
    """One of a student's answers, cut.

    prompt, beginning: token ids; of the answer its first half, so that something is left to be done.
    right: who -> whether that answer is.
    """

    row: Row
    prompt: list[int]
    beginning: list[int]
    right: dict[str, bool]


def is_right(row: Row, text: str, finish_reason: str) -> bool:
    return grade(row, text, finish_reason).outcome == "correct"


def read_beginnings(run: Path, data: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[Begun]:
    """Every answer of a run's rounds that has two tokens or more.

    Raises:
        UserError: the run has no rounds.
    """
    # 1. every prompt's row, and whether the teacher's own answer to it is right
    config = read_json(run / "kd_config.json")
    rows = {row["id"]: row for row in read_dataset(data / "train_dataset.jsonl")}
    answers = read_jsonl(Path(config["experiment_dir"]) / "sft" / "sft_train_data.jsonl")
    teachers = {
        given["id"]: is_right(rows[given["id"]], given["response"], given["finish_reason"]) for given in answers
    }
    rounds = sorted(run.glob("rounds/round_*/sft"))
    if not rounds:
        raise UserError(f"{run}: no on-policy rounds; name a run that was made with --on_policy_rounds")
    # 2. the student's answers, as they were learned from; names of rounds sort by their number
    for folder in rounds:
        for own in read_jsonl(clean_files(folder)["train"]):
            row, text = rows[own["id"]], own["messages"][-1]["content"]
            # the ids that were sampled, where the round has them: the text may be cut in another way
            ids = own.get("response_ids") or tokenizer(text, add_special_tokens=False)["input_ids"]
            # half of one token is none
            if len(ids) < 2:
                continue
            # the end of the prompt is where an answer begins
            [prompt] = prompt_ids(tokenizer, [prompt_text(tokenizer, own["messages"][:-1])])
            right = {"student": is_right(row, text, own["finish_reason"]), "teacher": teachers[row["id"]]}
            yield Begun(row, prompt, ids[: len(ids) // 2], right)


@torch.no_grad()
def go_on(
    who: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    begun: Sequence[Begun],
    sampling: dict[str, Any],
) -> None:
    """Have a model end all beginnings, and write down which come out right.

    Args:
        sampling: of `generate`; its max_new_tokens hold for beginning and end together, as for an answer made at once.
    """
    torch.manual_seed(0)
    end = end_of_turn_id(tokenizer)
    # like lengths side by side, so that little is padded
    order = sorted(begun, key=lambda one: len(one.prompt) + len(one.beginning))
    for first in range(0, len(order), BATCH):
        batch = order[first : first + BATCH]
        # 1. prompts and beginnings, padded on the left
        texts = [one.prompt + one.beginning for one in batch]
        width = max(map(len, texts))
        # on the left, so that all rows end where the model goes on; the mask hides the padding
        ids = torch.tensor([[end] * (width - len(text)) + text for text in texts])
        mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])
        # 2. what follows, up to the end of the turn
        made = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, eos_token_id=end, pad_token_id=end, **sampling
        )[:, width:]
        # 3. the whole answer is graded
        for one, following in zip(batch, made.tolist(), strict=True):
            following = following[: sampling["max_new_tokens"] - len(one.beginning)]
            # a row that has ended is filled up with `end`, so that the first one counts
            has_ended = end in following
            following = following[: following.index(end)] if has_ended else following
            # decoded together: the cut may lie within a character or a word
            text = tokenizer.decode(one.beginning + following, skip_special_tokens=True)
            one.right[who] = is_right(one.row, text, "stop" if has_ended else "length")


def summary(begun: Sequence[Begun]) -> dict[str, Any]:
    """Shares of right answers, and teacher less student where both go on from the same beginning."""
    families = [family_of(one.row) for one in begun]
    # who -> 1 or 0 for each answer
    shares = {who: [float(one.right[who]) for one in begun] for who in begun[0].right}
    # paired: both went on from the same beginning; all answers to a family's prompts are drawn together
    gap = difference(shares["teacher_goes_on"], shares["student_goes_on"], families, seed=0)
    right = {who: proportion(share, families, samples=1)._asdict() for who, share in shares.items()}
    return {"answers": len(begun), "right": right, "teacher_less_student": gap._asdict()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders with rounds/")
    parser.add_argument("--output", required=True, help="the results' file")
    arguments = parser.parse_args()
    runs, output = [run.resolve() for run in arguments.runs], Path(arguments.output).resolve()
    os.chdir(ROOT)  # the profile's folders are below it
    profile = read_merged(PROFILE)
    names = ("temperature", "top_p", "top_k", "max_new_tokens")
    sampling = {name: profile["generate_sft_data"][name] for name in names}
    tokenizer = load_tokenizer(profile["model_name_or_path"])
    begun: list[Begun] = []
    # 1. the student, of each run its own
    for run in runs:
        own = list(read_beginnings(run, Path(profile["data_dir"]), tokenizer))
        # none: the run began with the student as it is
        adapter = read_json(run / "kd_config.json")["init_from"]
        student = load_model(profile["model_name_or_path"], torch.float32)
        student = merge_adapter(student, adapter) if adapter else student
        go_on("student_goes_on", student, tokenizer, own, sampling)
        begun += own
    # 2. the teacher, of all runs the same
    teacher = load_model(profile["teacher_model_name_or_path"], torch.float32)
    go_on("teacher_goes_on", teacher, tokenizer, begun, sampling)
    # 3. wrong and right answers of the student apart
    results: dict[str, Any] = {"runs": [run.name for run in runs], "sampling": sampling}
    for word, wanted in (("right", True), ("wrong", False)):
        own = [one for one in begun if one.right["student"] == wanted]
        if not own:
            continue
        results[f"the_student_was_{word}"] = summary(own)
        for who, share in results[f"the_student_was_{word}"]["right"].items():
            print(f"{word:6} {len(own):4} answers  {who:16} right in {100 * share['value']:.1f} %")
    write_json(output, results | {"provenance": provenance()})


if __name__ == "__main__":
    run_cli(main)
