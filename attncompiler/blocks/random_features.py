"""Random projections of positive features (Choromanski et al. 2021, https://arxiv.org/abs/2009.14794)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attncompiler.blocks.autocast import wide

LARGEST_SEED = 2**62
"""Seeds of redraws are counted on from a first one below this, and torch's generators take up to 2⁶³."""


def random_projection(num_features: int, head_dim: int, orthogonal: bool, generator: torch.Generator) -> Tensor:
    """Rows (R, D) of Gaussian vectors in fp32, on the CPU: independent, or orthogonal within each block of D of them.

    Orthogonal rows have the directions of a random rotation and the lengths of other Gaussian vectors, so that each
    alone is distributed as an independent one is (section 3.2 of the paper).
    """
    rows = torch.randn(num_features, head_dim, generator=generator)
    if not orthogonal:
        return rows
    blocks = []
    for _ in range(-(-num_features // head_dim)):
        rotation, triangle = torch.linalg.qr(torch.randn(head_dim, head_dim, generator=generator, dtype=torch.float64))
        # uniform over rotations once the triangle's diagonal is positive (Mezzadri 2007, math-ph/0609050)
        blocks.append((rotation * triangle.diagonal().sign()).mT)
    directions = torch.cat(blocks)[:num_features]
    return (directions * rows.double().norm(dim=-1, keepdim=True)).float()


class RandomFeatures(nn.Module):
    """A projection (R, D) that is kept with the weights, and may be drawn anew in training.

    With `redraw_interval` N, a projection serves N forwards in training mode and the next is drawn: the k-th redraw
    from a generator that is seeded with `seed` + k. `seed`, drawn with the first weights, and `forwards`, the number of
    training forwards so far, are buffers too: every process that holds the same weights draws the same, and goes on
    where a saved model was. Evaluation, decoding and the recomputation of a checkpointed forward neither count nor
    draw. The count is read on the host, which waits for a GPU once a forward.

    A redraw between a forward and its recomputation changes what is recomputed: under activation checkpointing run
    each backward before the next forward.
    """

    projection: Tensor
    seed: Tensor
    forwards: Tensor

    def __init__(self, num_features: int, head_dim: int, orthogonal: bool = True, redraw_interval: int | None = None):
        super().__init__()
        self.orthogonal, self.redraw_interval = orthogonal, redraw_interval
        dtype = wide(torch.get_default_dtype())
        self.register_buffer("projection", torch.empty(num_features, head_dim, dtype=dtype))
        if redraw_interval is not None:
            self.register_buffer("seed", torch.empty((), dtype=torch.int64))
            self.register_buffer("forwards", torch.empty((), dtype=torch.int64))

    def initial_value(self, name: str, generator: torch.Generator) -> Tensor:
        """A first projection, a seed for the others, and a count of 0."""
        if name == "projection":
            R, D = self.projection.shape
            return random_projection(R, D, self.orthogonal, generator)
        return (
            torch.randint(LARGEST_SEED, (), generator=generator)
            if name == "seed"
            else torch.zeros((), dtype=torch.int64)
        )

    def forward(self, state: object | None = None) -> Tensor:
        """The projection (R, D); of a decode `state`, when one is given, it is the one it was made with."""
        if self.redraw_interval is None or not self.training or state is not None:
            return self.projection
        redraw(self.projection, self.seed, self.forwards, self.redraw_interval, self.orthogonal)
        return self.projection.clone()  # what a backward has kept must outlive the next redraw

    def extra_repr(self) -> str:
        R, D = self.projection.shape
        kind = "orthogonal" if self.orthogonal else "independent"
        return f"{R}, {D}, {kind}" + (f", redraw_interval={self.redraw_interval}" if self.redraw_interval else "")


@torch.library.custom_op("attncompiler::redraw", mutates_args=("projection", "forwards"))
def redraw(projection: Tensor, seed: Tensor, forwards: Tensor, interval: int, orthogonal: bool) -> None:
    """Count a training forward, and draw the projection anew where `interval` of them have used it.

    Opaque to torch.compile, which would have to break its graph where the count is read.
    """
    if torch._C._current_graph_task_id() != -1:
        return  # inside a backward: a checkpointed forward is computed again
    so_far = int(forwards)
    if so_far and so_far % interval == 0:
        generator = torch.Generator().manual_seed(int(seed) + so_far // interval)
        R, D = projection.shape
        projection.copy_(random_projection(R, D, orthogonal, generator))
    forwards.add_(1)


@redraw.register_fake
def _(projection: Tensor, seed: Tensor, forwards: Tensor, interval: int, orthogonal: bool) -> None:
    pass
