"""Whatever changes a private algorithm afterwards is refused, in words."""

import dataclasses
from typing import Any

import jax
import pytest

from fedjax_sim import sampling, tasks
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.core import Algorithm, PrivacySpec, Requirements, Survey
from fedjax_sim.privacy.central import CentralDPConfig, with_central_dp
from fedjax_sim.privacy.central.guard import Budget
from fedjax_sim.privacy.leakage import leakage
from fedjax_sim.privacy.leakage.limits import limited
from fedjax_sim.simulation.simulator import Simulator
from fedjax_sim.training.replay import replay
from fedjax_sim.training.stale import stale
from problems import quadratic, quadratic_data, sgd

TASK = quadratic(2)
PLAIN = fedavg(TASK, sgd(1.0), sgd(1.0))
SETTINGS = CentralDPConfig(clip_norm=1.0, noise_multiplier=1.0, denominator=2.0)
PRIVATE = with_central_dp(PLAIN, SETTINGS)


def simulator(algorithm):
  return Simulator(
    task=TASK,
    algorithm=algorithm,
    data=quadratic_data([[1.0, 0], [0, 1], [1, 1], [2, 1]]),
    sampler=sampling.poisson(4, 2),
    budget=Budget(delta=1e-3),
  )


def scaled(client, report):
  """A client's report, ten times as large as what was clipped."""
  report = PRIVATE.postprocess_report(client, report)
  larger = jax.tree.map(lambda x: 10 * x, report.update)
  return report._replace(update=larger)


NEEDS = [f"requirements.{name}" for name in Requirements._fields]


@pytest.mark.parametrize("field", [*Algorithm._fields, *NEEDS])
def test_every_field_that_is_replaced_is_seen(field):
  field, _, need = field.partition(".")
  before = getattr(PRIVATE, field)
  if field == "hparams":  # numbers may change, but for the noise
    less = {**before, "privacy": {**before["privacy"], "clip_norm": 0.5}}
    assert simulator(PRIVATE._replace(hparams=less)).account.ledger is not None
    return
  other: Any
  if isinstance(before, bool):
    other = not before
  elif field == "requirements":
    flag = getattr(before, need, None)
    other = before._replace(**{need: not flag} if need else {})
  elif field == "privacy":
    other = before._replace(noise="laplace")
  elif field == "passes":
    other = tuple(p._replace(split="train") for p in before)
  elif field == "survey":
    other = Survey(PRIVATE.passes, PRIVATE.finish, lambda first, mean: first)
  elif before is None:
    other = lambda *rest: None
  else:
    other = lambda *rest: before(*rest)
  changed = PRIVATE._replace(**{field: other})
  first = {  # refused before anybody asks for privacy
    "all_updates": "joins the clients' updates",
    "pools_data": "draws up to 4 clients a round; there are 1",
    "server_data": "asks for examples of the server's own",
  }
  words = first.get(need, rf"Algorithm\.{field}.*central made")
  with pytest.raises(ValueError, match=words):
    simulator(changed)


def test_what_is_sent_larger_than_it_was_clipped():
  with pytest.raises(
    ValueError, match=r"Algorithm\.postprocess_report: .* change the alg"
  ):
    simulator(PRIVATE._replace(postprocess_report=scaled))
  assert simulator(PRIVATE).account.ledger is not None


@pytest.mark.parametrize(
  ("wrap", "words"),
  [
    (lambda a: limited(a, {}), r"central\(limited\(algorithm, \.\.\.\)"),
    (
      lambda a: replay(a, TASK, sgd(1.0), steps=1, batch_size=1),
      r"central\(replay\(algorithm, \.\.\.\)",
    ),
    (
      lambda a: leakage(a, TASK),
      r"central\(leakage\(\.\.\.\), \.\.\.\)",
    ),
    (lambda a: stale(a, 0.5), r"server.stale_probability=0.5: a late report"),
    (lambda a: with_central_dp(a, SETTINGS), r"private already; wrap it once"),
  ],
)
def test_wrappers_say_how_to_put_it_right(wrap, words):
  with pytest.raises(ValueError, match=words):
    wrap(PRIVATE)


def test_a_release_that_nobody_has_proven():
  told = PLAIN._replace(
    privacy=PrivacySpec("gaussian", 100.0),
    requirements=Requirements(weighted_mean=True),
  )
  with pytest.raises(ValueError, match=r"let privacy.central make"):
    simulator(told)


def test_without_an_epsilon_it_may_be_looked_into():
  changed = PRIVATE._replace(state_metrics=lambda state, hparams: {})
  made = dataclasses.replace(simulator(PRIVATE), algorithm=changed, budget=None)
  assert made.account.ledger is None


def test_another_task_is_no_other_algorithm():
  """What a wrapper of tasks does is inside, before anything is clipped."""
  task = tasks.with_remat(TASK)
  assert simulator(with_central_dp(fedavg(task, sgd(1.0), sgd(1.0)), SETTINGS))
