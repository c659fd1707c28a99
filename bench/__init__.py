"""Measurements behind every figure that the project publishes; each is one command, `python -m bench.NAME`."""
