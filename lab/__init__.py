"""Many runs and their figures: `python -m lab.sweep …`."""
