"""What is learned: losses and metrics over a model's outputs. A task knows a model's call protocol, never a concrete model."""
