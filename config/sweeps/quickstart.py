# Frontiers of dense and BTT layers on the source code of Python's standard library, in a few minutes on 2 CPU cores:
#   python -m lab.sweep config/sweeps/quickstart.py
config = "config/quickstart.py"
common = dict(max_steps=500, warmup_steps=50, schedule="constant", eval_interval=50, sample_tokens=0, save=False)

sizes = {"dense": (24, 48, 80, 128), "btt": (48, 96, 144, 240)}  # widths
# The best of 5e-4, 1e-3, 2e-3 and 4e-3, at widths 48 and 128 for dense, 96 and 240 for BTT.
rates = {"dense": 5e-4, "btt": 1e-3}
runs = [
    dict(structure=structure, rank=1, d_model=width, n_head=4, n_layer=2, lr=rates[structure])
    for structure, widths in sizes.items()
    for width in widths
]
fit = "--by=structure"
