"""What the blocks cost: linears, norms, MLPs, embeddings, heads and the loss. Nothing here imports torch.

Sizes are numbers of elements unless they are called bytes. `saved_bytes` follows what each block's autograd keeps; an
activation that two blocks keep is counted by the later one, as its input.
"""

from __future__ import annotations

from attncompiler.mechanisms.base import Cost, MixerSize
from attncompiler.mechanisms.rope import RopeParameters, rotary_width

FP32 = 4
INT64 = 8
LOSS_CHUNK = 4096
"""tokens whose logits the loss holds at once; `blocks.head.LMLoss` has the same default"""


def linear(tokens: int, inputs: int, outputs: int, bias: bool, itemsize: int) -> Cost:
    """A linear layer on `tokens` rows. Its input is kept by autograd but counted by the block that calls it."""
    flops = 2 * tokens * inputs * outputs
    moved = (tokens * (inputs + outputs) + inputs * outputs) * itemsize
    return Cost(
        parameters=inputs * outputs + bias * outputs,
        forward_flops=flops,
        backward_flops=2 * flops,
        forward_bytes=moved,
        backward_bytes=2 * moved,
    )


def norm(kind: str, tokens: int, width: int, itemsize: int) -> Cost:
    """An rmsnorm or layernorm over rows of `width`, or an l2 norm without parameters.

    Autograd keeps the rows and one number a row in fp32 or better, two for a layernorm.
    """
    wide = max(itemsize, FP32)
    return Cost(
        parameters={"rmsnorm": width, "layernorm": 2 * width, "l2": 0}[kind],
        forward_bytes=2 * tokens * width * itemsize,
        backward_bytes=3 * tokens * width * itemsize,
        saved_bytes=tokens * (width * itemsize + (2 if kind == "layernorm" else 1) * wide),
        workspace_bytes=3 * tokens * width * wide,
    )


def gated_norm(tokens: int, width: int, groups: int, itemsize: int) -> Cost:
    """An rmsnorm of x · silu(gate), or silu(gate) times an rmsnorm, in fp32 or better, for each group of the width.

    Autograd keeps the opened gate and the product or the normed rows (both, with groups), and wide copies of x and gate
    where they are narrower; x and gate themselves are counted by the block that calls it.
    """
    wide = max(itemsize, FP32)
    copies = (2 if itemsize == wide else 4) + (1 if groups > 1 else 0)
    return Cost(
        parameters=width,
        forward_bytes=3 * tokens * width * itemsize,
        backward_bytes=5 * tokens * width * itemsize,
        saved_bytes=tokens * wide * (copies * width + groups),
        workspace_bytes=3 * tokens * width * wide,
    )


def convolution(tokens: int, channels: int, width: int, bias: bool, itemsize: int) -> Cost:
    """A causal depthwise convolution with its silu, which torch's counter does not count.

    Autograd keeps its input alone; that, and its output, are counted by the block that calls it.
    """
    return Cost(
        parameters=channels * width + bias * channels,
        forward_bytes=2 * tokens * channels * itemsize,
        backward_bytes=4 * tokens * channels * itemsize,
        workspace_bytes=2 * tokens * channels * itemsize,
    )


def rotary(rope: RopeParameters | None, size: MixerSize, heads: int, head_dim: int) -> Cost:
    """Rotary of `heads` queries and keys together, which torch's counter does not count.

    Autograd keeps cosines and sines alone, one for each position of a sequence and channel that is turned; a dynamic
    one's decode state has the length it was made for.
    """
    if rope is None:
        return Cost()
    moved = 2 * size.tokens * heads * head_dim * size.itemsize
    return Cost(
        forward_bytes=moved,
        backward_bytes=moved,
        saved_bytes=2 * size.seq_len * int(rotary_width(rope, head_dim)) * size.itemsize,
        state_bytes=size.batch * INT64 if rope.rope_type == "dynamic" else 0,
    )


def mlp(kind: str, tokens: int, width: int, inner: int, act: str, bias: bool, itemsize: int) -> Cost:
    """A gated or plain MLP: down(act(gate(x)) · up(x)) or down(act(up(x))).

    Autograd keeps x, the linears' outputs, the activation and (gated) the product; the plain form of relu keeps its
    output alone. In the backward the gated form holds two gradients of the inner width beside these, the plain one one.
    """
    hidden = tokens * inner * itemsize
    ups = 2 if kind == "gated" else 1
    kept = 4 if kind == "gated" else 2
    if act == "relu":
        kept -= 1
    total = linear(tokens, inner, width, bias, itemsize)
    for _ in range(ups):
        total = total + linear(tokens, width, inner, bias, itemsize)
    return total + Cost(
        forward_bytes=(2 * ups) * hidden,
        backward_bytes=(3 * ups) * hidden,
        saved_bytes=tokens * width * itemsize + kept * hidden,
        workspace_bytes=ups * hidden,
    )


def embedding(tokens: int, rows: int, width: int, itemsize: int) -> Cost:
    """A table of `rows` vectors, read once per token. Its gradient is dense."""
    return Cost(
        parameters=rows * width,
        forward_bytes=2 * tokens * width * itemsize,
        backward_bytes=(tokens + 2 * rows) * width * itemsize,
        saved_bytes=tokens * INT64,
    )


def lm_head(tokens: int, width: int, vocabulary: int, bias: bool, itemsize: int, softcap: bool) -> Cost:
    """The language model's head with its chunked cross-entropy, which makes the gradients in the forward pass.

    Forward FLOPs are those of the logits; the two products for the gradients are counted as backward. Kept between are
    the gradients themselves: of the hidden states, and of the weight in fp32. The chunk's logits live in fp32 in three
    copies, four when chunks follow one another, two more for a softcap.
    """
    chunk = min(tokens, LOSS_CHUNK)
    copies = (3 if tokens <= LOSS_CHUNK else 4) + (2 if softcap else 0)
    weight_grad = (vocabulary * width + bias * vocabulary) * FP32
    return linear(tokens, width, vocabulary, bias, itemsize) + Cost(
        saved_bytes=tokens * width * itemsize + weight_grad,
        workspace_bytes=max(copies * chunk * vocabulary * FP32, weight_grad + 2 * tokens * width * itemsize),
    )


def classifier_head(batch: int, tokens: int, width: int, labels: int, pooling: str, itemsize: int) -> Cost:
    """Pooling to one vector per sequence, and a linear layer on it. The mean is a product with the mask."""
    pooled = 2 * tokens * width if pooling == "mean" else 0
    mask = tokens * (itemsize if pooling == "mean" else 1)
    return linear(batch, width, labels, False, itemsize) + Cost(
        forward_flops=pooled,
        # the mask has no gradient, so one product is enough
        backward_flops=pooled,
        forward_bytes=tokens * width * itemsize,
        backward_bytes=tokens * width * itemsize,
        saved_bytes=mask + batch * (width * itemsize + labels * FP32),
        workspace_bytes=tokens * width * itemsize,
    )
