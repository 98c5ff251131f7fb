"""What a private run must not do.

An epsilon holds for what is released: the noisy sums and all that is computed
from them. Whatever else a run learns of its training clients is refused, where
the model would depend on it; what it shows of them is listed (`uncovered.py`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp

from fedjax_sim.core import (
  HParams,
  Participation,
  PrivacySpec,
  PyTree,
  Sampler,
  Transform,
  validate,
)
from fedjax_sim.privacy import accounting, draws
from fedjax_sim.privacy.accounting import accountants

MOST_EPSILON = 1000.0  # more is no privacy
OF_CLIENTS = ("seen/", "finetuned/")  # metrics that training clients have
FIXED = ("noise_multiplier", "noise_scale")  # what the ledger counts on


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
  """What a private run is held to.

  Attributes:
    delta: of the (epsilon, delta); below 1 over the number of clients.
    epsilon: the run ends before it exceeds this; None: it is only shown.
    accountant: one of `accounting.ACCOUNTANTS`; None: the usual one.
    rounds: the run's last, for which delta has to suffice; None: not known.

  Raises:
    TypeError, ValueError: names the field.
  """

  delta: float
  epsilon: float | None = None
  accountant: str | None = None
  rounds: int | None = None

  def __post_init__(self) -> None:
    validate.number("privacy.delta", self.delta, gt=0)
    if self.rounds is not None:
      validate.integer("server.rounds", self.rounds)
    if self.accountant is not None:
      validate.one_of(
        "privacy.accountant", self.accountant, accountants.ACCOUNTANTS
      )
    if self.epsilon is not None:
      validate.number(
        "privacy.target_epsilon", self.epsilon, gt=0, le=MOST_EPSILON
      )


def counted(rounds: int) -> int:
  """Return the round whose epsilon a round's row gets: this or a later one.

  Counting takes milliseconds, so beyond 64 rounds only multiples of 2, 5, 10,
  20, 50, ... are counted: fewer than 120 in every tenfold, and round ends, such
  as 500, among them. It depends on nothing but the round: a run that is given
  more rounds later on has the rows of one that had them from the start.

  Args:
    rounds: 1 or more.

  Returns:
    A round less than a 32nd later; for `rounds` + 1 no earlier one.
  """
  most = max(rounds // 32, 1)
  unit = 10 ** (len(str(most)) - 1)
  step = unit * max(n for n in (1, 2, 5) if n * unit <= most)
  return -(-rounds // step) * step


def ledger(
  release: PrivacySpec, sampler: Sampler, budget: Budget, num_clients: int
) -> accounting.Ledger:
  """Return the ledger that counts the run's epsilon.

  Args:
    release: of the algorithm.
    sampler: who takes part.
    budget: delta and the accountant.
    num_clients: how many may take part.

  Raises:
    ValueError: no epsilon would hold: the sampler promises nothing, delta is
      too large, or the accountant cannot count such a release.
  """
  participation = sampler.participation
  if participation is None:
    raise ValueError(
      "sampler.name promises nothing of how often a client takes part, so"
      " no epsilon holds; take 'poisson' or 'uniform' with"
      " sampler.min_clients=None, or give Sampler.participation."
    )
  rate = "sampler.name: Sampler.participation.rate"
  validate.number(rate, participation.rate, gt=0, le=1)
  if release.simulated is not None:
    participation = simulated_participation(participation, release.simulated)
    num_clients = int(release.simulated[1])
  num_clients = max(num_clients, participation.population or 0)
  try:
    accounting.check_delta(budget.delta, num_clients)
    made = accounting.Ledger(
      release,
      participation,
      budget.delta,
      budget.accountant or accounting.usual_accountant(release.noise),
    )
    last = budget.rounds or 1
    last = min(last, release.rounds or last)
    made.epsilon(last)  # what it cannot count
    made.check_draws(last, budget.epsilon)
    return made
  except ValueError as error:  # it begins with the field
    of = ""
    if release.simulated is not None:
      of = f"privacy.population={num_clients}: "
    raise ValueError(f"{of}privacy.{error}") from error


def check_ends(
  ledger: accounting.Ledger, rounds: int, coordinates: int
) -> None:
  """Refuse a delta that is too small for the ends of the noise.

  Args:
    ledger: of the run.
    rounds: that it may have.
    coordinates: numbers that a round releases.

  Raises:
    ValueError: names delta, and what would do.
  """
  needed = ledger.exposure(rounds, coordinates) / (1 - draws.KEPT)
  if needed > ledger.delta:
    larger = f"give at least {needed:.2g}, or " if needed < 1 else "give "
    raise ValueError(
      f"privacy.delta={ledger.delta:g}: noise of finitely many bits on"
      f" {coordinates:,} numbers in {rounds:,} rounds betrays by its end more"
      f" often than a thousandth of that; {larger}a larger"
      f" privacy.noise_multiplier than {ledger.release.multiplier:g}."
    )


def simulated_participation(
  participation: Participation, simulated: tuple[float, float] | None
) -> Participation:
  """Return what a sampler of this kind would promise of a larger cohort.

  Args:
    participation: of the cohort that is run.
    simulated: (cohort, population); None: there is none.

  Raises:
    ValueError: nothing follows for a larger cohort.
  """
  if simulated is None:
    return participation
  cohort, population = simulated
  _, period, independent, _ = participation
  if participation.rate == 1 and period > 1:  # everybody in turn
    return Participation(1.0, int(population // cohort))
  if participation.rate == 1 and not independent and cohort < population:
    raise ValueError(
      f"privacy.noise_cohort_size={cohort:g} of"
      f" privacy.population={population:g}, where everybody takes part in every"
      " round: that does not say how so many would be drawn, or take turns;"
      " lower server.clients_per_round, or take sampler.name='poisson'."
    )
  if period * cohort > population * (1 + 1e-9):
    raise ValueError(
      f"privacy.noise_cohort_size={cohort:g} exceeds the"
      f" {population / period:g} of privacy.population={population:g} clients"
      f" whose turn it is; give at most those."
    )
  rate = min(1.0, period * cohort / population)
  return Participation(rate, period, independent)


def check(
  transforms: Sequence[Transform],
  params: PyTree,
  scheduled: Iterable[str],
  release: PrivacySpec,
  revert_to_best: bool,
) -> None:
  """Refuse what would let more than the noisy sums into the model.

  Args:
    transforms: what happens to an update before it is clipped.
    params: the model's, or their shapes.
    scheduled: hyper-parameters that schedules change.
    release: of the algorithm.
    revert_to_best: whether a run goes back to its best state.

  Raises:
    ValueError: names the field.
  """
  for name in scheduled:
    section, _, field = name.partition(".")
    if section == "privacy" and field in FIXED:
      raise ValueError(
        f"A schedule of {name} would change the noise that the accountant"
        " counts on; leave it out. privacy.clip_norm may have one."
      )
  if revert_to_best and (release.sensitivity or release.audited) is not None:
    raise ValueError(
      "server.revert_to_best=True goes back to an older state, and with it to"
      " what correlated noise, or an audit, remembers of the rounds; set it to"
      " False, or take privacy.mechanism='gaussian' without privacy.canaries."
    )
  check_transforms(transforms, params)


def check_transforms(transforms: Sequence[Transform], params: PyTree) -> None:
  """Refuse transforms that learn from what no noise covers.

  Args:
    transforms: of a run in which clients' updates, or their sum, get noise.
    params: the model's, or their shapes.

  Raises:
    ValueError: a transform's shared state depends on the clients' aux.
  """
  for transform in transforms:
    if _learns(transform, params):
      raise ValueError(
        f"transforms.{transform.name} learns from what clients send beside"
        " their updates, without noise; leave it out. Clipping that adapts is"
        " privacy.quantile."
      )


def _learns(transform: Transform, params: PyTree) -> bool:
  """Return whether its shared state depends on clients' aux; nothing is run.

  Args:
    transform: of the run.
    params: the model's, or their shapes.
  """
  number = jax.ShapeDtypeStruct((), jnp.float32)
  numbers = jax.tree.map(lambda _: number, dict(transform.hparams))
  shared = jax.eval_shape(transform.init, params, numbers)
  own = jax.eval_shape(transform.client_init, params, numbers)
  key = jax.eval_shape(lambda: jax.random.key(0))
  given = params, shared, own, numbers, key
  aux = jax.eval_shape(transform.apply, *given).aux
  traced = jax.make_jaxpr(transform.update)(shared, aux, numbers).jaxpr
  first, count = len(jax.tree.leaves(shared)), len(jax.tree.leaves(aux))
  tainted = set(map(id, traced.invars[first : first + count]))
  for equation in traced.eqns:
    if any(id(x) in tainted for x in equation.invars):
      tainted.update(map(id, equation.outvars))
  return any(id(x) in tainted for x in traced.outvars)


def check_watched(watched: Mapping[str, str]) -> None:
  """Refuse what would let metrics of training clients into the model.

  Args:
    watched: the field that names a metric -> the metric.

  Raises:
    ValueError: names the field.
  """
  for owner, metric in watched.items():
    if metric.startswith(OF_CLIENTS):
      raise ValueError(
        f"{owner}={metric!r} is measured on clients that train, without noise;"
        " follow a metric of 'test' or 'unseen'."
      )


def check_noise(
  release: PrivacySpec, hparams: HParams, sampler: Sampler
) -> None:
  """Refuse noise other than what the accountant counts on.

  Args:
    release: of the algorithm.
    hparams: of the algorithm.
    sampler: who takes part.

  Raises:
    ValueError: names the number.
  """
  numbers = hparams.get("privacy", {})
  if (drawn := numbers.get("noise_multiplier")) not in (
    None,
    release.multiplier,
  ):
    raise ValueError(
      f"hparams['algorithm']['privacy']['noise_multiplier']={drawn} is not the"
      f" {release.multiplier} that the algorithm tells accountants; wrap it"
      " again, with this one."
    )
  _check_denominator(numbers.get("denominator"), sampler)
  most = release.most_clients
  if most is not None and sampler.sizes[-1] > most:
    raise ValueError(
      f"CentralDPConfig.most_clients={most} is below the {sampler.sizes[-1]}"
      " clients that sampler.name may draw, whose sum could overflow; give as"
      " many."
    )
  scale = float(numbers.get("noise_scale", 1.0))
  if release.simulated is None:
    if scale != 1:
      raise ValueError(
        f"hparams['algorithm']['privacy']['noise_scale']={scale} is of a"
        " simulated cohort, and there is none; leave it at 1."
      )
    return
  cohort, _ = release.simulated
  if numbers.get("denominator") not in (None, sampler.expected):
    raise ValueError(
      f"privacy.denominator={numbers['denominator']} with a simulated cohort"
      f" has to be the expected cohort, {sampler.expected:g}, to which the"
      " noise is scaled."
    )
  if cohort < sampler.expected:
    raise ValueError(
      f"privacy.noise_cohort_size={cohort:g} is below the cohort that is"
      f" trained, {sampler.expected:g}; give the larger one whose noise is to"
      " be simulated."
    )


def _check_denominator(denominator: float | None, sampler: Sampler) -> None:
  """Refuse a denominator that reveals a private number of clients.

  Args:
    denominator: what sums are divided by; None: something else.
    sampler: who takes part.
  """
  part = sampler.participation
  if part is None or part.population is None or denominator is None:
    return
  chosen = part.rate * part.population
  there = sampler.expected
  if math.isclose(denominator, there) and not math.isclose(denominator, chosen):
    raise ValueError(
      f"privacy.denominator={denominator:g} is the mean cohort of the clients"
      f" that there are, whose number sampler.population="
      f"{part.population} keeps private; give one chosen in advance, such as"
      f" {chosen:g}."
    )


def check_numbers(given: HParams, counted: HParams) -> None:
  """Refuse hyper-parameters that change the noise that the ledger counts on.

  Args:
    given: hyper-parameters of a call.
    counted: those of the algorithm.

  Raises:
    ValueError: names the number.
  """
  for name in FIXED:
    one, other = given["privacy"][name], counted["privacy"][name]
    if float(one) != float(other):
      raise ValueError(
        f"hparams['algorithm']['privacy'][{name!r}]={one} is not {other}, which"
        " the accountant counts on; wrap the algorithm again, with this one."
      )
