"""State space duality by passes of the gated recurrence (`blocks/recurrence`), in Triton.

Forward, a pass with rows C, columns B and sums of Δ·x, under the decays Δ·A; D·x and the gate are in its end. With dy
the gradient of C·h,

    dC[t] = Σ_{s ≤ t} w (dy[t]·Δx[s]) B[s]
    dB[s] = Σ_{t ≥ s} w (Δx[s]·dy[t]) C[t]
    d(Δx)[s] = Σ_{t ≥ s} w (B[s]·C[t]) dy[t]

are sums over all pairs of tokens. A walk through the chunks (`states.py`) keeps the state before each, and one in
reverse the gradient of the state behind it, for as many chunks at a time as fit a buffer (`launch.py`). Two kernels
(`heads.py`) then take one chunk and all heads of a group, one after the other: what heads share is loaded once, and
sums over them stay in registers. The gradients of decays and time steps (`steps.py`) are made of what they leave once
for a token. One token of every sequence, as in decoding, is no pass: `step.py` reads and writes its state once, in one
launch.
"""
