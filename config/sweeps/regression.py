# Regression on a random ReLU network by residual MLPs of several structures, in one pass over the data ("Searching for
# Efficient Linear Layers over a Continuous Space of Structured Matrices", NeurIPS 2024, section 4). No data needed.
#   python -m lab.sweep config/sweeps/regression.py           # published sizes and length: 144 runs of 1M updates, 1,300 H100 hours
#   python -m lab.sweep config/sweeps/regression.py --small   # 28 runs of 4,000 updates, 22 minutes on an H100
# Times are estimates.
import runpy

script = "vision/regression.py"
config = "vision/config/regression.py"  # 8 inputs; a teacher of 6 layers of width 1024, students of 3; batch 4096

thetas = runpy.run_path("config/sweeps/gpt_theta.py")["thetas"]  # the same 23
widths = (64, 128, 512, 1024, 2048, 4096)
runs = [dict(structure="dense", d_model=d) for d in widths]
runs += [dict(structure="einsum", theta=theta, d_model=d) for theta in thetas for d in widths]
fit = "--points=final"  # the rate decays

# At these widths all groups have 0.1 to 3 million forward FLOPs per input. A run takes 25 to 30 s to start and compile,
# and 5 to 50 s for its 4,000 updates: in all 14 minutes to start and 8 to train.
small_widths = {
    (0.5, 0, 0.5, 0, 0.5, 0.5, 0): (128, 256, 512, 1024),  # full-rank BTT, ν = 1/2
    (0.67, 0, 0.33, 0, 0.33, 0.67, 0): (128, 256, 512, 768),  # full-rank BTT, ν = 2/3
    (0.67, 0, 0.33, 0, 0.67, 0.33, 0): (256, 512, 1024, 2048),  # low-rank BTT, ψ = 2/3
    (1, 0, 0, 0, 1, 0, 0.5): (128, 256, 512, 1024),  # low-rank, ψ = 1/2
    (0.5, 0.5, 0, 0.5, 0.5, 0, 0): (128, 256, 512, 1024),  # Kronecker, ω = 1/2
    (0.5, 0.25, 0.25, 0.25, 0.5, 0.25, 0): (128, 256, 512, 1024),  # generic, ω = 1/4
}
small = dict(
    common=dict(max_steps=4000, eval_interval=400, log_interval=50, save=False),
    runs=[dict(structure="dense", d_model=d) for d in (64, 96, 128, 256)]
    + [dict(structure="einsum", theta=theta, d_model=d) for theta, sizes in small_widths.items() for d in sizes],
)
