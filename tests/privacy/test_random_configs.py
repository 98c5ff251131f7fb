"""Random private configs: what they print is no less than what they betray.

Each config goes the way of the command line, `flags.load` and `build`. If it is
accepted, its clients move the sum of a compiled round as far as they can, by
brute force: with and without one client, and with another in its place. The
independent bound is the epsilon that the likelihood ratio of two federations
attains (`test_neighbors.attained`): a mixture of shifted densities, composed
by FFT on losses that are rounded down, for as many turns and with the rate that
follow from the config's own numbers, and with the shift that was measured. Of
correlated noise the shift is the longest sum of columns of the strategy's
matrix over all rounds that are a period apart. No accountant, no
`Participation`, and no `sensitivity` of the package is asked.

It is a lower bound of what holds, so a printed epsilon below it is wrong; and
by `pld` a printed one is not much above it, or it would bound nothing.
"""

import dataclasses
import functools
import itertools
import math
import pathlib
from typing import Any

import adversaries
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import linalg, optimize, stats
from test_central import recorded
from test_neighbors import attained

from fedjax_sim import sampling
from fedjax_sim.config import flags
from fedjax_sim.config.build import build
from fedjax_sim.privacy.central import Contribution
from fedjax_sim.simulation.runtime import Runtime

FILE = str(pathlib.Path(adversaries.__file__))
CLIENTS, TARGETS = adversaries.CLIENTS, adversaries.TARGETS
SLOW = pytest.mark.slow

# --- configs ------------------------------------------------------------------


def drawn(rng, *, correlated: bool, only: str | None = None) -> dict[str, Any]:
  """Fields of a config that may, or may not, go together.

  Args:
    rng: numpy's.
    correlated: whether noise may be, which takes seconds to make.
    only: a mechanism; None: any.
  """
  pick = lambda *choices: choices[rng.integers(len(choices))]
  often = lambda chance: bool(rng.random() < chance)
  size = lambda low, high: float(
    f"{math.exp(rng.uniform(*np.log([low, high]))):.3g}"
  )
  noises = ["gaussian"] * 4 + ["laplace"] * 2 + ["discrete_gaussian"]
  mechanism = pick(*noises, *["banded", "banded", "blt"] * correlated)
  mechanism = only or mechanism
  fields: dict[str, Any] = {
    "privacy.mechanism": mechanism,
    "privacy.clip_norm": size(1e-2, 10.0),
    "privacy.delta": pick(1e-2, 1e-3, 1e-4, 1e-6),
    "server.clients_per_round": int(
      rng.integers(1, CLIENTS // pick(1, 1, 2, 5))
    ),
    "sampler.name": pick(
      *("poisson", "poisson", "uniform", "cyclic", "cyclic_poisson"),
      *("shuffled", f"{FILE}:in_turns"),
      *(f"{FILE}:too_often", f"{FILE}:not_by_itself"),
    ),
    "server.rounds": pick(1, 2, 3, 5, 8, 13),
    "seed": int(rng.integers(2**31)),
  }
  if mechanism in ("banded", "blt"):  # few, since each takes seconds to find
    fields["server.rounds"] = 8
    fields["sampler.name"] = pick("cyclic", "cyclic_poisson")
    fields["server.clients_per_round"] = pick(3, 10, 20, 40)
  if mechanism == "blt":
    fields["server.clients_per_round"] = pick(10, 20)
  if mechanism == "banded":
    fields["privacy.bands"] = pick(1, 2, 3)
  elif mechanism == "blt" and often(0.8):
    fields["sampler.name"] = "cyclic"
  if fields["sampler.name"] == "cyclic_poisson":
    fields["sampler.groups"] = pick(1, 2, 3, 5)
  if fields["sampler.name"] == "poisson" and often(0.3):
    fields["sampler.population"] = int(rng.integers(30, 100))
  if fields["sampler.name"] == "uniform" and often(0.1):
    fields["sampler.min_clients"] = 1
  if often(0.1):
    fields["privacy.target_epsilon"] = size(0.3, 20.0)
  else:
    fields["privacy.noise_multiplier"] = size(0.4, 8.0)
  if mechanism == "discrete_gaussian":  # a program for each, so few
    fields["server.clients_per_round"] = pick(_SIZE, 20)
    fields["privacy.noise_multiplier"] = pick(0.4, 1.0, 3.0)
    fields.pop("privacy.target_epsilon", None)
    fields["privacy.accountant"] = "rdp"
  elif often(0.6):
    fields["privacy.accountant"] = pick("pld", "rdp", "gdp")
  if often(0.4):
    fields["privacy.max_weight"] = pick(3.0, 12.0)
    if often(0.5):
      fields["algorithm.weighting"] = "examples"
    if often(0.3):
      fields["privacy.noise_weights"] = True
  if often(0.2):
    fields["privacy.per_layer"] = True
  elif often(0.2):
    fields["privacy.quantile"] = pick(0.3, 0.9)
  if often(0.2) and {"privacy.quantile", "privacy.noise_weights"} & set(fields):
    fields["privacy.extras_fraction"] = 0.2
  if often(0.2):
    fields["privacy.denominator"] = size(1.0, 50.0)
  if often(0.08):
    fields["privacy.noise_cohort_size"] = int(rng.integers(10, 60))
    fields["privacy.population"] = pick(60, 90)
  if mechanism == "discrete_gaussian":  # which all of these are refused with
    extras = ("quantile", "noise_weights", "noise_cohort_size", "population")
    for name in extras:
      fields.pop(f"privacy.{name}", None)
  return fields


# --- what a config betrays ----------------------------------------------------


def chances(fields, coefficients):
  """(turns, rate, shift of a contribution, in contributions) of a config.

  From what the documentation says of samplers.

  Args:
    fields: of the config.
    coefficients: of the matrix that noise is correlated by, its first column;
      None: it is not.
  """
  rounds, wanted = fields["server.rounds"], fields["server.clients_per_round"]
  name = fields["sampler.name"].rpartition(":")[2]
  population = fields.get("sampler.population") or CLIENTS
  if "privacy.noise_cohort_size" in fields:
    wanted = fields["privacy.noise_cohort_size"]
    population = fields["privacy.population"]
  groups, rate, moved = 1, wanted / population, 1.0
  if name == "uniform":
    moved = 2.0
  elif name == "in_turns":
    groups, moved = 2, 2.0
  elif name == "cyclic_poisson":
    groups = fields["sampler.groups"]
  elif name == "cyclic":
    groups, rate = -(-population // wanted), 1.0
    if "privacy.noise_cohort_size" in fields:  # cohorts no smaller than that
      groups = population // wanted
    moved = 1.0 if groups > 1 else 2.0
  else:
    assert name in ("poisson", "not_by_itself")  # the latter with everybody
  if name in ("in_turns", "cyclic_poisson"):
    rate *= groups
  rate, turns = min(rate, 1.0), -(-rounds // groups)
  if rate == 1 and groups > 1:  # everybody in its turn: nobody is replaced
    moved = 1.0
  if coefficients is None:
    return turns, rate, moved
  matrix = linalg.toeplitz(coefficients[:rounds], np.zeros(rounds))
  if rate == 1:  # all at once
    return 1, 1.0, moved * farthest(matrix, groups)
  bands = int(np.count_nonzero(coefficients))
  whole = max(1, -(-(rounds - bands + 1) // groups))
  last = (whole - 1) * groups
  return whole, rate, moved * float(np.linalg.norm(matrix[:, last]))


def farthest(matrix, apart):
  """Length of the longest sum of columns that are so far apart, or farther."""
  rounds = len(matrix)
  longest = 0.0
  for count in range(1, -(-rounds // apart) + 1):
    for chosen in itertools.combinations(range(rounds), count):
      if np.diff(chosen).min(initial=apart) >= apart:
        total = matrix[:, list(chosen)].sum(axis=1)
        longest = max(longest, float(np.linalg.norm(total)))
  return longest


@functools.lru_cache(maxsize=4096)
def betrayed(noise, multiplier, turns, rate, delta):
  """The epsilon that the two farthest federations attain."""
  if noise != "laplace" and rate == 1:  # on whole numbers, too
    mu = math.sqrt(turns) / multiplier
    excess = lambda e: (
      stats.norm.cdf(mu / 2 - e / mu)
      - math.exp(e) * stats.norm.cdf(-mu / 2 - e / mu)
      - delta
    )
    return optimize.brentq(excess, 0, 600) if excess(0) > 0 else 0.0
  law = stats.laplace if noise == "laplace" else stats.norm
  reach = (36 if noise == "laplace" else 9) * multiplier
  x = np.linspace(-reach, reach + 1, 20_001)
  silent = law.pdf(x, scale=multiplier)
  sent = (1 - rate) * silent + rate * law.pdf(x, loc=1, scale=multiplier)
  ways = ((sent, silent), (silent, sent))
  return max(attained(*way, delta, turns, x, interval=5e-4) for way in ways)


# --- how far a client moves the sum -------------------------------------------

_COMPILED: dict[Any, Any] = {}
_SIZE = 4


class Measured:
  """The compiled round of a config, with cohorts that are set from outside.

  Programs are shared by configs that differ in traced numbers alone.
  """

  def __init__(self, made, fields):
    self.ids = [0]
    sampler = sampling.Sampler(
      lambda seed, round_: np.array(self.ids, np.int64),
      sizes=(_SIZE,),
      expected=made.sampler.expected,
    )
    self.simulator = dataclasses.replace(
      made,
      algorithm=recorded(made.algorithm),
      sampler=sampler,
      budget=None,
      runtime=Runtime(lanes=2, donate=False, rounds_per_dispatch=1),
    )
    static = (
      *("privacy.mechanism", "privacy.per_layer", "privacy.bands"),
      *(
        "privacy.noise_weights",
        "algorithm.weighting",
        "privacy.extras_fraction",
      ),
    )
    key = [fields.get(name) for name in static]
    key += ["privacy.max_weight" in fields, "privacy.quantile" in fields]
    if fields["privacy.mechanism"] == "discrete_gaussian":
      key += [fields["server.clients_per_round"]]
      key += [fields["privacy.noise_multiplier"]]
    if made.algorithm.privacy.sensitivity is not None:
      strategy = made.algorithm.privacy.sensitivity.__self__
      key += [strategy.rounds, strategy.coefficients.tobytes()]
    if tuple(key) not in _COMPILED:
      _COMPILED[tuple(key)] = (
        self.simulator.compiler.compiled,
        self.simulator.init(),
      )
    compiled, start = _COMPILED[tuple(key)]
    self.start = start._replace(seed=jnp.uint32(made.seed))
    self.simulator.compiler.__dict__["compiled"] = compiled
    self.steps = 1.0  # of the longest contribution
    if fields["privacy.mechanism"] == "discrete_gaussian":
      self.steps = self.grid(fields)

  def grid(self, fields):
    """A power of 2: the steps in 1, by two rounds with the same noise."""
    (one, model), (other, further) = self.sum_of(0), self.sum_of(1)
    moved = np.abs(flat(model) - flat(further)).max()
    steps = np.abs(flat(one.update) - flat(other.update)).max()
    numbers = self.simulator.hparams["algorithm"]["privacy"]
    scale = steps * numbers["clip_norm"] / (moved * numbers["denominator"])
    found = 2.0 ** np.round(np.log2(scale))
    assert abs(scale / found - 1) < 0.01
    return found

  def sum_of(self, *ids):
    """The contributions' sum, whole numbers in steps; the model's change."""
    self.ids = sorted(ids)
    planned = self.simulator.plan(0, 1)
    state = self.simulator.dispatch(self.start, planned).state
    model = self.simulator.algorithm.variables(state.server).params
    total, model = jax.device_get((state.server[1], model))
    update = jax.tree.map(lambda x: x / self.steps, total.update)
    return total._replace(update=update), model


def flat(tree):
  leaves = [np.ravel(x).astype(np.float64) for x in jax.tree.leaves(tree)]
  return np.concatenate(leaves) if leaves else np.zeros(0)


def sensitivity(measured, fields, rng):
  """How far a client moves the sum: by being there; over by being another.

  In the unit of the multiplier, all parts of what is released together.
  """
  extras = ("privacy.quantile", "privacy.noise_weights")
  count = sum(name in fields for name in extras)
  share = fields.get("privacy.extras_fraction", 0.01)
  laplace = fields["privacy.mechanism"] == "laplace"
  order, power = (1, 1.0) if laplace else (2, 0.5)
  rest = (1 - count * share) ** power
  parts = Contribution(rest, share**power, share**power, share**power)

  def apart(one, other):
    lengths = [
      np.linalg.norm(flat(a) - flat(b), order) * part
      for a, b, part in zip(one, other, parts, strict=True)
    ]
    return float(np.linalg.norm(lengths, order))

  there = other = 0.0
  opposite = [i for i in range(CLIENTS) if i not in TARGETS]
  for target in rng.choice(TARGETS, 3, replace=False):
    around = rng.choice(opposite, _SIZE, replace=False)
    with_it, _ = measured.sum_of(target, *around[1:])
    without, _ = measured.sum_of(*around[1:])
    replaced, _ = measured.sum_of(*around)
    there = max(there, apart(with_it, without))
    other = max(other, apart(with_it, replaced))
  return there, other


def noise_of(measured, fields, multiplier, scale):
  """The update's noise, over what it should be; shape=(parameters,).

  Of a first round, which is not correlated with another yet.
  """
  total, model = measured.sum_of(1)
  numbers = measured.simulator.hparams["algorithm"]["privacy"]
  mean = flat(model) * numbers["denominator"] / numbers["clip_norm"]
  noise = mean - flat(total.update)
  extras = ("privacy.quantile", "privacy.noise_weights")
  rest = 1 - sum(n in fields for n in extras) * fields.get(
    "privacy.extras_fraction", 0.01
  )
  laplace = fields["privacy.mechanism"] == "laplace"
  return noise * (rest if laplace else rest**0.5) / (multiplier * scale)


# --- the test -----------------------------------------------------------------


def accepted(rng, correlated, only=None):
  """The next random config that is accepted."""
  error: ValueError | None = None
  for _ in range(100):  # a third is, or more
    fields = drawn(rng, correlated=correlated, only=only)
    texts = {name: str(value) for name, value in fields.items()}
    try:
      return fields, build(flags.load(FILE, texts))
    except ValueError as refused:
      error = refused
  raise AssertionError("no config is accepted") from error


@pytest.mark.parametrize(
  ("block", "count", "measures", "only"),
  [(0, 4, 1, None), (0, 2, 1, "discrete_gaussian")]
  + [pytest.param(i, 50, 50, None, marks=SLOW) for i in range(1, 41)],
)
@pytest.mark.timeout(1800)
def test_no_config_prints_less_than_it_betrays(block, count, measures, only):
  rng = np.random.default_rng([11, block])
  noises = []
  for i in range(count):
    fields, experiment = accepted(rng, block > 0, only)
    everybody = fields["server.clients_per_round"] == CLIENTS
    assert "too_often" not in fields["sampler.name"]
    assert everybody or "not_by_itself" not in fields["sampler.name"]
    made = experiment.simulator
    ledger, release = made.account.ledger, made.algorithm.privacy
    assert ledger is not None
    there, other = 1.0, 2.0
    scale = made.hparams["algorithm"]["privacy"]["noise_scale"]
    if i < measures:
      measured = Measured(made, fields)
      there, other = sensitivity(measured, fields, rng)
      assert there <= 1, fields
      assert other <= 2, fields
      if "privacy.noise_weights" not in fields:
        noise = noise_of(measured, fields, release.multiplier, scale)
        noises.append(noise / (2**0.5 if release.noise == "laplace" else 1))
        assert noises[-1].std() > 0.6, fields
    rounds = made.account.rounds_within_budget(fields["server.rounds"])
    coefficients = None
    if release.sensitivity is not None:
      coefficients = release.sensitivity.__self__.coefficients
    turns, rate, moved = chances(
      fields | {"server.rounds": rounds}, coefficients
    )
    # Where weights are small nobody can move the sum as far as is counted.
    longest = {1: there, 2: other / 2}[1 if moved < 2 else 2]
    sharp = longest > 0.99
    told = ledger.told(rounds)
    noise_ = release.multiplier / moved
    delta = fields["privacy.delta"]
    bound = betrayed(release.noise, noise_ / longest, turns, rate, delta)
    assert bound <= told, (fields, bound, told)
    row = made.account.epsilon_row(rounds)
    assert list(row.values()) == [told]
    if "privacy.target_epsilon" in fields:
      assert told <= fields["privacy.target_epsilon"] * 1.001
    tight = fields.get("privacy.accountant", "pld") == "pld" and rate == 1
    tight |= fields.get("privacy.accountant", "pld") == "pld" and moved == 1
    if tight and sharp and coefficients is None:
      assert told <= bound * 1.02 + 0.02, (fields, bound, told)
  if len(noises) > 20:  # the noise has its size, over all configs
    parts = np.concatenate(noises)
    assert abs(parts.std() - 1) < 0.15
