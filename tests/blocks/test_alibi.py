"""ALiBi's slopes, as the paper gives them."""

from __future__ import annotations

import pytest
import torch

from attncompiler.blocks.alibi import Alibi

SLOPES = {
    1: [2**-8],
    2: [2**-4, 2**-8],
    8: [2**-h for h in range(1, 9)],
    12: [2**-h for h in range(1, 9)] + [2**-h for h in (0.5, 1.5, 2.5, 3.5)],
}


@pytest.mark.parametrize("heads", SLOPES)
def test_slopes(heads: int) -> None:
    expected = torch.tensor(SLOPES[heads], dtype=torch.float64)
    torch.testing.assert_close(Alibi(heads)(torch.zeros(1, dtype=torch.float64)), expected)


def test_slopes_are_those_of_bloom() -> None:
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    for heads in (1, 2, 3, 6, 8, 20, 32):
        (theirs,) = bloom.build_alibi_tensor(torch.ones(1, 2), heads, torch.float32).view(1, heads, 2)
        torch.testing.assert_close(Alibi(heads)(torch.zeros(1)), theirs[:, 1])


def test_slopes_are_in_fp32_or_better_whatever_the_model_is_in() -> None:
    assert Alibi(4)(torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.float32
