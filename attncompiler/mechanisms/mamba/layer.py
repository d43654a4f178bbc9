"""The Mamba layer (Gu & Dao 2023, figure 3): projections, causal convolution, and one site that scans and gates."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from attncompiler.blocks.autocast import wide
from attncompiler.blocks.convolution import CausalConv1d
from attncompiler.blocks.linear import ResidualLinear
from attncompiler.blocks.norm import RMSNorm
from attncompiler.mechanisms.mamba.mechanism import MambaPolicy
from attncompiler.mechanisms.mamba.op import OPERATOR, MambaOptions, check
from attncompiler.mechanisms.mamba.state import init_state
from attncompiler.runtime.context import MixerContext
from attncompiler.runtime.site import Site

State = dict[str, Tensor]


class MambaSite(Site):
    """Runs the selective scan, from the decode state when one is given."""

    def forward(
        self,
        u: Tensor,
        dt: Tensor,
        A_log: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        z: Tensor,
        dt_bias: Tensor,
        segment_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        conv: Tensor | None = None,
        state: State | None = None,
    ) -> tuple[Tensor, State | None]:
        """u, dt, z (B, T, E), A_log (E, N), B, C (B, T, N), D, dt_bias (E,) → out (B, T, E) and the layer's state.

        `conv` is the convolution's part of the new state.
        """
        initial = None if state is None else state["ssm"]
        tensors = check(
            u, dt, -A_log.to(wide(A_log.dtype)).exp(), B, C, D, z, dt_bias, initial, segment_ids, attention_mask
        )
        results = OPERATOR(tensors, self.options, self.handle)
        if state is None:
            return results["out"], None
        assert conv is not None
        return results["out"], {"conv": conv, "ssm": results["final_state"]}


class TimeStep(nn.Module):
    """The projection of time steps from rank R to the channels, without its bias, which the scan adds in fp32."""

    def __init__(self, policy: MambaPolicy, hidden_size: int):
        super().__init__()
        self.policy, self.rank = policy, policy.rank(hidden_size)
        self.weight = nn.Parameter(torch.empty(policy.channels(hidden_size), self.rank))
        self.bias = nn.Parameter(torch.empty(policy.channels(hidden_size), dtype=wide(torch.get_default_dtype())))

    def initial_value(self, name: str, generator: torch.Generator) -> Tensor:
        """Mamba's scheme: the bias gives time steps log-uniform in the policy's range."""
        if name == "weight":
            bound = self.rank**-0.5 * self.policy.time_step_scale
            if self.policy.time_step_init_scheme == "constant":
                return torch.full(self.weight.shape, bound)
            return torch.empty(self.weight.shape).uniform_(-bound, bound, generator=generator)
        low, high = math.log(self.policy.time_step_min), math.log(self.policy.time_step_max)
        steps = torch.empty(self.bias.shape).uniform_(low, high, generator=generator).exp()
        steps = steps.clamp(min=self.policy.time_step_floor)
        return steps + torch.log(-torch.expm1(-steps))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, R) → (B, T, E)."""
        return nn.functional.linear(x, self.weight)


class MambaMixer(nn.Module):
    """in_proj, conv1d, x_proj, dt_proj, the site, out_proj; HF's parameter names. A_log and D stay in fp32."""

    def __init__(self, policy: MambaPolicy, context: MixerContext):
        super().__init__()
        self.policy, self.context = policy, context
        M, N = context.hidden_size, policy.state_size
        E, R = policy.channels(M), policy.rank(M)
        self.widths = (R, N, N)
        self.in_proj = nn.Linear(M, 2 * E, bias=policy.use_bias)
        self.conv1d = CausalConv1d(E, policy.conv_kernel, policy.use_conv_bias)
        self.x_proj = nn.Linear(E, R + 2 * N, bias=False)
        self.dt_proj = TimeStep(policy, M)
        self.A_log = nn.Parameter(torch.empty(E, N, dtype=wide(torch.get_default_dtype())))
        self.D = nn.Parameter(torch.empty(E, dtype=wide(torch.get_default_dtype())))
        layers = context.num_layers if policy.rescale_prenorm_residual else None
        self.out_proj = ResidualLinear(E, M, policy.use_bias, layers)
        if policy.dt_bc_norm:
            self.dt_layernorm = RMSNorm(R, context.norm_eps)
            self.b_layernorm = RMSNorm(N, context.norm_eps)
            self.c_layernorm = RMSNorm(N, context.norm_eps)
        options = MambaOptions(deterministic=context.deterministic)
        self.site = MambaSite("mamba", options, context.chain)

    def initial_value(self, name: str, generator: torch.Generator) -> Tensor:
        """A = −1 … −N in every channel (S4D-Real), D = 1."""
        if name == "D":
            return torch.ones(self.D.shape)
        return torch.arange(1.0, self.policy.state_size + 1).log().expand(self.A_log.shape).clone()

    def forward(
        self,
        hidden: Tensor,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        state: State | None = None,
    ) -> tuple[Tensor, State | None]:
        """hidden (B, T, M), segment_ids and attention_mask (B, T) → (B, T, M), state. Positions do not matter here."""
        u, z = self.in_proj(hidden).chunk(2, -1)
        u, conv = self.conv1d(u, attention_mask, segment_ids, state)
        dt, B, C = self.x_proj(u).split(self.widths, -1)
        if self.policy.dt_bc_norm:
            dt, B, C = self.dt_layernorm(dt), self.b_layernorm(B), self.c_layernorm(C)
        dt = self.dt_proj(dt)
        out, state = self.site(
            u, dt, self.A_log, B, C, self.D, z, self.dt_proj.bias, segment_ids, attention_mask, conv, state
        )
        return self.out_proj(out), state

    def init_state(self, batch: int, max_length: int, device: torch.device, dtype: torch.dtype) -> State:
        """An empty state for B sequences of any length."""
        return init_state(self.policy, self.context, batch, max_length, device, dtype)
