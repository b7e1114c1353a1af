"""From Adam to AdaMax for JAX, in few bytes, as Optax transformations.

In docstrings ``:doc:`name``` is the page or notebook ``notebooks/name``.
"""

from importlib.metadata import version

# Adam, AdaMax, and the family between them.
from adamax_jax._adam import adam, adamw, scale_by_adam
from adamax_jax._adamax import ScaleByAdamaxState, adamax, adamaxw, scale_by_adamax

# Diagnostics.
from adamax_jax._diagnose import Diagnosis, diagnose

# Interoperability.
from adamax_jax._interop import from_optax, from_torch, to_optax
from adamax_jax._lp_adam import (
    ScaleByLpAdamState,
    lp_adam,
    lp_adamw,
    scale_by_lp_adam,
)

# Parameters in half precision.
from adamax_jax._master_weights import (
    MasterWeightsState,
    full_params,
    master_weights,
    set_full_params,
)

# A sharded state.
from adamax_jax._sharding import zero_shardings

# Reads, converts and inserts a state.
from adamax_jax._state import convert_state, insert_state, moments

__version__ = version("adamax_jax")

__all__ = [
    "Diagnosis",
    "MasterWeightsState",
    "ScaleByAdamaxState",
    "ScaleByLpAdamState",
    "adam",
    "adamax",
    "adamaxw",
    "adamw",
    "convert_state",
    "diagnose",
    "from_optax",
    "from_torch",
    "full_params",
    "insert_state",
    "lp_adam",
    "lp_adamw",
    "master_weights",
    "moments",
    "scale_by_adam",
    "scale_by_adamax",
    "scale_by_lp_adam",
    "set_full_params",
    "to_optax",
    "zero_shardings",
]
