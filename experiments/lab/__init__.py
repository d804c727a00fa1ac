"""What the studies share: data, networks, training, sweeps, flags, figures and the report page."""
