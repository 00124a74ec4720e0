"""Mixtures of experts. The experts are matrices, in every linear layer, or whole FFNs.

moe="linear" makes every linear layer a mixture (Potapczynski, Qiu et al., "Searching for Efficient Linear Layers over
a Continuous Space of Structured Matrices", NeurIPS 2024, section 5): a router picks top_k of num_experts matrices for
each token and weighs them by the softmax of their logits. A BTT of rank num_experts · rank already is such a mixture:
expert e is slice e of its rank index, and the gates scale z, the result of the first of its two products,

    z[n, g, E r f] = Σ_a x[n, g, a] · A[g, a, (E r f)]     y[n, f, e] = Σ_{g E r} gate[n, E] · z[n, g, E r, f] · B[f, (g E r), e]

of which only the picked slices are computed. A low-rank matrix is a BTT of one block (g = f = 1), a Monarch matrix a BTT
of rank 1, so the same holds for "low_rank" and "monarch"; the experts of "dense" are whole matrices.
moe="ffn" is the standard MoE: each block has num_experts FFNs, with layers of any structure, and one router.

Time and memory grow with top_k: the n · k pairs of a token and an expert are sorted by expert, and each expert multiplies
its own rows (kernels/grouped.py). On a GPU, BTT-MoE and low-rank-MoE have kernels of their own (kernels/moe.py). No token
is dropped, the host never waits for the device, and no shape depends on values. Gates get gradients from what they scale.

Shapes: n tokens, k = top_k, m = n · k rows, one for each token and expert of it, E experts; g a f e r as in einsum_linear.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from configurator import ConfigError
from einsum_linear import CoreLinear, Dense, init_std, make_linear
from kernels import routing
from kernels.btt import BTTSizes
from kernels.common import compute_dtype, gelu
from kernels.grouped import Collect, Spread, btt_experts, btt_moe, dense_experts, dense_moe, sort_by_expert
from kernels.moe import btt_mixture, mixture_method, routed_btt_mixture
from options import check_top_k
from theta import check_mixture

AUXILIARY, Z = 0.01, 0.1  # loss = cross-entropy + AUXILIARY · mean over routers of (load balance + Z · z-loss)

# ---------------------------------------------------------------------------------------
# Routers


class Router(nn.Module):
    """Picks top_k experts for each token: x (..., d_in) -> index (n, k) int64, gate (n, k) of rows that sum to 1.

    Logits are float32 even under autocast: many 16-bit logits would tie. All rows of the matrix start with the same length
    and mean 0, so that no expert has an advantage at first, neither by chance nor because inputs from a GELU have a
    positive mean. With top_k = 1 the only gate is 1, and the router learns from the auxiliary loss alone.
    With zero_init the matrix starts at zero, as published, and all tokens first pick experts 0 … k - 1.

    `bias` (E,) is added to the logits when experts are picked, but not in the gates. It has no gradient:
    Routers.balance changes it after every update.

    In training `routing` holds the result for the last batch until Routers reads it: index, gate (without gradient)
    and logits (n, E).
    """

    def __init__(self, d_in, num_experts, top_k, zero_init=False):
        super().__init__()
        self.in_features, self.out_features, self.top_k, self.zero_init = d_in, num_experts, top_k, zero_init
        self.init_std = [init_std(d_in, num_experts)]
        self.weight = nn.Parameter(torch.empty(num_experts, d_in))
        self.register_buffer("bias", torch.zeros(num_experts))
        self.routing = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        if self.weight.is_meta:  # as in einsum_linear.draw
            return
        if self.zero_init:
            nn.init.zeros_(self.weight)
            self.bias.copy_(-1e-6 * torch.arange(self.out_features, device=self.bias.device))  # ties go to the first
            return
        nn.init.normal_(self.weight)
        self.weight -= self.weight.mean(dim=1, keepdim=True)
        self.weight *= self.init_std[0] * math.sqrt(self.in_features) / self.weight.norm(dim=1, keepdim=True)

    @property
    def cores(self):
        return [self.weight]

    @property
    def flops_per_token(self):
        return 2 * self.in_features * self.out_features

    def forward(self, x):
        index, gate, logits = self.route(x.reshape(-1, self.in_features))
        self.keep(index, gate, logits)
        return index, gate

    def route(self, x):
        """x (n, d_in) -> index, gate, logits"""
        if routing.router_method(x, self.out_features) == "kernel":
            logits, index, gate = torch.ops.nanoeinsum.route(
                x.to(compute_dtype(x)), self.weight.float(), self.bias, self.top_k
            )
            return index, gate, logits
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(dtype), self.weight.to(dtype))
        index = pick(logits.detach() + self.bias, self.top_k)
        return index, logits.gather(1, index).softmax(dim=1), logits

    def keep(self, index, gate, logits):
        """In training, keep the result for Routers."""
        if self.training:
            self.routing = index, gate.detach(), logits


def pick(logits, k):
    """The k largest of each row of (n, E) logits -> (n, k) int64.

    Ties are broken fairly: row i considers the experts in the order i, i + 1, … (mod E). With equal logits topk alone
    would pick the same experts for every row.
    """
    n, E = logits.shape
    turn = (torch.arange(n, device=logits.device)[:, None] + torch.arange(E, device=logits.device)) % E
    return turn.gather(1, logits.gather(1, turn).topk(k).indices)


class Routers:
    """The routers of a model, read together: GPT(config).routers, which is None for a model without mixtures.

    A report describes one router and one batch in (4 + 2 E,) float32 numbers: 1; the auxiliary loss; entropy of a token's
    gates; standard deviation of the logits; E shares of the rows; E mean gates. Sums over batches and processes, divided
    by the sum of the first number, are means. Only the auxiliary loss has a gradient.

    names          of the R routers, each by its layer: "blocks.0.attn.q"
    reports        (R, 4 + 2 E) for the last batch in training, without gradient
    cross_entropy  of the last batch in training, without gradient: the loss before add_loss
    """

    AUX, ENTROPY, SPREAD, LOADS = 1, 2, 3, 4  # columns of a report

    @classmethod
    def of(cls, model):
        """The model's Routers, or None if it has no routers."""
        named = {name.removesuffix(".router"): m for name, m in model.named_modules() if isinstance(m, Router)}
        return cls(named) if named else None

    def __init__(self, named_routers):
        self.names, self.all = list(named_routers), list(named_routers.values())
        self.reports = self.cross_entropy = None

    def no_reports(self, device):
        """Zeros to sum reports in."""
        return torch.zeros(len(self.all), self.LOADS + 2 * self.all[0].out_features, device=device)

    def add_loss(self, loss):
        """The loss of a batch in training plus the auxiliary loss of its routers. None stays None."""
        routings = [router.routing for router in self.all]
        for router in self.all:
            router.routing = None  # it holds the autograd graph of the batch
        if loss is None:
            return None
        reports = router_reports(routings)
        self.reports, self.cross_entropy = reports.detach(), loss.detach()
        return loss + auxiliary_loss(reports)

    @torch.no_grad()
    def balance(self, reports, rate):
        """After an update, raise the biases of experts that got few rows and lower those of experts that got many.

        reports (R, 4 + 2 E): sums over the whole batch and all processes, so that biases stay equal on all processes.
        rate: the largest step, in standard deviations of a router's logits (option router_balance); 0: none.
        The auxiliary loss alone does not keep experts alive at high rates and small batches: Adam scales its gradient
        together with that of the cross-entropy, which is far larger. The bias balances without a gradient (Wang et al.,
        "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts", 2024). Here a step is proportional to
        the imbalance and to the standard deviation of the logits, so that it keeps up as they grow.
        """
        means = reports / reports[:, :1]
        load = means[:, self.LOADS :].chunk(2, dim=1)[0]
        steps = rate * means[:, self.SPREAD, None] * (1 - load.shape[1] * load).clamp(-1, 1)
        for router, step in zip(self.all, steps):
            router.bias += step

    def figures(self, reports):
        """Summed reports, (R, 4 + 2 E) on any device, as {name: plain numbers} for the log.

        load            share of the rows that each expert got; 1/E if they are balanced
        token_entropy   entropy of a token's gates in nats, mean over tokens: from 0 (one expert has all the weight) to log k
        mean_entropy    entropy of the mean gates: log E if all experts have the same weight
        """
        sums = reports.cpu().double()
        means = sums / sums[:, :1]
        load, gate = means[:, self.LOADS :].chunk(2, dim=1)
        mean_entropy = torch.special.entr(gate).sum(dim=1)

        def rounded(values):
            return [round(value, 4) for value in values.tolist()]

        columns = zip(self.names, load, rounded(means[:, self.ENTROPY]), rounded(mean_entropy))
        return {
            name: {"load": rounded(of_experts), "token_entropy": of_token, "mean_entropy": of_mean}
            for name, of_experts, of_token, of_mean in columns
        }


def router_reports(routings):
    """Routings of R routers of n tokens -> reports (R, 4 + 2 E). One router at a time would launch 20 small kernels for each.

    The load balance (Fedus et al., "Switch Transformers", JMLR 2022, eq. 4) is E · Σ_e load_e · p_e with the mean
    probability p_e under the softmax of all logits; it is 1 if both are uniform. The z-loss (Zoph et al., "ST-MoE", 2022,
    eq. 5) is the mean of logsumexp², which keeps logits small. Both are means over the tokens of one micro-batch on one
    process; training minimises the mean of these auxiliary losses.
    """
    index, gate, logits = (torch.stack(tensors) for tensors in zip(*routings))  # (R, n, k), (R, n, k), (R, n, E)
    zeros = torch.zeros_like(logits)
    load = zeros.scatter(2, index, 1 / index.shape[2]).mean(dim=1)  # (R, E)
    balance = logits.shape[2] * (load * logits.softmax(dim=2).mean(dim=1)).sum(dim=1)
    aux = balance + Z * logits.logsumexp(dim=2).square().mean(dim=1)
    entropy = torch.special.entr(gate).sum(dim=2).mean(dim=1)
    spread = logits.detach().std(dim=1, correction=0).mean(dim=1)
    single = torch.stack((torch.ones_like(aux), aux, entropy, spread), dim=1)
    return torch.cat((single, load, zeros.scatter(2, index, gate).mean(dim=1)), dim=1)


def auxiliary_loss(reports):
    """The term that the routers add to the cross-entropy. reports (R, 4 + 2 E) of one batch."""
    return AUXILIARY * reports[:, Routers.AUX].mean()


def set_top_k(model, top_k, option="top_k"):
    """From now on all mixtures of the model pick top_k experts for each token.

    ConfigError if the model has no mixtures or too few experts; it calls the number `option`.
    """
    mixtures = [module for module in model.modules() if hasattr(module, "top_k")]
    if not mixtures:
        raise ConfigError(f"{option}={top_k}: the model has no mixtures, leave it out")
    check_top_k(option, top_k, model.config.num_experts)
    for module in mixtures:
        module.top_k = top_k


def checkpoint_routed(function, x, **kwargs):
    """torch.utils.checkpoint of a block with routers, whose routings become outputs.

    Otherwise the recomputation in the backward pass would set Router.routing again, and nobody would clear it.
    """
    routers = [module for module in function.modules() if isinstance(module, Router)]

    def run(x):
        try:
            return function(x), *(tensor for router in routers for tensor in router.routing)
        finally:
            for router in routers:
                router.routing = None

    y, *tensors = checkpoint(run, x, use_reentrant=False, **kwargs)
    for i, router in enumerate(routers):
        router.routing = tuple(tensors[3 * i : 3 * i + 3])
    return y


# ---------------------------------------------------------------------------------------
# Mixtures


class Mixture(CoreLinear):
    """A linear layer of num_experts matrices, of which top_k are picked for each token. The experts share bias, RMS cap and gains.

    Initialisation and learning rates (structure-aware µP, einsum_linear.init_std and optim.lr_multipliers): a token sees
    its k experts side by side, for a BTT as one layer of rank k · r whose second core is scaled by gates that sum to 1,
    about 1/k each. That layer starts and learns as it would without gates if

    - the first core has the std of fan-in a and fan-out k·r·f, and the rate of fan-in a;
    - the second, of fan-in k·g·r, has k times the std and k times the rate of such a core, which undoes the gates' 1/k.
      Its rate, lr · 768 / (k·g·r · 2) times k, is that of one expert alone for any k: the updates of the experts point
      in one direction, and the gates average them. Its std is up to √k times that of one expert alone: at first the
      experts are independent, and their average would be √k times smaller.

    The same holds for whole matrices: std √k · init_std(d_in, d_out), rate lr · 768 / d_in. Gates do not mix the layers
    inside an FFN that is an expert; these start as one expert alone (active=1), as do all with expert_init="single".

    x (..., d_in) -> (..., d_out) by its own router. The router is None if the caller passes index and gate to `mix`.

    The interface is that of CoreLinear, except that product(x, index, gate) and materialize(gate) depend on the picked
    experts, that there is no load_dense, and that experts(rows, ends, gate) computes rows sorted by expert.
    """

    def __init__(self, d_in, d_out, num_experts, top_k, routed, shapes, zero_router=False, **kwargs):
        super().__init__(d_in, d_out, shapes, **kwargs)
        self.num_experts, self.top_k = num_experts, top_k
        self.router = Router(d_in, num_experts, top_k, zero_router) if routed else None

    def forward(self, x, input_fn=None):
        x = x if input_fn is None else input_fn(x)
        return self.mix(x, *self.router(x))

    def mix(self, x, index, gate):
        """x (..., d_in), index (n, k) int64, gate (n, k) -> Σ_k gate · W[index] x, (..., d_out)"""
        return self.finish(self.product(x.reshape(-1, self.in_features), index, gate), x)

    def extra_repr(self):
        return f"{self.in_features} -> {self.out_features}, {self.top_k} of {self.num_experts} experts"


class BTTMixture(Mixture):
    """Experts are rank slices of a BTT of rank E·r, with cores A (g, a, E·r·f) and B (f, g·E·r, e) as in kernels.btt."""

    def __init__(self, sizes, num_experts, top_k, active, routed, **kwargs):
        a, _, g, _, e, f, r = sizes
        E = num_experts
        super().__init__(
            g * a, f * e, E, top_k, routed, [(g, a, E * r * f), (f, g * E * r, e)], fan_ins=[a, g * r],
            stds=[init_std(a, active * r * f), active * init_std(active * g * r, e)], **kwargs,
        )  # fmt: skip
        self.sizes = sizes

    @property
    def flops_per_token(self):
        a, _, g, _, e, f, r = self.sizes
        return 2 * self.top_k * g * r * f * (a + e)

    def method_for(self, x):
        """The method that computes the layer for x: kernels.moe.mixture_method."""
        a, _, g, _, e, f, r = self.sizes
        return mixture_method(x, BTTSizes(g, a, f, e, r), self.num_experts, self.top_k, self.router is not None)

    def forward(self, x, input_fn=None):
        if self.method_for(x) != "routed":
            return super().forward(x, input_fn)
        # The kernels for the gradient of x also compute those of the router and of the GELU.
        dtype, router = compute_dtype(x), self.router
        x = x if input_fn in (None, gelu) else input_fn(x)
        A, B = (core.to(dtype) for core in self.effective_cores())
        rows = x.reshape(-1, self.in_features).to(dtype)
        y, *routing = routed_btt_mixture(rows, router.weight.float(), router.bias, A, B, self.top_k, input_fn is gelu)
        router.keep(*routing)
        return self.finish(y, x)

    def product(self, x, index, gate):
        A, B = self.effective_cores()
        if self.method_for(x) == "grouped":
            return btt_moe(x, A, B, index, gate, self.num_experts)
        dtype = compute_dtype(x)
        return btt_mixture(x.to(dtype), A.to(dtype), B.to(dtype), index, gate, self.num_experts)

    def experts(self, x, ends, gate=None):
        """Rows (m, d_in) sorted by expert, the end of each expert's rows (E,), gates (m,) or None -> (m, d_out), without bias."""
        return btt_experts(x, *self.effective_cores(), ends, gate)

    def materialize(self, gate):
        """The matrix (d_out, d_in) of a token with these gates, (E,), 0 for experts that were not picked."""
        a, _, g, _, e, f, r = self.sizes
        A, B = self.effective_cores()
        A, B = A.view(g, a, self.num_experts, r, f), B.view(f, g, self.num_experts, r, e)
        return torch.einsum("k,gakrf,fgkre->fega", gate, A, B).reshape(self.out_features, self.in_features)


class DenseMixture(Mixture):
    """Experts are whole matrices: one core (E, d_in, d_out), like dense layers without a cap by default."""

    def __init__(self, d_in, d_out, num_experts, top_k, active, routed, normalize=False, **kwargs):
        std = math.sqrt(active) * init_std(d_in, d_out)
        super().__init__(
            d_in, d_out, num_experts, top_k, routed, [(num_experts, d_in, d_out)], stds=[std], normalize=normalize,
            **kwargs,
        )  # fmt: skip

    @property
    def flops_per_token(self):
        return 2 * self.top_k * self.in_features * self.out_features

    def product(self, x, index, gate):
        return dense_moe(x, *self.effective_cores(), index, gate)

    def experts(self, x, ends, gate=None):
        """Rows (m, d_in) sorted by expert, the end of each expert's rows (E,), gates (m,) or None -> (m, d_out), without bias."""
        return dense_experts(x, *self.effective_cores(), ends, gate)

    def materialize(self, gate):
        """The matrix (d_out, d_in) of a token with these gates, (E,), 0 for experts that were not picked."""
        return torch.einsum("k,kio->oi", gate, *self.effective_cores())


def make_mixture(d_in, d_out, num_experts, top_k, routed=True, mixed=True, zero_router=False, **options):
    """A d_in -> d_out mixture whose experts are make_linear(d_in, d_out, **options): `rank` is the rank of one expert.

    routed  it has a router of its own; otherwise the caller passes index and gate to Mixture.mix
    mixed   its initial size is for top_k experts that gates mix; False: for one expert alone, such as a layer of an FFN
            that is itself an expert
    zero_router  as in Router
    ConfigError if layers of this structure cannot be experts.
    """
    with torch.device("meta"):
        expert = make_linear(d_in, d_out, **options)
    kwargs = {name: options[name] for name in ("bias", "normalize", "gain", "zero_init") if name in options}
    active = top_k if mixed else 1
    if isinstance(expert, Dense):
        return DenseMixture(d_in, d_out, num_experts, top_k, active, routed, zero_router=zero_router, **kwargs)
    check_mixture(options.get("structure"), getattr(expert, "sizes", expert))
    return BTTMixture(expert.sizes, num_experts, top_k, active, routed, zero_router=zero_router, **kwargs)


def mix_together(router, layers, x):
    """[layer(x) for layer in layers] for mixtures that share a router: a token goes to the same experts in all of them."""
    index, gate = router(x)
    return [layer.mix(x, index, gate) for layer in layers]


class MixtureOfFFNs(nn.Module):
    """The standard MoE: Σ_k gate · down_e(activation(up_e(x))). `up` and `down` hold the layers of all its FFNs."""

    def __init__(self, router, up, down, activation):
        super().__init__()
        self.router, self.up, self.down, self.activation = router, up, down, activation

    def forward(self, x):
        index, gate = self.router(x)  # (n, k)
        order, inverse, ends = sort_by_expert(index, self.up.num_experts)
        rows = Spread.apply(x.reshape(-1, x.shape[-1]).to(compute_dtype(x)), order, inverse)
        hidden = self.activation(self.up.finish(self.up.experts(rows, ends), rows))  # (m, d_ff)
        y = self.down.experts(hidden, ends, gate.flatten()[order])
        return self.down.finish(Collect.apply(y, order, inverse, len(index)), x)
