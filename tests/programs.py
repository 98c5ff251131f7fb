"""Rounds and evaluations that tests of one module compile once.

Most tests of whole runs differ in where these stop, not in what they compile.
Each has a simulator of its own, whose functions are new, so JAX would trace and
compile them anew. Not for tests whose functions note that they were called, or
that replace what rounds are made of: both is lost on a program of before.
"""

from collections.abc import Hashable
from typing import Any

import jax
import pytest

from fedjax_sim.config.build.parts import TRACED
from fedjax_sim.engine import program as rounds
from fedjax_sim.engine.evaluation import EvaluationSet
from fedjax_sim.engine.fingerprint import fingerprint
from fedjax_sim.engine.state import RunState
from fedjax_sim.simulation.compiler import Compiler


def share(patch: pytest.MonkeyPatch) -> None:
  """Let simulators use the programs of those before, where they are the same.

  Two programs are taken for the same under the rules by which the runs of a
  study share theirs, `fedjax_sim.engine.fingerprint`, and only for arguments of
  the same shapes, on the same devices.
  """
  trace, compile = Compiler._trace, rounds.compile_rounds
  begin = EvaluationSet.__init__
  traced: dict[Hashable, jax.stages.Traced] = {}
  compiled: dict[Hashable, tuple[jax.stages.Traced, rounds.Program]] = {}
  evaluations: dict[Hashable, Any] = {}

  def trace_once(
    self: Compiler, shape: rounds.Shape, called: RunState
  ) -> jax.stages.Traced:
    given = called, self.hparams, self.server_data
    data = self.residency.shapes(shape.capacity, shape.rounds)
    leaves, tree = jax.tree.flatten((given, data))
    key = (
      settings(),
      fingerprint((self.spec, shape, self.donate), TRACED),
      self.residency.spec,
      tree,
      tuple((x.shape, x.dtype) for x in leaves),
    )
    if key not in traced:
      traced[key] = trace(self, shape, called)
    return traced[key]

  def compile_once(
    rounds: jax.stages.Traced, *args: Any, **options: Any
  ) -> rounds.Program:
    key = id(rounds), settings(), args, tuple(options.items())
    if key not in compiled:
      compiled[key] = rounds, compile(rounds, *args, **options)
    return compiled[key][1]

  def begin_with_others(
    self: EvaluationSet, task: Any, algorithm: Any, data: Any, **options: Any
  ) -> None:
    begin(self, task, algorithm, data, **options)
    key = fingerprint(
      (
        (task, algorithm, self._work.batch_size, self._mesh),
        options.get("prepare"),
        (self._personal, self._owner if task.joint else None),
      ),
      TRACED,
    )
    self._jitted = evaluations.setdefault(key, self._jitted)

  patch.setattr(Compiler, "_trace", trace_once)
  patch.setattr(rounds, "compile_rounds", compile_once)
  patch.setattr(EvaluationSet, "__init__", begin_with_others)


def settings() -> Hashable:
  """What a program depends on beside its function and its arguments."""
  names = (
    "jax_enable_x64",
    "jax_debug_nans",
    "jax_default_matmul_precision",
    "jax_disable_most_optimizations",
  )
  return (
    jax.stages.Lowered.compile,  # the fixture `exact` replaces it
    *(jax.config.values[name] for name in names),
  )
