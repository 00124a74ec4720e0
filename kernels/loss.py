"""The LM head and its cross-entropy as one operation, computed in chunks of tokens.

The logits are by far the largest tensor of a GPT: for 32 sequences of 1024 tokens and a vocabulary of
50304 they take 3.3 GB in 16 bits, and their gradient as much again. Here the forward pass computes
the logits of a chunk, replaces them by their gradient in place, accumulates the gradients of x and of
the head, and discards them; the backward pass only scales. This works for any head, dense or structured;
torch.nn.functional.linear_cross_entropy (in newer torch) needs a dense matrix.
"""

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # no GPU: plain torch
    triton = None

IGNORED = -1  # target of tokens that do not count in the loss


@torch.compiler.disable  # the chunks of a head are a few large products: nothing to fuse
def linear_cross_entropy(head, x, targets, chunk):
    """Mean cross-entropy of head(x), in nats, without ever holding all of head(x) in memory.

    head     module, (n, d_model) -> (n, vocab_size)
    x        (N, d_model)
    targets  (N,) int64; IGNORED for tokens that do not count
    chunk    number of tokens at a time
    -> scalar, float32
    """
    parameters = tuple(head.parameters())
    # Decided here: inside a Function gradients are off, and needs_input_grad is true even under no_grad.
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *parameters))
    total = _ChunkedLoss.apply(head, chunk, wanted, x, targets, *parameters)
    return total / (targets != IGNORED).sum()


class _ChunkedLoss(torch.autograd.Function):
    """Sum of the losses. The head's parameters are arguments, so that autograd asks for their gradients."""

    @staticmethod
    def forward(ctx, head, chunk, wanted, x, targets, *parameters):
        total = torch.zeros((), device=x.device)
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        dx, gradients = torch.empty_like(x) if wanted else None, None
        for start in range(0, len(x), chunk):
            here = slice(start, start + chunk)
            with torch.set_grad_enabled(wanted):
                x_chunk = x[here].detach().requires_grad_(wanted)
                logits = head(x_chunk)  # (chunk, vocab_size)
            loss, dlogits = cross_entropy(logits, targets[here], gradient=wanted)
            total += loss
            if wanted:
                dx[here], *of_parameters = torch.autograd.grad(logits, (x_chunk, *trained), dlogits)
                if gradients is None:
                    gradients = of_parameters
                else:
                    for gradient, more in zip(gradients, of_parameters):
                        gradient += more
        if wanted:
            ctx.trained = [parameter.requires_grad for parameter in parameters]
            ctx.save_for_backward(dx, *gradients)
        return total

    @staticmethod
    def backward(ctx, dtotal):
        # The gradient of a token in the sum has size 1, well within the range of 16 bits; in the mean it would be tiny.
        dx, *gradients = (gradient * dtotal for gradient in ctx.saved_tensors)
        gradients = iter(gradients)
        return None, None, None, dx, None, *(next(gradients) if trained else None for trained in ctx.trained)


def cross_entropy(logits, targets, gradient):
    """-> sum of the losses, float32, and its gradient, which may overwrite the logits (None if not `gradient`).

    logits (n, vocab_size), targets (n,) int64, IGNORED for tokens that do not count.
    """
    if triton is not None and (logits.is_cuda or _interpreted()):
        return _cross_entropy_by_triton(logits, targets, gradient)
    with torch.no_grad():
        log_p = F.log_softmax(logits.float(), dim=-1)
        loss = F.nll_loss(log_p, targets, ignore_index=IGNORED, reduction="sum")
        if not gradient:
            return loss, None
        dlogits = log_p.exp_()
        kept = targets != IGNORED
        dlogits[torch.arange(len(targets), device=logits.device), targets.clamp(min=0)] -= 1
        return loss, (dlogits * kept[:, None]).to(logits.dtype)


def _interpreted():
    return triton.knobs.runtime.interpret


def _cross_entropy_by_triton(logits, targets, gradient):
    logits = logits.detach().contiguous()
    losses = torch.empty(len(logits), device=logits.device)
    block = min(4096, triton.next_power_of_2(logits.shape[1]))
    _cross_entropy_kernel[(len(logits),)](
        logits, targets, losses, logits.shape[1], gradient=gradient, IGNORED=IGNORED, BLOCK=block, num_warps=8
    )  # fmt: skip
    if gradient:
        torch.autograd.graph.increment_version(logits)  # autograd then rejects a head that saved its output
    return losses.sum(), logits if gradient else None


if triton is not None:

    @triton.jit
    def _cross_entropy_kernel(
        logits, targets, losses, V: tl.constexpr, gradient: tl.constexpr, IGNORED: tl.constexpr, BLOCK: tl.constexpr
    ):
        """One program per token reads its row twice: for the sum of exponentials, then, from the L2 cache, for the gradient."""
        token = tl.program_id(0).to(tl.int64)
        row = logits + token * V
        target = tl.load(targets + token)
        columns = tl.arange(0, BLOCK)
        biggest, total = -float("inf"), 0.0  # of the logits so far, and sum of exp(logit - biggest)
        for start in range(0, V, BLOCK):
            x = tl.load(row + start + columns, start + columns < V, -float("inf")).to(tl.float32)
            bigger = tl.maximum(biggest, tl.max(x, 0))
            total = total * tl.exp(biggest - bigger) + tl.sum(tl.exp(x - bigger), 0)
            biggest = bigger
        log_total = biggest + tl.log(total)
        weight = tl.where(target == IGNORED, 0.0, 1.0)
        at_target = tl.load(row + tl.maximum(target, 0)).to(tl.float32)
        tl.store(losses + token, weight * (log_total - at_target))
        if gradient:
            tl.debug_barrier()  # all threads must read the target's logit before any of them overwrites it
            for start in range(0, V, BLOCK):
                inside = start + columns < V
                x = tl.load(row + start + columns, inside, 0.0).to(tl.float32)
                dx = weight * (tl.exp(x - log_total) - tl.where(start + columns == target, 1.0, 0.0))
                tl.store(row + start + columns, dx.to(logits.dtype.element_ty), inside)
