"""Fulcrum: a JAX research codebase for teams that are short of data and compute."""

__version__ = '0.1.0'
