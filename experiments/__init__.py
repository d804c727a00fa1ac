"""Binaries: `python -m experiments.NAME --flag=value`."""
