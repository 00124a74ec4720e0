"""Tabulate and draw the best rate at each width, over seeds, from rows of lab.mup_check lr_landscape.

python -m results.mup.landscapes
"""

import json
import math
import pathlib
import statistics
from collections import defaultdict

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = pathlib.Path(__file__).parent
NAMES = {
    "dense": "dense", "dense, normalize_dense=True": "dense, RMS cap", "btt": "BTT rank 1", "btt, rank=4": "BTT rank 4",
    "low_rank, rank=sqrt(width), structured_layers=attn,ffn": "low-rank √d", "kronecker, structured_layers=attn,ffn": "Kronecker",
    "btt, moe=linear": "BTT-MoE",
}  # fmt: skip


def main():
    losses = defaultdict(dict)  # structure: {(width, rate): losses of the seeds}
    for row in json.loads((HERE / "landscapes.json").read_text()):
        losses[row["structure"]].setdefault((row["width"], row["lr"]), []).append(row["loss"])
    figure, axes = plt.subplots(2, 4, figsize=(14, 6), layout="constrained", sharey=False)
    lines = ["| structure | width 128 | 256 | 512 | 1024 |", "|---|---|---|---|---|"]
    for (structure, found), axis in zip(losses.items(), axes.flat):
        widths = sorted({width for width, _ in found})
        cells = []
        for width in widths:
            rates = sorted(rate for w, rate in found if w == width)
            means = [statistics.mean(found[width, rate]) for rate in rates]
            best = min(range(len(rates)), key=lambda i: means[i] if math.isfinite(means[i]) else math.inf)
            seeds = found[width, rates[best]]
            edge = " (edge)" if best in (0, len(rates) - 1) else ""
            cells.append(f"2^{round(math.log2(rates[best]))}{edge}: {means[best]:.3f} ± {statistics.stdev(seeds):.3f}")
            axis.plot(rates, means, marker="o", ms=3, label=f"width {width}")
        lines.append(f"| {NAMES[structure]} | {' | '.join(cells)} |")
        axis.set(xscale="log", title=NAMES[structure], xlabel="learning rate", ylabel="training loss (nats)")
        finite = [loss for each in found.values() for loss in each if math.isfinite(loss)]
        axis.set_ylim(min(finite) - 0.05, min(3.4, max(finite) + 0.05))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    for axis in list(axes.flat)[len(losses) :]:
        axis.remove()
    figure.suptitle("Loss after 200 steps against learning rate, structure-aware µP, mean of three seeds")
    figure.savefig(HERE / "landscapes.png", dpi=100)
    (HERE / "landscapes.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
