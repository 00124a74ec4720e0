"""Data parallelism: each process holds a copy of the model, or, with FSDP2, a shard of parameters, gradients and optimizer state.

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
    """-> rank, rank on this machine, number of processes, as torchrun sets them; 0, 0, 1 without torchrun.

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
    """-> number of sequences (or images, …) of an update, number of micro-steps in which a process works through its share.

    config  has micro_batch, and either batch_tokens and block_size or batch_size
    ConfigError, which offers values that fit, if the batch cannot be divided evenly.
    """
    tokens = hasattr(config, "batch_tokens")
    option, length = ("batch_tokens", config.block_size) if tokens else ("batch_size", 1)
    batch, unit = getattr(config, option), length * config.micro_batch * world
    if batch % unit:
        remedies = [f"{option}={max(1, round(batch / unit)) * unit}"]
        share, rest = divmod(batch, length * world)  # sequences per process
        micro_batch = math.gcd(share, config.micro_batch)
        pairs = getattr(config, "mixup", 0) or getattr(config, "cutmix", 0)  # a micro-batch holds whole pairs
        if not (rest or (pairs and micro_batch % 2)):
            remedies.insert(0, f"micro_batch={micro_batch}")
        of_each = f"block_size {length} x " if tokens else ""
        raise ConfigError(
            f"{option}={batch} is not divisible by {of_each}micro_batch {config.micro_batch} x {world} processes = {unit}: "
            f"take {', or '.join(remedies)}"
        )
    return batch // length, batch // unit


def parallelize(model, config, device, compiling, micro_steps):
    """Compile a model and distribute it over all processes -> compiled_model, parallel_model, flat_gradients.

    compiling        what choose_compiling returned
    compiled_model   the model to evaluate: compiled, sharded in place, or unchanged
    parallel_model   the model to train: compiled_model, or DDP around it
    flat_gradients   FlatGradients if copies exchange their gradients after the backward passes, otherwise None
    Call it before the optimizers are made: sharding replaces the parameters by other objects.
    """
    world = ranks()[2]
    if config.shard == "fsdp" and world > 1:
        shard(model, device, compiling)
        return model, model, None
    if compiling == "blocks":
        for block in model.blocks:
            block.compile()
    compiled_model = torch.compile(model) if compiling is True else model
    if world > 1 and config.bucket_mb:
        return compiled_model, replicate(compiled_model, device, micro_steps, config.bucket_mb), None
    return compiled_model, compiled_model, FlatGradients(model) if world > 1 else None


def shard(model, device, compiling):
    """Shard a model in place over all processes, block by block: a block is gathered only for its forward and backward pass.

    Call it before the optimizer is made: parameters become DTensors, with the same names and global shapes.
    Blocks are compiled one by one, because they are gathered between them.
    """
    # The logits are a view, to which FSDP2 must not attach its backward hook; training needs only the loss.
    model.register_forward_hook(drop_logits)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.blocks:
        if compiling:
            block.compile()
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def drop_logits(model, inputs, output):
    """Forward hook: in training (logits, loss, …) becomes (None, loss, …)."""
    return (None, *output[1:]) if model.training and output[1] is not None else output


def check_gradients(model):
    """RunFailed if a backward pass has left a trained parameter without a gradient.

    Copies exchange the gradients of all parameters: they would wait forever for a missing one.
    """
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if without:
        others = f" and {len(without) - 1} more have" if len(without) > 1 else " has"
        raise RunFailed(
            f"{without[0]}{others} no gradient, which several processes would exchange: let the loss depend on it, "
            "or set its requires_grad to False"
        )


class FlatGradients:
    """Gradients of a copied model, concatenated in one tensor, which all processes exchange at once.

    The exchange comes between the passes and the optimizer step, each of which can be a CUDA graph. It overlaps with
    no computation: the 475 MiB of GPT-2 take 3.4 ms between four H100s. Parameters become those of rank 0.
    """

    def __init__(self, model):
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), src=0)
        # Sizes that 4 does not divide come last: all others then begin at multiples of 16 bytes, which kernels read faster.
        self.parameters = sorted((p for p in model.parameters() if p.requires_grad), key=lambda p: p.numel() % 4 > 0)
        sizes = [p.numel() for p in self.parameters]
        self.flat = self.parameters[0].new_zeros(sum(sizes))
        self.parts = [part.view_as(p) for p, part in zip(self.parameters, self.flat.split(sizes))]

    def collect(self):
        """Copy this process's gradients into the flat tensor."""
        torch.cat([p.grad.flatten() for p in self.parameters], out=self.flat)
        for p in self.parameters:
            p.grad = None

    def exchange(self):
        """Average them over all processes."""
        if self.flat.is_cuda:
            dist.all_reduce(self.flat, dist.ReduceOp.AVG)
        else:  # gloo has no mean
            dist.all_reduce(self.flat.div_(dist.get_world_size()))

    def hand_out(self):
        """Make each parameter's gradient its part of the flat tensor."""
        for p, part in zip(self.parameters, self.parts):
            p.grad = part


class DropoutSeeds:
    """Makes the dropout masks a function of (seed, step, index of the micro-batch in the batch of all processes).

    They then do not depend on how many processes share the batch. A CUDA graph can only be seeded before it is replayed,
    so with one, masks after a process's first micro-batch do depend on how many micro-batches it takes.
    """

    def __init__(self, config, as_graph):
        self.active, self.seed, self.as_graph, self.step = config.dropout > 0, config.seed, as_graph, 0

    def seed_update(self, step, first):
        """Call it before update number `step`. first: index of this process's first micro-batch."""
        self.step = step
        if self.as_graph:
            self._set(first)

    def seed_micro_batch(self, number):
        """Call it before the passes of a micro-batch. number: its index."""
        if not self.as_graph:
            self._set(number)

    def _set(self, number):
        if self.active:
            torch.manual_seed(hash((self.seed, self.step, number)))


def sum_over_ranks(rows, device):
    """Add up float32 tensors (n,), of which each rank has a list -> n floats, the same on all ranks.

    They are added in double precision on the host, because Apple's GPUs have no float64.
    """
    sums = [math.fsum(column) for column in zip(*torch.stack(rows).tolist())]
    if dist.is_initialized():
        total = torch.tensor(sums, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        sums = total.tolist()
    return sums


def replicate(model, device, micro_steps, bucket_mb):
    """-> DDP around a model, which exchanges gradients in buckets of bucket_mb MiB: for slow networks (results/multi_gpu.md).

    A bucket is exchanged while the gradients of earlier layers are still being computed. A compiled graph returns all of
    its gradients at its end, so inside DDP torch.compile makes one graph per bucket: the exchange overlaps with
    computation, but fewer operations are fused, and no CUDA graph is recorded.

    The autograd graph is the same in every step, but torch up to 2.15 stops exchanging gradients when static_graph
    is combined with no_sync (pytorch/pytorch#187732). So DDP is told only if there is one micro-step.
    """
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        bucket_cap_mb=bucket_mb,
        gradient_as_bucket_view=True,
        broadcast_buffers=False,  # the buffers of mixtures are equal on all processes
        static_graph=micro_steps == 1,
    )


def exchange_gradients(model, wanted):
    """Context of one micro-step. wanted: whether processes exchange gradients in it, as they do in the last one only."""
    if isinstance(model, DistributedDataParallel):
        return nullcontext() if wanted else model.no_sync()
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP2
        model.set_requires_gradient_sync(wanted)
    return nullcontext()


def clip_gradients(parameters, most):
    """Scale the gradients so that their total norm is at most `most` -> the norm before clipping, a scalar tensor (not a DTensor)."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, most)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
