"""Growing by TINY against the package gromo, in an environment of its own."""
