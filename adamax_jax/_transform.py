"""Where pickles made before the package was reorganised look for their states."""

from adamax_jax._adamax import ScaleByAdamaxState as ScaleByAdamaxState
