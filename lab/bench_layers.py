"""Time structured layers and mixtures beside dense layers: `python -m lab.bench layers`, `python -m lab.bench mixtures`.

For every layer and number of tokens it prints the milliseconds of the forward pass, and of forward and backward, for
cuBLAS's dense product, for torch.bmm and for each method of kernels.btt; the floor, a time that no kernel can beat on
this GPU; and each method's error against float64. A mixture is timed with its router, beside the layer of its top_k
experts alone and the published method, which computes all experts. On a GPU calls are recorded in a CUDA graph, so that
launches are not timed. The default sizes for a CPU are small.
"""

import itertools
import json
import math
import time

import torch

from configurator import ConfigError, load_config
from einsum_linear import make_linear
from engine.compiling import order_loops
from engine.device import choose_device, choose_dtype, device_name, write_rows
from engine.runlog import duration, is_number, lines_of, save_figure, whole_file, writing
from kernels import btt as btt_kernels
from lab.bench_options import LayersConfig, MixturesConfig
from moe import Mixture, Routers, make_mixture
from theta import BTT, factor_sizes

LAYERS = {  # by device
    "cuda": "1024-1024:1 1024-1024:4 2048-2048:1 2048-2048:4 4096-4096:1 4096-4096:4 "
    "768-3072:1 3072-768:1 768-3072:4 3072-768:4 2048-8192:1 8192-2048:1 2048-8192:4 8192-2048:4",
    "cpu": "256-256:1 512-512:1 512-512:4 512-2048:1 2048-512:1",
}
TOKENS = {"cuda": (2048, 32_768, 262_144), "cpu": (2048,)}


def bench_layers(argv):
    """The command `lab.bench layers`."""
    config = load_config(LayersConfig, argv)
    if config.draw:
        draw_layers(rows_of_layers(config.draw), config.png or "layers.png")
        return
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    layers = [parse_layer(text) for text in (config.layers or of_device(LAYERS, device)).split()]
    cases = list(
        itertools.product(check_tokens(of_device(TOKENS, device) if config.tokens is None else config.tokens), layers)
    )
    bandwidth, rate = ceilings(device, dtype)
    name = device_name(device)
    print(f"{name}, torch {torch.__version__}, {dtype}: {bandwidth / 1e12:.3g} TB/s, {rate / 1e12:.3g} TFLOP/s; ms")
    print(
        f"{'layer':<16}{'tokens':>8}  {'method':<22}{'fwd':>8}{'fwd+bwd':>9}{'floor':>8}{'/floor':>8}{'dense/':>8}  error"
    )
    rows = []
    clock = Clock([tokens * (d_in * d_out + 100 * (d_in + d_out)) for tokens, (d_in, d_out, _) in cases])
    for tokens, (d_in, d_out, rank) in cases:
        with clock:
            for row in time_layer(d_in, d_out, rank, tokens, config, device, dtype, bandwidth, rate):
                rows.append(
                    {"what": "layer", "dtype": str(dtype), "copy_bytes_per_second": bandwidth, "flops": rate, **row}
                )
                print(format_row(row), flush=True)
        if config.json:
            save_rows(config.json, rows, device)
    if config.png:
        draw_layers([{"device": name, **row} for row in rows], config.png)


def of_device(table, device):
    """The entry of a table for GPUs, or for all other devices."""
    return table["cuda" if device.type == "cuda" else "cpu"]


class Clock:
    """Prints after each case how many are done and how long the rest will take. work: of each case, in any unit."""

    def __init__(self, work):
        self.work, self.done, self.seconds = work, 0, 0.0

    def __enter__(self):
        self.began = time.perf_counter()

    def __exit__(self, *error):
        if error[0] is not None:
            return
        self.seconds += time.perf_counter() - self.began
        self.done += 1
        if self.done < len(self.work):
            left = self.seconds * sum(self.work[self.done :]) / sum(self.work[: self.done])
            print(f"{self.done} of {len(self.work)} done, about {duration(left)} left", flush=True)


def rows_of_layers(path):
    """The rows of a JSON file that `layers` wrote."""
    try:
        rows = [row for row in json.loads("".join(lines_of(path))) if row["what"] == "layer"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        rows = []
    if not rows or not all(map(is_row_of_layer, rows)):
        raise ConfigError(f"draw={path} has no rows of layers: give the --json of an earlier `lab.bench layers`")
    return rows


def is_row_of_layer(row):
    """Whether this is a row that draw_layers can draw, of a file that may hold anything."""
    figures = ("tokens", "ms", "times_faster_than_dense", "training_flops", "bytes", "copy_bytes_per_second", "flops")
    words = ("layer", "method", "device", "dtype")
    numbers = [row.get(key) for key in figures]
    return all(isinstance(row.get(key), str) for key in words) and all(
        is_number(n) and 0 < n < math.inf for n in numbers
    )


def save_rows(path, rows, device):
    """Write rows, with device and versions, as JSON; ConfigError where `path` (of --json) cannot be written."""
    with writing(path, "give another --json"), whole_file(path) as part:
        write_rows(part, rows, device)


def check_tokens(tokens):
    """The option `tokens` if all are positive whole numbers; ConfigError otherwise."""
    if not all(type(number) is int and number > 0 for number in tokens):
        raise ConfigError(f"tokens={tokens}: give whole numbers of at least 1, such as 2048,32768")
    return tokens


def parse_layer(text):
    """ "1024-4096:2" -> d_in, d_out, rank"""
    try:
        widths, rank = text.split(":")
        d_in, d_out = widths.split("-")
        return int(d_in), int(d_out), int(rank)
    except ValueError:
        raise ConfigError(f"layers: {text!r} is no layer: write 1024-4096:2 for rank 2") from None


def format_row(row):
    cells = [f"{row[key]:>{width}.3f}" for key, width in (("forward_ms", 8), ("ms", 9), ("floor_ms", 8))]
    ratios = [f"{row[key]:>8.2f}" for key in ("times_floor", "times_faster_than_dense")]
    error = f"  {row['error']:.1e}" if "error" in row else ""
    return f"{row['layer']:<16}{row['tokens']:>8}  {row['method']:<22}" + "".join(cells + ratios) + error


def ceilings(device, dtype):
    """-> bytes/s of a large copy, counting reads and writes; FLOP/s of a large matrix product."""
    size = 2**28 if device.type == "cuda" else 2**22
    a = torch.randn(size // 2, device=device).to(dtype)
    b = torch.empty_like(a)
    seconds = milliseconds(lambda: b.copy_(a), device, repeats=20) / 1e3
    side = 8192 if device.type == "cuda" else 512
    m = torch.randn(side, side, device=device).to(dtype)
    return 2 * a.numel() * a.element_size() / seconds, 2 * side**3 / (milliseconds(lambda: m @ m, device) / 1e3)


def milliseconds(function, device, repeats=10, rounds=7):
    """Milliseconds of a call: median over `rounds` of the mean of `repeats` successive calls."""
    for _ in range(2):
        function()
    if device.type != "cuda":
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - start))
        return sorted(times)[rounds // 2]
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(repeats):
                function()
    torch.cuda.current_stream().wait_stream(stream)
    graph.replay()
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / repeats)
    return sorted(times)[rounds // 2]


def time_layer(d_in, d_out, rank, tokens, config, device, dtype, bandwidth, rate):
    """Rows of one layer: the dense product first, then each method."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape, std=1.0):
        return (std * torch.randn(shape, generator=generator, device=device)).to(dtype)

    a, _, g, _, e, f, r = factor_sizes(d_in, d_out, BTT, rank)
    x, dy = normal(tokens, d_in).requires_grad_(), normal(tokens, d_out)
    A = normal(g, a, r * f, std=a**-0.5).requires_grad_()
    B = normal(f, g * r, e, std=(g * r) ** -0.5).requires_grad_()
    W = normal(d_out, d_in, std=d_in**-0.5).requires_grad_()
    # The floor: every input read and every output written once, or the products if they take longer.
    size, mults = x.element_size(), g * r * f * (a + e)
    io = size * tokens * (d_in + d_out)
    floors = [max(io / bandwidth, 2 * tokens * mults / rate), None]
    floors[1] = floors[0] + max(size * tokens * (2 * d_in + d_out) / bandwidth, 4 * tokens * mults / rate)
    repeats = max(2, min(20, 2**30 // (tokens * (d_in + d_out))))

    def row(method, forward, parameters):
        gradients = [x, *parameters]

        def both():
            return torch.autograd.grad(forward(), gradients, dy)

        with torch.no_grad():
            forward_ms = milliseconds(forward, device, repeats)
        ms = milliseconds(both, device, repeats)
        return {
            "layer": f"{d_in}-{d_out}:{rank}", "d_in": d_in, "d_out": d_out, "rank": rank, "tokens": tokens, "method": method,
            "forward_ms": forward_ms, "ms": ms, "floor_forward_ms": 1e3 * floors[0], "floor_ms": 1e3 * floors[1],
            "times_floor": ms / (1e3 * floors[1]), "training_flops": 6 * tokens * mults, "bytes": io * 3,
        }  # fmt: skip

    rows = [row("dense", lambda: torch.nn.functional.linear(x, W), [W])]
    rows[0]["training_flops"] = 6 * tokens * d_in * d_out
    sizes = btt_kernels.BTTSizes(g, a, f, e, r)
    chosen = btt_kernels.fastest_method(tokens, sizes) if btt_kernels.runs_triton(x) else "torch"
    for method in config.methods:
        if method in ("fused", "staged") and not btt_kernels.runs_triton(x):
            continue  # no kernels on this device
        if method == "fused" and not btt_kernels.fuses(sizes):
            continue
        if method == "staged" and not btt_kernels.staged_fits(sizes):
            continue
        use = {"chosen": None}.get(method, method)
        label = f"chosen: {chosen}" if method == "chosen" else f"btt, {method}"
        measured = row(label, lambda use=use: btt_kernels.btt(x, A, B, use), [A, B])
        if config.errors:
            measured["error"] = worst_error(use, x, dy, A, B)
        rows.append(measured)
    for measured in rows:
        measured["times_faster_than_dense"] = rows[0]["ms"] / measured["ms"]
    return rows


def worst_error(method, x, dy, A, B, most=512):
    """Largest relative error of y, dx, dA and dB on the first tokens against float64."""
    x, dy = x[:most].detach().requires_grad_(), dy[:most]
    y = btt_kernels.btt(x, A, B, method)
    ours = [y, *torch.autograd.grad(y, (x, A, B), dy)]
    x, A, B = (tensor.detach().double().requires_grad_() for tensor in (x, A, B))
    y = torch.nn.functional.linear(x, btt_kernels.btt_matrix(A, B))
    true = [y, *torch.autograd.grad(y, (x, A, B), dy.double())]
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(ours, true))


# ---------------------------------------------------------------------------------------
# Mixtures


MIXTURES = {  # by device
    "cuda": "btt/1024-1024:1/8:2 btt/1024-1024:1/16:2 btt/2048-2048:1/8:2 btt/4096-4096:1/8:2 "
    "low_rank/1024-1024:128/8:2 dense/1024-1024:1/8:2",
    "cpu": "btt/256-256:1/8:2 low_rank/256-256:32/8:2 dense/256-256:1/8:2",
}


def bench_mixtures(argv):
    """The command `lab.bench mixtures`."""
    config = load_config(MixturesConfig, argv)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    mixtures = (config.layers or of_device(MIXTURES, device)).split()
    sizes = [parse_mixture(text) for text in mixtures]
    tokens = of_device({"cuda": 32_768, "cpu": 2048}, device) if config.tokens is None else config.tokens
    (config.tokens,) = check_tokens((tokens,))
    print(f"{device_name(device)}, torch {torch.__version__}, {dtype}, {config.tokens:,} tokens; ms")
    print(f"{'mixture':<30}{'method':<24}{'fwd':>8}{'fwd+bwd':>9}{'dense/':>8}{'GiB':>7}")
    rows = []
    clock = Clock([d_in * d_out * experts for _, d_in, d_out, _, experts, _ in sizes])
    for text in mixtures:
        with clock:
            for row in time_mixture(text, config, device, dtype):
                rows.append(row)
                memory = "" if row["peak_gib"] is None else f"{row['peak_gib']:7.2f}"
                print(
                    f"{text:<30}{row['method']:<24}{row['forward_ms']:8.3f}{row['ms']:9.3f}"
                    f"{row['times_faster_than_dense']:8.2f}{memory}",
                    flush=True,
                )
        if config.json:
            save_rows(config.json, rows, device)


def parse_mixture(text):
    """ "btt/1024-4096:1/8:2" -> structure, d_in, d_out, rank, num_experts, top_k"""
    try:
        structure, layer, experts = text.split("/")
        num_experts, top_k = map(int, experts.split(":"))
    except ValueError:
        raise ConfigError(f"layers: {text!r} is no mixture: write btt/1024-4096:1/8:2 for 2 of 8 experts") from None
    return structure, *parse_layer(layer), num_experts, top_k


def time_mixture(text, config, device, dtype):
    """Rows of one mixture: a dense layer, the top_k experts without a router, the mixture, and all experts computed."""
    structure, d_in, d_out, rank, num_experts, top_k = parse_mixture(text)
    torch.manual_seed(0)
    options = dict(structure=structure, rank=rank)
    with device:
        mixture = make_mixture(d_in, d_out, num_experts, top_k, **options)
        methods = {"dense": make_linear(d_in, d_out, structure="dense")}
        if structure != "dense":
            methods[f"{top_k} experts, no router"] = make_linear(d_in, d_out, structure=structure, rank=top_k * rank)
        methods["mixture"] = mixture
        if structure != "dense":
            methods["all experts, by bmm"] = AllExperts(mixture)
        x = torch.randn(config.tokens, d_in).to(dtype).requires_grad_()
        dy, one = torch.randn(config.tokens, d_out).to(dtype), torch.ones(())
    repeats = max(2, min(20, 2**30 // (config.tokens * (d_in + d_out))))
    rows = []
    for method, layer in methods.items():
        torch._dynamo.reset()

        routers = Routers.of(layer)

        def forward(x, layer=layer, routers=routers):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                y = layer(x)
            return (y,) if routers is None else (y, routers.add_loss(torch.zeros((), device=x.device)))

        compiling = device.type == "cuda" if config.compile is None else config.compile
        if compiling:
            order_loops(device)
        run = torch.compile(forward, fullgraph=True) if compiling else forward
        gradients = [x, *layer.parameters()]

        def both(run=run, gradients=gradients):
            outputs = run(x)
            return torch.autograd.grad(outputs, gradients, (dy, one)[: len(outputs)])

        with torch.no_grad():
            forward_ms = milliseconds(lambda run=run: run(x), device, repeats)
        memory = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            both()
            memory = (torch.cuda.max_memory_allocated() - before) / 2**30
        ms = milliseconds(both, device, repeats)
        rows.append({
            "what": "mixture", "layer": text, "method": method, "tokens": config.tokens, "dtype": str(dtype), "compile": compiling,
            "forward_ms": forward_ms, "ms": ms, "times_faster_than_dense": (rows[0]["ms"] if rows else ms) / ms,
            "peak_gib": memory,
        })  # fmt: skip
    return rows


class AllExperts(torch.nn.Module):
    """A mixture of BTTs as published: it computes every expert and multiplies most of them by zero."""

    def __init__(self, mixture):
        super().__init__()
        self.mixture: Mixture = mixture

    def forward(self, x):
        layer = self.mixture
        a, _, g, _, e, f, r = layer.sizes
        E, n, (A, B) = layer.num_experts, len(x), layer.effective_cores()
        index, gate = layer.router(x)
        gates = torch.zeros(n, E, device=x.device).scatter(1, index, gate).to(x.dtype)
        z = x.view(n, g, a).transpose(0, 1) @ A.to(x.dtype)  # (g, n, E·r·f)
        z = (z.view(g, n, E, r * f) * gates[:, :, None]).view(g, n, E, r, f)
        z = z.permute(4, 1, 0, 2, 3).reshape(f, n, g * E * r)
        return (z @ B.to(x.dtype)).transpose(0, 1).reshape(n, f * e)


# ---------------------------------------------------------------------------------------
# The picture


def draw_layers(rows, png):
    """Draw `rows` of layers. Left: time as a share of dense. Right: FLOP/s reached, under the GPU's two ceilings."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = {  # first word of a row's method: label, colour, marker
        "dense": ("dense, cuBLAS", "0.55", "s"),
        "btt, torch": ("BTT by torch.bmm", "tab:red", "x"),
        "chosen": ("BTT, kernels.btt", "tab:blue", "o"),
    }
    tokens = max([row["tokens"] for row in rows if row["tokens"] <= 32_768] or [min(row["tokens"] for row in rows)])
    layers = list(dict.fromkeys(row["layer"] for row in rows if row["tokens"] == tokens))
    wide = max(6, 0.75 * len(layers))  # inches
    figure, (bars, roofline) = plt.subplots(
        1, 2, figsize=(wide + 5, 4.8), constrained_layout=True, width_ratios=[wide, 5]
    )
    for i, (kind, (label, colour, marker)) in enumerate(kinds.items()):
        mine = [row for row in rows if row["method"].startswith(kind)]
        ms = {row["layer"]: row["ms"] for row in mine if row["tokens"] == tokens}
        share = {row["layer"]: 1 / row["times_faster_than_dense"] for row in mine if row["tokens"] == tokens}
        measured = [layer for layer in layers if layer in share]  # --methods may have left this kind out
        at = [layers.index(layer) + 0.27 * (i - 1) for layer in measured]
        bars.bar(at, [share[layer] for layer in measured], 0.26, label=label, color=colour)
        for x, layer in zip(at, measured):
            bars.text(x, share[layer] + 0.03, f"{ms[layer]:.2f}", ha="center", va="bottom", fontsize=7, rotation=90)
        roofline.scatter(
            [row["training_flops"] / row["bytes"] for row in mine], [row["training_flops"] / row["ms"] / 1e9 for row in mine],
            s=14 if marker == "x" else 20, c=colour, marker=marker, label=label,
        )  # fmt: skip
    bars.axhline(1, color="k", lw=0.8)
    names = [layer.replace("-", "\n→ ").replace(":", "\nrank ") for layer in layers]
    bars.set_xticks(range(len(layers)), names, fontsize=8)
    bars.set(ylabel="time, as a share of dense", title=f"Forward and backward of {tokens:,} tokens; labels are ms")
    bars.margins(y=0.12)
    bars.legend(fontsize=8)
    bandwidth, rate = rows[0]["copy_bytes_per_second"], rows[0]["flops"]
    edge, low = rate / bandwidth, min(row["training_flops"] / row["bytes"] for row in rows) / 1.5
    roofline.plot([low, edge, 4 * edge], [low * bandwidth / 1e12, rate / 1e12, rate / 1e12], "k-", lw=1)
    roofline.set(xscale="log", yscale="log", xlabel="FLOPs a byte of input and output", ylabel="TFLOP/s")
    roofline.set_title(
        f"Under the ceilings of memory and arithmetic\n{rows[0]['device']}, {rows[0]['dtype']}", fontsize=10
    )
    roofline.grid(alpha=0.3, which="both")
    save_figure(figure, png, remedy="give another --png")
