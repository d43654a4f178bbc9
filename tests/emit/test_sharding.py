"""FSDP2 on an emitted model: two processes over gloo compute what one does."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny import ENCODERS, MIXERS, gradients, model, tokens

EVERY = (*MIXERS.values(), *ENCODERS.values())


def _worker(rank: int, world: int, port: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    try:
        built = model(*EVERY, layers=1)
        mesh = init_device_mesh("cpu", (world,))
        for layer in built.layers.values():
            fully_shard(layer, mesh=mesh)
        fully_shard(built, mesh=mesh)
        register_fsdp_forward_method(built, "loss")
        x, y = tokens(2 * world, 11), tokens(2 * world, 11, seed=1)
        part = slice(2 * rank, 2 * rank + 2)
        loss = built.loss(x[part], y[part])
        loss.backward()
        full = {name: p.grad.full_tensor() for name, p in built.named_parameters()}
        total = loss.detach().clone()
        dist.all_reduce(total)
        if rank == 0:
            torch.save({"grads": full, "loss": total / world}, Path(folder) / "sharded.pt")
    finally:
        dist.destroy_process_group()
    # past the end of the interpreter, which gloo's threads may outlive with tensors in hand (pytorch #179291): C++ then
    # ends the process by SIGABRT
    os._exit(0)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_fully_shard_on_every_layer_gives_the_gradients_of_one_process(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_worker, args=(2, port, str(tmp_path)), nprocs=2)
    sharded = torch.load(tmp_path / "sharded.pt", weights_only=True)
    built = model(*EVERY, layers=1)
    loss = built.loss(tokens(4, 11), tokens(4, 11, seed=1))
    loss.backward()
    torch.testing.assert_close(sharded["loss"], loss.detach())
    torch.testing.assert_close(sharded["grads"], gradients(built), rtol=1e-4, atol=1e-6)
