"""One process under NCCL, its network wrapped by DDP or FSDP as by several: `torchrun -m benchmarks.gpu.one_process`.

Prints a line of JSON: the losses, beside those of the same network without a wrapper.
"""

from __future__ import annotations

import json
import sys
import time

import torch
import torch.distributed as dist

from benchmarks.gpu import networks, step
from benchmarks.gpu.sizes import TINY, Network
from reeltune.diffusion.loss import diffusion_loss
from reeltune.distributed import fsdp
from reeltune.distributed.ddp import Direct
from reeltune.distributed.engine import Engine
from reeltune.families.wan_fun.family import CONTROL_V1_1 as FAMILY

NETWORK, STEPS = Network(heads=4, ffn=256, layers=4, head_width=32), 3


def losses(engine: Engine, wrapper: str) -> tuple[list[float], float]:
    """(of each step, seconds of the last). wrapper: ddp, fsdp, or none."""
    net = networks.filled(networks.transformer(NETWORK, TINY.encoders), engine.device, torch.float32).train()
    net = engine.accelerator.prepare_model(net, device_placement=False, evaluation_mode=True)
    if wrapper == "fsdp":
        more = {"keep_gathered": False, "offload": False}
        fsdp.shard(net, FAMILY.blocks, device=engine.device, world=1, dtype=engine.dtype, **more)
    parameters = list(net.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    trainer = Direct(engine.accelerator, net, optimizer, ddp=wrapper == "ddp")
    encoded = step.encoded(TINY.clip, TINY.encoders, engine.device)
    found, begun = [], 0.0
    for i in range(STEPS):
        begun = time.perf_counter()
        loss = diffusion_loss(FAMILY.denoise, trainer.net, FAMILY.objective, encoded, {}, [i], [(0, 1)]).value
        trainer.backward(loss, last=True)
        trainer.step(parameters, 1.0)
        found.append(loss.item())
    return found, time.perf_counter() - begun


def main(wrapper: str) -> None:
    engine = Engine("bf16")
    one = torch.ones(2**20, device=engine.device)
    dist.all_reduce(one)
    wrapped, seconds = losses(engine, wrapper)
    plain, _ = losses(engine, "none")
    told = {"backend": dist.get_backend(), "sum": one.sum().item(), "losses": wrapped, "plain": plain}
    print(json.dumps({**told, "step_s": seconds}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
