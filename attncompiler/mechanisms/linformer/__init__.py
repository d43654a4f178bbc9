"""Linformer (Wang et al. 2020, https://arxiv.org/abs/2006.04768, equation 7): attention over a projected sequence.

    out[t] = Σ_r p[t, r] (F v)[r],   p[t, ·] = softmax over r of D^-1/2 · q[t]·(E k)[r]

E and F map the sequence's S tokens to R; token s uses column s, counted from the sequence's first real token, so
that padding on either side changes nothing; of packed sequences each counts its own columns, and has R projected tokens
of its own. Every token sees every other of its sequence: there is no causal form.

Shapes: q (B, T, H, D), k (B, S, H, D), v (B, S, H, V), projections (R, P) or one per head (H, R, P), P ≥ S, of which
the first S columns are used → out (B, T, H, V).
"""
