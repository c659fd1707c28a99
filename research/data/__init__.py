"""Data as a function of the step: sources, splits, budgets, the index plan, augmentation, the batch pipeline."""
