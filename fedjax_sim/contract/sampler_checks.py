"""Checks of a sampler: on the host, without a compiled round."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import numpy as np

from fedjax_sim.contract.blame import blamed
from fedjax_sim.contract.outcome import Failed, NotApplicable, Outcome, Passed
from fedjax_sim.contract.setting import Setting
from fedjax_sim.core import Sampler, validate
from fedjax_sim.privacy.accounting import promises
from fedjax_sim.simulation import arguments

_SEEDS, _ROUNDS = (0, 1, 2), 64
_SURE = 6  # standard errors of a mean


def _made(setting: Setting) -> Sampler:
  return setting.draw(setting.population, setting.drawn)


def _observed(setting: Setting, *, resumed: bool = False) -> list[np.ndarray]:
  """Return the cohorts of rounds in which clients report made-up numbers.

  Args:
    setting: makes a sampler that observes.
    resumed: whether it is made anew for every round, and its state is copied,
      as in a run that goes on.
  """
  rng = np.random.default_rng(0)
  sampler, clients = _made(setting), setting.population
  assert sampler.init is not None
  state = jax.tree.map(np.array, sampler.init())
  drawn = []
  for round_ in range(_ROUNDS):
    given = state
    if resumed:
      sampler = _made(setting)
      given = jax.tree.map(np.array, state)
    ids = np.sort(validate.cohort(sampler.sample(0, round_, given), clients))
    drawn.append(ids)
    present = rng.random(len(ids)) < 0.8
    loss = np.where(present, rng.random(len(ids)), np.nan)
    values = _Values(loss=loss.astype(np.float32))
    assert sampler.observe is not None
    state = sampler.observe(state, round_, ids, present, values)
  return drawn


class _Values(dict[str, np.ndarray]):
  """What clients report: the loss, and the same for whatever is asked."""

  def __missing__(self, name: str) -> np.ndarray:
    return self["loss"]


def _cohorts(setting: Setting, sampler: Sampler) -> list[np.ndarray]:
  if sampler.observe is not None:
    return _observed(setting)
  clients, drawn = setting.population, []
  for seed in _SEEDS:
    for round_ in range(_ROUNDS):
      try:
        ids = validate.cohort(sampler.sample(seed, round_), clients)
      except Exception as error:
        error.add_note(f"round {round_ + 1} of seed {seed}")
        raise
      drawn.append(ids)
  return drawn


def draws(setting: Setting) -> Outcome:
  """Check that cohorts are ids of clients, as many as expected."""
  try:
    sampler = _made(setting)
    arguments.check_sampler(sampler, setting.population)
    cohorts = _cohorts(setting, sampler)
  except Exception as error:
    return Failed(blamed(error, setting.file))
  counts = np.array([len(ids) for ids in cohorts])
  spread = counts.std() / math.sqrt(len(counts))
  if abs(counts.mean() - sampler.expected) > _SURE * spread + 1e-6:
    return Failed(
      f"{len(counts)} rounds have {counts.mean():.4g} clients on average, and"
      f" Sampler.expected is {sampler.expected:g}; give the mean size."
    )
  return Passed(
    f"{len(counts)} rounds of {counts.min()} to {counts.max()} of"
    f" {setting.population} clients"
  )


def sizes(setting: Setting) -> Outcome:
  """Check that every cohort fits into a size that rounds are compiled for."""
  sampler = _made(setting)
  try:
    counts = [len(ids) for ids in _cohorts(setting, sampler)]
  except Exception:
    return NotApplicable("see draws")
  if len(sampler.sizes) > 3:
    return Failed(
      f"Sampler.sizes={sampler.sizes}: each is a program to compile; give three"
      " at most."
    )
  if max(counts) > sampler.sizes[-1]:
    round_ = int(np.argmax(counts))
    return Failed(
      f"round {round_ % _ROUNDS + 1} has {max(counts)} clients, and"
      f" Sampler.sizes={sampler.sizes} ends below; let the last one hold any"
      " cohort."
    )
  return Passed(f"at most {len(sampler.sizes)} programs, for {sampler.sizes}")


def state(setting: Setting) -> Outcome:
  """Check that what a sampler learns keeps its shapes and dtypes."""
  sampler = _made(setting)
  if sampler.observe is None or sampler.init is None:
    return NotApplicable("the sampler has no state")
  first = jax.tree.map(np.array, sampler.init())
  kept = jax.tree.map(np.copy, first)
  kind = lambda tree: jax.tree.map(
    lambda x: (np.shape(x), np.asarray(x).dtype), tree
  )
  some = np.arange(min(3, setting.population))
  present = some > 0
  loss = np.where(present, 1.0, np.nan).astype(np.float32)
  cases: tuple[tuple[str, Callable[[np.ndarray], np.ndarray]], ...] = (
    ("a client that is not present", lambda x: x),
    ("no clients", lambda x: x[:0]),
  )
  for what, take in cases:
    given = take(some), take(present), _Values(loss=take(loss))
    try:
      after = sampler.observe(first, 0, *given)
    except Exception as error:
      return Failed(f"observe, with {what}: {blamed(error, setting.file)}")
    if kind(after) != kind(first):
      return Failed(
        f"observe, with {what}, returns {kind(after)}, and the state was"
        f" {kind(first)}; keep structure, shapes and dtypes."
      )
    for x in jax.tree.leaves(after):
      if x.dtype.kind == "f" and np.isnan(x).any():
        return Failed(
          f"observe, with {what}, leaves NaN in the state; take values where"
          " `present` alone."
        )
  same = [
    np.array_equal(a, b, equal_nan=True)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(kept), strict=True)
  ]
  if not all(same):
    return Failed(
      "observe changes the state that it is given; copy it first: taken ="
      " taken.copy()."
    )
  return Passed("with clients that are absent, and without any")


def resume(setting: Setting) -> Outcome:
  """Draw rounds in a row and, by other samplers, by themselves; compare."""
  sampler = _made(setting)
  if sampler.observe is not None:
    rounds = [(0, round_) for round_ in range(_ROUNDS)]
    one = _observed(setting)
    other = _observed(setting, resumed=True)
    how, from_ = "each from the state before", "seed, round and state alone,"
  else:
    again = _made(setting)
    how, from_ = "forwards and backwards", "seed and round alone,"
    rounds = [(seed, r) for seed in _SEEDS for r in range(_ROUNDS)]
    one = [sampler.sample(*at) for at in rounds]
    other = [again.sample(*at) for at in rounds[::-1]][::-1]
  for (seed, round_), a, b in zip(rounds, one, other, strict=True):
    if not np.array_equal(a, b):
      return Failed(
        f"round {round_ + 1} of seed {seed} has the clients {np.asarray(a)[:5]}"
        f" if the rounds before were drawn, and {np.asarray(b)[:5]} if not:"
        f" sample must follow from {from_} as np.random.default_rng((seed,"
        " round_)) does, and change nothing; a run that goes on would take"
        " others."
      )
  return Passed(f"{len(rounds)} rounds, {how}")


def promise(setting: Setting) -> Outcome:
  """Hold `Sampler.participation` against what is drawn."""
  sampler = _made(setting)
  if sampler.participation is None:
    return NotApplicable("the sampler promises nothing: no epsilon is told")
  try:
    witness = promises.Witness(sampler, setting.population, 0)
    for round_ in range(_ROUNDS):
      ids = validate.cohort(sampler.sample(0, round_), setting.population)
      witness.check(round_, ids)
    promises.check_draws(sampler, setting.population, _ROUNDS)
  except ImportError as error:
    return NotApplicable(f"{error}")
  except ValueError as error:
    return Failed(f"{error}")
  return Passed(f"{sampler.participation}")
