"""Gluon kernels of BTT layers: their PTX for Hopper, run by the emulator, against float64. `pytest tests/kernels/test_gluon_btt.py`."""

import numpy as np
import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402

from kernels import gluon_btt as kernels  # noqa: E402
from ptx_emulator import FORMATS, Memory, run_grid  # noqa: E402

TYPES = {"x": "16", "first": "16", "second": "16", "y": "16", "dy": "16", "A": "16", "B": "16", "dx": "16", "sums": "*fp32"}


def compiled(kernel, constants, dtype="bf16", arch=90):
    """A kernel compiled for Hopper, with pointers and strides that are multiples of 16."""
    arguments = [p.name for p in kernel.params if not p.is_constexpr]
    types = {name: TYPES.get(name, "i32").replace("16", f"*{dtype.replace('f16', 'fp16') if dtype == 'f16' else dtype}") for name in arguments}
    hints = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(arguments) if name != "N"}
    source = GluonASTSource(kernel, {**types, **dict.fromkeys(constants, "constexpr")}, constants, hints)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": constants["W"]})
