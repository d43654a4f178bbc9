"""State space duality by passes of the gated recurrence (`blocks/recurrence`), in Triton.

Forward, a pass with rows C, columns B and sums of Δ·x, under the decays Δ·A; D·x and the gate are in its end. With dy
the gradient of C·h,

    dC[t] = Σ_{s ≤ t} w (dy[t]·Δx[s]) B[s]
    dB[s] = Σ_{t ≥ s} w (Δx[s]·dy[t]) C[t]
    d(Δx)[s] = Σ_{t ≥ s} w (B[s]·C[t]) dy[t]

are three passes more, of each head; B's and C's are then summed over the heads of their group. The gradients of the
decays follow from C·dC and B·dB, and that of Δ has x·d(Δx) beside them.
One token of every sequence, as in decoding, is no pass: `step.py` reads and writes its state once, in one launch.
"""
