"""`fedjax-sim launch`: train in several processes on this machine."""

from __future__ import annotations

from collections.abc import Sequence

from fedjax_sim.distributed import launcher


def run(arguments: Sequence[str]) -> int:
  """Start the processes and wait for them; return the exit code.

  Args:
    arguments: what follows `fedjax-sim launch`.

  Raises:
    ValueError: they are wrong.
  """
  return launcher.launch(*launcher.parse(arguments))
