"""Several processes: copies, DDP, or FSDP2 that shards parameters, gradients and optimizer state.

Under torchrun a process drives one GPU (NCCL), or shares the CPU (gloo).
"""

import math
import os
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from configurator import ConfigError, RunFailed


def ranks():
    """-> rank, rank on this machine, number of processes, as torchrun sets them; 0, 0, 1 without it.

    ConfigError where the environment holds something else.
    """
    given = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name in os.environ}
    wrong = [f"{name}={value}" for name, value in given.items() if not value.isdecimal()]
    rank, local_rank, world = 0, 0, 1
    if not wrong:
        rank, local_rank, world = (
            int(given.get(name, default)) for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
        )
        if world > 1 and "RANK" not in given:
            wrong = [f"WORLD_SIZE={world} without RANK"]
        elif not rank < world or not local_rank < world:
            wrong = [
                f"{name}={value}" for name, value in dict(RANK=rank, LOCAL_RANK=local_rank, WORLD_SIZE=world).items()
            ]
    if wrong:
        raise ConfigError(
            f"the environment has {', '.join(wrong)}: start several processes with torchrun; for one, unset RANK, LOCAL_RANK "
            "and WORLD_SIZE"
        )
    return rank, local_rank, world


def split_batch(config, world):
    """-> sequences (or images, …) of an update, micro-steps in which a process takes its share of them.

    config  has micro_batch, and batch_tokens and block_size, or else batch_size
    ConfigError with values that fit where the batch does not divide.
    """
    tokens = hasattr(config, "batch_tokens")
    option, length = ("batch_tokens", config.block_size) if tokens else ("batch_size", 1)
    batch, unit = getattr(config, option), length * config.micro_batch * world
    if batch % unit:
        remedies = [f"{option}={max(1, round(batch / unit)) * unit}"]
        share, rest = divmod(batch, length * world)  # sequences of a process
        micro_batch = math.gcd(share, config.micro_batch)
        pairs = getattr(config, "mixup", 0) or getattr(config, "cutmix", 0)  # of which a micro-batch has whole ones
        if not (rest or (pairs and micro_batch % 2)):
            remedies.insert(0, f"micro_batch={micro_batch}")
        of_each = f"block_size {length} x " if tokens else ""
        raise ConfigError(
            f"{option}={batch} is not divisible by {of_each}micro_batch {config.micro_batch} x {world} processes = {unit}: "
            f"take {', or '.join(remedies)}"
        )
    return batch // length, batch // unit


def spread_model(model, config, device, compiling, micro_steps):
    """Compile a model and bring it to all processes -> fast, parallel, flat.

    compiling   of compiling.choose_compiling
    fast        the model as it is evaluated: itself, sharded in place, or compiled
    parallel    as it is trained: `fast`, or DDP around it
    flat        FlatGradients where copies exchange gradients after their passes, else None
    Before the optimizers are made: sharded parameters are other objects.
    """
    world = ranks()[2]
    if config.shard == "fsdp" and world > 1:
        shard(model, device, compiling)
        return model, model, None
    if compiling == "blocks":
        for block in model.blocks:
            block.compile()
    fast = torch.compile(model) if compiling is True else model
    if world > 1 and config.bucket_mb:
        return fast, replicate(fast, device, micro_steps, config.bucket_mb), None
    return fast, fast, FlatGradients(model) if world > 1 else None


def shard(model, device, compiling):
    """Shard a GPT in place over all processes, a block at a time: gathered for its forward and backward pass only.

    Before the optimizer is made: parameters become DTensors, of the same names and global shapes.
    Blocks are compiled one by one, for gathering happens between them.
    """
    # Its logits are a view, which FSDP2's hook for the backward pass must not sit on; training needs the loss alone.
    model.register_forward_hook(without_logits)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.blocks:
        if compiling:
            block.compile()
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def without_logits(model, inputs, output):
    """Forward hook: (logits, loss, …) -> (None, loss, …) in training."""
    return (None, *output[1:]) if model.training and output[1] is not None else output


def check_gradients(model):
    """RunFailed that names the trained parameters which a backward pass has left without a gradient.

    Copies exchange the gradients of all parameters, or wait for them for ever.
    """
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if without:
        others = f" and {len(without) - 1} more have" if len(without) > 1 else " has"
        raise RunFailed(
            f"{without[0]}{others} no gradient, which several processes would exchange: let the loss depend on it, "
            "or set its requires_grad to False"
        )


class FlatGradients:
    """Gradients of a copied model, one after the other in one tensor, which all processes exchange at once.

    The exchange comes between the passes and the optimizer, which can be a CUDA graph each. It hides behind
    nothing: 475 MiB, GPT-2's, take 3.4 ms between four H100s. Parameters become those of rank 0.
    """

    def __init__(self, model):
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), src=0)
        # Odd sizes come last, so that all others begin at multiples of 16 bytes, which kernels read faster.
        self.parameters = sorted((p for p in model.parameters() if p.requires_grad), key=lambda p: p.numel() % 4 > 0)
        sizes = [p.numel() for p in self.parameters]
        self.flat = self.parameters[0].new_zeros(sum(sizes))
        self.parts = [part.view_as(p) for p, part in zip(self.parameters, self.flat.split(sizes))]

    def collect(self):
        """Take the gradients of this process's share."""
        torch.cat([p.grad.flatten() for p in self.parameters], out=self.flat)
        for p in self.parameters:
            p.grad = None

    def exchange(self):
        """Their mean over all processes."""
        if self.flat.is_cuda:
            dist.all_reduce(self.flat, dist.ReduceOp.AVG)
        else:  # gloo has no mean
            dist.all_reduce(self.flat.div_(dist.get_world_size()))

    def hand_out(self):
        """Give the parameters their gradients."""
        for p, part in zip(self.parameters, self.parts):
            p.grad = part


class DropoutSeeds:
    """Makes dropout's masks a function of (seed, step, number of the micro-batch in the batch of all processes).

    So they do not depend on how many processes share the batch. A CUDA graph is seeded before it, not inside: there the
    masks behind a process's first micro-batch depend on how many it takes.
    """

    def __init__(self, config, as_graph):
        self.active, self.seed, self.as_graph, self.step = config.dropout > 0, config.seed, as_graph, 0

    def seed_update(self, step, first):
        """Before update number `step`; first: number of this process's first micro-batch."""
        self.step = step
        if self.as_graph:
            self._set(first)

    def seed_micro_batch(self, number):
        """Before the passes of a micro-batch."""
        if not self.as_graph:
            self._set(number)

    def _set(self, number):
        if self.active:
            torch.manual_seed(hash((self.seed, self.step, number)))


def sum_over_ranks(rows, device):
    """Sums of float32 tensors (n,), a list of them on each rank -> n floats, the same on all ranks.

    Added in double precision on the host, for Apple's GPUs have no float64.
    """
    sums = [math.fsum(column) for column in zip(*torch.stack(rows).tolist())]
    if dist.is_initialized():
        total = torch.tensor(sums, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        sums = total.tolist()
    return sums


def replicate(model, device, micro_steps, bucket_mb):
    """DDP around a model; gradients live in the buckets that are exchanged, of bucket_mb MiB.

    A bucket is exchanged while those below it are still computed. A compiled graph hands out all of its gradients
    at its end, so inside DDP torch.compile makes a graph a bucket: the exchange hides, but less is fused, and
    none of it is a CUDA graph. For slow networks (results/multi_gpu.md).

    The graph is the same every step, but torch up to 2.15 stops exchanging gradients where
    static_graph meets no_sync (pytorch/pytorch#187732): said only where there is one micro-step.
    """
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        bucket_cap_mb=bucket_mb,
        gradient_as_bucket_view=True,
        broadcast_buffers=False,  # those of mixtures are equal on all processes
        static_graph=micro_steps == 1,
    )


def exchange_gradients(model, wanted):
    """Context of one micro-step: gradients are exchanged between processes in the last one only."""
    if isinstance(model, DistributedDataParallel):
        return nullcontext() if wanted else model.no_sync()
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP2
        model.set_requires_gradient_sync(wanted)
    return nullcontext()


def clip_gradients(parameters, most):
    """Scale the gradients so that their common norm is at most `most` -> the norm before, a plain scalar tensor."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, most)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
