"""Mamba's selective scan on a GPU, in Triton: states in registers, tokens one after the other.

    h[t] = exp(Δ[t]·A) h[t−1] + Δ[t]·u[t]·B[t],   y[t] = C[t]·h[t] + D·u[t],   out[t] = y[t]·silu(z[t])

Backward, with dy[t] the gradient of y[t] and g[t] that of h[t], which is met from the last token to the first:

    g[t] = C[t]·dy[t] + exp(Δ[t+1]·A) g[t+1],   x[t] = exp(Δ[t]·A)·g[t]·h[t−1], the gradient of Δ[t]·A
    dA = Σ_t Δ[t]·x[t],   dΔ[t] = Σ_n A·x[t] + u[t]·(B[t]·g[t]),   d(Δ[t]·u[t]) = B[t]·g[t]
    dB[t] = Σ_e Δ[t]·u[t]·g[t],   dC[t] = Σ_e dy[t]·h[t]

`tokens.py` says how a token lies among a warp's threads, `passes.py` is the forward and what finds states, `reverse.py`
the backward, `kernel.py` launches them. Bytes of device memory for each token and channel of the backward, in bf16 with
N = 16: 16 for the tensors themselves (u, dt, z and dout read two or three times, from the cache in part, and du, ddt, dz
written), 1.5 for states before chunks and 1 for the shares of dB and dC, both written and read.
"""
