"""Mamba's selective scan, S6 (Gu & Dao 2023, https://arxiv.org/abs/2312.00752, equation 2 and algorithm 2).

    Δ[t] = softplus(dt[t] + dt_bias)
    h[t] = exp(Δ[t]·A) h[t−1] + Δ[t]·u[t]·B[t],   out[t] = (C[t]·h[t] + D·u[t]) · silu(z[t])

Shapes, channels last: u, dt, z (B, T, E), A (E, N), B and C (B, T, N) or (B, T, G, N), D and dt_bias (E) → out
(B, T, E) and the final state (B, E, N) in fp32. Each of the E channels has a state of its own of N numbers; B and C
are shared by all channels, or by those of a group: channel e reads group e div (E div G).
"""
