"""Checks of random numbers: what their keys come from, and who says so."""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from fedjax_sim.contract import part_checks
from fedjax_sim.contract.compare import difference
from fedjax_sim.contract.outcome import Failed, NotApplicable, Outcome, Passed
from fedjax_sim.contract.rounds import Rounds
from fedjax_sim.contract.setting import Setting


def keys(rounds: Rounds) -> Outcome:
  """Check that random numbers are drawn from the keys that functions get.

  Numbers from a key that is a constant of the program are the same with every
  seed, and, but for what is folded into it, for all clients and rounds.
  """
  setting, program = rounds.setting, rounds.program
  draws: list[Draw] = []
  follow(program.jaxpr, {}, draws)
  for draw in draws:
    if draw.key is not None:
      return Failed(
        f"{_line(draw.equation, setting.file)}a round draws random numbers from"
        f" {draw.key}, so they are the same with every seed, and perhaps for"
        " all clients and rounds; take the key that the function gets. If that"
        " is meant, draw them once, where the part is made."
      )
  if setting.kind == "transform" and (leaves := _alike(setting)):
    return Failed(
      f"{leaves[0]} and {leaves[1]} get the same random numbers; give each leaf"
      " a key of its own: jax.random.fold_in(key, i), or split."
    )
  return Passed("from those given" if draws else "nothing random is drawn")


class Draw(NamedTuple):
  """A draw of random bits in a program.

  Attributes:
    equation: the draw.
    key: which constant its key comes from; None: none.
  """

  equation: Any
  key: str | None


def follow(
  jaxpr: Any, constants: Mapping[Any, str], draws: list[Draw]
) -> list[str | None]:
  """Follow constant keys to what is drawn from them.

  Args:
    jaxpr: a program, with others inside.
    constants: input -> the constant key that it comes from.
    draws: all draws of random bits are appended.

  Returns:
    For each output the constant key that it comes from; None: from none.
  """
  known = dict(constants)
  for var in jaxpr.constvars:
    if jax.dtypes.issubdtype(var.aval.dtype, jax.dtypes.prng_key):
      known[var] = "a key from outside of the functions"
  origin = lambda x: None if isinstance(x, Literal) else known.get(x)
  for equation in jaxpr.eqns:
    name, given = equation.primitive.name, [*map(origin, equation.invars)]
    found: list[str | None] = [None] * len(equation.outvars)
    first = equation.invars[0] if equation.invars else None
    if name == "random_bits":
      draws.append(Draw(equation, given[0]))
    elif name == "random_seed" and isinstance(first, Literal):
      found = [f"jax.random.key({first.val})"]
    elif inside := [*_programs(equation.params)]:
      for each in inside:
        # The inputs of branches and loops' bodies are the last ones given.
        last = dict(zip(each.invars[::-1], given[::-1], strict=False))
        passed = {var: key for var, key in last.items() if key is not None}
        made = follow(each, passed, draws)
        ends = itertools.zip_longest(found[::-1], made[::-1])
        found = [a or b for a, b in ends][::-1]
    elif given:  # what is folded into a key leaves it what it is
      source = given[0] if name == "random_fold_in" else _first(given)
      found = [source] * len(found)
    known |= {
      var: key
      for var, key in zip(equation.outvars, found, strict=False)
      if key is not None
    }
  return [*map(origin, jaxpr.outvars)]


def _first(keys: Iterable[str | None]) -> str | None:
  return next((key for key in keys if key is not None), None)


def _programs(params: Mapping[str, Any]) -> Iterator[Any]:
  """Yield the programs inside of an equation, such as a loop's body."""
  for value in params.values():
    for each in value if isinstance(value, tuple | list) else (value,):
      inner = getattr(each, "jaxpr", each)
      if hasattr(inner, "eqns"):
        yield inner


def _line(equation: Any, file: str | None) -> str:
  """Return "FILE, line N: " of an equation; "" where JAX did not keep it."""
  found = equation.source_info.traceback
  if found is None:
    return ""
  for frame in reversed(traceback.extract_tb(found.as_python_traceback())):
    if frame.filename == file:
      return f"{Path(frame.filename).name}, line {frame.lineno}: "
  return ""


def _alike(setting: Setting) -> tuple[str, str] | None:
  """Return two leaves of zeros to which a transform adds the same numbers."""
  added = part_checks.transformed_zeros(setting, 0)
  leaves = [
    (jax.tree_util.keystr(path).lstrip("."), np.ravel(leaf))
    for path, leaf in jax.tree_util.tree_leaves_with_path(added)
  ]
  for (a, x), (b, y) in itertools.combinations(leaves, 2):
    size = min(len(x), len(y))
    if size > 1 and x[:size].any() and np.array_equal(x[:size], y[:size]):
      return (a, b) if _is_random(setting) else None
  return None


def _is_random(setting: Setting) -> bool:
  """Return whether a transform adds random numbers to an update of zeros."""
  one, other = (part_checks.transformed_zeros(setting, s) for s in (0, 1))
  return difference(one, other, 0.0) is not None


def adds_noise(setting: Setting) -> Outcome:
  """Check that a transform which adds noise says so."""
  (*_, transform) = setting.transforms
  if transform.adds_noise:
    return Passed("adds_noise")
  if _is_random(setting):
    return Failed(
      "it adds random numbers to an update of zeros, and Transform.adds_noise"
      " is False: error feedback would take them back. Set it to True."
    )
  return NotApplicable("adds_noise is not set, and none is added")


def draws_noise(rounds: Rounds) -> Outcome:
  """Check that an algorithm which draws private noise says so."""
  if rounds.simulator().states.draws_noise:
    return Passed("draws_noise")
  words = jnp.array([1, 2], jnp.uint32)
  state = rounds.began._replace(noise_seed=words)
  one, other = rounds.run().compared, rounds.run(state).compared
  apart = difference(one, other, 0.0)
  if apart is not None:
    return Failed(part_checks.undeclared("Algorithm", apart.where))
  return NotApplicable("draws_noise is not set, and none is drawn")
