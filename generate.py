"""Generation: a GPT continues token ids by tokens that it draws, one at a time.

Shapes: B batch, T new positions, S = block_size positions in the cache, nh heads of width hs.
"""

import math
from contextlib import nullcontext

import torch

from einsum_linear import multiplied_out
from kernels.cuda_graph import Graphed


@torch.no_grad()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None, vocab_size=None):
    """Continue idx, (B, T) int64 with 1 <= T <= block_size, by max_new_tokens sampled tokens -> (B, T + max_new_tokens).

    temperature, top_k, top_p, generator  as in sample_token
    vocab_size                            draw only ids below it: a tokenizer knows fewer than a rounded-up vocabulary has

    Keys and values are cached. When the context is full, its second half is read again and generation continues from
    there. On a GPU the structured layers are multiplied out meanwhile, and the step of one token is a CUDA graph.
    """
    was_training = model.training
    model.eval()
    try:
        with multiplied_out(model) if idx.is_cuda else nullcontext():
            return _generate(model, idx, max_new_tokens, temperature, top_k, top_p, generator, vocab_size)
    finally:
        model.train(was_training)


def _generate(model, idx, max_new_tokens, temperature, top_k, top_p, generator, vocab_size):
    cache, block_size = KVCache(model.config, idx.device), model.config.block_size

    def read(tokens):
        return model.lm_head(model.trunk(tokens, cache)[:, -1]).float()  # (B, vocab_size)

    read_one = Graphed(read) if idx.is_cuda else read
    B, T = idx.shape
    idx = torch.cat((idx, idx.new_empty(B, max_new_tokens)), dim=1)
    cached = 0  # positions in the cache
    for end in range(T, T + max_new_tokens):
        if cached == 0 or cached == block_size:
            first = 0 if cached == 0 else end - max(1, block_size // 2)
            cache.clear()
            logits, cached = read(idx[:, first:end]), end - first
        else:
            logits, cached = read_one(idx[:, end - 1 : end]), cached + 1
        idx[:, end : end + 1] = sample_token(logits[:, :vocab_size], temperature, top_k, top_p, generator)
    return idx


class KVCache:
    """Keys and values of the positions read so far, for each attention layer, in buffers of block_size positions.

    The number of positions is kept on the device and all shapes are fixed, so that a step can be a CUDA graph.
    """

    def __init__(self, config, device):
        self.every = torch.arange(config.block_size, device=device)  # (S,)
        self.length = torch.zeros((), dtype=torch.int64, device=device)
        self.buffers = {}

    def clear(self):
        """Forget all positions."""
        self.length.zero_()

    def next_positions(self, T):
        """Positions of the next T tokens, (T,). The caller ensures that they fit."""
        self.positions = self.length + self.every[:T]
        self.length += T
        return self.positions

    def extend(self, layer, k, v):
        """Store k and v (B, nh, T, hs) at the next positions -> all keys, all values (B, nh, S, hs), mask (T, S)."""
        if layer not in self.buffers:
            B, nh, _, hs = k.shape
            self.buffers[layer] = [k.new_zeros(B, nh, len(self.every), hs) for _ in range(2)]
        for buffer, new in zip(self.buffers[layer], (k, v)):
            buffer.index_copy_(2, self.positions, new)
        return *self.buffers[layer], self.every <= self.positions[:, None]


def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """(B, vocab_size) logits -> (B, 1) token ids.

    temperature 0 takes the likeliest token. top_k keeps the k likeliest, top_p the fewest likeliest tokens whose
    probabilities add up to p.
    """
    if temperature < 1e-30:  # float32 cannot divide by it, and the likeliest token has all the probability
        return logits.argmax(dim=-1, keepdim=True)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # at most 0: none overflows
    if top_k is not None and top_k < logits.size(-1):
        kept = logits.topk(top_k).indices  # exactly k, even where logits are equal
        logits = torch.full_like(logits, -math.inf).scatter(-1, kept, logits.gather(-1, kept))
    if top_p is not None:
        ordered, order = logits.sort(descending=True)
        probability = ordered.softmax(dim=-1)
        beyond = probability.cumsum(dim=-1) - probability >= top_p  # likelier tokens already add up to p
        beyond[:, 0] = False
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -math.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
