# What "Compute Better Spent" (ICML 2024) and "Searching for Efficient Linear Layers" (NeurIPS 2024) do otherwise in their
# GPTs and mixtures; docs/deviations.md lists it, and what no option can restore. It follows another config file:
#   python train.py config/char_btt.py config/published.py
#   python -m lab.sweep config/sweeps/moe.py --config=config/published.py
# Options that a model does not read, such as those of routers, are left out with a note.
embedding_std = 0.02
scale_decay = True

router_init = "zero"
router_balance = 0.0
expert_init = "single"
