"""Knowledge distillation of a causal language model, the whole idea on two screens. Start reading here.

    python examples/plain_kd.py --config configs/embedded.yaml --steps 5

Full logits, autograd, no packing, no cache, no checkpoints: slow, and right. src/distillation/ does the same to the
last digits (tests/test_plain_kd.py holds one against the other), but never holds a [tokens, vocabulary] tensor, reads
the teacher once for all runs, and can be killed at any moment. Run the stages up to fix_sft_data first.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import yaml
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from src.distillation.base import encode_row, end_of_turn_id, load_model, load_tokenizer
from src.distillation.lora import add_lora
from src.utils.common import read_jsonl


def read_rows(path: Path, tokenizer) -> list[tuple[list[int], list[int]]]:
    """Clean rows -> (prompt ids, response ids); the response ends with the token that ends the turn."""
    end = end_of_turn_id(tokenizer)
    encoded = [encode_row(tokenizer, row, end) for row in read_jsonl(path, ("id", "messages"))]
    return [(list(row.prompt_ids), list(row.response_ids)) for row in encoded]


def response_logits(model, prompt: list[int], response: list[int], vocabulary: int) -> torch.Tensor:
    """The logits that predict the response, [response tokens, vocabulary].

    The logits at position i predict token i + 1, so the first response token is predicted by the last of the prompt.
    Columns beyond the tokenizer's vocabulary are padding of the output layer and take no part.
    """
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0]
    return logits[len(prompt) - 1 : -1, :vocabulary].float()


def kd_loss(student, teacher, labels, temperature: float, alpha: float) -> torch.Tensor:
    """alpha * T^2 * KL(teacher_T || student_T) + (1 - alpha) * CE, summed over response tokens.

    T^2 keeps the gradient's size, and so alpha's meaning, as T changes (Hinton et al. 2015, section 2).
    """
    log_q = log_softmax(student / temperature, -1)
    log_p = log_softmax(teacher / temperature, -1)
    divergence = kl_div(log_q, log_p, log_target=True, reduction="sum")  # KL(p || q): torch takes the student first
    ce = cross_entropy(student, labels, reduction="sum")  # at T = 1
    return alpha * temperature**2 * divergence + (1 - alpha) * ce


def train(student_name, teacher_name, clean_rows: Path, *, steps, rows_per_step, temperature, alpha, learning_rate,
          lora_r, lora_alpha, seed=42):  # fmt: skip
    """Train a LoRA adapter; returns the student and the loss of every step (nats per response token)."""
    # 1. both models; their tokenizers share one vocabulary, but each reads the prompt by its own chat template
    tokenizers = [load_tokenizer(name) for name in (student_name, teacher_name)]
    vocabulary = max(tokenizers[0].get_vocab().values()) + 1
    teacher = load_model(teacher_name, torch.float32)
    torch.manual_seed(seed)
    student = add_lora(load_model(student_name, torch.float32), lora_r, lora_alpha, dropout=0.0)  # trains fp32 adapters

    # 2. rows, as each model reads them; the response ids are the same
    student_rows, teacher_rows = (read_rows(clean_rows, tokenizer) for tokenizer in tokenizers)

    # 3. the loop
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=learning_rate)
    losses = []
    for step in range(steps):
        chosen = [(step * rows_per_step + i) % len(student_rows) for i in range(rows_per_step)]
        # one division by the tokens of the whole step: dividing row by row would weigh short answers more
        tokens = sum(len(student_rows[i][1]) for i in chosen)
        total = 0.0
        for i in chosen:
            prompt, response = student_rows[i]
            with torch.no_grad():
                target = response_logits(teacher, *teacher_rows[i], vocabulary)
            predicted = response_logits(student, prompt, response, vocabulary)
            loss = kd_loss(predicted, target, torch.tensor(response), temperature, alpha) / tokens
            loss.backward()  # gradients add up over the rows of a step
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        print(f"step {step + 1}: loss {total:.4f}, {tokens} response tokens")
    return student, losses


def main() -> None:
    parser = argparse.ArgumentParser(description="distillation with full logits, to be read")
    parser.add_argument("--config", default="configs/embedded.yaml")
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    profile = yaml.safe_load(Path(options.config).read_text(encoding="utf-8"))
    run = profile["run_improved_kd"]
    train(
        profile["model_name_or_path"], profile["teacher_model_name_or_path"],
        Path(profile["experiment_dir"]) / "sft" / "sft_train_data_clean.jsonl",
        steps=options.steps, rows_per_step=run["batch_size"] * run["gradient_accumulation_steps"],
        temperature=run["temperature"], alpha=run["alpha"], learning_rate=run["learning_rate"],
        lora_r=run.get("lora_r", 64), lora_alpha=run.get("lora_alpha", 128), seed=profile["seed"],
    )  # fmt: skip


if __name__ == "__main__":
    main()
