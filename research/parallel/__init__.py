"""Devices: the mesh, partition rules, step compilation by jit or pmap, what the chips can do."""
