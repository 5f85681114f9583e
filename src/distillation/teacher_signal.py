"""What the objective needs of a teacher, from a resident model; `teacher_cache.py` gives the same from files."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from src.distillation.base import EncodedRow, head_weight, logit_map, response_hidden
from src.distillation.losses import LogitMap, TopK
from src.distillation.packing import attention_of_packs, batch_of

Rows = Sequence[EncodedRow]


@dataclass(frozen=True)
class TeacherSignal:
    """A teacher's beliefs about rows as its own template renders them.

    hidden: rows -> final hidden states `[N, G]` at their response positions, row after row.
    head_VG: its output matrix, cut to the shared vocabulary.
    topk: rows -> what is trained on instead of the hidden states, where it is set.
    """

    hidden: Callable[[Rows], Tensor]
    head_VG: Tensor
    logit_map: LogitMap
    topk: Callable[[Rows], TopK] | None = None
    _heads: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)

    def head_on(self, device: torch.device) -> Tensor:
        """The output matrix on a device; copied there once."""
        if device not in self._heads:
            self._heads[device] = self.head_VG.to(device)
        return self._heads[device]

    def cut(self, vocab_size: int) -> "TeacherSignal":
        return replace(self, head_VG=self.head_VG[:vocab_size], _heads={})


def online_signal(teacher: PreTrainedModel, pad_id: int, packing: bool) -> TeacherSignal:
    """The signal of a resident teacher, made anew for every batch."""

    @torch.no_grad()
    def hidden(rows: Rows) -> Tensor:
        with attention_of_packs(teacher, packing):
            return response_hidden(teacher, batch_of(rows, pad_id, packing))[0]

    head = head_weight(teacher, teacher.get_output_embeddings().weight.shape[0]).detach()
    return TeacherSignal(hidden, head, logit_map(teacher))
