"""The gated linear recurrence on a GPU, in Triton: what linear attention and state space duality have in common.

    S[t] = exp(g[t])·S[t−1] + y[t] u[t]ᵀ,   out[t] = x[t]·S[t]     (Yang et al. 2024, https://arxiv.org/abs/2312.06635)

One pass (`passes.py`) serves both directions of both: with rows x, columns y and what is summed, u, it computes

    out[r] = Σ_c w[r, c]·(x[r]·y[c])·u[c],   w[r, c] = exp(Σ g between the two), 0 where r does not see c,

over c ≤ r, or in reverse over c ≥ r. The gradients of x, y and u are such sums themselves:

    dx[t] = Σ_{s ≤ t} w (dout[t]·u[s]) y[s]
    dy[s] = Σ_{t ≥ s} w (u[s]·dout[t]) x[t]
    du[s] = Σ_{t ≥ s} w (y[s]·x[t]) dout[t]

Tokens are met in pairs inside chunks, and before a chunk by the state (K, W). Where there are fewer heads than the
device has room for, the sequence is cut into groups of chunks: a first pass finds what each group adds to the state, a
second carries it from group to group, and the groups then run beside each other.

Shapes: x, y (B, T, H, K), u (B, T, H, W) → out (B, T, H, W); states (K, W) in fp32.
"""
