"""Learning-rate multipliers of structure-aware µP, and the optimizers that use them.

A core is a batched matrix with a fan-in of its own. Adam changes every entry by about the
learning rate. For the change of a layer's output to have size 1 at any width, a core's rate
must fall as 1/fan_in, and the cores of a layer must share the change ("Compute Better
Spent", ICML 2024, section 3.2):

    parameter                                   learning rate
    core of a structured layer                  lr · base_width / (fan_in · number of cores)
    dense matrix, router of a mixture           lr · base_width / d_in
    embeddings, norms, biases, gains            lr

The rule holds for the product of the cores, in every structure. One example changes each matrix of a core by at most
its rate times signs, s_out s_inᵀ, of spectral norm rate · sqrt(fan_in · fan_out). With rates of 1/fan_in, and the other
cores at their initial norms of sqrt(fan_out/fan_in), the matrix of the layer changes by ‖ΔW‖ ~ sqrt(d_out/d_in) at any
width and rank: the spectral condition (Yang et al., arXiv 2310.17813). Inputs that the core is not yet aligned with see
a smaller change: only a share sqrt(rank/d_in) of a random input lies in the row space of a low-rank layer, and an entry
used in many places (Kronecker, Tensor-Train, ω > 0) follows the mean of their gradients. So in the first steps the
change of activations falls with the width; once the cores are aligned it does not. Rates raised by sqrt(d_in/rank), or by
the root of the number of places, would then overshoot (results/mup).

So `lr` is the rate of a dense layer of width 768. A core of a mixture has the fan-in of one
expert (moe.Mixture explains why). The initial standard deviations are defined with the layers
(einsum_linear.init_std). Under parametrization="standard" every multiplier is 1.

To train with another optimizer, edit make_optimizers: give each torch optimizer its share of the parameters, in groups of
parameter_groups (tests/test_optimizers.py has an example). Cores are 3-D, (batch, fan_in, fan_out); embeddings are 2-D,
like matrices. A group's rate is lr · lr_mult: a second base rate goes into lr_mult.
Everything else (the loop, checkpoints, FSDP2, CUDA graphs) uses the class Optimizers alone.
"""

from contextlib import contextmanager

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from einsum_linear import CoreLinear, Dense
from moe import Router
from options import BASE_WIDTH


def lr_multipliers(model, base_width=BASE_WIDTH, base_ffn_expansion=1):
    """{parameter name: learning-rate multiplier}, a float for each of the model's parameters.

    base_width          `lr` is the rate of a dense layer with this many inputs
    base_ffn_expansion  `lr` is the rate of an ffn.down with base_width times this many inputs: a factor on the multipliers
                        of ffn.down (4 if `lr` was tuned on a model of width base_width with the usual FFN)
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


def make_optimizers(model, config, multipliers=None):
    """The optimizers of a run -> Optimizers. Here: AdamW for all parameters.

    config       a RunConfig, or an object with its lr, weight_decay, scale_decay, beta2, base_width and base_ffn_expansion
    multipliers  {parameter name: learning-rate multiplier}; None: lr_multipliers of the config
    Call it after the model is sharded, which replaces its parameters.
    """
    if multipliers is None:
        multipliers = lr_multipliers(model, config.base_width, config.base_ffn_expansion)
    groups = parameter_groups(model.named_parameters(), multipliers, config.weight_decay, config.scale_decay)
    optimizers = Optimizers(model, [adamw(groups, config.lr, (0.9, config.beta2))], multipliers)
    optimizers.set_lr(config.lr)
    return optimizers


def parameter_groups(named_parameters, multipliers, weight_decay, scale_decay=False):
    """Groups for a torch optimizer, one for each pair of multiplier and weight decay.

    A group stores its multiplier as "lr_mult", from which Optimizers.set_lr computes its rate. Matrices decay, vectors do
    not. Decay is divided by the multiplier, so that a step shrinks every matrix by the factor 1 - lr · weight_decay. With
    scale_decay it is not, and the factor is 1 - lr · lr_mult · weight_decay.
    """
    groups = {}
    for name, parameter in named_parameters:
        multiplier = multipliers[name]  # 0: the parameter neither learns nor decays
        decay = 0.0
        if parameter.dim() >= 2 and multiplier:
            decay = weight_decay if scale_decay else weight_decay / multiplier
        groups.setdefault((multiplier, decay), []).append(parameter)
    return [{"params": params, "lr_mult": mult, "weight_decay": decay} for (mult, decay), params in groups.items()]


def adamw(groups, lr, betas):
    """torch's AdamW for these parameter_groups. On a GPU its step can be recorded as a CUDA graph."""
    first = groups[0]["params"][0]
    fused = first.device.type in ("cuda", "cpu")
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=1e-8, fused=fused, capturable=in_graphs(first))


def in_graphs(parameter):
    """Whether a CUDA graph may update the parameter.

    Not if it is sharded: to find the shapes of an AdamW whose rate is a tensor, torch would run a step on zeros of the
    whole model.
    """
    return parameter.is_cuda and not isinstance(parameter, DTensor)


class Optimizers:
    """Several torch optimizers, which divide a model's parameters among them, used as one.

    parts        torch optimizers; each parameter that learns is in one of their groups, and each group has its "lr_mult".
                 Their state of a parameter consists of tensors
    multipliers  {parameter name: learning-rate multiplier}, for tables
    GradScaler treats it as one optimizer, so an overflow in the gradients of one part skips the step of all.
    """

    def __init__(self, model, parts, multipliers):
        self.model, self.parts, self.multipliers = model, parts, multipliers
        self.average_decay = None
        for group in self.param_groups:
            if in_graphs(group["params"][0]):  # a recorded graph reads the rate again at every replay
                group["lr"] = torch.zeros((), device=group["params"][0].device)

    @property
    def param_groups(self):
        """The groups of all parts, as in a torch optimizer."""
        return [group for part in self.parts for group in part.param_groups]

    def set_lr(self, lr):
        """Set each group's rate to lr · lr_mult. The rate is assigned, not multiplied, so repeated calls do no harm."""
        for group in self.param_groups:
            if torch.is_tensor(group["lr"]):
                group["lr"].fill_(lr * group["lr_mult"])
            else:
                group["lr"] = lr * group["lr_mult"]

    def step(self):
        for part in self.parts:
            part.step()
        if self.average_decay is not None:
            self._update_averages()

    def zero_grad(self, set_to_none=True):
        for part in self.parts:
            part.zero_grad(set_to_none)

    # -- running means of the weights

    def keep_average(self, decay):
        """From now on every step updates a running mean of each parameter, "ema" in its state and so in checkpoints."""
        self.average_decay = decay

    def _update_averages(self):
        states = [(p, part.state[p]) for part in self.parts for group in part.param_groups for p in group["params"]]
        for p, state in states:
            if "ema" not in state:
                state["ema"] = p.detach().clone()
        means, weights = [state["ema"] for _, state in states], [p.detach() for p, _ in states]
        torch._foreach_lerp_(means, weights, 1 - self.average_decay)

    @contextmanager
    @torch.no_grad()
    def averaged(self):
        """Within this context the weights are their running means, if there are any."""
        means = [(p, state["ema"]) for part in self.parts for p, state in part.state.items() if "ema" in state]
        now = [p.clone() for p, _ in means]
        try:
            for p, mean in means:
                p.copy_(mean)
            yield
        finally:
            for (p, _), weight in zip(means, now):
                p.copy_(weight)

    # -- state, by the names of parameters

    def state_dict(self):
        """{parameter name: {key: tensor}}: the tensors of the parts themselves, DTensors if the model is sharded. Rates are
        not included: they belong to the schedule. TypeError if a part keeps something other than tensors."""
        self.model.state_dict()  # makes FSDP2 shard its root again: after an evaluation its parameters are others than those of the parts
        states = {p: state for part in self.parts for p, state in part.state.items()}
        named = {name: states[p] for name, p in self.model.named_parameters() if p in states}
        for name, state in named.items():
            for key, value in state.items():
                if not torch.is_tensor(value):
                    raise TypeError(
                        f"the optimizer keeps {key}={value!r} of {name}: make it a tensor, to be in checkpoints"
                    )
        return named

    @torch.no_grad()
    def load_state_dict(self, state):
        """Load a state_dict of whole tensors on any device. They are copied, not shared."""
        for name, tensors in self.allocate_state(state).items():
            for key, tensor in tensors.items():
                copy_whole(tensor, state[name][key])

    def allocate_state(self, state):
        """Replace the state by zeros of the shapes in `state`, {name: {key: tensor}} -> state_dict().

        A tensor with the shape of its parameter is placed and split like the parameter; others are whole on every rank.
        """
        names = {p: name for name, p in self.model.named_parameters()}
        for part in self.parts:
            for group in part.param_groups:
                # torch's step counters are on the host, unless a kernel reads them.
                numbers_on_device = group.get("fused") or group.get("capturable")
                for p in group["params"]:
                    if names.get(p) in state:
                        tensors = state[names[p]].items()
                        part.state[p] = {key: _zeros_beside(p, tensor, numbers_on_device) for key, tensor in tensors}
        return self.state_dict()


def _zeros_beside(parameter, tensor, numbers_on_device):
    if tensor.dim() and tensor.shape == parameter.shape:
        return torch.zeros_like(parameter, dtype=tensor.dtype)
    on_device = tensor.dim() or numbers_on_device
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device=parameter.device if on_device else "cpu")


def copy_whole(target, whole):
    """Copy a whole tensor into `target`; of a DTensor, this rank's part. Every rank has the whole tensor, nothing is sent."""
    if isinstance(target, DTensor):
        whole = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(whole)
