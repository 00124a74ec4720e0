"""Learning-rate multipliers of structure-aware µP, and the optimizers made from them.

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
Inputs that the core is not yet aligned with see a smaller change: of a random one, sqrt(rank/d_in) is in the rows of a
low-rank layer, and an entry that serves many places (Kronecker, Tensor-Train, ω > 0) follows their mean. So the change
of activations falls with the width in the first steps, and no longer once the cores have lined up; rates raised by
sqrt(d_in/rank), or by the root of the number of places, overshoot then (results/mup).

So `lr` is the rate of a dense layer of width 768. A core of a mixture has the fan-in of one
expert (moe.Mixture says why). The initial standard deviations are with the layers
(einsum_linear.init_std). Under parametrization="standard" every multiplier is 1.

To train with another optimizer, edit make_optimizers: give each torch optimizer its share of the parameters, in groups of
parameter_groups (tests/test_optimizers.py has an example). Cores are 3-D, (batch, fan_in, fan_out); embeddings are matrices
to `dim()`, too. A group's rate is lr · lr_mult: a second base rate goes into lr_mult.
All else (the loop, checkpoints, FSDP2, CUDA graphs) knows the Optimizers only.
"""

from contextlib import contextmanager

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

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


def make_optimizers(model, config, multipliers=None):
    """The optimizers of a run -> Optimizers. Here: AdamW for all parameters.

    config       with lr, weight_decay, beta2, base_width and base_ffn_expansion, such as a RunConfig
    multipliers  {parameter name: learning-rate multiplier}; None: lr_multipliers of the config
    Called after the model is sharded, for then its parameters are other objects.
    """
    if multipliers is None:
        multipliers = lr_multipliers(model, config.base_width, config.base_ffn_expansion)
    groups = parameter_groups(model.named_parameters(), multipliers, config.weight_decay)
    optimizers = Optimizers(model, [adamw(groups, config.lr, (0.9, config.beta2))], multipliers)
    optimizers.set_lr(config.lr)
    return optimizers


def parameter_groups(named_parameters, multipliers, weight_decay):
    """Groups for a torch optimizer: one for the parameters that share a multiplier and a weight decay.

    A group keeps its multiplier as "lr_mult", from which Optimizers.set_lr makes its rate. Matrices decay, vectors do
    not, and a step takes lr · weight_decay off a matrix whatever its multiplier: decay is divided by it, so
    that it does not grow where the rate does.
    """
    groups = {}
    for name, parameter in named_parameters:
        multiplier = multipliers[name]  # 0: one that does not learn, and so does not decay
        decay = weight_decay / multiplier if parameter.dim() >= 2 and multiplier else 0.0
        groups.setdefault((multiplier, decay), []).append(parameter)
    return [{"params": params, "lr_mult": mult, "weight_decay": decay} for (mult, decay), params in groups.items()]


def adamw(groups, lr, betas):
    """torch's AdamW of parameter_groups. On a GPU its step is ready to be recorded as a CUDA graph."""
    first = groups[0]["params"][0]
    fused = first.device.type in ("cuda", "cpu")
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=1e-8, fused=fused, capturable=in_graphs(first))


def in_graphs(parameter):
    """Whether a CUDA graph may update the parameter.

    Never where it is sharded: to learn the shapes of an AdamW whose rate is a tensor, torch would do a step on zeros of
    the whole model.
    """
    return parameter.is_cuda and not isinstance(parameter, DTensor)


class Optimizers:
    """torch optimizers that share out a model's parameters, used as one.

    parts        torch optimizers; each parameter that learns is in one of their groups, and each group has its "lr_mult".
                 What they keep of a parameter are tensors
    multipliers  {parameter name: learning-rate multiplier}, for tables
    GradScaler takes it for one optimizer, so an overflow in the gradients of one part skips the step of all.
    """

    def __init__(self, model, parts, multipliers):
        self.model, self.parts, self.multipliers = model, parts, multipliers
        self.average_decay = None
        for group in self.param_groups:
            if in_graphs(group["params"][0]):  # a recorded graph reads a tensor anew at every replay
                group["lr"] = torch.zeros((), device=group["params"][0].device)

    @property
    def param_groups(self):
        """The groups of all parts, as a torch optimizer's."""
        return [group for part in self.parts for group in part.param_groups]

    def set_lr(self, lr):
        """Each group's rate from the base rate: assigned, so it is the same however often it is done."""
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

    # -- a running mean of the weights

    def keep_average(self, decay):
        """Have every step update a running mean of the weights, "ema" in the state of each parameter, and so in checkpoints."""
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
        """In this block the weights are their running means, where there are any."""
        means = [(p, state["ema"]) for part in self.parts for p, state in part.state.items() if "ema" in state]
        now = [p.clone() for p, _ in means]
        try:
            for p, mean in means:
                p.copy_(mean)
            yield
        finally:
            for (p, _), weight in zip(means, now):
                p.copy_(weight)

    # -- state, by the names of parameters, whichever part has them

    def state_dict(self):
        """{parameter name: {key: tensor}}: the parts' own tensors, DTensors of a sharded model. Without rates, which
        belong to the schedule. TypeError where a part keeps something other than tensors."""
        self.model.state_dict()  # FSDP2 splits its root again, which an evaluation leaves with parameters no part knows
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
        """Put back what state_dict gave, as whole tensors on any device: copied, not shared."""
        for name, tensors in self.allocate_state(state).items():
            for key, tensor in tensors.items():
                copy_whole(tensor, state[name][key])

    def allocate_state(self, state):
        """Zeros for what `state`, {name: {key: tensor}}, has, in the place of what was kept -> state_dict().

        A tensor of its parameter's shape is placed and split as the parameter is; others are whole on every rank.
        """
        names = {p: name for name, p in self.model.named_parameters()}
        for part in self.parts:
            for group in part.param_groups:
                # torch's step counters are on the host, but where a kernel reads them.
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
    """Copy a whole tensor into `target`, of a DTensor this rank's part: every rank has the whole, nothing is sent."""
    if isinstance(target, DTensor):
        whole = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(whole)
