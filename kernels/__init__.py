"""Products, losses and routing as functions of tensors, forward and backward."""
