"""What `archscale_jax.report` is made of: names in short, table, header and notes."""
