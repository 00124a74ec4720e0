"""What the kernels share: where they run, in which dtype, the GELU, and sizes of blocks."""

import math

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no GPU: plain torch
    triton = None

# TRITON_INTERPRET=1: kernels run on the CPU, slowly
INTERPRETED = triton is not None and triton.knobs.runtime.interpret

# Of a block of z, r·f or g·r, that a program can hold; twice as many of g·r, which two kernels share out.
MAX_ROWS = 256


def compute_dtype(x):
    """Autocast's dtype where autocast is on, else that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def gelu(x):
    """GELU in its tanh form. When compiled, with 0.5 (1 + tanh u) = sigmoid(2u): one exponential, cheaper on a GPU."""
    if torch.compiler.is_compiling():
        return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))
    return torch.nn.functional.gelu(x, approximate="tanh")


def runs_triton(tensor):
    """Whether kernels run where the tensor is: on a GPU that has room for their blocks, or anywhere in Triton's interpreter."""
    return INTERPRETED or (triton is not None and tensor.is_cuda and _has_room(tensor.device.index))


def takes_kernels(x):
    """Whether they run where x is, in the type that it is computed in."""
    return runs_triton(x) and compute_dtype(x) in (torch.float16, torch.bfloat16)


SHARED_MEMORY = 232_448  # bytes that a block may have on a Hopper GPU, which the kernels' block sizes are made for


@torch.compiler.assume_constant_result
def _has_room(index):
    """Whether a block of this GPU may have that much: true of H100, H200 and B200, not of A100 or of GPUs for games."""
    properties = torch.cuda.get_device_properties(index)
    room = getattr(properties, "shared_memory_per_block_optin", None)  # older torch does not say
    return properties.major in (9, 10) if room is None else room >= SHARED_MEMORY


def pow2(n, least=1):
    """The smallest power of 2 that is at least n and `least`."""
    return max(least, 1 << (n - 1).bit_length())


def multiprocessors(tensor):
    """How many the tensor's GPU has; 2 in the interpreter."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 2


def whole_rows(x):
    """x (n, d) with its rows whole in memory."""
    return x if x.stride(1) == 1 else x.contiguous()


def row_stride_of_z(n):
    """Elements between the rows of a transposed z of n tokens, 16 bits each."""
    return -(-n // 64) * 64  # rows of z begin at a multiple of 128 bytes


if triton is not None:

    @triton.jit
    def _sigmoid_of_gelu(u):
        """gelu(u) / u = sigmoid(2 √(2/π) (u + 0.044715 u³)), with two operations of the special-function units, no division."""
        e = tl.exp2(u * (-2.302208198 - 0.102943240 * u * u))  # the constants are times log2 e
        root = tl.rsqrt(1 + e)
        return root * root

    @triton.jit
    def gelu_of_tile(x):
        """The function `gelu`, by float32."""
        u = x.to(tl.float32)
        return (u * _sigmoid_of_gelu(u)).to(x.dtype)

    @triton.jit
    def gelu_slope_of_tile(x):
        """Its derivative, float32."""
        u = x.to(tl.float32)
        s = _sigmoid_of_gelu(u)
        return s + u * s * (1 - s) * (1.595769122 + 0.214064449 * u * u)
