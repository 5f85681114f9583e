"""README.md of an exported model: what it was made from, how, what was measured of it, and what was not.

Numbers come from files of this very run and of an evaluation of it; a number that is not there is not written.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id

from src.evaluation.results_schema import Arm, Results, check_results
from src.evaluation.verdict import NAMES, against_sft, closeness, headline, particulars
from src.report.data_records import DataRecords
from src.report.tables import Section, sections
from src.utils.common import UserError, logger, read_json, read_jsonl

# What Markdown and HTML take for more than text inside a line; CommonMark lets all of them be escaped. GitHub and the
# hub make links of bare addresses and names, too (https://github.github.com/gfm/#autolinks-extension-): these break at
# the colon, the point after www, and the at sign.
SPECIAL = re.compile(r"[\\`*_{}\[\]<>#|~$&!@]|:(?=//)|(?<=www)\.", re.IGNORECASE)  # "a_b <i>" is "a\_b \<i\>"
FILE_ORIGIN = re.compile(r"file .*?([^/\\]+) (\(sha256 [0-9a-f]+\))")  # "file /home/me/own.csv (sha256 0f3a)"
PLACE = "PATH_OR_HUB_ID"  # on the card: a folder's name here is no address anywhere else
HUB_ORIGIN = re.compile(r"model hub, ([\w.-]+/[\w.-]+)")  # "model hub, openai/gsm8k main train at revision 740312a"
HUB_FINGERPRINT = re.compile(r"\S+@[0-9a-f]+")  # "Qwen/Qwen3-8B@b968826d", as `base.model_fingerprint` has it
FOLDER_FINGERPRINT = re.compile(r"[0-9a-f]+")  # "0f3a9c1be2d47a58", a hash of its files
SHOWN = ("heldout", "heldout_differences", "scores", "comparisons")  # sections of the report
GRADERS = {
    "numeric": "the last number of an answer is compared with the reference; the way to it is not judged",
    "python_tests": "code is run against tests; what they do not try is not judged",
    "rubric": "answers are searched for the phrases that a rubric names; what they mean is not judged",
}


@dataclass(frozen=True)
class Evaluation:
    """An evaluation of the exported run.

    arm: what the run is called in it. graders: (domain, grader) of the graded answers.
    passed_over: the other evaluations of the run, in words.
    """

    path: Path
    results: Results
    arm: Arm
    graders: Sequence[tuple[str, str]]
    passed_over: Sequence[str] = ()


@dataclass(frozen=True)
class CardFacts:
    """What the card is written from.

    config, measured: kd_config.json and kd_results.json of the run.
    records: what is known of its data.
    licence: of the base model, the fields that its own card has.
    hashes: of the adapter and of all that the card was made from, by name.
    end: the token that ends a turn. sampling: what generation_config.json has, in words.
    """

    name: str
    config: Mapping[str, Any]
    measured: Mapping[str, Any]
    records: DataRecords
    evaluation: Evaluation | None
    licence: Mapping[str, str]
    hashes: Mapping[str, str]
    dtype: str
    check: str
    end: str
    sampling: str
    hybrid: bool
    provenance: Mapping[str, Any]


def plain(text: Any) -> str:
    """Text of others as one line of Markdown that says it and nothing else."""
    # 1. no control characters and no line ends; 2. every special sign gets a backslash: "a_b\n<i>" -> "a\_b \<i\>"
    printable = "".join(letter if letter.isprintable() else " " for letter in str(text))
    return SPECIAL.sub(r"\\\g<0>", " ".join(printable.split()))


@dataclass(frozen=True, order=True)
class _Size:
    """How much an evaluation tells: the one that asked more tells more, and of two alike the newer is taken."""

    prompts: int
    samples: int  # a prompt
    time: datetime


@dataclass(frozen=True)
class _Candidate:
    size: _Size
    path: Path
    arm: Arm
    results: Results


def _size(results: Results, path: Path) -> _Size:
    """How large and how old an evaluation is; times are compared as moments, whatever their offset from UTC.

    Raises:
        UserError: it does not say when it was made.
    """
    settings = results["settings"]
    try:
        time = datetime.strptime(results["provenance"]["time"], "%Y-%m-%dT%H:%M:%S%z")  # as `common.provenance` has it
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: no provenance.time such as 2026-11-27T09:00:00+0000; make it again") from None
    # of one that does not say: 0 prompts, 1 sample
    return _Size(settings.get("prompts", 0), settings.get("num_samples", 1), time)


def _arm_of(results: Any, measured: Any) -> Arm | None:
    """What a run with this kd_results.json is called in an evaluation; None if it took no part."""
    # unchecked JSON, perhaps of another version: nothing is taken for granted
    training = results.get("training") if isinstance(results, dict) else None
    for arm in ("kd", "sft"):
        if isinstance(training, dict) and training.get(arm) == measured:
            return arm
    return None


def find_evaluation(folder: Path, run: Path) -> Evaluation | None:
    """The evaluation with most prompts, in or below a folder, that results.json records to be of this very run.

    Of those with as many prompts it is the one with most samples, and of these the newest. A run is known by its whole
    kd_results.json, times included: a folder's name may be used again by another run.

    Raises:
        UserError: all that there are of this run are of another version of this code, or broken.
    """
    # 1. every evaluation of this run that can be read
    measured = read_json(run / "kd_results.json")
    found: list[_Candidate] = []
    passed_over: list[str] = []
    refused: UserError | None = None
    for path in sorted(folder.rglob("results.json")):
        arm = None
        try:
            results = read_json(path)
            if arm := _arm_of(results, measured):  # what is of other runs is not checked: it is no reason to speak
                check_results(results, path)
                found.append(_Candidate(_size(results, path), path, arm, results))
        except UserError as error:
            logger.warning("%s; passed over", error)
            if arm:
                refused = error
                passed_over.append(f"{path.parent.name} (not readable by this version)")
    if not found and refused:
        raise refused
    if not found:
        return None
    # 2. the largest; the others are named on the card
    *others, taken = sorted(found, key=lambda candidate: candidate.size)
    for other in others:
        asked = f"{other.size.prompts} prompts, {other.size.samples} samples of each"
        passed_over.append(f"{other.path.parent.name} ({asked}, {other.size.time:%Y-%m-%d %H:%M %z})")
    # 3. who graded, which only the answers say
    samples = taken.path.with_name("samples.jsonl")
    rows = read_jsonl(samples) if samples.is_file() else []
    graders = sorted({(row["domain"], row["grader"]) for row in rows})
    return Evaluation(taken.path, taken.results, taken.arm, graders, passed_over)


def _is_hub_id(model: str, fingerprint: str) -> bool:
    """Whether a model was read from the hub: by the fingerprint of what was read, where there is one."""
    if HUB_FINGERPRINT.fullmatch(fingerprint):
        return True
    if FOLDER_FINGERPRINT.fullmatch(fingerprint):  # "models/student" looks like an id where it is no folder
        return False
    # one that a server had the weights of: "Qwen/Qwen3-8B", "gpt2"; not what is a folder here, nor "/data/student"
    return not Path(model).exists() and model.count("/") <= 1


def _model(name: str, fingerprint: str) -> str:
    """A model in words: a hub id with its revision, if it has one, or the name of a folder, without the way to it."""
    # "Qwen/Qwen3-8B@main" -> id, revision
    hub_id, _, revision = name.partition("@")
    if not _is_hub_id(hub_id, fingerprint):
        return f"the local folder {plain(Path(name).name)}"
    return plain(hub_id) + (f" at revision {plain(revision)}" if revision else "")


def _base(facts: CardFacts) -> str:
    """The base model in words; its fingerprint of a hub model is id@commit."""
    name, fingerprint = facts.config["model_name_or_path"], facts.hashes["base model"]
    return _model(fingerprint if "@" in fingerprint else name, fingerprint)


def _teacher(facts: CardFacts) -> str:
    return _model(facts.config["teacher_model_name_or_path"], facts.config["fingerprint"].get("teacher", ""))


def _front_matter(facts: CardFacts) -> dict[str, Any]:
    """The metadata that the hub reads (https://huggingface.co/docs/hub/model-cards)."""
    data: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    base = facts.config["model_name_or_path"].partition("@")[0]
    if _is_hub_id(base, facts.hashes["base model"]):  # the hub refuses a card that names a path
        data |= {"base_model": base, "base_model_relation": "finetune"}
    if ids := sorted({found for entry in _trained_on(facts) if (found := _hub_data_set(entry["origin"]))}):
        data["datasets"] = ids
    return data | dict(facts.licence) | {"tags": ["knowledge-distillation", "lora"]}


def _hub_data_set(origin: str) -> str | None:
    """The hub's id of a data set that comes from there; what is no id (a/..) would have the hub refuse the card."""
    # "model hub, openai/gsm8k main train at revision 740312a" -> "openai/gsm8k"
    found = HUB_ORIGIN.match(origin)
    if found is None:
        return None
    try:
        validate_repo_id(found[1])
    except HFValidationError:
        return None
    return found[1]


def _public(origin: str) -> str:
    """An origin without the way to a local file, which is nobody else's business: its name and hash say enough."""
    return FILE_ORIGIN.sub(r"file \1 \2", origin)


def _trained_on(facts: CardFacts) -> list[Mapping[str, Any]]:
    sources = facts.records.manifest["sources"] if facts.records.manifest else []
    return [entry for entry in sources if entry["split"] == "train"]


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    # a rule stands below the first line, the header
    lines = [f"| {' | '.join(map(plain, cells))} |" for cells in (header, *rows)]
    return [lines[0], f"|{'---|' * len(header)}", *lines[1:], ""]


def _own_answers(config: Mapping[str, Any], measured: Mapping[str, Any]) -> list[str]:
    """How many of the rows were the student's own answers, in a run of the version that can have them."""
    rounds, fraction = config.get("on_policy_rounds", 0), config.get("on_policy_fraction", 0)
    if config["arm"] != "kd" or not rounds or not fraction:
        return []
    read = measured["steps"] * config["rows_per_step"]
    return [
        f"- On-policy: {rounds} rounds; {measured['rounds']['rows']} of the {read} rows that the steps took were the "
        f"student's own answers (a share of {fraction:g} was asked for; drawn at T = "
        f"{config['on_policy_temperature']:g}, top_p {config['on_policy_top_p']:g}, top_k "
        f"{config['on_policy_top_k']}), learned from by the divergence alone."
    ]


def _beginning(config: Mapping[str, Any]) -> list[str]:
    """Whose adapter training went on from, if it did: the run's name, without the way to it."""
    if not config.get("init_from"):
        return []
    # "runs/gpu_optimized_kd_20261124_101500/final_model" -> "gpu_optimized_kd_20261124_101500"
    run = Path(config["init_from"].rstrip("/").removesuffix("/final_model")).name
    return [f"- Began from the adapter of {plain(run)} (sha256 {config['fingerprint']['init_from'][:16]})."]


def _what(facts: CardFacts) -> list[str]:
    config, base = facts.config, _base(facts)
    if config["arm"] == "kd":
        kind = "distilled from"
        # "0.5 x T^2 x forward_kl(teacher, student) at T = 2 (the teacher at 0.7, top_p 0.8) + 0.5 x cross-entropy"
        objective = f"{config['alpha']:g} x T^2 x {config['divergence']}(teacher, student) at T = "
        objective += f"{config['temperature']:g}"
        cut = [f"top_k {config['teacher_top_k']}"] if config.get("teacher_top_k") else []
        cut += [f"top_p {config['teacher_top_p']:g}"] if config.get("teacher_top_p", 1) < 1 else []
        if config["teacher_temperature"] or cut:  # None: the teacher's T is the student's
            own = f"{config['teacher_temperature'] or config['temperature']:g}"
            objective += f" (the teacher at {', '.join([own, *cut])})"
        objective += f" + {1 - config['alpha']:g} x cross-entropy"
    else:
        kind, objective = "fine-tuned on the answers of", "cross-entropy alone: the control of a distilled student"
    return [
        f"# {plain(facts.name)}",
        "",
        f"{base[0].upper()}{base[1:]}, {kind} {_teacher(facts)}: a LoRA adapter of rank "
        f"{config['lora_r']}, merged into the weights ({facts.dtype}).",
        "",
        f"- Rows: {config['rows']['train']} answers of the teacher to train on, {config['rows']['validation']} to "
        f"watch, {config['rows']['heldout']} held out.",
        f"- Objective: {plain(objective)}.",
        *_own_answers(config, facts.measured),
        *_beginning(config),
        f"- Training: {facts.measured['steps']} steps of {config['rows_per_step']} rows, learning rate "
        f"{config['learning_rate']:g} ({plain(config['lr_scheduler_type'])}, {config['warmup_steps']} warm-up steps), "
        f"LoRA rank {config['lora_r']}, alpha {config['lora_alpha']}, seed {config['seed']}.",
        f"- Merged weights: {plain(facts.check)}.",
        "",
    ]


def _section(section: Section) -> list[str]:
    lines = [f"### {plain(section.title)}", ""]
    if section.rows:
        lines += _table(section.header, section.rows)
    for sentence in (section.further, section.note):
        lines += [plain(sentence), ""] if sentence else []
    return lines


IN_4_BITS = (
    "measured with the base model's weights in 4 bits (NF4), as in training. The weights here are the adapter added to "
    "unquantised ones, of which nothing is measured so."
)


def _not_evaluated(facts: CardFacts) -> list[str]:
    measured = facts.measured
    before, after = measured["before"], measured["after"]
    kl_is = measured.get("kl_is", "exact")  # a run of the version before does not say
    # a KL from a server's top tokens is a bound and must read as one
    least = "" if kl_is == "exact" else "at least "
    bound = f" The KL is a {kl_is}: the teacher's server says no more." if least else ""
    return [
        "**Not evaluated.** There is no results.json of an evaluation of this run: nothing is known of the quality "
        "of its answers.",
        "",
        f"All that was measured is how close it came to its teacher on {measured['heldout_rows']} held-out answers "
        f"({measured['heldout_tokens']} tokens), without intervals: KL to the teacher {least}"
        f"{after['kl_to_teacher']:.4f} nats per token ({least}{before['kl_to_teacher']:.4f} before training), the "
        f"teacher's most likely token is its own at {after['top1_agreement']:.1%} ({before['top1_agreement']:.1%} "
        f"before).{plain(bound)}",
        "",
    ]


def _merged_where(engine: str) -> str:
    """How the weights that were evaluated relate to these, by what answered."""
    if engine == "transformers":
        return "it merged the adapter by itself, so that these weights may differ by rounding"
    return (
        "a server answered there, with the adapter beside the base model's weights rather than merged into them, so "
        "that these weights may differ by rounding"
    )


def _results(facts: CardFacts) -> list[str]:
    lines = ["## Results", ""]
    if facts.evaluation is None:
        lines += _not_evaluated(facts)
        return lines + ([f"That was {IN_4_BITS}", ""] if facts.config.get("load_in_4bit") else [])
    results, arm = facts.evaluation.results, facts.evaluation.arm
    if arm == "kd":  # these sentences are about the distilled student, which a control is not
        for sentence in (headline(results), closeness(results), against_sft(results)):
            lines += [plain(sentence), ""] if sentence else []
    settings = results["settings"]
    # settings that say how large the evaluation was
    named = ("prompts", "mode", "num_samples", "max_new_tokens", "engine", "seed")
    asked = [f"{name} {settings[name]}" for name in named if name in settings]
    lines += [
        f"This model is the arm {NAMES[arm]}. The evaluation is of {plain(results['provenance']['time'])} "
        f"({plain(', '.join(asked))}); {_merged_where(settings.get('engine', 'transformers'))}.",
        "",
    ]
    if facts.evaluation.passed_over:
        others = "; ".join(facts.evaluation.passed_over)
        lines += [f"Other evaluations of this run are smaller, older or unreadable: {plain(others)}.", ""]
    if facts.config.get("load_in_4bit") and "heldout" in results:
        lines += [f"KL, NLL, agreement and acceptance on held-out text were {IN_4_BITS}", ""]
    for section in sections(results):
        if section.name in SHOWN:
            lines += _section(section)
    return lines


def vllm_command(folder: str, hybrid: bool) -> str:
    """How the folder is served; a hybrid student's template is told there not to ask for a thought."""
    # a hybrid model thinks where its template is not told otherwise
    off = " --default-chat-template-kwargs '{\"enable_thinking\": false}'" if hybrid else ""
    return f"vllm serve {shlex.quote(folder)}{off}"


def _use(facts: CardFacts) -> list[str]:
    # the same, as the pipeline takes it
    off = ', tokenizer_encode_kwargs={"enable_thinking": False}' if facts.hybrid else ""
    lines = [
        "## How to use it",
        "",
        f"{plain(PLACE)} is this folder, or the id it has on the hub.",
        "",
        "```python",
        "from transformers import pipeline",
        "",
        f'generate = pipeline("text-generation", model="{PLACE}")',
        'question = [{"role": "user", "content": "What is 17 + 25?"}]',
        f'print(generate(question, max_new_tokens=256{off})[0]["generated_text"][-1]["content"])',
        "```",
        "",
        "```bash",
        vllm_command(PLACE, facts.hybrid),
        "```",
        "",
        f"It ends its turn with {plain(facts.end)}; generation\\_config.json stops there. {facts.sampling}",
        "",
    ]
    if facts.hybrid:
        lines += [
            "It was trained to answer without a thought: its chat template must be told `enable_thinking=False`, as "
            'above, or in a request by `"chat_template_kwargs": {"enable_thinking": false}`. With thinking on it was '
            "neither trained nor evaluated.",
            "",
        ]
    return lines


def _data(facts: CardFacts) -> list[str]:
    lines = ["## Training data", ""]
    if facts.records.manifest is None:
        why = plain(facts.records.missing["manifest.json"])
        return [*lines, f"Where the prompts come from is not recorded: {why}.", ""]
    rows = [
        [entry["source"], entry["rows"], entry["licence"], _public(entry["origin"])] for entry in _trained_on(facts)
    ]
    said = "Prompts, which the teacher answered; its answers were cleaned before training."
    return [*lines, said, "", *_table(["source", "prompts", "licence", "origin"], rows)]


def _limits(facts: CardFacts) -> list[str]:
    # each from a fact of the run: nothing is warned of that does not apply
    lines = [f"One training seed ({facts.config['seed']}): how much another would differ is not known."]
    if sources := [entry["source"] for entry in _trained_on(facts)]:
        lines.append(f"Trained for {', '.join(sources)} alone; nothing is known of it elsewhere, nor of its safety.")
    if "adapter_sha256" not in facts.measured:
        lines.append(
            "The run did not record the hash of its adapter: that these are the weights that it measured is not shown."
        )
    if facts.config.get("load_in_4bit"):
        lines.append(
            "Trained with the base model's weights in 4 bits (NF4), merged into unquantised ones: the two differ by "
            "the error of the quantisation."
        )
    if facts.records.stats:
        split = facts.records.stats["train"]
        cut = split["by_reason"]["truncated"]
        lines.append(
            f"{cut} of the teacher's {split['answers']} answers ({cut / split['answers']:.1%}) were cut at the token "
            "limit and not trained on: long answers are underrepresented."
        )
    else:
        why = facts.records.missing["stats.json"]
        lines.append(f"How many of the teacher's answers were cut or left out is not recorded: {why}.")
    if facts.evaluation is None:
        lines.append("No graded answers: no gain over the base model is shown, nor over training without the teacher.")
    else:
        if facts.evaluation.arm == "kd":
            lines += particulars(facts.evaluation.results)
        for domain, grader in facts.evaluation.graders:
            lines.append(f"Graded in {domain} by {grader}: {GRADERS.get(grader, 'another grader')}.")
    return ["## Limits", "", *(f"- {plain(line)}" for line in lines), ""]


def _licence(facts: CardFacts) -> list[str]:
    licences = sorted({entry["licence"] for entry in _trained_on(facts)})  # each licence once
    data = f"the data's ({plain(', '.join(licences))})" if licences else "the data's (not recorded)"
    if facts.licence:
        own = f"The base model's licence is {plain(facts.licence.get('license_name') or facts.licence['license'])}."
    else:
        own = "The base model's licence is not recorded here: look it up before passing this model on."
    teacher = _teacher(facts)
    return ["## Licence", "", f"{own} Check beside it {data}, and what the licence of the teacher ({teacher}) says "
            "about models that are trained on its answers.", ""]  # fmt: skip


def _provenance(facts: CardFacts) -> list[str]:
    lines = ["## Provenance", ""]
    for what, own in (("Trained", facts.config["provenance"]), ("Exported", facts.provenance)):
        commit = own["git_commit"] or "unknown commit"
        changed = ", with changes" if own["git_dirty"] else ""
        versions = ", ".join(f"{name} {version}" for name, version in own["versions"].items())
        lines.append(f"- {what} with {plain(commit)}{changed} ({plain(versions)})")
    if date := facts.config["fingerprint"].get("prompt_date"):
        lines.append(f"- Its chat template asks for the day; in training it read {plain(date)}")
    return [*lines, *(f"- {plain(name)}: {plain(value)}" for name, value in facts.hashes.items()), ""]


def model_card(facts: CardFacts) -> str:
    """README.md's text."""
    # sort_keys: the order above is for readers; allow_unicode: names stay legible
    front = yaml.safe_dump(_front_matter(facts), sort_keys=False, allow_unicode=True)
    lines = [*_what(facts), *_results(facts), *_use(facts), *_data(facts), *_limits(facts), *_licence(facts),
             *_provenance(facts)]  # fmt: skip
    return f"---\n{front}---\n\n" + "\n".join(lines)
