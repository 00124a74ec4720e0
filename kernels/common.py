"""Helpers that all kernels share: where they run, in which dtype, the GELU, and block sizes."""

import math

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no GPU: plain torch
    triton = None

# With TRITON_INTERPRET=1 kernels run on the CPU, slowly.
INTERPRETED = triton is not None and triton.knobs.runtime.interpret

# Most rows of a block of z that a program can hold. The second staged kernel of btt.py can hold twice as many.
MAX_ROWS = 256


def compute_dtype(x):
    """Autocast's dtype if autocast is on, otherwise the dtype of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def gelu(x):
    """GELU in its tanh form. Compiled, it uses 0.5 (1 + tanh u) = sigmoid(2u): one exponential, cheaper on a GPU."""
    if torch.compiler.is_compiling():
        return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))
    return torch.nn.functional.gelu(x, approximate="tanh")


def runs_triton(tensor):
    """Whether kernels run on the tensor's device: a GPU with room for their blocks, or any device in Triton's interpreter."""
    return INTERPRETED or (triton is not None and tensor.is_cuda and _has_room(tensor.device.index))


def takes_kernels(x):
    """Whether kernels run on the device of x and in its compute dtype."""
    return runs_triton(x) and compute_dtype(x) in (torch.float16, torch.bfloat16)


SHARED_MEMORY = 232_448  # bytes available to a block on a Hopper GPU, for which the kernels' block sizes are chosen


@torch.compiler.assume_constant_result
def _has_room(index):
    """Whether a block on this GPU may use that much: true for H100, H200 and B200, not for A100 or consumer GPUs."""
    properties = torch.cuda.get_device_properties(index)
    room = getattr(properties, "shared_memory_per_block_optin", None)  # older torch does not report it
    return properties.major in (9, 10) if room is None else room >= SHARED_MEMORY


def pow2(n, least=1):
    """The smallest power of 2 that is at least n and `least`."""
    return max(least, 1 << (n - 1).bit_length())


def multiprocessors(tensor):
    """Number of multiprocessors of the tensor's GPU; 2 in the interpreter."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 2


def whole_rows(x):
    """x (n, d), copied if its rows are not contiguous."""
    return x if x.stride(1) == 1 else x.contiguous()


def row_stride_of_z(n):
    """Elements between the rows of a transposed z of n tokens: rows of 16-bit numbers start at multiples of 128 bytes."""
    return -(-n // 64) * 64


if triton is not None:

    @triton.jit
    def _sigmoid_of_gelu(u):
        """gelu(u) / u = sigmoid(2 √(2/π) (u + 0.044715 u³)), with two operations of the special-function unit and no division."""
        e = tl.exp2(u * (-2.302208198 - 0.102943240 * u * u))  # the constants include log2 e
        root = tl.rsqrt(1 + e)
        return root * root

    @triton.jit
    def gelu_of_tile(x):
        """The function `gelu`, computed in float32."""
        u = x.to(tl.float32)
        return (u * _sigmoid_of_gelu(u)).to(x.dtype)

    @triton.jit
    def gelu_slope_of_tile(x):
        """The derivative of `gelu`, float32."""
        u = x.to(tl.float32)
        s = _sigmoid_of_gelu(u)
        return s + u * s * (1 - s) * (1.595769122 + 0.214064449 * u * u)

    @triton.jit
    def _sum_parts_kernel(
        sums_A, sums_B, dA, dB, PARTS_A, PARTS_B, stride_A, stride_B, SIZE_A: tl.constexpr, SIZE_B: tl.constexpr,
        ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """The first programs sum sums_A (parts, SIZE_A) over its parts, BLOCK columns each; the others sum sums_B."""
        PROGRAMS_A: tl.constexpr = (SIZE_A + BLOCK - 1) // BLOCK
        pid = tl.program_id(0)
        if pid < PROGRAMS_A:
            _sum_columns(sums_A, dA, pid, PARTS_A, stride_A, SIZE_A, ROWS, BLOCK)
        else:
            _sum_columns(sums_B, dB, pid - PROGRAMS_A, PARTS_B, stride_B, SIZE_B, ROWS, BLOCK)

    @triton.jit
    def _sum_columns(sums, to, pid, PARTS, stride, SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
        at = pid * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        for first in range(0, PARTS, ROWS):
            part = first + tl.arange(0, ROWS)
            mask = (part[:, None] < PARTS) & (at[None, :] < SIZE)
            total += tl.load(sums + part[:, None].to(tl.int64) * stride + at[None, :], mask, 0.0)
        tl.store(to + at, tl.sum(total, 0).to(to.dtype.element_ty), at < SIZE)


def sum_parts(sums_A, sums_B, A, B):
    """Sums the parts of both cores' gradients, (parts, size of the core), float32, in a fixed order -> dA, dB like A, B."""
    dA, dB = torch.empty_like(A), torch.empty_like(B)
    block = 128
    programs = triton.cdiv(A.numel(), block) + triton.cdiv(B.numel(), block)
    _sum_parts_kernel[(programs,)](
        sums_A, sums_B, dA, dB, len(sums_A), len(sums_B), sums_A.stride(0), sums_B.stride(0),
        SIZE_A=A.numel(), SIZE_B=B.numel(), ROWS=16, BLOCK=block,
    )  # fmt: skip
    return dA, dB
