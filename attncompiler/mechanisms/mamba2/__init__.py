"""Mamba-2's state space duality, SSD (Dao & Gu 2024, https://arxiv.org/abs/2405.21060, sections 2.2 and 6).

    Δ[t] = clamp(softplus(dt[t] + dt_bias), dt_limit)
    h[t] = exp(Δ[t]·A) h[t−1] + Δ[t]·x[t] B[t]ᵀ,   out[t] = (h[t] C[t] + D·x[t]) · silu(z[t])

Shapes: x, z (B, T, H, P), dt (B, T, H), A and dt_bias (H), B and C (B, T, G, N), D (H) or (H, P) → out (B, T, H, P) and
the final state (B, H, P, N) in fp32. A head has one decay for its whole state, which makes a chunk of the recurrence a
product of matrices; B and C are shared by the heads of a group: head h reads group h div (H div G).
"""
