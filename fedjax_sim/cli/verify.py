"""`fedjax-sim verify`: execute rounds of a run again, and compare."""

from __future__ import annotations

from collections.abc import Sequence

from fedjax_sim.config import flags
from fedjax_sim.data import workdir_on_disk


def run(arguments: Sequence[str]) -> int:
  """Print what equals; return 0 if all does, else 1.

  Args:
    arguments: what follows `fedjax-sim verify`.

  Raises:
    UsageError: a flag is unknown, missing or has a wrong value.
    WorkdirError, ConfigChangedError: there is nothing to compare with.
    TypeError, ValueError, OSError, ImportError: what the run was built from is
      missing or has changed.
  """
  values = flags.parse(
    arguments, "workdir", rounds="checkpoints", **{"data-path": ""}
  )
  workdir = workdir_on_disk(values.workdir, "--workdir")
  from fedjax_sim import distributed
  from fedjax_sim.run import verify

  distributed.setup()
  distributed.devices()  # what is wrong with JAX shows now
  say = lambda line: print(line, flush=True)  # noqa: T201
  done = verify.verify(
    workdir,
    values.rounds,
    say,
    data_path=values["data-path"].value or None,
  )
  equal = all(comparison.equal for comparison in done)
  say("verified: all equal" if equal else "NOT verified")
  return 0 if equal else 1
