"""MimeLite against algorithm 1 of its paper, in numpy."""

import numpy as np

from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.algorithms.mime_lite import mime_lite
from fedjax_sim.training.optimizers import optimizer
from logistic import (
  DIM,
  SIZES,
  TASK,
  all_rows,
  batches,
  cohort,
  gradient,
  model,
)
from problems import sgd


def by_hand(step, renew, s, eta, rounds, weights=None):
  """x; `step` and `renew` are the paper's U and V."""
  x = np.zeros(DIM)
  for r in range(rounds):
    ys, gradients = [], []
    for i in cohort(r):
      y = x.copy()
      for rows in batches(i):
        y = y - eta * step(gradient(y, rows), s, r)
      ys.append(y)
      gradients.append(gradient(x, all_rows(i)))
    w = None if weights is None else weights[cohort(r)]
    s = renew(np.average(gradients, axis=0, weights=w), s)
    x = np.average(ys, axis=0, weights=w)
  return x


def test_momentum():
  beta, eta = 0.8, 0.5
  momentum = lambda g, m, *_: (1 - beta) * g + beta * m
  x = by_hand(momentum, momentum, np.zeros(DIM), eta, 5)
  base = optimizer("sgd", learning_rate=(1 - beta) * eta, momentum=beta)
  found = model(mime_lite(TASK, base, sgd(1.0)), 5)
  np.testing.assert_allclose(found, x, atol=2e-6)


def test_adam():
  b1, b2, eps, eta = 0.7, 0.9, 1e-3, 0.05

  def renew(g, s):
    return (1 - b1) * g + b1 * s[0], (1 - b2) * g**2 + b2 * s[1]

  def step(g, s, rounds):  # with the corrections of the usual Adam
    m, v = renew(g, s)
    m, v = m / (1 - b1 ** (rounds + 1)), v / (1 - b2 ** (rounds + 1))
    return m / (np.sqrt(v) + eps)

  x = by_hand(step, renew, (np.zeros(DIM), np.zeros(DIM)), eta, 4, SIZES)
  base = optimizer("adam", learning_rate=eta, b1=b1, b2=b2, eps=eps)
  algorithm = mime_lite(TASK, base, sgd(1.0), weighting="examples")
  np.testing.assert_allclose(model(algorithm, 4), x, atol=1e-5)


def test_without_a_state_it_is_fedavg():
  plain = fedavg(TASK, sgd(0.3), sgd(0.7), weighting="uniform")
  ours = mime_lite(TASK, sgd(0.3), sgd(0.7))
  np.testing.assert_allclose(model(ours, 4), model(plain, 4), rtol=1e-5)
