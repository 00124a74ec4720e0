"""The LM head and its cross-entropy as one operation, a chunk of tokens at a time.

The logits are by far the largest tensor of a GPT: of 32 sequences of 1024 tokens and 50304 words
they take 3.3 GB in 16 bits, and their gradient as much again. Here the logits of a chunk are made,
turned into their own gradient in place, multiplied into the gradients of x and of the head, and
forgotten, all in the forward pass; the backward pass only scales. It works for any head, dense or
structured, where torch.nn.functional.linear_cross_entropy (of newer torch) takes a dense matrix.
"""

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # no GPU: plain torch
    triton = None

IGNORED = -1  # target of a token without loss


@torch.compiler.disable  # the chunks of a head are a few large products: nothing to fuse
def linear_cross_entropy(head, x, targets, chunk):
    """Mean cross-entropy of head(x), in nats, without the whole of head(x) in memory.

    head     module, (n, d_model) -> (n, vocab_size)
    x        (N, d_model)
    targets  (N,) int64; IGNORED where no loss is wanted
    chunk    tokens at a time
    -> scalar, float32
    """
    parameters = tuple(head.parameters())
    # Asked here: inside a Function gradients are off, and needs_input_grad is true of parameters under no_grad too.
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
        # A token's gradient in the sum is of size 1, well within 16 bits; in the mean it would not be.
        dx, *gradients = (gradient * dtotal for gradient in ctx.saved_tensors)
        gradients = iter(gradients)
        return None, None, None, dx, None, *(next(gradients) if trained else None for trained in ctx.trained)


def cross_entropy(logits, targets, gradient):
    """-> sum of the losses, float32, and its gradient in the place of the logits (None where `gradient` is false).

    logits (n, vocab_size), targets (n,) int64, IGNORED where no loss is wanted.
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
        torch.autograd.graph.increment_version(logits)  # a head that saved its output for backward gets an error
    return losses.sum(), logits if gradient else None


if triton is not None:

    @triton.jit
    def _cross_entropy_kernel(
        logits, targets, losses, V: tl.constexpr, gradient: tl.constexpr, IGNORED: tl.constexpr, BLOCK: tl.constexpr
    ):
        """One program a token. Twice over its row: for the sum of exponentials, then, from L2, for the gradient."""
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
            tl.debug_barrier()  # every thread has read the target's logit before one of them writes over it
            for start in range(0, V, BLOCK):
                inside = start + columns < V
                x = tl.load(row + start + columns, inside, 0.0).to(tl.float32)
                dx = weight * (tl.exp(x - log_total) - tl.where(start + columns == target, 1.0, 0.0))
                tl.store(row + start + columns, dx.to(logits.dtype.element_ty), inside)
