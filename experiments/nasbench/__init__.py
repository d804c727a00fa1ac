"""NAS-Bench-201: published tables, and rankings of its cells under several recipes."""
