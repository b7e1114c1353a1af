"""AdaMax for JAX: Adam with the infinity norm, as Optax transformations."""

from importlib.metadata import version

from adamax_jax._alias import adamax as adamax
from adamax_jax._alias import adamaxw as adamaxw
from adamax_jax._alias import lp_adam as lp_adam
from adamax_jax._alias import lp_adamw as lp_adamw
from adamax_jax._convert import convert_state as convert_state
from adamax_jax._convert import moments as moments
from adamax_jax._diagnose import Diagnosis as Diagnosis
from adamax_jax._diagnose import diagnose as diagnose
from adamax_jax._interchange import from_optax as from_optax
from adamax_jax._interchange import from_torch as from_torch
from adamax_jax._interchange import insert_state as insert_state
from adamax_jax._interchange import to_optax as to_optax
from adamax_jax._lp import ScaleByLpAdamState as ScaleByLpAdamState
from adamax_jax._lp import scale_by_lp_adam as scale_by_lp_adam
from adamax_jax._sharding import zero_shardings as zero_shardings
from adamax_jax._transform import ScaleByAdamaxState as ScaleByAdamaxState
from adamax_jax._transform import scale_by_adamax as scale_by_adamax

__version__ = version("adamax_jax")
