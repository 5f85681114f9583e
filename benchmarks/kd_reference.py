"""What `kd_loss.py` measures on and holds results against: seeded states, and the objective in fp64."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# tokens; all of them in fp64 would take [N, V] numbers of 8 bytes, 2.5 GB at 2,048 x 151,936
ROWS = 128


def inputs(job: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Student and teacher that lean to the same labels: logits of spread 2.5, the label's above their mean by about 15
    in the teacher's eyes and 11 in the student's. No label is one of the rows that are stored beyond the vocabulary.
    """
    vocab, width, tokens, dtype = job["V"], job["H"], job["N"], getattr(torch, job["dtype"])
    device = job.get("device", "cpu")
    generator = torch.Generator(device).manual_seed(job["seed"])

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    # rows of length 2.5 and states of length sqrt(H): logits of spread 2.5
    teacher_head = normal(vocab, width).mul_(2.5 / width**0.5)
    # 0.9^2 + 0.44^2 = 1: as spread as the teacher's, and correlated with it by 0.9
    student_head = (0.9 * teacher_head).add_(normal(vocab, width), alpha=0.44 * 2.5 / width**0.5).to(dtype)
    labels = torch.randint(job["vocab_size"], (tokens,), generator=generator, device=device)
    # [N, H], the direction that raises the label's logit, by 2.5 for each 1 that is added
    towards = F.normalize(teacher_head[labels], dim=-1)
    teacher = normal(tokens, width)
    student = 0.9 * teacher + 0.44 * normal(tokens, width) + 5 * towards
    return student.to(dtype), student_head, (teacher + 6 * towards).to(dtype), teacher_head.to(dtype), labels


def rows(tokens: int) -> Tensor:
    """The tokens whose gradient is computed in fp64, spread over all."""
    return torch.linspace(0, tokens - 1, min(ROWS, tokens)).long()


def project(states: Tensor, head: Tensor) -> Tensor:
    """Logits `[R, V]` in fp64, a slice of the head at a time."""
    # 8,192 rows: in fp64 a head of 151,936 x 4,096 would take 5 GB
    return torch.cat([states.double() @ part.double().T for part in head.split(8192)], dim=1)


def reference(z_RV, t_RV, head_VH, labels_R, temperature: float, alpha: float) -> tuple[Tensor, float]:
    """The objective from the logits of student and teacher, in fp64.

    Returns:
        The gradient of the summed loss by the student's states, `[R, H]`, and the loss per token.
    """
    log_p, log_q = F.log_softmax(t_RV / temperature, -1), F.log_softmax(z_RV / temperature, -1)
    kd = (log_p.exp() * (log_p - log_q)).sum()
    # d/dz of T^2 KL(p || q) at z / T: T^2 (q - p) / T
    grad_RV = alpha * temperature * (log_q.exp() - log_p.exp())
    # from here on at T = 1: the cross-entropy, whose gradient is q - onehot(label)
    log_q = F.log_softmax(z_RV, -1)
    ce = -log_q.gather(1, labels_R[:, None]).sum()
    grad_RV += (1 - alpha) * log_q.exp().scatter_add(1, labels_R[:, None], torch.full_like(z_RV[:, :1], -1))
    # a slice of the vocabulary at a time, see `project`
    grad_RH = torch.zeros(len(z_RV), head_VH.shape[1], dtype=torch.float64, device=z_RV.device)
    for part, head in zip(grad_RV.split(8192, dim=1), head_VH.split(8192), strict=True):
        grad_RH += part @ head.double()
    return grad_RH, ((alpha * temperature**2 * kd + (1 - alpha) * ce) / len(z_RV)).item()
