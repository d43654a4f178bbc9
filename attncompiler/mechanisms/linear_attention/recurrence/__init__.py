"""Linear attention by passes of the gated recurrence (`blocks/recurrence`), in Triton.

Forward, a pass with rows φ(q), columns φ(k) and sums of v, whose width more is the normaliser. With N the numerator, n
the normaliser and out = scale·N / n, the gradients of N and of φ(q)·z are dN = scale/n · dout and dz = −(dout·out) / n;
from them

    dφ(q)[t] = Σ_{s ≤ t} w (dN[t]·v[s] + dz[t]) φ(k)[s]       dφ(k)[s] = Σ_{t ≥ s} w (v[s]·dN[t] + dz[t]) φ(q)[t]
    dv[s] = Σ_{t ≥ s} w (φ(k)[s]·φ(q)[t]) dN[t]

are three passes more: whatever lies between input and output is a state for each group of chunks. A call that is not
causal is two calls: of the tokens up to and with one's own, and, from last to first, of those before it. One token
of every sequence, as in decoding, is neither: `step.py` reads and writes its state once, in one launch.

Favor's features and their running maximum are in favor.py, one token's too. Its sums are multiples of an exponential
for each token.
"""
