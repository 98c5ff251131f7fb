"""Schedules: what multiplies a hyper-parameter from round to round.

A schedule of optax, a function of the round, is one; `plateau` also looks at a
metric, and keeps what it has seen in the run's state. Factors are computed in
the compiled round, so a rate that changes recompiles nothing.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedjax_sim.core import Array, HParams, PyTree, validate
from fedjax_sim.engine.hparams import Schedule, named, path_of, short_name

_LEAST_CHANGE = 1e-9  # optax wants one that is not 0


def step(every: int, factor: float = 0.1) -> Schedule:
  """Multiply by `factor` after every so many rounds."""
  every, factor = _rounds("every", every), _factor("factor", factor)
  # Whole numbers: compilers make a product of a division, and floor it wrong.
  return of_round(lambda done: jnp.float32(factor) ** (done // every))


def multi_step(at: Sequence[int], factor: float = 0.1) -> Schedule:
  """Multiply by `factor` after each of these numbers of rounds."""
  if not isinstance(at, list | tuple) or not at:
    raise TypeError(f"at={at!r} holds no rounds; give some, such as (50, 75).")
  rounds = [_rounds("at", n) for n in at]
  if len(set(rounds)) < len(rounds):
    raise ValueError(f"at={at!r} holds a round twice; give each once.")
  factors = dict.fromkeys(rounds, _factor("factor", factor))
  return of_round(optax.piecewise_constant_schedule(1.0, factors))


def linear(rounds: int, start: float = 0.0, begin: int = 0) -> Schedule:
  """Go from `start` to 1 within so many rounds, after `begin` rounds."""
  rounds = _rounds("rounds", rounds)
  start = validate.number("start", start, ge=0)
  begin = _rounds("begin", begin, least=0)
  return of_round(optax.linear_schedule(start, 1.0, rounds, begin))


def cosine(rounds: int, floor: float = 0.0) -> Schedule:
  """Go from 1 to `floor` within so many rounds, on half a cosine."""
  rounds = _rounds("rounds", rounds)
  floor = validate.number("floor", floor, ge=0, le=1)
  return of_round(optax.cosine_decay_schedule(1.0, rounds, floor))


def ramp_keep_decay(
  ramp: int, keep: int, decay: int, floor: float = 0.01
) -> Schedule:
  """Ramp up linearly, keep 1, decay exponentially, and stay at a floor.

  Args:
    ramp: rounds in which the factor climbs, from 1 / ramp in the first one to
      1 in the last one.
    keep: rounds after them with 1.
    decay: rounds after those, in the last of which it has fallen to `floor`,
      where it stays.
    floor: > 0.
  """
  ramp = _rounds("ramp", ramp)
  keep = _rounds("keep", keep, least=0)
  decay = _rounds("decay", decay)
  floor = _factor("floor", floor)

  def factor(done: Array) -> Array:
    climbed = jnp.minimum((done + 1) / ramp, 1.0)
    fallen = jnp.clip((done + 1 - ramp - keep) / decay, 0.0, 1.0)
    return climbed * floor**fallen

  return of_round(factor)


def plateau(
  metric: str = "test/loss",
  patience: int = 1,
  factor: float = 0.1,
  floor: float = 0.0,
) -> Schedule:
  """Multiply by `factor` where a metric has stopped improving.

  Args:
    metric: looked at after each evaluation that tells it.
    patience: so many evaluations in a row without a new best value.
    factor: above 0 and below 1.
    floor: the least factor.
  """
  validate.instance("metric", metric, str, "'test/loss'")
  patience = _rounds("patience", patience)
  factor = validate.number("factor", factor, gt=0)
  if factor >= 1:
    raise ValueError(f"factor={factor} is out of range; give less than 1.")
  floor = validate.number("floor", floor, ge=0, le=1)
  rule = optax.contrib.reduce_on_plateau(
    factor=factor,
    patience=patience,
    rtol=0.0,
    atol=_LEAST_CHANGE,
    min_scale=floor,
  )

  @jax.jit  # its conditionals would be compiled at every call
  def react(state: PyTree, value: float) -> PyTree:
    return rule.update((), state, value=jnp.asarray(value, jnp.float32))[1]

  return Schedule(
    factor=lambda round_, state: state.scale,
    init=lambda: rule.init(jnp.zeros((), jnp.float32)),
    react=react,
    metric=metric,
  )


def of_round(function: Callable[[Array], Any]) -> Schedule:
  """Return a schedule from a function of the rounds done, such as optax's."""
  return Schedule(lambda round_, state: jnp.asarray(function(round_)))


SCHEDULES: dict[str, Callable[..., Schedule]] = {
  "cosine": cosine,
  "linear": linear,
  "multi_step": multi_step,
  "plateau": plateau,
  "ramp_keep_decay": ramp_keep_decay,
  "step": step,
}


def _rounds(field: str, value: int, least: int = 1) -> int:
  return validate.integer(field, value, ge=least, le=2**31 - 1)


def _factor(field: str, value: float) -> float:
  return validate.number(field, value, gt=0, le=1)


def parse(field: str, text: str) -> Schedule:
  """Parse a schedule, such as `step(every=30, factor=0.5)`.

  Args:
    field: what messages call the text.
    text: a name in `SCHEDULES`, and its arguments by name.

  Raises:
    TypeError, ValueError: it calls none, or with other arguments; names the
      field.
  """
  validate.instance(field, text, str, "'step(every=30, factor=0.5)'")
  given = f"{field}={text!r}"
  try:
    call = ast.parse(text.strip(), mode="eval").body
    if isinstance(call, ast.Name):
      call = ast.Call(call, [], [])
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
      raise ValueError("no call")
    names = [k.arg for k in call.keywords]
    if call.args or not all(names):
      raise ValueError("arguments without names")
    if len(set(names)) < len(names):
      raise ValueError("an argument twice")
    arguments = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
  except (SyntaxError, ValueError, TypeError) as error:
    raise ValueError(
      f"{given} calls no schedule ({error}); give one such as"
      " 'step(every=30, factor=0.5)'."
    ) from error
  make = validate.lookup(field, call.func.id, SCHEDULES)
  validate.arguments(f"{field}={call.func.id!r}", arguments, make)
  try:
    return make(**arguments)
  except (TypeError, ValueError) as error:
    raise type(error)(f"{given}: {error}") from error


def checked(
  schedules: Mapping[str, Schedule | Callable[[Array], Any]], hparams: HParams
) -> dict[str, Schedule]:
  """Return every value as a `Schedule`, by the hyper-parameter's short name.

  Args:
    schedules: hyper-parameter, such as `client.learning_rate` of the algorithm
      or `transforms.clip.norm` -> its schedule, or a function of the rounds
      done. `algorithm.client.learning_rate` is the same as the first, and the
      way to name a number of the algorithm that another part has, too.
    hparams: the run's.

  Raises:
    TypeError, UnknownNameError: a value is no schedule, or the run has no such
      hyper-parameter.
    ValueError: a hyper-parameter is given twice.
  """
  paths = named(hparams)
  if not isinstance(schedules, Mapping):
    raise TypeError(
      f"schedules={schedules!r} is no dict; give hyper-parameter -> schedule,"
      " such as {'client.learning_rate': schedules.step(every=30)}."
    )
  result: dict[str, Schedule] = {}
  for name, schedule in schedules.items():
    path = path_of(name, paths)
    short = name if path is None else short_name(path, paths)
    if path is None:
      names = {short_name(path, paths) for path in paths}
      validate.one_of("schedules: hyper-parameter", name, names)
    if short in result:
      raise ValueError(
        f"schedules has {short!r} twice, once as {name!r}; leave one out."
      )
    if not isinstance(schedule, Schedule):
      if not callable(schedule):
        raise TypeError(
          f"schedules[{name!r}]={schedule!r} is no schedule; give one such as"
          " schedules.step(every=30), or a function of the round."
        )
      schedule = of_round(schedule)
    result[short] = schedule
  return result
