"""One type for whatever reads rows: a student, a resident teacher, or a teacher's cache, which has read them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from src.distillation.base import EncodedRow, causal_lm, head_weight, logit_map, response_hidden
from src.distillation.losses import LogitMap, Stated, TopK, shared_head
from src.distillation.packing import attention_of_packs, batch_of

Rows = Sequence[EncodedRow]


@dataclass(frozen=True)
class Reader:
    """What training and measuring need of a model.

    hidden: rows, as the model's own template renders them -> final hidden states `[N, H]` at their response positions,
        row after row, without gradients.
    head: -> its output matrix, all rows that are stored.
    logit_map: what it does to its logits.
    vocab_size: logits beyond it have no part in anything.
    topk: rows -> what is trained on instead of the hidden states, where it is set.
    stated: rows -> what is measured with instead of the hidden states, where there are none.
    """

    hidden: Callable[[Rows], Tensor]
    head: Callable[[], Tensor]
    logit_map: LogitMap
    vocab_size: int
    topk: Callable[[Rows], TopK] | None = None
    stated: Callable[[Rows], Stated] | None = None
    _heads: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)

    def head_on(self, device: torch.device) -> Tensor:
        """The output matrix as `losses.shared_head` cuts it, on a device; taken there once, for it does not learn."""
        if device not in self._heads:
            self._heads[device] = shared_head(self.head().to(device), self.vocab_size)
        return self._heads[device]

    def cut(self, vocab_size: int) -> "Reader":
        """The same reader with the vocabulary that two models share."""
        # a dict of its own: heads that are kept were cut to the old vocabulary
        return replace(self, vocab_size=vocab_size, _heads={})


def model_reader(model: nn.Module, pad_id: int, packing: bool) -> Reader:
    """A loaded model, or a PEFT model around one, as its adapters are switched when it reads; always without dropout.

    Args:
        packing: read the rows end to end, without padding.
    """

    @torch.no_grad()
    def hidden(rows: Rows) -> Tensor:
        training = model.training  # put back below: a run measures between its steps
        model.eval()
        try:
            with attention_of_packs(model, packing):
                return response_hidden(model, batch_of(rows, pad_id, packing))[0]
        finally:
            model.train(training)

    stored = causal_lm(model).get_output_embeddings().weight.shape[0]
    return Reader(hidden, lambda: head_weight(model).detach(), logit_map(model), stored)
