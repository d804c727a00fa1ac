"""Parts of `archscale_jax.audit`: what is asked of a set-up, and what is said of the answers."""
