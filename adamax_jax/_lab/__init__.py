"""The laboratory: what ``python -m adamax_jax`` runs. No optimizer imports it."""
