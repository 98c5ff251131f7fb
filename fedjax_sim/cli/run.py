"""`fedjax-sim run`: run a config in a workdir."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from fedjax_sim.cli import start
from fedjax_sim.cli.lasting import lasting
from fedjax_sim.distributed import supervisor


def run(
  arguments: Sequence[str], reporter: supervisor.Reporter | None = None
) -> int:
  """Run a config in a workdir; return the exit code."""
  with lasting():
    from fedjax_sim.config import flags

    optional: dict[str, Any] = {"branch-from": "", "sync-to": None}
    values = flags.parse(
      arguments,
      "config",
      "workdir",
      switches=("profile",),
      distributed="off",
      **optional,
    )
    import jax

    from fedjax_sim import distributed
    from fedjax_sim.distributed import processes
    from fedjax_sim.run import experiment, signals

  start.prepare(named=values.profile)
  runtime = values.config.runtime
  processes.join(
    values.distributed, runtime.peer_timeout, runtime.start_timeout
  )
  distributed.devices()  # what is wrong with JAX shows now

  def on_round(done: int) -> None:
    if reporter is not None:
      # Now that the data are loaded, which may hold Python's lock for long. A
      # little less than all, as what follows takes its time, too.
      reporter.timeout = 0.8 * runtime.peer_timeout
      reporter.round(done)

  if reporter is not None:
    reporter.rank = jax.process_index()
    reporter.timeout = runtime.start_timeout
  try:
    experiment.run(
      values.config,
      values.workdir,
      on_round,
      branch_from=values["branch-from"].value,
      profile=values.profile,
      sync_to=values["sync-to"].value,
    )
  except signals.Interrupted as stop:
    if processes.is_first():
      print(f"fedjax-sim: {stop}", file=sys.stderr)  # noqa: T201
    return stop.exit_code
  return 0
