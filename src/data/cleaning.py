"""From teacher answers to training rows: what is kept, what is dropped and why; nothing of the evaluation leaks in."""

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from src.data.code_overlap import function_trees
from src.grading.code import function_names
from src.grading.graders import grade_all
from src.grading.rows import UNGRADED, Row, question_of
from src.grading.sandbox import CLOSED, Sandbox
from src.utils.answers import END_WORDS, answer_text, final_answer, finish_word, has_think_tag, without_code
from src.utils.common import UserError

REASONS = (
    "unknown_id", "duplicate_key", "refused", "empty", "truncated", "special_token", "think_tag", "refusal",
    "duplicate", "eval_overlap", "wrong", "not_selected",
)  # fmt: skip
SELECT = ("first_correct", "all_correct", "shortest_correct", "all")
# of a grader's outcome; a truncated answer never gets there
VERIFIED = {"correct": True, "wrong": False, "no_answer": False, "not_executed": None, "error": None}

# "<|im_start|>", "<｜Assistant｜>", "<end_of_turn>", "<eos>", "[/INST]"
SPECIAL_TOKEN = re.compile(r"<[|｜][\w ▁]+[|｜]>|<(?:start|end)_of_turn>|<(?:bos|eos)>|\[/?INST\]")
# "i can't", "i am unable to"
CANNOT = r"i(?:'m| am)? (?:can'?t|cannot|can not|won'?t|(?:am )?(?:unable|not able) to)"
# "i'm sorry, but i can't", "as an ai language model, i cannot", "i am unable to assist", "作为一个人工智能，我不能";
# not "i cannot help but", nor "i can't" with another verb
REFUSAL = re.compile(
    rf"\W*(?:(?:i(?:'m| am) )?(?:(?:very|really|so) )?sorry,? (?:but )?{CANNOT}|i apologi[sz]e,? (?:but )?{CANNOT}|"
    rf"(?:unfortunately, )?as an? (?:ai|artificial intelligence)\b[\w ]*,? (?:{CANNOT}|i (?:do not|don't) have)|"
    rf"(?:unfortunately,? )?{CANNOT} (?:help(?! but)|assist|comply|fulfil|provide|answer|do that|engage|create)|"
    r"(?:很|非常)?(?:抱歉|对不起)[，,]\s*(?:但)?我?(?:不能|无法)|作为(?:一[个名]|)(?:人工智能|ai)[^，。]{0,8}[，,]?\s*我?(?:不能|无法|没有))"
)

NGRAM = 13  # words, as in GPT-3's filter (Brown et al. 2020, appendix C)
SHINGLE, ALIKE = 3, 0.8  # two masked questions are near-duplicates if their word 3-grams have this Jaccard similarity
MIN_WORDS = 8  # a shorter question says too little to be told apart by its words
BOILERPLATE = 10  # an n-gram in more rows than this is a template's wording, not a leak
SHORT_NGRAM, SHORT_SHARE = 8, 0.25  # questions that share this part of the shorter one's 8-grams are one question


def words_of(text: str) -> list[str]:
    """Lower-case words and numbers, punctuation dropped; an identifier with underscores and a Han character is one."""
    # "It's max_len = 18元" -> it, s, max_len, 18, 元
    return re.findall(r"[\u4e00-\u9fff]|[^\W\u4e00-\u9fff]+", text.lower())


def word_ngrams(text: str, n: int) -> set[str]:
    """All runs of n consecutive words, joined by blanks; empty for a shorter text."""
    words = words_of(text)
    # "a b c", n = 2 -> {"a b", "b c"}
    return {" ".join(words[start : start + n]) for start in range(len(words) - n + 1)}


def gram_counts(rows: Iterable[Row], n: int, references: bool) -> Counter[str]:
    """In how many rows each n-gram of the questions (and references) stands.

    A question shorter than n words counts as a whole from 8 words on; a shorter reference (a number) does not count.
    """
    counts: Counter[str] = Counter()
    for row in rows:
        question = question_of(row)
        grams = word_ngrams(question, n) or word_ngrams(question, max(MIN_WORDS, len(words_of(question))))
        # sets: a row counts once for each of its n-grams
        counts.update(grams | word_ngrams(row["reference"], n) if references else grams)
    return counts


def overlap_index(rows: Iterable[Row], n: int = NGRAM) -> set[str]:
    """The n-grams of `gram_counts` that betray a row: all but the ones found in more than 10 rows."""
    return {gram for gram, number in gram_counts(rows, n, references=True).items() if number <= BOILERPLATE}


def entry_lengths(index: set[str]) -> list[int]:
    """Word counts of the entries, for `overlaps`."""
    # 13, and those of whole short questions
    return sorted({gram.count(" ") + 1 for gram in index})


def overlaps(text: str, index: set[str], lengths: Iterable[int], given: str = "") -> bool:
    """Whether `text` holds an entry of `index` that does not also stand in `given`."""
    # the text's n-grams of every length that an entry has, less those of `given`
    return any((word_ngrams(text, n) & index) - word_ngrams(given, n) for n in lengths)


def masked_question(row: Row) -> str:
    """The question's words with every number as 0; empty below 8 words."""
    # "He pays 1,300.5 for 12" -> "he pays 0 for 0"
    words = words_of(re.sub(r"\d+(?:[.,]\d+)*", " 0 ", question_of(row)))
    return " ".join(words) if len(words) >= MIN_WORDS else ""


def near_duplicates(rows: list[Row], names: Collection[str] = ()) -> list[Row]:
    """The rows that, numbers and `names` masked, are near-duplicates of an earlier row. Exact: no hashing.

    Two sets that alike share one of their rarest 3-grams, so only rows that do are compared (Bayardo et al. 2007).
    """
    # 1. numbers and names masked, the longest name first: "cart-service" before "cart"
    longest_first = sorted(names, key=len, reverse=True)
    # "cart" as a word of its own, not in "cartoon"; without names "(?!)", which matches nothing
    pattern = "|".join(rf"(?<![a-z0-9_]){re.escape(name)}(?![a-z0-9_])" for name in longest_first) or "(?!)"
    mask = re.compile(pattern, re.IGNORECASE)
    # "10:15" -> " 0 ", too
    masked = [re.sub(r"\d+(?:[.,:]\d+)*", " 0 ", mask.sub(" name ", question_of(row))) for row in rows]
    shingles = [word_ngrams(text, SHINGLE) or {text} for text in masked]
    # 2. in how many rows each 3-gram stands; ties by text, so that all rows put their 3-grams in one order
    number_of = Counter(gram for grams in shingles for gram in grams)
    rows_with: dict[str, list[int]] = {}
    found = []
    # 3. each row against those earlier ones that share one of its rarest
    for index, grams in enumerate(shingles):
        rarest = sorted(grams, key=lambda gram: (number_of[gram], gram))
        # of 10 3-grams an alike row has at least 8, so one of any 3: the 3 rarest are looked up
        prefix = rarest[: len(grams) - math.ceil(ALIKE * len(grams) - 1e-9) + 1]
        earlier = {other for gram in prefix for other in rows_with.get(gram, [])}
        # Jaccard >= 0.8, without a division
        if any(len(grams & shingles[other]) >= ALIKE * len(grams | shingles[other]) for other in earlier):
            found.append(rows[index])
        for gram in prefix:
            rows_with.setdefault(gram, []).append(index)
    return found


def shared_ngrams(train_rows: list[Row], eval_rows: list[Row], template: set[str]) -> set[str]:
    """Ids of training rows whose question shares a quarter of the shorter one's 8-grams with an evaluation question.

    Args:
        template: the 8-grams that are template wording, which count on neither side.
    """
    # 1. which evaluation rows hold each 8-gram, and how many each has
    holders: dict[str, list[int]] = defaultdict(list)
    sizes = []
    for number, row in enumerate(eval_rows):
        grams = word_ngrams(question_of(row), SHORT_NGRAM) - template
        sizes.append(len(grams))
        for gram in grams:
            holders[gram].append(number)
    # 2. training rows: how many 8-grams are shared with each of those rows
    found = set()
    for row in train_rows:
        grams = word_ngrams(question_of(row), SHORT_NGRAM) - template
        shared = Counter(number for gram in grams & holders.keys() for number in holders[gram])
        if any(count >= SHORT_SHARE * min(len(grams), sizes[number]) for number, count in shared.items()):
            found.add(row["id"])
    return found


def check_disjoint(train_rows: list[Row], eval_rows: list[Row]) -> None:
    """Refuse a training row that is an evaluation row.

    Raises:
        UserError: same id, or same question but for case and blanks; names source and id of both rows.
    """
    by_id = {row["id"]: row for row in eval_rows}
    # case and runs of blanks aside
    by_question = {" ".join(question_of(row).lower().split()): row for row in eval_rows}
    for row in train_rows:
        twin = by_id.get(row["id"]) or by_question.get(" ".join(question_of(row).lower().split()))
        if twin:
            raise UserError(
                f"{row['source']} {row['id']} and {twin['source']} {twin['id']} are one row, in training and "
                f"evaluation: {question_of(row)[:60]!r}; take it out of one of the two sources"
            )


def drop_overlapping(train_rows: list[Row], eval_rows: list[Row]) -> tuple[list[Row], list[dict[str, str]]]:
    """Drop training rows that come too near to an evaluation row.

    Returns:
        The kept rows and, for each dropped one, `{id, reason}` with the first of: `ngram` (the questions share a
        13-gram, numbers kept, that is not template wording, in more than 10 rows of both splits), `masked_numbers` (the
        same question of at least 8 words but for its numbers), `short_ngrams` (a quarter of the shorter question's
        8-grams, template wording aside), `entry_point` (a function of the same name), `syntax_tree` (the reference
        solutions hold the same function but for its names).

    Raises:
        UserError: an exact overlap, see `check_disjoint`.
    """
    check_disjoint(train_rows, eval_rows)
    # 1. what the evaluation is known by; wording that both splits together use in many rows betrays nothing
    counts, train_counts = (gram_counts(rows, NGRAM, references=False) for rows in (eval_rows, train_rows))
    index = {gram for gram, number in counts.items() if number + train_counts[gram] <= BOILERPLATE}
    lengths = entry_lengths(index)
    short_counts = gram_counts([*eval_rows, *train_rows], SHORT_NGRAM, references=False)
    template = {gram for gram, number in short_counts.items() if number > BOILERPLATE}
    sharing = shared_ngrams(train_rows, eval_rows, template)
    masked = {masked_question(row) for row in eval_rows} - {""}
    names: set[str] = set()
    trees: set[str] = set()
    for row in eval_rows:
        trees.update(function_trees(row))
        if row["grader"] == "python_tests":
            names.update(function_names(row))
    # 2. the first of these that a training row has, too
    kept, dropped = [], []
    for row in train_rows:
        if overlaps(question_of(row), index, lengths):
            dropped.append({"id": row["id"], "reason": "ngram"})
        elif masked_question(row) in masked:
            dropped.append({"id": row["id"], "reason": "masked_numbers"})
        elif row["id"] in sharing:
            dropped.append({"id": row["id"], "reason": "short_ngrams"})
        elif row["grader"] == "python_tests" and function_names(row) & names:
            dropped.append({"id": row["id"], "reason": "entry_point"})
        elif function_trees(row) & trees:
            dropped.append({"id": row["id"], "reason": "syntax_tree"})
        else:
            kept.append(row)
    return kept, dropped


def text_fault(answer: dict[str, Any], prompt: str = "") -> str | None:
    """The first reason to reject an answer that shows without knowing its siblings.

    Control tokens that stand in code, or in the answer's own prompt, and think tags in code are text.
    """
    # the order is that of `REASONS`: the first that applies is told
    text, finish_reason = answer_text(answer["response"]), finish_word(answer["finish_reason"])
    if finish_reason == "refused":
        return "refused"
    if not text and final_answer(answer["response"]) is not None:  # no text behind a thought that ended, or without one
        return "empty"
    if finish_reason != "stop":
        return "truncated"
    # what a prompt spells out ("what does <eos> mean?") an answer may repeat
    control_words = [match[0] for match in SPECIAL_TOKEN.finditer(without_code(text)) if match[0] not in prompt]
    if control_words or END_WORDS.search(text):
        return "special_token"
    if not text or has_think_tag(text):  # no text: its thought did not end
        return "think_tag"
    # at the start only, where refusals stand
    return "refusal" if REFUSAL.match(text[:200].lower().replace("’", "'")) else None


def clean_row(row: Row, answer: dict[str, Any], verified: bool | None) -> dict[str, Any]:
    messages = [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": answer_text(answer["response"])},
    ]
    if row.get("system"):
        messages.insert(0, {"role": "system", "content": row["system"]})
    return {
        "id": row["id"],
        "sample_index": answer["sample_index"],
        "source": row["source"],
        "domain": row["domain"],
        "messages": messages,
        "verified": verified,
    }


def can_judge(row: Row, sandbox: Sandbox) -> bool:
    """Whether an answer to this row can be found right: it has a grader, and code may be run."""
    return row["grader"] != UNGRADED and (row["grader"] != "python_tests" or sandbox.executes)


def verify(answers: list[dict[str, Any]], by_id: dict[str, Row], sandbox: Sandbox) -> dict[int, bool | None]:
    """Answer number -> whether it is right, by the graders that score the student; None, or no entry, where nothing can
    judge it. Answers to unknown prompts and those with a `text_fault` are not judged."""
    judged = [  # numbers of the answers, into `answers`
        number
        for number, answer in enumerate(answers)
        if (row := by_id.get(answer["id"])) and row["grader"] != UNGRADED and text_fault(answer, row["prompt"]) is None
    ]
    tasks = [(by_id[answers[i]["id"]], answers[i]["response"], answers[i]["finish_reason"]) for i in judged]
    return {i: VERIFIED[grade.outcome] for i, grade in zip(judged, grade_all(tasks, sandbox), strict=True)}


def chosen(group: list[dict[str, Any]], select: str) -> list[dict[str, Any]]:
    """Of one prompt's faultless clean rows, none of them wrong unless `select` is `all`, those that are kept.

    One is chosen among the correct ones; only where there is none among those that cannot be judged.
    """
    if select in ("all", "all_correct"):
        return group
    best = [row for row in group if row["verified"]] or group  # none verified: of those that nothing can judge
    if select == "first_correct":
        return [min(best, key=lambda row: row["sample_index"])]
    return [min(best, key=lambda row: (len(row["messages"][-1]["content"]), row["sample_index"]))]


@dataclass(frozen=True)
class _OverlapIndex:
    """What `overlaps` looks for, and the word counts of these entries."""

    entries: set[str]
    lengths: list[int]


@dataclass
class _Seen:
    """What the answers looked at so far were: their keys, and the verdict on each text without fault."""

    keys: set[tuple[str, int]] = field(default_factory=set)
    verdict_of_text: dict[tuple[str, str], bool | None] = field(default_factory=dict)


@dataclass(frozen=True)
class _Finding:
    """The first reason of `REASONS` against an answer, None where there is none, and what its grader says."""

    reason: str | None
    verified: bool | None = None


def _text_key(answer: dict[str, Any]) -> tuple[str, str]:
    """Equal for two answers to one prompt that differ in case and blanks alone."""
    return answer["id"], " ".join(answer_text(answer["response"]).lower().split())


def _find_fault(
    answer: dict[str, Any], row: Row | None, seen: _Seen, index: _OverlapIndex, verified: bool | None, select: str
) -> _Finding:
    """What speaks against an answer, in the order of `REASONS`."""
    if row is None:
        return _Finding("unknown_id")
    # a key that came before, whatever became of that answer
    if (answer["id"], answer["sample_index"]) in seen.keys:
        return _Finding("duplicate_key")
    if fault := text_fault(answer, row["prompt"]):
        return _Finding(fault)
    text = _text_key(answer)
    if text in seen.verdict_of_text:  # the same text has the same verdict: it counts in the acceptance rate
        return _Finding("duplicate", seen.verdict_of_text[text])
    if overlaps(answer_text(answer["response"]), index.entries, index.lengths, given=row["prompt"]):
        return _Finding("eval_overlap")
    if verified is False and select != "all":
        return _Finding("wrong", verified)
    return _Finding(None, verified)


def _rejection(row: dict[str, Any], reason: str) -> dict[str, Any]:
    return {"id": row["id"], "sample_index": row["sample_index"], "reason": reason}


def _choose(candidates: list[dict[str, Any]], select: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The faultless rows that `select` keeps, and the rejections of the others."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in candidates:
        groups[row["id"]].append(row)
    best = set()
    for group in groups.values():
        best.update((row["id"], row["sample_index"]) for row in chosen(group, select))
    kept, rejected = [], []
    for row in candidates:
        if (row["id"], row["sample_index"]) in best:
            kept.append(row)
        else:
            rejected.append(_rejection(row, "not_selected"))
    return kept, rejected


def clean(answers: list[dict[str, Any]], rows: list[Row], eval_rows: list[Row], select: str, minimum: int = 1,
          sandbox: Sandbox = CLOSED) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:  # fmt: skip
    """Filter teacher answers; every answer is either kept or rejected with the first reason that applies of `REASONS`.

    Args:
        answers: rows of `sft_*_data.jsonl`.
        rows: the dataset rows they answer.
        eval_rows: the evaluation rows no answer may quote (what the answer's own prompt says is not a quote); empty
            when the evaluation split itself is cleaned.
        select: one of `SELECT`. `all_correct` rejects answers that the grader finds wrong; `first_correct` and
            `shortest_correct` also keep one answer a prompt at most, by sample index or by length in characters; `all`
            keeps wrong ones too, with verified false. An answer that nothing can judge is never wrong: it stays, with
            verified null, and gives way to a correct one where one is chosen.
        minimum: the fewest kept answers that are worth going on with.
        sandbox: where code answers are run; where it runs nothing they cannot be judged.

    Returns:
        `(kept, rejected, stats)`: kept rows in the conversational format, `{id, sample_index, reason}`, and counts (see
        `count`).

    Raises:
        UserError: an unknown `select`; fewer than `minimum` kept.
        AssertionError: the counts do not add up (a defect of this function).
    """
    if select not in SELECT:
        raise UserError(f"select = {select!r} is not known; say {', '.join(SELECT)}")
    by_id = {row["id"]: row for row in rows}
    entries = overlap_index(eval_rows)
    index = _OverlapIndex(entries, entry_lengths(entries))
    verdict_of = verify(answers, by_id, sandbox)

    # 1. each answer's first fault
    seen = _Seen()
    verdicts: Counter[tuple[str, bool | None]] = Counter()
    candidates, rejected = [], []
    for number, answer in enumerate(answers):
        row = by_id.get(answer["id"])
        found = _find_fault(answer, row, seen, index, verdict_of.get(number), select)
        # after the look-up, or every answer would be its own duplicate
        seen.keys.add((answer["id"], answer["sample_index"]))
        # the answers without a fault of form; of those that quote the evaluation nothing is counted
        if row and not can_judge(row, sandbox):
            verdicts[row["source"], None] += 1  # whatever its fault, no answer here could be accepted
        elif found.reason in (None, "wrong", "duplicate"):
            verdicts[row["source"], found.verified] += 1
        if found.reason is None:
            seen.verdict_of_text[_text_key(answer)] = found.verified
            candidates.append(clean_row(row, answer, found.verified))
        else:
            rejected.append(_rejection(answer, found.reason))

    # 2. among several faultless answers to a prompt, those that are wanted
    kept, passed_over = _choose(candidates, select)
    rejected += passed_over

    # 3. the counts
    stats = count(answers, kept, rejected, {row["id"]: row["source"] for row in rows}, verdicts)
    if len(kept) < minimum:
        reasons = ", ".join(f"{reason} {number}" for reason, number in stats["by_reason"].items() if number)
        raise UserError(
            f"{len(kept)} of {len(answers)} answers are kept, {minimum} are needed (rejected: {reasons or 'none'}); "
            "look at a few of the answers, then at the teacher, max_new_tokens and select"
        )
    return kept, rejected, stats


def count(
    answers: list[dict[str, Any]], kept: list[dict[str, Any]], rejected: list[dict[str, Any]],
    source_of: dict[str, str], verdicts: Counter[tuple[str, bool | None]],
) -> dict[str, Any]:  # fmt: skip
    """Counts per reason and source, and the proof that no answer was lost or counted twice.

    Args:
        verdicts: how many answers of a source that are without fault (duplicates among them) got each verdict; None
            for all answers to a row that nothing can judge, with a fault or without.

    Returns:
        `verified` counts kept answers, `unverifiable` those with the verdict None. `acceptance_rate` is the share of a
        source's answers that are without fault and correct, among all but the unverifiable ones; null where none could
        be judged. An answer to an unknown prompt counts under the source "unknown".
    """
    total = Counter(source_of.get(answer["id"], "unknown") for answer in answers)
    by_source = {}
    for source in sorted(total):
        reasons = Counter(row["reason"] for row in rejected if source_of.get(row["id"], "unknown") == source)
        # "true", "false", "null"
        verified = Counter(json.dumps(row["verified"]) for row in kept if row["source"] == source)
        # what was rejected unread counts as judged, and as not correct
        judgeable = 0 if source == "unknown" else total[source] - verdicts[source, None]
        by_source[source] = {
            "answers": total[source],
            "prompts": len({a["id"] for a in answers if source_of.get(a["id"], "unknown") == source}),
            "kept": verified.total(),
            "prompts_kept": len({row["id"] for row in kept if row["source"] == source}),
            "rejected": {reason: reasons[reason] for reason in REASONS if reasons[reason]},
            "verified": {word: verified[word] for word in ("true", "false", "null")},
            "unverifiable": verdicts[source, None],
            "acceptance_rate": verdicts[source, True] / judgeable if judgeable else None,
        }
        assert total[source] == verified.total() + reasons.total(), f"{source}: answers != kept + rejected"
    by_reason = Counter(row["reason"] for row in rejected)
    assert len(answers) == len(kept) + len(rejected), "answers != kept + rejected"
    return {
        "answers": len(answers),
        "kept": len(kept),
        "rejected": len(rejected),
        "by_reason": {reason: by_reason[reason] for reason in REASONS},
        "by_source": by_source,
    }


def brought_clean(folder: Path) -> bool:
    """Whether the clean rows in a folder sft/ were brought ready-made: the stage that makes them has left no marker.

    Raises:
        UserError: they were, but only one of the two files is there.
    """
    if (folder / "fix_sft_data.json").is_file():
        return False
    files = [folder / f"sft_{split}_data_clean.jsonl" for split in ("train", "eval")]
    lacking = [path for path in files if not path.is_file()]
    if len(lacking) == 1:
        raise UserError(
            f"{lacking[0]}: no such file, but the other clean file was brought ready-made; both are wanted: bring this "
            "one too, or move the other away to have answers generated and cleaned"
        )
    return not lacking
