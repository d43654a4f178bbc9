"""Linear attention (Katharopoulos et al. 2020, https://arxiv.org/abs/2006.16236, equations 4 to 12).

    out[t] = scale · φ(q[t])·S[t] / (φ(q[t])·z[t] + eps),   S[t] = Σ_s φ(k[s]) v[s]ᵀ,   z[t] = Σ_s φ(k[s])

The sums run over s ≤ t when causal, else over the whole sequence; without `normalize`, out[t] = scale · φ(q[t])·S[t].
With a decay g ≤ 0 of each token and head, S[t] = exp(g[t])·S[t−1] + φ(k[t]) v[t]ᵀ, and z likewise.

Feature maps: φ(x) = elu(x) + 1 (the Linear Transformer), max(x, 0) (relu), x (identity, without normaliser), and favor,
the Performer's positive random features of softmax attention (Choromanski et al. 2021,
https://arxiv.org/abs/2009.14794, equations 5 and 7): φ(x)[r] = exp(w[r]·x̂ − |x̂|²/2) / √R, x̂ = x / D^¼, with R random
rows w. Where softmax attention has another scale than 1/√D, q is to be multiplied beforehand.

Decays: none; retention, γ[h] = 1 − 2^(−5−h) for head h (Sun et al. 2023, https://arxiv.org/abs/2307.08621, equation 8;
RetNet's retention itself is feature_map identity, normalize false, scale 1/√D, with rotary positions); and scalar,
g = log σ(gate) / 16 with a gate projected from the token, as the simple GLA of flash-linear-attention has it.

Shapes: q, k (B, T, H, D), v (B, T, H, V) → out (B, T, H, V). The state is S (B, H, R, V), z (B, H, R) and m (B, H),
R being the number of features (D but for favor): it stands for the sums S·exp(m) and z·exp(m). Favor's m is the
logarithm of the largest feature of a key so far, a running maximum, so that features which fp32 does not hold stay in
range and nothing that comes later moves what came before; for the other maps m is 0 in every state that is given back.
"""
