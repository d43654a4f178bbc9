"""Embeddings: of tokens, and what is added to them, of absolute positions and of token types.

Ids may be of any integer dtype, and are converted where torch has no embedding of it: bytes are tokens as they are. An
id without a vector is refused in words where torch itself looks, which it does on a CPU; on a GPU and in compiled code
nothing is read.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attncompiler.blocks.positions import check_inputs, no_position
from attncompiler.errors import InputError, fail


class _Vectors(nn.Embedding):
    """A vector for each id from 0 to `num_embeddings` − 1."""

    ids = "ids"
    """what the ids are called"""

    def look_up(self, ids: Tensor) -> Tensor:
        """Raises InputError: E402 for ids that are not whole numbers, and `none_of` for one without a vector."""
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise fail(InputError, "E402", f"{self.ids} must be whole numbers, not {ids.dtype}")
        if ids.dtype not in (torch.int64, torch.int32):
            ids = ids.long()
        try:
            return super().forward(ids)
        except IndexError:
            least, most = (int(bound) for bound in ids.aminmax())
            raise self.none_of(least if least < 0 else most) from None

    def none_of(self, wanted: int) -> Exception:
        """The error of an id without a vector, to be raised."""
        known = f"0 to {self.num_embeddings - 1}"
        return fail(InputError, "E403", f"{self.ids} must be {known}, and {wanted} is among them")


class Tokens(_Vectors):
    """A vector for each token. input_ids (B, T) → (B, T, M)."""

    ids = "tokens"

    def forward(self, input_ids: Tensor) -> Tensor:
        """Raises InputError: E402 for ids that are not whole numbers, E403 for one that is no token."""
        return self.look_up(input_ids)


class LearnedPositions(_Vectors):
    """A vector for each absolute position. position_ids (B or 1, T) → (B or 1, T, M)."""

    ids = "position_ids"

    def forward(self, position_ids: Tensor) -> Tensor:
        """Raises InputError: E402 for ids that are not whole numbers, E401 for a position without a vector."""
        return self.look_up(position_ids)

    def none_of(self, wanted: int) -> Exception:
        if wanted >= 0:
            return no_position(self.num_embeddings, wanted + 1)
        count = self.num_embeddings
        message = f"position {wanted} is none of the model's {count} learned positions, 0 to {count - 1}"
        return fail(InputError, "E401", message)


class TokenTypes(_Vectors):
    """A vector for each token type, type 0 where none are given (as BERT's segments A and B)."""

    ids = "token_type_ids"

    def forward(self, tokens: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """tokens (B, T) or (B, T, M), of which only the size counts, token_type_ids (B, T) → (B, T, M) or (M,).

        Raises InputError: E401 for a shape that does not fit the tokens, E402 for ids that are not whole numbers, E403
        for one that is no type.
        """
        if token_type_ids is None:
            return self.weight[0]
        check_inputs(tokens, token_type_ids=token_type_ids)
        return self.look_up(token_type_ids)
