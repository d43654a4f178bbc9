"""A target: hardware as facts. It names no kernel."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Rate = Annotated[float, Field(gt=0)]
DType = Literal["float64", "float32", "bfloat16", "float16"]


class Target(BaseModel):
    """One device. Rates are dense, without sparsity, as published by the vendor unless the file's comment says."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$", description="how specs refer to this target")
    title: str = Field(description="the product's name")
    device_type: Literal["cpu", "cuda"] = Field(description="torch's device type; ROCm devices are 'cuda' to torch")
    vendor: Literal["nvidia", "amd", "any"] = Field(description="who makes the device")
    memory_bytes: int = Field(gt=0, description="device memory")
    bandwidth: Rate = Field(description="device memory bandwidth, bytes per second")
    matrix_flops: dict[DType, Rate] = Field(description="matrix rate per dtype, FLOP per second")
    vector_flops: Rate = Field(description="fp32 rate outside the matrix units, FLOP per second")
    compute_capability: tuple[int, int] | None = Field(default=None, strict=False, description="NVIDIA's version")
    multiprocessors: int = Field(gt=0, description="streaming multiprocessors, compute units or cores")
    shared_memory_bytes: int = Field(gt=0, description="largest shared memory (or fast local memory) of one block")
    interconnect: Rate | None = Field(default=None, description="bytes per second to a neighbouring device, one way")
    features: tuple[str, ...] = Field(default=(), strict=False, description="hardware features kernels may need")

    def __str__(self) -> str:
        return self.name
