"""Learning-rate multipliers of structure-aware µP, and the optimizer made from them.

A core is a batched matrix, and so has a fan-in of its own. Adam moves every entry by about the
learning rate; for the change of the layer's output to be of size 1 at any width, a core's rate
must fall as 1/fan_in, and the cores of a layer share the change between them ("Compute Better
Spent", ICML 2024, section 3.2):

    parameter                                   learning rate
    core of a structured layer                  lr · base_width / (fan_in · number of cores)
    dense matrix, router of a mixture           lr · base_width / d_in
    embeddings, norms, biases, gains            lr

The rule is right for the product of the cores, of every structure. An example changes a core by at most its rate
times signs, s_out s_inᵀ in each of its matrices, of spectral norm rate · sqrt(fan_in · fan_out). With rates of
1/fan_in, and the other cores at their initial norms of sqrt(fan_out/fan_in), the matrix of the layer changes by
‖ΔW‖ ~ sqrt(d_out/d_in) at any width and rank: the spectral condition (Yang et al., arXiv 2310.17813).
An input that the core has not lined up with sees less of it: of a random one, sqrt(rank/d_in) is in the rows of a
low-rank layer, and an entry that serves many places (Kronecker, Tensor-Train, ω > 0) follows their mean. So the change
of activations falls with the width in the first steps, and no longer once the cores have lined up; rates raised by
sqrt(d_in/rank), or by the root of the number of places, overshoot then (results/mup).

So `lr` is the rate of a dense layer of width 768. A core of a mixture has the fan-in of one
expert (moe.Mixture says why). The initial standard deviations are with the layers
(einsum_linear.init_std). Under parametrization="standard" every multiplier is 1.
"""

import torch
from torch.distributed.tensor import DTensor

from einsum_linear import CoreLinear, Dense
from moe import Router
from options import BASE_WIDTH


def lr_multipliers(model, base_width=BASE_WIDTH, base_ffn_expansion=1):
    """{parameter name: learning-rate multiplier}, a float for each of the model's parameters.

    base_width          the width of which `lr` is a dense layer's rate
    base_ffn_expansion  `lr` is the rate of an ffn.down that reads base_width times this many features: a factor on the
                        multipliers of ffn.down (4 where the model that `lr` was tuned on has the usual FFN)
    """
    multipliers = {name: 1.0 for name, _ in model.named_parameters()}
    if model.config.parametrization == "standard":
        return multipliers
    down = {module for block in model.blocks for module in block.ffn.down.modules()}
    for name, module in model.named_modules():
        base = base_width * base_ffn_expansion if module in down else base_width
        if isinstance(module, (Dense, Router)):
            multipliers[f"{name}.weight"] = base / module.in_features
        elif isinstance(module, CoreLinear):
            for i, fan_in in enumerate(module.fan_ins):
                multipliers[f"{name}.cores.{i}"] = base / (fan_in * len(module.cores))
    return multipliers


def make_optimizer(model, lr, weight_decay=0.0, betas=(0.9, 0.95), multipliers=None):
    """AdamW with one group for the parameters that share a multiplier and a weight decay.

    A group keeps its multiplier as "lr_mult"; set_lr makes its rate. Matrices decay, vectors do
    not, and a step takes lr · weight_decay off a matrix whatever its multiplier: decay is
    divided by it, so that it does not grow where the rate does. On a GPU the rates are tensors,
    which a recorded CUDA graph reads anew at every replay. Not of sharded parameters, which no graph updates:
    to learn the shapes of an AdamW whose rate is a tensor, torch would do one on zeros of the whole model.
    """
    multipliers = lr_multipliers(model) if multipliers is None else multipliers
    groups = {}
    for name, parameter in model.named_parameters():
        multiplier = multipliers[name]  # 0: one that does not learn, and so does not decay
        decay = weight_decay / multiplier if parameter.dim() >= 2 and multiplier else 0.0
        groups.setdefault((multiplier, decay), []).append(parameter)
    first = next(model.parameters())
    graphed = first.is_cuda and not isinstance(first, DTensor)
    optimizer = torch.optim.AdamW(
        [{"params": params, "lr_mult": mult, "weight_decay": decay} for (mult, decay), params in groups.items()],
        lr=lr, betas=betas, eps=1e-8, fused=first.device.type in ("cuda", "cpu"), capturable=graphed,
    )  # fmt: skip
    if graphed:
        for group in optimizer.param_groups:
            group["lr"] = torch.zeros((), device=first.device)
    set_lr(optimizer, lr)
    return optimizer


def set_lr(optimizer, lr):
    """Each group's rate from the base rate: assigned, so it is the same however often it is done."""
    for group in optimizer.param_groups:
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(lr * group["lr_mult"])
        else:
            group["lr"] = lr * group["lr_mult"]
