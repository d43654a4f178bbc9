"""Linear attention (Katharopoulos et al. 2020, https://arxiv.org/abs/2006.16236, equations 4 to 12).

    out[t] = scale · φ(q[t])·S[t] / (φ(q[t])·z[t] + eps),   S[t] = Σ_s φ(k[s]) v[s]ᵀ,   z[t] = Σ_s φ(k[s])

The sums run over s ≤ t when causal, else over the whole sequence; without `normalize`, out[t] = scale · φ(q[t])·S[t].
Feature maps: φ(x) = elu(x) + 1 (the Linear Transformer), max(x, 0) (relu), x (identity, without normaliser).

Shapes: q, k (B, T, H, D), v (B, T, H, V) → out (B, T, H, V). The state is S (B, H, R, V), z (B, H, R) and m (B, H),
R being the number of features (D here): it stands for the sums S·exp(m) and z·exp(m), so that a feature map that
grows exponentially can keep its state in range; for the maps above m is 0 in every state that is given back.
"""
