"""The pictures of learn.md, drawn from docs/figures/numbers.json and nothing else: the same numbers, the same files.

    python benchmarks/figures.py                                                     # draw docs/figures/*.svg again
    python benchmarks/figures.py --cache outputs/experiment/smollm2_30_to_20_layers/teacher_cache \
      --sweep outputs/sweep/smollm2_30_to_20_layers/sweep.json --teacher_config FOLDER/config.json      # measure again

What is measured: a teacher's softened distribution, from its cache of hidden states; the size of the two terms'
gradients, on random logits; a sweep over alpha; the shapes of the reference run's teacher.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import load_file
from torch import Tensor

from src.distillation.losses import plain_kd_loss
from src.distillation.teacher_cache import read_index
from src.report import sweep
from src.report.charts import Chart, Curve, document, draw, text
from src.report.plots import Point, Tick
from src.utils.common import ROOT, read_json, run_cli, write_json, write_text

FOLDER = ROOT / "docs" / "figures"
TEMPERATURES = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0)
TOPS = (1, 64, 512)  # how many of the likeliest tokens
POSITIONS = 512  # of a cache, evenly spread, on which its distribution is measured
BF16, TOPK_ENTRY = 2, 6  # bytes of a number, and of a kept token: its id (4) and its log-probability (2)

Numbers = dict[str, Any]


def distribution(cache: Path, teacher: str) -> Numbers:
    """Entropy and tail of a teacher's next-token distribution over the softmax temperature, means over positions."""
    index = read_index(cache)
    # [all positions, H]; names of files sort as they were written
    hidden = torch.cat([load_file(cache / name)["hidden"] for name in sorted(index["shards"])])
    hidden_NH = hidden[:: max(1, len(hidden) // POSITIONS)].float()
    # bf16 on disk; in fp32 the sums of a softmax keep their digits
    logits_NV = hidden_NH @ load_file(cache / "head.safetensors")["head"][: index["vocab_size"]].float().T
    entropy, outside = [], {str(top): [] for top in TOPS}
    for temperature in TEMPERATURES:
        log_p = torch.log_softmax(logits_NV / temperature, -1)
        # [N, V], the likeliest first
        p = log_p.exp().sort(-1, descending=True).values
        entropy.append(round(-(log_p.exp() * log_p).sum(-1).mean().item(), 4))
        for top in TOPS:
            outside[str(top)].append(round(1 - p[:, :top].sum(-1).mean().item(), 5))
    return {"teacher": teacher or Path(index["teacher_model_name_or_path"]).name, "positions": len(hidden_NH),
            "vocab_size": index["vocab_size"], "temperatures": list(TEMPERATURES), "entropy": entropy,
            "outside_top": outside}  # fmt: skip


def random_logits() -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher and labels for 64 tokens of a vocabulary of 1,000; the two models agree in part."""
    torch.manual_seed(0)
    # logits of spread 3, and a student whose own part is half as large
    teacher_NV = 3 * torch.randn(64, 1000, dtype=torch.float64)
    student_NV = teacher_NV + 1.5 * torch.randn(64, 1000, dtype=torch.float64)
    labels_N = torch.distributions.Categorical(logits=teacher_NV).sample()
    return student_NV, teacher_NV, labels_N


def gradient_size(temperature: float, alpha: float) -> float:
    """Length of the loss's gradient by a token's student logits, the mean over tokens."""
    student_NV, teacher_NV, labels_N = random_logits()
    # a sum over tokens: each row of the gradient is of its token alone
    student_NV.requires_grad_()
    plain_kd_loss(student_NV, teacher_NV, labels_N, temperature=temperature, alpha=alpha).loss.backward()
    return student_NV.grad.norm(dim=-1).mean().item()


def gradients() -> Numbers:
    """Of both terms by themselves (alpha 1 and 0), over T; the divergence also without its T^2."""
    temperatures = [1, 1.5, 2, 2.5, 3, 4, 5, 6]
    found = [gradient_size(temperature, 1.0) for temperature in temperatures]
    return {
        "temperatures": temperatures,
        "with_t_squared": [round(size, 4) for size in found],
        # the loss has T^2 in it, which is taken out again
        "without": [round(size / temperature**2, 5) for size, temperature in zip(found, temperatures, strict=True)],
        "cross_entropy": round(gradient_size(1.0, 0.0), 4),
    }


def shapes(config: Path) -> Numbers:
    """What decides the size of a cache."""
    stored = read_json(config)
    return {"teacher": config.parent.name, "hidden_size": stored["hidden_size"], "vocab_size": stored["vocab_size"]}


def swept(path: Path) -> Numbers:
    """Of a sweep, what its plot is drawn from."""
    stored = read_json(path)
    kept = {name: stored[name] for name in ("axes", "models", "fixed", "kl_is", "cells", "lowest")}
    run = next(run for run in stored["runs"].values() if run["status"] == "finished")
    return kept | {"steps": run["steps"], "validation_rows": run["validation_rows"]}


def bytes_per_token(numbers: Numbers) -> dict[str, int]:
    """Of the reference teacher, by what is kept of it."""
    hidden_size, vocab_size = numbers["shapes"]["hidden_size"], numbers["shapes"]["vocab_size"]
    return {
        "full logits": BF16 * vocab_size,
        "hidden states": BF16 * hidden_size,
        "top 512": TOPK_ENTRY * 512,
        "top 64": TOPK_ENTRY * 64,
    }


def _numbered(values: list[float], unit: str = "") -> list[Tick]:
    return [Tick(value, f"{value:g}{unit}") for value in values]


def _curve(name: str, xs: list[float], ys: list[float]) -> Curve:
    # [1, 2], [3, 4] -> (1, 3), (2, 4)
    return Curve(name, [Point(x, y) for x, y in zip(xs, ys, strict=True)])


SHARES = [Tick(share / 100, f"{share} %") for share in (0, 20, 40, 60, 80, 100)]


def temperature_figure(numbers: Numbers) -> str:
    found = numbers["distribution"]
    # log V: the entropy where all tokens are alike
    at, most = found["temperatures"], math.log(found["vocab_size"])
    tails = []
    for top in TOPS:
        name = "outside the likeliest token" if top == 1 else f"outside the top {top}"
        tails.append(_curve(name, at, found["outside_top"][str(top)]))
    entropy = [
        _curve("entropy", at, found["entropy"]),
        Curve(f"all {found['vocab_size']:,} tokens alike", [Point(at[0], most), Point(at[-1], most)]),
    ]
    x_ticks = _numbered([1, 2, 3, 4])
    return draw(
        [
            Chart("Where the mass is", "softmax temperature T", "share of the mass", tails, x_ticks, SHARES),
            Chart("How open the choice is", "softmax temperature T", "nats", entropy, x_ticks,
                  _numbered([0, 2, 4, 6, 8, 10, 12]), marks=False),
        ],
        f"What T does to a teacher's distribution ({found['teacher']}, {found['positions']} answer tokens)",
        "As T grows from 1 to 4, mass moves from the likeliest token to the tail, and entropy nears its maximum.",
    )  # fmt: skip


def t_squared_figure(numbers: Numbers) -> str:
    found = numbers["gradients"]
    at = found["temperatures"]
    curves = [
        _curve("D alone", at, found["without"]),
        _curve("T² x D", at, found["with_t_squared"]),
        _curve("cross-entropy", at, [found["cross_entropy"]] * len(at)),
    ]
    x_ticks, y_ticks = _numbered([1, 2, 3, 4, 5, 6]), _numbered([0.001, 0.01, 0.1, 1])
    label = "length of the gradient (log scale)"
    return draw(
        [Chart("By a token's student logits", "softmax temperature T", label, curves, x_ticks, y_ticks, log=True)],
        "Why T²: without it the teacher fades",
        t_squared_said(found),
        ["Random logits, 64 tokens, a vocabulary of 1,000"],
    )


def t_squared_said(found: Numbers) -> str:
    """What is seen, in numbers of the plot. D alone shrinks as 1/T² only where T is large against the logits."""
    at, alone, scaled = found["temperatures"], found["without"], found["with_t_squared"]
    four = at.index(4)
    lost = 1 - scaled[-1] / scaled[four]
    return (
        f"From T = {at[0]} to {at[-1]} the gradient of the divergence alone shrinks {alone[0] / alone[-1]:.0f}-fold. "
        f"Multiplied by T² it shrinks {scaled[0] / scaled[four]:.1f}-fold up to T = 4 and levels off above: from 4 to "
        f"{at[-1]} it loses {lost:.0%}. It stays below cross-entropy's {found['cross_entropy']:.2f}, which has no T."
    )


def signals_figure(numbers: Numbers) -> str:
    found, sizes = numbers["distribution"], bytes_per_token(numbers)
    at = found["temperatures"]
    curves = []
    for name, size in sizes.items():
        # "top 64" -> "64"; "hidden states" stays, is no number of tokens, and keeps all
        top = name.removeprefix("top ")
        kept = [1 - share for share in found["outside_top"][top]] if top in found["outside_top"] else [1.0] * len(at)
        curves.append(_curve(f"{name}: {size:,} bytes a token", at, kept))
    return draw(
        [Chart("Of the distribution that is taught at T", "softmax temperature T", "share kept", curves,
               _numbered([1, 2, 3, 4]), SHARES)],
        "What a cache keeps, and its price",
        "Hidden states keep all of the distribution at every temperature for a fraction of the bytes of full logits.",
        [f"Shares: {found['teacher']}", f"Bytes: {numbers['shapes']['teacher']}, bf16"],
    )  # fmt: skip


def alpha_figure(numbers: Numbers) -> str:
    drawn = sweep.plot(numbers["alpha"])
    assert drawn, "numbers.json holds no sweep along alpha"
    return drawn


# name, what it is, and the left upper corner of its box
ARMS = (
    ("base", "the student as it was", 30, 92),
    ("sft", "trained on the teacher's answers (alpha 0)", 300, 92),
    ("kd", "the same rows and steps, and its distribution", 570, 92),
    ("teacher", "what could be reached", 570, 232),
)
BOX_WIDTH, BOX_HEIGHT = 210, 58


def _box(name: str, meaning: str, x: float, y: float) -> list[str]:
    """An arm: its name over what it is, in two lines of at most 28 letters."""
    # a line is full where the next word would go beyond 28 letters
    words, lines = meaning.split(), [""]
    for word in words:
        if len(lines[-1]) + len(word) > 28:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    middle = x + BOX_WIDTH / 2
    parts = [f'<rect class="axis" x="{x}" y="{y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6" fill="none"/>']
    parts.append(text(middle, y + 18, name, "middle", "panel"))
    # baselines: the name 18 below the upper edge, then a line every 14
    return parts + [text(middle, y + 34 + 14 * index, line, "middle") for index, line in enumerate(lines)]


def _arrow(path: str, end: str) -> list[str]:
    # the line, and the two strokes of its head
    return [f'<path class="axis" d="{path}" fill="none"/>', f'<path class="axis" d="{end}" fill="none"/>']


def arms_figure() -> str:
    parts = []
    for arm in ARMS:
        parts += _box(*arm)
    # base -> sft -> kd, kd -> teacher, and base -> kd as an arc over sft
    parts += _arrow("M242 121H296", "M289 117L296 121L289 125")
    parts += _arrow("M512 121H566", "M559 117L566 121L559 125")
    parts += _arrow("M675 152V228", "M671 221L675 228L679 221")
    parts += _arrow("M135 90C180 34 630 34 675 88", "M668 84L675 88L675 79")
    parts += [text(269, 112, "text", "middle"), text(539, 112, "beliefs", "middle")]
    parts += [text(405, 44, "base to kd: what the whole pipeline gives", "middle")]
    parts += [text(30, 180, "base to sft: what the teacher's text alone gives")]
    parts += [text(30, 202, "sft to kd: what distillation adds; without sft nothing is shown about it")]
    parts += [text(560, 266, "kd to teacher: what is still missing", "end")]
    return document(800, 305, "Four arms, and what each comparison says",
                    "Base, SFT control, distilled student and teacher, with an arrow for each comparison.",
                    parts)  # fmt: skip


def figures(numbers: Numbers) -> dict[str, str]:
    """File name -> SVG."""
    return {
        "temperature.svg": temperature_figure(numbers),
        "t_squared.svg": t_squared_figure(numbers),
        "alpha.svg": alpha_figure(numbers),
        "signals.svg": signals_figure(numbers),
        "arms.svg": arms_figure(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, help="measure the distribution in this teacher cache (hidden states)")
    parser.add_argument("--teacher_name", default="", help="what to call that teacher (its folder's name)")
    parser.add_argument("--sweep", type=Path, help="take the numbers over alpha from this sweep.json")
    parser.add_argument("--teacher_config", type=Path, help="take the reference teacher's shapes from this config.json")
    parser.add_argument("--gradients", action="store_true", help="compute the sizes of the gradients again")
    asked = parser.parse_args()
    path = FOLDER / "numbers.json"
    numbers = read_json(path) if path.is_file() else {}
    if asked.cache:
        numbers["distribution"] = distribution(asked.cache, asked.teacher_name)
    if asked.gradients:
        numbers["gradients"] = gradients()
    if asked.sweep:
        numbers["alpha"] = swept(asked.sweep)
    if asked.teacher_config:
        numbers["shapes"] = shapes(asked.teacher_config)
    # written before the figures: they are drawn from what the file holds
    write_json(path, numbers)
    for name, svg in figures(numbers).items():
        write_text(FOLDER / name, svg)
        print(FOLDER / name)


if __name__ == "__main__":
    run_cli(main)
