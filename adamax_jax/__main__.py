"""``python -m adamax_jax``: the commands of the package."""

import sys

from adamax_jax._lab.cli import main

if __name__ == "__main__":
    sys.exit(main())
