"""How parameters move: learning-rate schedules, gradient clipping, optimisers, weight-decay and freezing rules."""
