"""Softmax attention (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, equation 1) under a visibility pattern.

    out[t] = Σ_s p[t, s] v[s],   p[t, ·] = softmax over the visible s of scale · q[t]·k[s]

Shapes: q (B, T, H, D), k (B, S, K, D), v (B, S, K, V) → out (B, T, H, V), lse (B, H, T). H is a multiple of K: query
head h reads key head h div (H div K) (grouped queries, Ainslie et al. 2023, https://arxiv.org/abs/2305.13245; K = 1 is
multi-query, Shazeer 2019, https://arxiv.org/abs/1911.02150). `lse` is the natural logarithm of the softmax's
denominator, −∞ on a row that sees nothing; such a row gives 0.
"""
