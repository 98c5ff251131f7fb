"""Local differential privacy: a client randomizes what it sends.

Nobody has to be trusted, neither the server nor whoever listens: whatever two
clients hold, what they send looks much the same. A `Randomizer` acts on a
client's update and weight after the transforms. What is guaranteed is for one
report; a client that sends several composes them (`composed`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from fedjax_sim.core import (
  Algorithm,
  Array,
  Client,
  HParams,
  Key,
  PyTree,
  Report,
  validate,
)
from fedjax_sim.core.types import EMPTY
from fedjax_sim.engine.traffic import report_shapes
from fedjax_sim.privacy import draws, library
from fedjax_sim.privacy.accounting import rounded_up
from fedjax_sim.training.wrappers import wrap_algorithm


class Randomizer(NamedTuple):
  """What a client does to its update and weight, and what that guarantees.

  Any two reports are neighbors: whatever a client holds is covered.

  Attributes:
    name: of the mechanism.
    hparams: its default numeric hyper-parameters. The guarantee is that of
      these; it stays if only bounds, such as `clip_norm`, change.
    apply: (update, weight, hparams, key) -> (update, weight) as they are sent.
    multiplier: of Gaussian noise, its standard deviation over the longest
      distance of two reports; None: it is another mechanism.
    epsilon: of another mechanism, which keeps it with delta 0 but for the ends
      of its noise; None: there is no guarantee.
    delta: of one report. A thousandth of that of Gaussian noise, and all that
      another mechanism has, is for the ends of the noise.
    exposure: numbers of a report -> a bound of how often it is one that no
      neighbor could have sent (`draws`); None: the noise has no ends.
    weighs: whether a client's weight counts; otherwise all weigh 1.
  """

  name: str
  hparams: HParams
  apply: Callable[[PyTree, Array, HParams, Key], tuple[PyTree, Array]]
  multiplier: float | None = None
  epsilon: float | None = None
  delta: float = 0.0
  exposure: Callable[[int], float] | None = None
  weighs: bool = False


def with_local_dp(algorithm: Algorithm, randomizer: Randomizer) -> Algorithm:
  """Return the algorithm with clients that randomize what they send.

  The randomizer has the last word, after the transforms. `Report.values`, which
  no randomizer sees, are not sent. `Report.metrics`, such as training losses,
  are: they are what a simulation shows and no guarantee covers them, as little
  as the transforms' `aux` and the log of clients.

  Args:
    algorithm: one whose clients send an update and a weight.
    randomizer: what they do to them.

  Raises:
    ValueError: an algorithm that wants a stack or values of clients, has no
      clients, or weighs clients in a way that the randomizer drops. Its `init`
      raises it, too, if clients send buffers or statistics.
  """
  owner = f"local_privacy.mechanism={randomizer.name!r}"
  softmax = algorithm.log_weight is not None
  unset = "set it to None, or take another"
  if algorithm.requirements.all_updates:
    raise ValueError(
      f"{owner} makes updates that are of use in a sum alone, and"
      f" algorithm.name wants every update by itself; {unset} algorithm."
    )
  if algorithm.requirements.client_values:
    raise ValueError(
      f"{owner} covers a client's update and weight, and algorithm.name wants"
      f" other numbers of every client, such as its loss; {unset} algorithm."
    )
  if algorithm.privacy is not None:
    raise ValueError(
      f"{owner} acts on what the server's noise is fitted to, and its epsilon"
      " would no longer hold; take local_privacy, or privacy.central, alone."
    )
  if algorithm.requirements.groups > 1:
    raise ValueError(
      f"{owner} covers a client's update, and algorithm.name makes it say, too,"
      f" which group of clients it belongs to; {unset} algorithm."
    )
  if algorithm.requirements.pools_data:
    raise ValueError(
      f"{owner}: algorithm.name trains on everybody's data at once, and no"
      f" client sends anything; {unset} algorithm."
    )
  if softmax and not randomizer.weighs:
    raise ValueError(
      f"{owner} makes every client weigh 1, and algorithm.name weighs them by"
      " their data; with 'gaussian' or 'laplace' set"
      " local_privacy.max_weight, or let all weigh the same by"
      " algorithm.weighting='uniform'."
    )
  if algorithm.survey is not None:
    raise ValueError(
      f"{owner} covers a client's update and weight, and algorithm.name makes"
      f" it answer a survey, too; {unset} algorithm."
    )
  fixed = "set algorithm.reference, such as 0.0, to send none"

  def check(server: PyTree, hparams: HParams) -> None:
    report = report_shapes(algorithm, server, hparams)
    for part, source, remedy in (
      (
        "buffers",
        "model.name",
        "set model.send_buffers=False, which keeps batch statistics as they"
        " begin, or take a model without, and model.mixture=None",
      ),
      (
        "statistics",
        "algorithm.name",
        fixed if softmax else f"{unset} algorithm",
      ),
    ):
      if jax.tree.leaves(getattr(report, part)):
        raise ValueError(
          f"{owner} covers a client's update and weight, and {source} makes it"
          f" send {part}, too; {remedy}."
        )
    _check_ends(randomizer, report.update)

  def postprocess_report(
    client: Client, report: Report, inner: Callable[[Report], Report]
  ) -> Report:
    report = inner(report)
    hparams = client.hparams["local_privacy"]
    update, weight = randomizer.apply(
      report.update, report.weight, hparams, client.noise_key
    )
    return report._replace(update=update, weight=weight, values=EMPTY)

  wrapped = wrap_algorithm(
    algorithm,
    check=check,
    postprocess_report=postprocess_report,
    hparams={"local_privacy": randomizer.hparams},
  )
  clips = randomizer.multiplier is None and randomizer.epsilon is None
  return wrapped._replace(
    draws_noise=True, sends_whole=algorithm.sends_whole or not clips
  )


def _check_ends(randomizer: Randomizer, update: PyTree) -> None:
  """Refuse a delta that is too small for the ends of the noise."""
  if randomizer.exposure is None:
    return
  numbers = sum(math.prod(x.shape) for x in jax.tree.leaves(update))
  needed = _exposure(randomizer, numbers)
  if randomizer.multiplier is not None:
    needed /= 1 - draws.KEPT
  if needed > randomizer.delta:
    raise ValueError(
      f"local_privacy.delta={randomizer.delta:g}: noise on {numbers} numbers"
      " that is made of finitely many bits betrays by its end more often than"
      f" that; give at least {needed:.2g}, or more noise."
    )


def _exposure(randomizer: Randomizer, numbers: int) -> float:
  """Return how often a report may be one that no neighbor could have sent."""
  return (
    0.0 if randomizer.exposure is None else randomizer.exposure(numbers + 1)
  )


def guarantee(randomizer: Randomizer) -> tuple[float, float]:
  """Return (epsilon, delta) of one report; without any, epsilon is infinite."""
  return composed(randomizer, 1), randomizer.delta


def composed(
  randomizer: Randomizer,
  reports: int,
  delta: float | None = None,
  numbers: int = 1,
) -> float:
  """Return the epsilon of several reports of a client, chosen adaptively.

  Sampling gains nothing: whoever sees reports knows who sent them.

  Gaussian noise composes exactly (Balle and Wang 2018, arXiv 1805.06530, with a
  multiplier smaller by sqrt(reports)). Other mechanisms compose as randomized
  response does, which is the worst one of the same epsilon (Kairouz, Oh and
  Viswanath 2015, arXiv 1311.0776); at delta 0 epsilons add up.

  Args:
    randomizer: the mechanism.
    reports: how many reports, at least 1.
    delta: at which delta; None: `default_delta`.
    numbers: how many an update has; the more of them, and of reports, the
      larger the share of delta that the ends of the noise take.

  Returns:
    Epsilon; infinite without a guarantee, and at a delta that is too small for
    the ends of the noise.

  Raises:
    TypeError, ValueError: a number is out of range.
    ImportError: the extra `privacy`, which Gaussian noise needs, is missing.
  """
  validate.integer("reports", reports)
  if delta is None:
    delta = default_delta(randomizer, reports)
  delta = validate.number("delta", delta, ge=0, lt=1)
  if randomizer.multiplier is not None:
    gaussian = library("dp_accounting").get_epsilon_gaussian
    multiplier = randomizer.multiplier / math.sqrt(reports)
    if reports * _exposure(randomizer, numbers) > (1 - draws.KEPT) * delta:
      return math.inf
    return float(gaussian(multiplier, draws.KEPT * delta))
  if randomizer.epsilon is None:
    return math.inf
  left = delta - reports * randomizer.delta
  if left < 0:
    return math.inf
  return _responses(randomizer.epsilon, reports, left)


def default_delta(randomizer: Randomizer, reports: int) -> float:
  """Return the delta of so many reports, if no other is given.

  With Gaussian noise it is that of one report. Another mechanism has a delta
  for the ends of its noise alone, and reports add it up.
  """
  if randomizer.multiplier is not None:
    return randomizer.delta
  return reports * randomizer.delta


def _responses(epsilon: float, reports: int, delta: float) -> float:
  """Return the epsilon of so many randomized responses, exactly."""
  total = reports * epsilon
  if delta == 0:
    return total
  lies = np.arange(reports + 1)
  lying = 1 / (1 + math.exp(min(epsilon, 700.0)))
  chance = library("scipy.stats").binom.pmf(lies, reports, lying)
  loss = (reports - 2 * lies) * epsilon

  def excess(x: float) -> float:
    beyond = -np.expm1(np.minimum(x - loss, 0))
    return float(np.sum(chance * beyond)) - delta

  if excess(0.0) <= 0:
    return 0.0
  return float(library("scipy.optimize").brentq(excess, 0.0, total))


def sentence(
  randomizer: Randomizer,
  reports: int,
  delta: float | None = None,
  numbers: int = 1,
) -> str:
  """Return what is guaranteed, in words, without a full stop.

  Args:
    randomizer: the mechanism.
    reports: how many the client with the most of them sends.
    delta: as for `composed`.
    numbers: as for `composed`.
  """
  one, own = guarantee(randomizer)
  if math.isinf(one):
    return f"none, {randomizer.name} alone guarantees nothing"
  delta = default_delta(randomizer, reports) if delta is None else delta
  many = composed(randomizer, reports, delta, numbers)
  return (
    f"epsilon {rounded_up(one):g} at delta {own:.15g} for a report, epsilon"
    f" {rounded_up(many):g} at delta {delta:.15g} for the {reports} of a client"
  )
