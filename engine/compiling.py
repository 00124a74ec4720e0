"""Which parts of a run are compiled or recorded, and a barrier that torch up to 2.13 omits from the kernels it generates.

A kernel reduces long rows in a loop. If a second loop reads back what the first has stored, another thread may have
stored it, and nothing orders the two accesses: in a standard MoE of width 256, compiled block by block, gradients were
7,000 times too large in 9 of 22 backward passes on an H100 (torch 2.11, results/compiling.md). Since
pytorch/pytorch#190519 torch puts a barrier between the loops; for earlier versions we add one after every loop that stores.
"""

import inspect

import torch

from configurator import ConfigError


def choose_compiling(config, device):
    """What to compile, according to the options of a run: True (the whole model), "blocks" (each block) or False."""
    compiling = device.type == "cuda" if config.compile is None else config.compile
    if compiling and config.activation_checkpointing and config.moe != "none":
        return "blocks"  # torch.compile cannot take a whole model whose checkpointed blocks record their routing
    return compiling


def choose_cuda_graphs(config, device, dtype, world):
    """Whether an update runs as a CUDA graph, or on several GPUs as two: by default whenever it can.

    ConfigError if config.cuda_graphs asks for it and it cannot.
    """
    reasons = [
        (device.type != "cuda", f"device {device.type}"),
        (world > 1 and config.shard == "fsdp", "shard=fsdp"),
        (
            world > 1 and config.bucket_mb > 0,
            f"bucket_mb={config.bucket_mb}, which exchanges gradients inside the passes",
        ),
        (dtype == torch.float16, "float16, whose gradient scaler must wait for the GPU"),
        (config.activation_checkpointing and config.dropout > 0, "activation_checkpointing with dropout"),
    ]
    against = [reason for holds, reason in reasons if holds]
    if config.cuda_graphs and against:
        raise ConfigError(f"cuda_graphs=True cannot be combined with {against[0]}: leave it out")
    return not against if config.cuda_graphs is None else config.cuda_graphs


def order_loops(device):
    """Add the barrier to the kernels that torch.compile will generate for the device -> whether torch needed the change."""
    if device.type != "cuda":
        return False
    from torch._inductor.codegen.triton import TritonKernel as kernel  # generates the kernels

    if "invalidated_stores" in inspect.getsource(kernel.load) or hasattr(kernel.codegen_body, "barriers"):
        return False
    write_body = kernel.codegen_body

    def codegen_body(self):
        """torch's own method, which writes the lines collected so far as one loop, then the barrier."""
        loop_stores = bool(self.stores) and any(tree.is_loop for tree in self.range_trees)
        write_body(self)
        if loop_stores:
            self.body.writeline("tl.debug_barrier()")

    codegen_body.barriers = True
    kernel.codegen_body = codegen_body
    torch.compiler.config.cache_key_tag += " barriers after loops"  # kernels cached on disk have none
    return True


def missing_compiler(error):
    """One line about the compiler or header that torch.compile or Triton lacks, if `error` was raised for that; otherwise None."""
    while error is not None:
        kind, text = type(error).__name__, str(error).strip()
        line = text.partition("\n")[0].rstrip(".")
        if kind in ("InvalidCxxCompiler", "TritonMissing", "GPUTooOldForTriton"):
            return f"torch.compile has no compiler ({line}): install one, or take --compile=False"
        if kind == "CppCompileError" and "Python.h" in text:
            return "torch.compile needs Python.h: install Python's headers (python3-dev), or take --compile=False"
        if "Failed to find C compiler" in line:
            return "Triton has no C compiler: install gcc, or name one in the variable CC"
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
    return None
