"""Mamba's selective scan on a GPU, in Triton: states in registers, tokens one after the other.

    h[t] = exp(Δ[t]·A) h[t−1] + Δ[t]·u[t]·B[t],   y[t] = C[t]·h[t] + D·u[t],   out[t] = y[t]·silu(z[t])

Backward, with dy[t] the gradient of y[t] and g[t] that of h[t], which is met from the last token to the first:

    g[t] = C[t]·dy[t] + exp(Δ[t+1]·A) g[t+1],   x[t] = exp(Δ[t]·A)·g[t]·h[t−1], the gradient of Δ[t]·A
    dA = Σ_t Δ[t]·x[t],   dΔ[t] = Σ_n A·x[t] + u[t]·(B[t]·g[t]),   d(Δ[t]·u[t]) = B[t]·g[t]
    dB[t] = Σ_e Δ[t]·u[t]·g[t],   dC[t] = Σ_e dy[t]·h[t]

`tokens.py` says how tokens lie among a warp's threads, `passes.py` is the forward and what finds states, `reverse.py`
the backward, `kernel.py` launches them. One token of every sequence, as in decoding, has a kernel of its own in
`step.py`.

For each token and channel of a row of N = 16 in bf16 the forward moves 8 bytes (u, dt, z and out) and takes 16
exponentials, beside 3 of the channel; where it is cut into groups, the sweep before it reads u and dt once more and
takes 16 again. The backward's sweep reads u, dt, z and dout (8 bytes) and takes 16. The backward itself reads them, u
and dt twice but for the cache, and takes 48, writes du, ddt and dz (6 bytes), and moves 2 bytes of states before
chunks, 2 of dB's and dC's shares, and through the cache 32 of states inside chunks.
"""
