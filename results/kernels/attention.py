"""Milliseconds of kernels.attention against compiled LayerNorms with torch's attention, on a GPU: rows to paste into kernels.json.

python -m results.kernels.attention
"""

import json

import torch
import torch.nn.functional as F
import triton

import kernels.attention  # noqa: F401 (its operators)

OPS = torch.ops.nanoeinsum
SHAPES = ((512, 128, 16, 64), (1024, 64, 16, 64), (512, 128, 32, 32))  # texts, tokens, heads, width of a head


def by_torch(q, k, v, q_weight, k_weight, scale, causal):
    q, k = (F.layer_norm(x.float(), x.shape[-1:], w).to(v.dtype) for x, w in ((q, q_weight), (k, k_weight)))
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale).transpose(1, 2)


def milliseconds(function):
    return triton.testing.do_bench(function, warmup=50, rep=300, return_mode="median")


def main():
    for texts, tokens, heads, width in SHAPES:
        # q, k and v are slices of one tensor, as a joined layer makes them.
        joined = torch.randn(texts, tokens, 3 * heads * width, device="cuda").bfloat16()
        q, k, v = (part.view(texts, tokens, heads, width) for part in joined.split(heads * width, dim=-1))
        dy, weights, scale = torch.randn_like(q), torch.ones(2, width, device="cuda"), 8 / width
        torch._dynamo.reset()
        compiled = torch.compile(by_torch)
        leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v, *weights)]
        y = compiled(*leaves, scale, True)
        methods = {
            "kernels.attention": (
                lambda q=q, k=k, v=v, w=weights, s=scale: OPS.short_attention(q, k, v, *w, s, True),
                lambda q=q, k=k, v=v, w=weights, s=scale, dy=dy: OPS.short_attention_backward(q, k, v, *w, dy, s, True),
            ),
            "torch, compiled": (
                lambda q=q, k=k, v=v, w=weights, s=scale, f=compiled: f(q, k, v, *w, s, True),
                lambda y=y, leaves=leaves, dy=dy: torch.autograd.grad(y, leaves, dy, retain_graph=True),
            ),
        }
        for method, (forward, backward) in methods.items():
            row = {
                "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
                "what": "attention", "texts": texts, "context": tokens, "heads": heads, "d_head": width, "method": method,
                "forward_ms": milliseconds(forward), "backward_ms": milliseconds(backward),
            }  # fmt: skip
            print(json.dumps(row))


if __name__ == "__main__":
    main()
