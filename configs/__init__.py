"""Experiments, one short file each; every docstring gives its command and its measured result."""
