"""Models that others wrote, as pip installs them: `python -m benchmarks.public_models`."""
