"""The Mamba-2 layer (Dao & Gu 2024, figure 6): one projection, causal convolution, one site, gated norm."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from attncompiler.blocks.autocast import wide
from attncompiler.blocks.convolution import CausalConv1d
from attncompiler.blocks.linear import ResidualLinear
from attncompiler.blocks.norm import GatedRMSNorm
from attncompiler.mechanisms.mamba2.mechanism import Mamba2Policy
from attncompiler.mechanisms.mamba2.op import OPERATOR, Mamba2Options, check
from attncompiler.mechanisms.mamba2.state import init_state
from attncompiler.runtime.context import MixerContext
from attncompiler.runtime.site import Site

State = dict[str, Tensor]


class Mamba2Site(Site):
    """Runs state space duality, from the decode state when one is given."""

    def forward(
        self,
        x: Tensor,
        dt: Tensor,
        A_log: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        z: Tensor | None,
        dt_bias: Tensor,
        segment_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        conv: Tensor | None = None,
        state: State | None = None,
    ) -> tuple[Tensor, State | None]:
        """x, z (B, T, H, P), dt (B, T, H), A_log, D, dt_bias (H,), B, C (B, T, G, N) → out (B, T, H, P), the state.

        `conv` is the convolution's part of the new state.
        """
        initial = None if state is None else state["ssm"]
        tensors = check(
            x, dt, -A_log.to(wide(A_log.dtype)).exp(), B, C, D, z, dt_bias, initial, segment_ids, attention_mask
        )
        results = OPERATOR(tensors, self.options, self.handle)
        if state is None:
            return results["out"], None
        assert conv is not None
        return results["out"], {"conv": conv, "ssm": results["final_state"]}


class Mamba2Mixer(nn.Module):
    """in_proj, conv1d over x, B and C, the site, gated norm, out_proj; HF's names. A_log, D, dt_bias stay in fp32."""

    def __init__(self, policy: Mamba2Policy, context: MixerContext):
        super().__init__()
        self.policy, self.context = policy, context
        M, H, N, G = context.hidden_size, policy.heads(context.hidden_size), policy.state_size, policy.n_groups
        E = policy.channels(M)
        self.widths, self.parts = (E, E + 2 * G * N, H), (E, G * N, G * N)
        self.in_proj = nn.Linear(M, sum(self.widths), bias=policy.use_bias)
        self.conv1d = CausalConv1d(E + 2 * G * N, policy.conv_kernel, policy.use_conv_bias)
        self.A_log = nn.Parameter(torch.empty(H, dtype=wide(torch.get_default_dtype())))
        self.D = nn.Parameter(torch.empty(H, dtype=wide(torch.get_default_dtype())))
        self.dt_bias = nn.Parameter(torch.empty(H, dtype=wide(torch.get_default_dtype())))
        if policy.rms_norm:
            self.norm = GatedRMSNorm(E, context.norm_eps, policy.norm_before_gate, G)
        layers = context.num_layers if policy.rescale_prenorm_residual else None
        self.out_proj = ResidualLinear(E, M, policy.use_bias, layers)
        options = Mamba2Options(
            dt_limit=policy.limits, chunk_size=policy.chunk_size, deterministic=context.deterministic
        )
        self.site = Mamba2Site("mamba2", options, context.chain)

    def initial_value(self, name: str, generator: torch.Generator) -> Tensor:
        """A = −1 … −H, D = 1, and time steps log-uniform in the policy's range behind the softplus."""
        heads = self.A_log.shape[0]
        if name == "A_log":
            return torch.arange(1.0, heads + 1).log()
        if name == "D":
            return torch.ones(heads)
        low, high = math.log(self.policy.time_step_min), math.log(self.policy.time_step_max)
        steps = torch.empty(heads).uniform_(low, high, generator=generator).exp().clamp(min=self.policy.time_step_floor)
        return steps + torch.log(-torch.expm1(-steps))

    def forward(
        self,
        hidden: Tensor,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        state: State | None = None,
    ) -> tuple[Tensor, State | None]:
        """hidden (B, T, M), segment_ids and attention_mask (B, T) → (B, T, M), state. Positions do not matter here."""
        z, xBC, dt = self.in_proj(hidden).split(self.widths, -1)
        xBC, conv = self.conv1d(xBC, attention_mask, segment_ids, state)
        x, B, C = xBC.split(self.parts, -1)
        x = x.unflatten(-1, (-1, self.policy.head_dim))
        B = B.unflatten(-1, (self.policy.n_groups, -1))
        C = C.unflatten(-1, (self.policy.n_groups, -1))
        gate = None if self.policy.rms_norm else z.unflatten(-1, (-1, self.policy.head_dim))
        out, state = self.site(
            x, dt, self.A_log, B, C, self.D, gate, self.dt_bias, segment_ids, attention_mask, conv, state
        )
        out = out.flatten(-2)
        if self.policy.rms_norm:
            out = self.norm(out, z)
        return self.out_proj(out), state

    def init_state(self, batch: int, max_length: int, device: torch.device, dtype: torch.dtype) -> State:
        """An empty state for B sequences of any length."""
        return init_state(self.policy, self.context, batch, max_length, device, dtype)
