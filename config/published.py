# What "Compute Better Spent" (ICML 2024) and "Searching for Efficient Linear Layers" (NeurIPS 2024) do differently in their
# GPTs and mixtures; docs/deviations.md lists all differences, also those without an option. Name this file after another:
#   python train.py config/char_btt.py config/published.py
#   python -m lab.sweep config/sweeps/moe.py --config=config/published.py
# A model without routers leaves out their options, with a note.
embedding_std = 0.02
scale_decay = True

router_init = "zero"
router_balance = 0.0
expert_init = "single"
