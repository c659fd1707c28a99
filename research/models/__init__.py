"""Networks: flax linen modules with a field `num_outputs` and `__call__(inputs, train=False) -> outputs`."""
