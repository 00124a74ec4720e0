"""What of a run is compiled or recorded, and a barrier that torch up to 2.13 leaves out of the kernels it makes for a GPU.

A reduction over rows that its program reads in several turns is a loop. If a second loop reads back what the first has
stored, another thread may have stored it, and nothing orders the two: of a standard MoE of width 256, compiled block
by block, gradients were 7,000 times too large in 9 of 22 backward passes on an H100 (torch 2.11, results/compiling.md).
torch puts a barrier between since pytorch/pytorch#190519; here one follows every loop that stores.
"""

import inspect

import torch

from configurator import ConfigError


def choose_compiling(config, device):
    """What torch.compile is given, by the options of a run: True (the model), "blocks" (each block) or False."""
    compiling = device.type == "cuda" if config.compile is None else config.compile
    if compiling and config.activation_checkpointing and config.moe != "none":
        return "blocks"  # torch.compile does not take a checkpointed block that leaves routings behind
    return compiling


def choose_cuda_graphs(config, device, dtype, world):
    """Whether an update runs as a CUDA graph, on several GPUs as two: by default where it can.

    ConfigError where config.cuda_graphs asks for what cannot be."""
    reasons = [
        (device.type != "cuda", f"device {device.type}"),
        (world > 1 and config.shard == "fsdp", "shard=fsdp"),
        (world > 1 and config.bucket_mb > 0, f"bucket_mb={config.bucket_mb}, whose exchange is within the passes"),
        (dtype == torch.float16, "float16, whose scaler reads the gradients"),
        (config.activation_checkpointing and config.dropout > 0, "activation_checkpointing with dropout"),
    ]
    against = [reason for holds, reason in reasons if holds]
    if config.cuda_graphs and against:
        raise ConfigError(f"cuda_graphs=True does not go with {against[0]}: leave it out")
    return not against if config.cuda_graphs is None else config.cuda_graphs


def order_loops(device):
    """Have the kernels that torch.compile makes for the device wait after loops that store -> whether they did not."""
    if device.type != "cuda":
        return False
    from torch._inductor.codegen.triton import TritonKernel as kernel  # which writes them

    if "invalidated_stores" in inspect.getsource(kernel.load) or hasattr(kernel.codegen_body, "barriers"):
        return False
    write_body = kernel.codegen_body

    def codegen_body(self):
        """As torch has it: the lines kept so far, as one loop if the kernel loops."""
        loop_stores = bool(self.stores) and any(tree.is_loop for tree in self.range_trees)
        write_body(self)
        if loop_stores:
            self.body.writeline("tl.debug_barrier()")

    codegen_body.barriers = True
    kernel.codegen_body = codegen_body
    torch.compiler.config.cache_key_tag += " barriers after loops"  # kernels on disk were made without
    return True


def missing_compiler(error):
    """What torch.compile or Triton lacks and what to do, in one line, where that is why `error` was raised; else None."""
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
