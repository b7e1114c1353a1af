"""Checks that need eight devices, in a process of their own with eight virtual CPUs.

A test module calls :func:`problem` for each of its checks; called as a script, it ends
in :func:`main`. One process serves all checks of a module.
"""

import functools
import json
import os
import subprocess
import sys
import traceback

import jax
from versions import UNOPTIMIZED


def problem(file, check, as_users_compile=False):
    """What is wrong with a check of a module, None for nothing."""
    return _problems(file, as_users_compile)[check]


@functools.cache
def _problems(file, as_users_compile):
    not_for_it = UNOPTIMIZED if as_users_compile else {}
    done = subprocess.run(
        [sys.executable, "-W", "error", file],
        env={k: v for k, v in os.environ.items() if k not in not_for_it}
        | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "8",
            # On few cores, two programs under way may starve each other's exchanges.
            "JAX_CPU_ENABLE_ASYNC_DISPATCH": "false",
        },
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def main(checks):
    """Prints what is wrong with each check, None for nothing."""
    assert len(jax.devices()) == 8
    print(json.dumps({name: _problem(check) for name, check in checks.items()}))


def _problem(check):
    try:
        check()
    except Exception:
        return traceback.format_exc()
    return None


def named(*checks):
    """The checks by their names."""
    return {check.__name__: check for check in checks}
