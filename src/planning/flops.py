"""Floating-point operations of what the stages do; a product of [n, k] and [k, m] has 2 n k m.

Counted as torch's FlopCounterMode counts: attention over whole squares, although a causal kernel may skip half.
"""

from collections.abc import Sequence

from src.planning.shapes import Shapes


def attention_forward(shapes: Shapes, lengths: Sequence[int]) -> int:
    """Scores and weighted values of rows of these lengths, each attending to itself, in all layers."""
    squares = sum(length * length for length in lengths)
    # 2 for a multiplication and an addition, 2 for two products: Q K' and P V
    return 2 * 2 * shapes.layers * shapes.heads * shapes.head_dim * squares


def body_forward(shapes: Shapes, lengths: Sequence[int], adapters: int = 0) -> int:
    """One forward pass of the layers, without the head."""
    tokens = sum(lengths)
    return 2 * tokens * (shapes.active_weights + adapters) + attention_forward(shapes, lengths)


def body_training(
    shapes: Shapes, lengths: Sequence[int], adapters: int, first_adapters: int, checkpointing: bool
) -> int:
    """Forward and backward of the layers with frozen weights: of these only their inputs' gradients are formed.

    Args:
        adapters: trainable weights, whose gradients are formed as well.
        first_adapters: those on what reads the first layer's input, which wants no gradient unless checkpointing makes
            it want one.
        checkpointing: the forward pass is run again.
    """
    tokens = sum(lengths)
    # W and the adapter's A and B
    forward = body_forward(shapes, lengths, adapters)
    # the gradient of the inputs, of the adapters, and twice the products of attention (four instead of two)
    backward = 2 * tokens * (shapes.active_weights + 2 * adapters) + 2 * attention_forward(shapes, lengths)
    if checkpointing:
        return 2 * forward + backward
    # of the first layer's q, k and v: the product with W, and the one with A
    spared = shapes.first_inputs + _input_side(shapes, first_adapters)
    return forward + backward - 2 * tokens * spared


def _input_side(shapes: Shapes, first_adapters: int) -> int:
    """Weights of A of the first layer's q, k and v adapters, `rank x hidden` each."""
    # q, k and v together: adapters have rank x (inputs + outputs) weights each, A of them rank x inputs
    outputs = (shapes.heads + 2 * shapes.kv_heads) * shapes.head_dim
    rank = first_adapters / (3 * shapes.hidden + outputs) if first_adapters else 0
    return round(rank * 3 * shapes.hidden)


def loss(student: Shapes, teacher: Shapes | None, tokens: int, vocab: int) -> int:
    """Logits of both models and the gradient of the student's states: three products, two without a teacher."""
    # logits [N, H] @ [H, V], the gradient [N, V] @ [V, H]; the teacher's logits [N, G] @ [G, V]
    return 2 * tokens * vocab * (2 * student.hidden + (teacher.hidden if teacher else 0))


def head(shapes: Shapes, tokens: int) -> int:
    """The logits of some tokens."""
    return 2 * tokens * shapes.hidden * shapes.vocab


def decoding(shapes: Shapes, rows: int, start: int, tokens: int) -> int:
    """`tokens` steps of decoding for `rows` rows that have read `start` tokens each; with the head."""
    steps = rows * tokens
    contexts = rows * (tokens * start + tokens * (tokens + 1) // 2)  # keys that the queries see, one query a step
    return (
        2 * steps * shapes.active_weights
        + head(shapes, steps)
        + 2 * 2 * shapes.layers * shapes.heads * shapes.head_dim * contexts
    )


def distinct_experts(shapes: Shapes, tokens: float) -> float:
    """Experts of a layer that at least one of some tokens chooses, on average, where all are chosen equally often.

    An expert is passed over by all with probability (1 - k / E)^tokens.

    """
    if not shapes.experts:
        return 0.0
    return shapes.experts * (1 - (1 - shapes.experts_per_token / shapes.experts) ** tokens)


def read_weights(shapes: Shapes, tokens: float) -> float:
    """Weights that a pass of some tokens reads: all but the experts that none of them chooses; the input embedding is
    looked up, not read."""
    # + the head
    dense = shapes.layer_weights - shapes.expert_weights + shapes.hidden * shapes.vocab
    share = distinct_experts(shapes, tokens) / shapes.experts if shapes.experts else 0.0
    return dense + share * shapes.expert_weights
