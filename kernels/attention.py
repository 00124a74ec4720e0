"""Attention of short contexts with the norms of queries and keys inside: Triton kernels, forward and backward.

A program processes one head of one text at a time. All its rows of q, k and v, at most 128, fit on one multiprocessor, so
that it normalises q and k as it reads them, writes neither row sums nor normalised copies to memory, and recomputes the
scores in the backward pass. Forward moves 4 tensors (q, k, v, y), backward 7 (q, k, v, dy, dq, dk, dv); LayerNorms and
torch's attention move 8 and 17. model.Attention uses torch for longer contexts, other dtypes and CPUs.

Sums are float32 and in a fixed order: the same inputs give the same bits.
"""

import torch

from kernels.common import multiprocessors, pow2, takes_kernels

try:
    import triton
    import triton.language as tl
except ImportError:  # no GPU: plain torch
    triton = None

LONGEST = 128  # most rows of one head that a program can hold
WIDEST = 64  # most columns of a head: wider ones hardly fit on a multiprocessor, and torch's kernels are faster
EPSILON = 1e-5  # of torch.nn.LayerNorm


def fits_attention(q, q_norm, k_norm):
    """Whether short_attention supports q (B, T, heads, width) and the norms of q and k: two LayerNorms, or two Identities."""
    norms = (q_norm, k_norm)
    none = all(type(norm) is torch.nn.Identity for norm in norms)
    fits = takes_kernels(q) and q.shape[1] <= LONGEST and q.shape[3] <= WIDEST
    return fits and (none or all(_is_plain_layer_norm(norm, q.shape[3]) for norm in norms))


def _is_plain_layer_norm(norm, width):
    """Whether this is a LayerNorm over a head, with a weight and without bias."""
    if type(norm) is not torch.nn.LayerNorm or norm.normalized_shape != (width,) or norm.eps != EPSILON:
        return False
    return norm.weight is not None and norm.bias is None


def short_attention(q, k, v, q_weight, k_weight, scale, causal):
    """softmax(scale · LN(q) LN(k)ᵀ) v, head by head.

    q, k, v (B, T, heads, width) of one 16-bit dtype for which fits_attention holds -> y (B, T, heads, width).
    q_weight, k_weight (width,): weights of the LayerNorms of q and k, or both None for no norms.
    causal: a row does not see later rows.
    """
    if q_weight is None:
        q_weight = k_weight = q.new_empty(0, dtype=torch.float32)
    return torch.ops.nanoeinsum.short_attention(q, k, v, q_weight.float(), k_weight.float(), scale, causal)


if triton is not None:

    @triton.jit
    def _load_rows(base, t, h, stride, T: tl.constexpr, H: tl.constexpr):
        """Rows t, columns h of one head; zeros outside."""
        return tl.load(base + t[:, None] * stride + h[None, :], (t[:, None] < T) & (h[None, :] < H), 0.0)

    @triton.jit
    def _normalise(u, weight, h, H: tl.constexpr, EPS: tl.constexpr, NORM: tl.constexpr):
        """LayerNorm over h -> normalised u (float32), 1 / std, normalised u times the weight in the dtype of u."""
        x = u.to(tl.float32)
        if not NORM:
            return x, tl.zeros_like(tl.sum(x, 1)), u
        x = tl.where(h[None, :] < H, x - tl.sum(x, 1)[:, None] / H, 0.0)
        r = tl.rsqrt(tl.sum(x * x, 1) / H + EPS)
        x = x * r[:, None]
        return x, r, (x * weight[None, :]).to(u.dtype)

    @triton.jit
    def _normalise_backward(d, x, r, weight, h, H: tl.constexpr, NORM: tl.constexpr):
        """Gradients of the input of the norm, and of its weight summed over rows. x: the normalised input."""
        if not NORM:
            return d, tl.zeros_like(tl.sum(d, 0))
        d_weight = tl.sum(d * x, 0)
        d = d * weight[None, :]
        d = d - tl.sum(d, 1)[:, None] / H - x * (tl.sum(d * x, 1) / H)[:, None]
        return tl.where(h[None, :] < H, r[:, None] * d, 0.0), d_weight

    @triton.jit
    def _probabilities(q, k, t, scale, T: tl.constexpr, CAUSAL: tl.constexpr):
        """exp(scores - maximum of their row) in float32, and the sums of the rows."""
        s = tl.dot(q, k.T) * (scale * 1.4426950408889634)  # exp(x) = exp2(x log2 e)
        seen = t[None, :] < T
        if CAUSAL:
            seen = seen & (t[:, None] >= t[None, :])
        s = tl.where(seen, s, -1e30)
        p = tl.exp2(s - tl.max(s, 1)[:, None])
        return p, tl.sum(p, 1)

    @triton.jit
    def _attention_kernel(
        q, k, v, q_weight, k_weight, y, scale, q_text, q_row, k_text, k_row, v_text, v_row, heads, count,
        T: tl.constexpr, H: tl.constexpr, TP: tl.constexpr, HP: tl.constexpr, EPS: tl.constexpr, NORM: tl.constexpr,
        CAUSAL: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        """Computes y, one head of one text after the other, and loads the next ones meanwhile."""
        t, h = tl.arange(0, TP), tl.arange(0, HP)
        w_q, w_k = h.to(tl.float32), h.to(tl.float32)
        if NORM:
            w_q, w_k = tl.load(q_weight + h, h < H, 0.0), tl.load(k_weight + h, h < H, 0.0)
        for item in tl.range(tl.program_id(0), count, tl.num_programs(0), num_stages=STAGES):
            text, head = (item // heads).to(tl.int64), item % heads
            q_t = _load_rows(q + text * q_text + head * H, t, h, q_row, T, H)
            k_t = _load_rows(k + text * k_text + head * H, t, h, k_row, T, H)
            v_t = _load_rows(v + text * v_text + head * H, t, h, v_row, T, H)
            q_hat, q_r, qn = _normalise(q_t, w_q, h, H, EPS, NORM)
            k_hat, k_r, kn = _normalise(k_t, w_k, h, H, EPS, NORM)
            p, total = _probabilities(qn, kn, t, scale, T, CAUSAL)
            y_t = tl.dot(p.to(v_t.dtype), v_t) / total[:, None]
            to = y + (text * T + t[:, None]) * (heads * H) + head * H + h[None, :]
            tl.store(to, y_t.to(y.dtype.element_ty), (t[:, None] < T) & (h[None, :] < H))

    @triton.jit
    def _attention_backward_kernel(
        q, k, v, dy, q_weight, k_weight, dq, dk, dv, d_weights, scale, q_text, q_row, k_text, k_row, v_text, v_row,
        heads, count, T: tl.constexpr, H: tl.constexpr, TP: tl.constexpr, HP: tl.constexpr, EPS: tl.constexpr,
        NORM: tl.constexpr, CAUSAL: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        """Computes all gradients. d_weights (programs, 2, H): each program's share of the gradients of both weights."""
        t, h = tl.arange(0, TP), tl.arange(0, HP)
        w_q, w_k = h.to(tl.float32), h.to(tl.float32)
        if NORM:
            w_q, w_k = tl.load(q_weight + h, h < H, 0.0), tl.load(k_weight + h, h < H, 0.0)
        dw_q, dw_k = tl.zeros((HP,), tl.float32), tl.zeros((HP,), tl.float32)
        for item in tl.range(tl.program_id(0), count, tl.num_programs(0), num_stages=STAGES):
            text, head = (item // heads).to(tl.int64), item % heads
            own = text * T * (heads * H) + head * H  # offset in contiguous tensors (B, T, heads, H)
            q_t = _load_rows(q + text * q_text + head * H, t, h, q_row, T, H)
            k_t = _load_rows(k + text * k_text + head * H, t, h, k_row, T, H)
            v_t = _load_rows(v + text * v_text + head * H, t, h, v_row, T, H)
            dy_t = _load_rows(dy + own, t, h, heads * H, T, H)
            q_hat, q_r, qn = _normalise(q_t, w_q, h, H, EPS, NORM)
            k_hat, k_r, kn = _normalise(k_t, w_k, h, H, EPS, NORM)
            p, total = _probabilities(qn, kn, t, scale, T, CAUSAL)
            p = p / total[:, None]
            to, mask = own + t[:, None] * (heads * H) + h[None, :], (t[:, None] < T) & (h[None, :] < H)
            dv_t = tl.dot(p.to(q_t.dtype).T, dy_t)
            tl.store(dv + to, dv_t.to(dv.dtype.element_ty), mask)
            dp = tl.dot(dy_t, v_t.T)
            ds = (p * (dp - tl.sum(p * dp, 1)[:, None]) * scale).to(q_t.dtype)
            dq_t, dw = _normalise_backward(tl.dot(ds, kn), q_hat, q_r, w_q, h, H, NORM)
            dw_q += dw
            tl.store(dq + to, dq_t.to(dq.dtype.element_ty), mask)
            dk_t, dw = _normalise_backward(tl.dot(ds.T, qn), k_hat, k_r, w_k, h, H, NORM)
            dw_k += dw
            tl.store(dk + to, dk_t.to(dk.dtype.element_ty), mask)
        if NORM:
            tl.store(d_weights + tl.program_id(0) * (2 * H) + h, dw_q, h < H)
            tl.store(d_weights + tl.program_id(0) * (2 * H) + H + h, dw_k, h < H)


# (warps, programs per multiprocessor, pipeline stages): the fastest of twelve choices on an H100.
FORWARD, BACKWARD = (8, 1, 3), (8, 1, 2)


def _launch(q, q_weight, causal, shape):
    """-> grid, number of heads of all texts, constants of a launch"""
    (B, T, heads, H), (warps, programs, stages) = q.shape, shape
    return (min(B * heads, programs * multiprocessors(q)),), B * heads, dict(
        T=T, H=H, TP=pow2(T, 16), HP=pow2(H, 16), EPS=EPSILON, NORM=q_weight.numel() > 0, CAUSAL=causal, STAGES=stages,
        num_warps=warps,
    )  # fmt: skip


def _whole_heads(*tensors):
    """Tensors (B, T, heads, width), copied if their rows of (heads, width) are not contiguous."""
    whole = [tensor.stride(3) == 1 and tensor.stride(2) == tensor.shape[3] for tensor in tensors]
    return [tensor if fine else tensor.contiguous() for tensor, fine in zip(tensors, whole)]


@torch.library.custom_op("nanoeinsum::short_attention", mutates_args=())
def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, scale: float,
    causal: bool,
) -> torch.Tensor:  # fmt: skip
    q, k, v = _whole_heads(q, k, v)
    y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    strides = [tensor.stride(axis) for tensor in (q, k, v) for axis in (0, 1)]
    grid, count, constants = _launch(q, q_weight, causal, FORWARD)
    _attention_kernel[grid](q, k, v, q_weight, k_weight, y, scale, *strides, q.shape[2], count, **constants)
    return y


@_attention.register_fake
def _(q, k, v, q_weight, k_weight, scale, causal):
    return q.new_empty(q.shape)


@torch.library.custom_op("nanoeinsum::short_attention_backward", mutates_args=())
def _attention_backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, dy: torch.Tensor,
    scale: float, causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    q, k, v = _whole_heads(q, k, v)
    dq, dk, dv = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    strides = [tensor.stride(axis) for tensor in (q, k, v) for axis in (0, 1)]
    grid, count, constants = _launch(q, q_weight, causal, BACKWARD)
    d_weights = torch.empty(grid[0], 2, q_weight.numel(), device=q.device)
    _attention_backward_kernel[grid](
        q,
        k,
        v,
        dy.contiguous(),
        q_weight,
        k_weight,
        dq,
        dk,
        dv,
        d_weights,
        scale,
        *strides,
        q.shape[2],
        count,
        **constants,
    )
    dw_q, dw_k = d_weights.sum(dim=0)
    return dq, dk, dv, dw_q.clone(), dw_k.clone()


@_attention_backward.register_fake
def _(q, k, v, q_weight, k_weight, dy, scale, causal):
    like = (q, k, v)
    return (
        *(q.new_empty(tensor.shape) for tensor in like),
        q_weight.new_empty(q_weight.shape),
        k_weight.new_empty(k_weight.shape),
    )


def _setup(ctx, inputs, output):
    *tensors, ctx.scale, ctx.causal = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, dy):
    grads = torch.ops.nanoeinsum.short_attention_backward(*ctx.saved_tensors, dy, ctx.scale, ctx.causal)
    return *grads, None, None


_attention.register_autograd(_gradients, setup_context=_setup)
