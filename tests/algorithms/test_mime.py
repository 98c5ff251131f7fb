"""Mime against algorithm 1 of its paper, in numpy; and what a survey is."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim.algorithms.mime import mime
from fedjax_sim.algorithms.mime_lite import mime_lite
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.engine.traffic import traffic
from fedjax_sim.privacy.central import CentralDPConfig, with_central_dp
from fedjax_sim.privacy.leakage.wrapper import leakage
from fedjax_sim.privacy.local import additive, with_local_dp
from fedjax_sim.training.optimizers import optimizer
from fedjax_sim.training.wrappers import wrap_algorithm
from logistic import (
  DIM,
  SIZES,
  TASK,
  all_rows,
  batches,
  cohort,
  gradient,
  model,
  simulate,
)
from problems import sgd, train

BETA, ETA = 0.8, 0.5
BASE = optimizer("sgd", learning_rate=(1 - BETA) * ETA, momentum=BETA)


def by_hand(rounds, weights=None):
  """x, with momentum as the base optimizer."""
  x, m = np.zeros(DIM), np.zeros(DIM)
  step = lambda g, m: (1 - BETA) * g + BETA * m
  for r in range(rounds):
    w = None if weights is None else weights[cohort(r)]
    full = [gradient(x, all_rows(i)) for i in cohort(r)]
    c = np.average(full, axis=0, weights=w)
    ys = []
    for i in cohort(r):
      y = x.copy()
      for rows in batches(i):
        y = y - ETA * step(gradient(y, rows) - gradient(x, rows) + c, m)
      ys.append(y)
    x, m = np.average(ys, axis=0, weights=w), step(c, m)
  return x


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_it_is_the_papers_recursion(weighting):
  algorithm = mime(TASK, BASE, sgd(1.0), weighting=weighting)
  weights = SIZES if weighting == "examples" else None
  found = model(algorithm, 4)
  np.testing.assert_allclose(found, by_hand(4, weights), atol=2e-6)


def test_it_is_mime_lite_where_batches_are_whole():
  """And where all have one step: then both take the step c of the server."""
  one = LocalBatching(batch_size=int(SIZES.max()), epochs=1, shuffle=False)
  ours = model(mime(TASK, BASE, sgd(1.0)), 4, batching=one)
  lite = model(mime_lite(TASK, BASE, sgd(1.0)), 4, batching=one)
  np.testing.assert_allclose(ours, lite, rtol=1e-5, atol=1e-6)


def test_a_survey_has_the_same_bits_on_virtual_devices():
  def params(devices):
    algorithm = mime(TASK, BASE, sgd(1.0))
    simulator, _ = simulate(algorithm, 0, devices=devices, lanes=1)
    runtime = dataclasses.replace(simulator.runtime, deterministic_reduction=4)
    simulator = dataclasses.replace(simulator, runtime=runtime)
    return jax.device_get(train(simulator, 2))

  jax.tree.map(np.testing.assert_array_equal, params(1), params(2))


def test_both_exchanges_count_as_traffic():
  simulator, state = simulate(mime(TASK, BASE, sgd(1.0)), 1)
  hparams = simulator.states.traced()["algorithm"]
  model_bytes = 4 * DIM
  sent = traffic(simulator.algorithm, state, hparams)
  assert sent.down == 3 * model_bytes  # x, m and c
  # The answer and its weight; the update and its weight.
  assert sent.up == model_bytes + 4 + model_bytes + 4


def test_a_client_without_a_finite_answer_is_left_out():
  """Of the survey, though its training is finite."""
  algorithm = mime(TASK, BASE, sgd(1.0))
  survey = algorithm.survey
  assert survey is not None

  def finish(client, carry):
    report = survey.finish(client, carry)
    broken = jax.tree.map(
      lambda g: jnp.where(client.id == 2, np.nan, g), report.statistics
    )
    return report._replace(statistics=broken)

  algorithm = algorithm._replace(survey=survey._replace(finish=finish))
  found = model(algorithm, 1)
  rest = [i for i in cohort(0) if i != 2]
  c = np.mean([gradient(np.zeros(DIM), all_rows(i)) for i in rest], axis=0)
  ys = []
  for i in cohort(0):
    y = np.zeros(DIM)
    for rows in batches(i):
      corrected = gradient(y, rows) - gradient(np.zeros(DIM), rows) + c
      y = y - (1 - BETA) * ETA * corrected
    ys.append(y)
  np.testing.assert_allclose(found, np.mean(ys, axis=0), atol=2e-6)


def test_privacy_refuses_a_survey():
  algorithm = mime(TASK, sgd(0.1), sgd(1.0))
  settings = CentralDPConfig(
    clip_norm=1.0, noise_multiplier=1.0, denominator=3.0
  )
  with pytest.raises(ValueError, match="answer a survey first"):
    with_central_dp(algorithm, settings)
  with pytest.raises(ValueError, match="answer a survey, too"):
    with_local_dp(algorithm, additive.laplace(1.0, epsilon=1.0))
  with pytest.raises(ValueError, match="answer a survey, too"):
    leakage(algorithm, TASK)


class Wrapped(NamedTuple):
  inner: Any
  one: Any


def test_a_wrapper_with_a_message_leaves_the_survey_as_it_is():
  algorithm = mime(TASK, BASE, sgd(1.0))
  wrapped = wrap_algorithm(
    algorithm,
    message=lambda state, inner: Wrapped(inner, jnp.ones(())),
  )
  np.testing.assert_array_equal(model(wrapped, 2), model(algorithm, 2))
