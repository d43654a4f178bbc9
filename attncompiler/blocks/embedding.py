"""Embeddings that are added to those of the tokens: of absolute positions, and of token types."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attncompiler.blocks.positions import check_inputs, no_position


class LearnedPositions(nn.Embedding):
    """A vector for each of `num_embeddings` absolute positions. position_ids (B or 1, T) → (B or 1, T, M)."""

    def forward(self, position_ids: Tensor) -> Tensor:
        """Raises InputError (E401) for a position without a vector, where that is seen without waiting for a GPU."""
        if not torch.compiler.is_compiling() and position_ids.device.type == "cpu":
            last = int(position_ids.max())
            if last >= self.num_embeddings or int(position_ids.min()) < 0:
                raise no_position(self.num_embeddings, last + 1)
        return super().forward(position_ids)


class TokenTypes(nn.Embedding):
    """A vector for each token type, type 0 where none are given (as BERT's segments A and B)."""

    def forward(self, tokens: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """tokens (B, T) or (B, T, M), of which only the size counts, token_type_ids (B, T) → (B, T, M) or (M,).

        Raises InputError: E401 for a shape that does not fit the tokens, E402 for ids that are not whole numbers.
        """
        if token_type_ids is None:
            return self.weight[0]
        check_inputs(tokens, token_type_ids=token_type_ids)
        return super().forward(token_type_ids)
