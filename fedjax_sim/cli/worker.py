"""A command as one process of several, which its parent watches."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from fedjax_sim.distributed import supervisor


def work(execute: Callable[[], int], reporter: supervisor.Reporter) -> NoReturn:
  """Execute a command, report to the parent how it ended, and exit.

  The process always exits at once: JAX's own shutdown waits minutes for
  processes that are gone.

  Args:
    execute: runs the command; returns the exit code.
    reporter: sends the parent how the command ended.
  """
  code = 1
  try:
    code = execute()
  except BaseException as error:
    if is_loss(error):
      text = " ".join(str(error).split())
      reporter.failed(f"lost another process ({text[:200]})")
      code = supervisor.TRY_AGAIN
    else:
      traceback.print_exc()
  finally:
    for stream in (sys.stdout, sys.stderr):
      with contextlib.suppress(OSError, ValueError):
        stream.flush()
    done = functools.partial(reporter.done, code)
    if code != supervisor.TRY_AGAIN and "jax" in sys.modules:
      from fedjax_sim.distributed import processes

      processes.leave(done)
    else:
      done()
    os._exit(code)


def is_loss(error: BaseException) -> bool:
  """Return whether an error comes of another process that is gone."""
  if "jax" not in sys.modules:
    return False
  from fedjax_sim.distributed import processes

  return processes.is_loss(error)
