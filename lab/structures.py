"""Describe structures in figures: sizes, FLOPs, parameters, rank, and place in the taxonomy.

python einsum_linear.py --d_in=1024 --d_out=4096                            # all named structures
python einsum_linear.py --d_in=1024 --d_out=4096 --theta=.5,0,.5,0,.5,.5,0  # one point of the space
python einsum_linear.py --plot=taxonomy.png                                 # all at their (omega, psi, nu)
"""

import math
from dataclasses import dataclass

from configurator import ConfigError, as_script, load_config
from theta import NAMED_THETAS, check_theta, factor_sizes, multiplications, num_parameters, show_theta, taxonomy


@dataclass
class StructuresConfig:
    d_in: int = 1024  # width of the input
    d_out: int = 1024  # width of the output
    theta: tuple | None = None  # seven exponents (alpha beta gamma delta epsilon phi rho); None: the named structures
    plot: bool | str = False  # draw every named structure at its (omega, psi, nu): --plot, or --plot=FILE

    def __post_init__(self):
        for name in ("d_in", "d_out"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: make it at least 1")
        if self.theta is not None:
            factor_sizes(self.d_in, self.d_out, self.theta)


def measured_rank(layer):
    """Numerical rank of the layer's matrix, computed in float64 from its cores."""
    import torch

    return int(torch.linalg.matrix_rank(layer.double().materialize()))


def describe_theta(d_in, d_out, theta):
    """Lines about one point of the space: a θ at these widths."""
    import torch  # here and below: pictures and error messages do not need it

    from einsum_linear import EinsumLinear

    sizes = factor_sizes(d_in, d_out, theta)
    torch.manual_seed(0)
    layer = EinsumLinear(sizes, normalize=False)
    mults, parameters, whole = multiplications(sizes), num_parameters(sizes), d_in * d_out
    omega, psi, nu = taxonomy(theta)
    yield f"theta {show_theta(check_theta(theta))}, {d_in} -> {d_out}"
    yield "sizes        " + "  ".join(f"{name} {size}" for name, size in sizes._asdict().items())
    yield "cores        " + ", ".join(str(tuple(core.shape)) for core in layer.cores) + "  (batch, fan_in, fan_out)"
    for order, name in (("AB", "A first"), ("BA", "B first")):
        taken = "  <- taken" if order == layer.order else ""
        yield f"{name:<12} {2 * mults[order]:,} FLOPs a token, {mults[order] / whole:.4f} of dense{taken}"
    yield f"parameters   {parameters:,}, {parameters / whole:.4f} of dense"
    yield f"params/FLOP  {parameters / mults[layer.order]:.4f} of dense's"
    yield f"taxonomy     omega {omega:.4g} (sharing)  psi {psi:.4g} (rank)  nu {nu:.4g} (compute)"
    yield f"rank         {measured_rank(layer)} measured, of {min(d_in, d_out)}"


def table_of_structures(d_in, d_out):
    """Lines of a table: every named structure at these widths."""
    import torch

    from einsum_linear import make_linear

    root = math.isqrt(math.isqrt(min(d_in, d_out)))
    rows = [
        ("dense", {}),
        ("low_rank", {"rank": math.isqrt(min(d_in, d_out))}),
        ("kronecker", {}),
        ("tt", {"rank": root}),
        ("tt", {"rank": 2, "num_cores": 3}),
        ("monarch", {}),
        ("monarch", {"num_blocks": 4}),
        ("btt", {}),
        ("btt", {"rank": root}),
        ("btt", {"num_cores": 3}),
        ("btt", {"rank": 2, "num_cores": 3}),
    ]
    yield f"{d_in} -> {d_out}; parameters and FLOPs as shares of dense ({d_in * d_out:,} and twice that)"
    yield f"{'structure':<30} {'cores (batch, fan_in, fan_out)':<54} {'parameters':>10} {'FLOPs':>8} {'params/FLOP':>11} {'rank':>6}"
    for name, options in rows:
        label = " ".join([name, *(f"{key}={value}" for key, value in options.items())])
        torch.manual_seed(0)
        try:
            layer = make_linear(d_in, d_out, name, normalize=False, **options)
        except ConfigError as error:
            yield f"{label:<30} {error}"
            continue
        cores = [core.unsqueeze(0) if core.dim() == 2 else core for core in layer.cores]
        shapes = " ".join(str(tuple(core.shape)).replace(" ", "") for core in cores)
        parameters = sum(core.numel() for core in cores) / (d_in * d_out)
        flops = layer.flops_per_token / (2 * d_in * d_out)
        yield f"{label:<30} {shapes:<54} {parameters:>10.4f} {flops:>8.4f} {parameters / flops:>11.4f} {measured_rank(layer):>6}"


def plot_taxonomy(png):
    """Draw every named structure at its (ω, ψ, ν)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(9, 7))
    axes = figure.add_subplot(projection="3d")
    places = {}
    for name, theta in NAMED_THETAS.items():
        places.setdefault(tuple(round(value, 3) for value in taxonomy(theta)), []).append(name)
    for (omega, psi, nu), names in places.items():
        best = omega == 0 and psi == 1
        axes.plot([omega, omega], [psi, psi], [0.25, nu], color="0.7", lw=0.8)  # a stem, to read the place on the floor
        axes.scatter(omega, psi, nu, s=50, color="tab:green" if best else "tab:red")
        axes.text(omega, psi, nu + 0.03, "\n".join(names), fontsize=8, ha="left", va="bottom")
    axes.set(
        xlabel="ω  parameter sharing",
        ylabel="ψ  rank",
        zlabel="ν  compute",
        zlim=(0.25, 1.1),
        xlim=(0, 0.6),
        ylim=(0.4, 1.05),
    )
    axes.set_title(
        "How parameters per FLOP (d^-ω), rank (d^ψ) and FLOPs (d^(1+ν)) scale with width d\n"
        "green: no sharing (ω = 0) and full rank (ψ = 1)",
        fontsize=10,
        y=0.93,
    )
    axes.view_init(elev=18, azim=-55)
    figure.savefig(png, dpi=130, bbox_inches="tight")
    plt.close(figure)


def main(argv):
    config = load_config(StructuresConfig, argv)
    if config.plot:
        path = "taxonomy.png" if config.plot is True else config.plot
        try:
            plot_taxonomy(path)
        except (OSError, ValueError) as error:  # no such folder, or no such format
            raise ConfigError(f"plot={path} cannot be written ({error}): give a .png in a folder that exists") from None
        print(f"drawn: {path}")
    elif config.theta is None:
        print("\n".join(table_of_structures(config.d_in, config.d_out)))
    if config.theta is not None:
        print("\n".join(describe_theta(config.d_in, config.d_out, config.theta)))


def run_command():
    """The command `python einsum_linear.py`."""
    as_script(main)
