"""One run: state, step, start, checkpoints, evaluation, hooks, writers, and the loop that tells the story."""
