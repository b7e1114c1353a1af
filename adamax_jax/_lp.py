"""Where pickles made before the package was reorganised look for their states."""

from adamax_jax._lp_adam import ScaleByLpAdamState as ScaleByLpAdamState
