"""The products inside a structured layer, in plain torch.

An EinsumLinear is two batched matrix products with a permutation between them. Left to autograd,
the permutations turn into copies of large strided tensors, forward and backward; written out here,
each product is given the orientation in which its operands are views and its result is what the
next one reads. For a BTT (q = s = 1 below) that leaves one copy of the output, one of the input
gradient, and one of z's gradient. Imports nothing of this project.
"""

import torch


class TwoProducts(torch.autograd.Function):
    """y[f s n t] = Σ_{q g r} second[f, q g r, t] · Σ_p first[g, p, r f s] · x[g p n q]

    n is the number of tokens, the other letters are sizes of a layer (EinsumLinear.forward).
    x (g, p, n, q), first (g, p, r·f·s), second (f, q·g·r, t), all of one dtype -> y (f, s, n, t).
    """

    @staticmethod
    def forward(ctx, x, first, second):
        g, p, n, q = x.shape
        f, qgr, t = second.shape
        r = qgr // (q * g)
        s = first.shape[2] // (r * f)
        ctx.sizes = (g, p, n, q, f, t, r, s)
        z = first.transpose(1, 2) @ x.reshape(g, p, n * q)  # (g, r·f·s, n·q)
        y = TwoProducts.turn(z, ctx.sizes) @ second  # (f, s·n, t)
        ctx.save_for_backward(x, first, second, z)
        return y.view(f, s, n, t)

    @staticmethod
    def turn(z, sizes):
        """z as the second product reads it: (g, r·f·s, n·q) -> (f, s·n, q·g·r), a view where q = 1."""
        g, p, n, q, f, t, r, s = sizes
        return z.view(g, r, f, s, n, q).permute(2, 3, 4, 5, 0, 1).reshape(f, s * n, q * g * r)

    @staticmethod
    def backward(ctx, dy):
        x, first, second, z = ctx.saved_tensors
        g, p, n, q, f, t, r, s = ctx.sizes
        dy = dy.reshape(f, s * n, t)
        d_second = TwoProducts.turn(z, ctx.sizes).transpose(1, 2) @ dy  # (f, q·g·r, t)
        dz = second @ dy.transpose(1, 2)  # (f, q·g·r, s·n)
        dz = dz.view(f, q, g, r, s, n).permute(2, 3, 0, 4, 5, 1).reshape(g, r * f * s, n * q).transpose(1, 2)
        d_first = x.reshape(g, p, n * q) @ dz  # (g, p, r·f·s)
        dx = dz @ first.transpose(1, 2)  # (g, n·q, p)
        return dx.view(g, n, q, p).permute(0, 3, 1, 2), d_first, d_second


def two_products(x, first, second):
    """TwoProducts in autocast's dtype where autocast is on, else in the dtype of x."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return TwoProducts.apply(x.to(dtype), first.to(dtype), second.to(dtype))
