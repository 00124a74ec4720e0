"""Compile Triton kernels for an H100 on a machine that has none, to check their shared memory and registers."""

import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
import triton

from kernels.btt import BTTSizes
from theta import BTT, factor_sizes

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def layer_sizes(d_in, d_out, rank):
    a, _, g, _, e, f, r = factor_sizes(d_in, d_out, BTT, rank)
    return BTTSizes(g, a, f, e, r)


class Compiler:
    """Stands in for a Triton kernel: a launch compiles the kernel for an H100 with these arguments and does not run it.

    Tests patch it in for a kernel and read the result, `compiled[kernel name]`: its metadata states the shared memory
    a block needs, and `spilled_bytes` counts the registers that did not fit.
    """

    TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}

    def __init__(self, kernel, compiled):
        self.kernel, self.compiled = kernel, compiled

    def __getitem__(self, grid):
        def launch(*args, num_warps=4, num_stages=3, maxnreg=None, **constants):
            from triton.backends.compiler import GPUTarget
            from triton.compiler import ASTSource
            from triton.experimental.gluon._runtime import GluonASTSource

            names = self.kernel.arg_names
            values = {**dict(zip(names, args)), **constants}
            fixed = {p.name: values[p.name] for p in self.kernel.params if p.is_constexpr or values[p.name] is None}
            signature, hints = {}, {}
            for i, name in enumerate(names):
                value = values[name]
                tensor = isinstance(value, torch.Tensor)
                signature[name] = "constexpr" if name in fixed else self.TYPES[value.dtype] if tensor else "i32"
                if name not in fixed and name not in self.kernel.do_not_specialize and (tensor or value % 16 == 0):
                    hints[(i,)] = [["tt.divisibility", 16]]
            source = (GluonASTSource if self.kernel.is_gluon() else ASTSource)(
                self.kernel, signature, constexprs=fixed, attrs=hints
            )
            options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg}
            result = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
            self.compiled[self.kernel.__name__] = result

        return launch


def spilled_bytes(compiled):
    """Bytes of registers that ptxas spills to memory, per thread."""
    binaries = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        for ptxas in ("ptxas", "ptxas-blackwell"):  # the second is newer: it reads PTX that the first cannot
            words = [str(binaries / ptxas), "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"]
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode == 0:
                return int(re.search(r"(\d+) bytes spill stores", done.stderr)[1])
    pytest.skip(f"no ptxas here reads this PTX: {done.stderr}")
