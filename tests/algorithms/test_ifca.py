"""IFCA against algorithm 1 of its paper, in numpy, and on planted clusters."""

import jax
import numpy as np
import pytest

from fedjax_sim import sampling
from fedjax_sim.algorithms.ifca import ifca
from fedjax_sim.data import FederatedData, FederatedDataset
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.engine.traffic import traffic
from fedjax_sim.privacy.central import CentralDPConfig, with_central_dp
from fedjax_sim.tasks import function_task
from logistic import (
  DATA,
  DIM,
  WORK,
  X,
  Y,
  all_rows,
  batches,
  cohort,
  gradient,
)
from problems import make_simulator, params_of, sgd, train
from tiers import slow_but

ETA, CLUSTERS = 0.3, 3


def _loss(params, examples):
  logit = examples["x"] @ params["w"]
  return jax.nn.softplus(logit) - examples["y"] * logit


TASK = function_task(lambda key: {"w": jax.random.normal(key, (DIM,))}, _loss)


def simulate(algorithm, rounds, data=DATA, draw=cohort, **options):
  sampler = sampling.Sampler(
    sample=lambda seed, r: np.array(draw(r)), sizes=(3,), expected=3.0
  )
  options = {"batching": WORK, "sampler": sampler, "lanes": 2, **options}
  simulator = make_simulator(TASK, algorithm, data, **options)
  return simulator, train(simulator, rounds)


def mean_loss(w, rows):
  logit = X[rows].astype(np.float64) @ w
  return np.mean(np.logaddexp(0, logit) - Y[rows] * logit)


def by_hand(models, rounds, averaging):
  """All models, clients' clusters, and the last cohort's shares."""
  chosen = {}
  for r in range(rounds):
    found: dict[int, list] = {j: [] for j in range(CLUSTERS)}
    for i in cohort(r):
      losses = [mean_loss(w, all_rows(i)) for w in models]
      chosen[i] = j = int(np.argmin(losses))
      w = models[j]
      if averaging == "models":
        for rows in batches(i):
          w = w - ETA * gradient(w, rows)
      else:
        w = gradient(w, all_rows(i))
      found[j].append(w)
    for j, ends in found.items():
      if averaging == "models" and ends:
        models[j] = np.mean(ends, axis=0)
      if averaging == "gradients":
        models[j] = models[j] - ETA * np.sum(ends, axis=0) / len(cohort(r))
    shares = [len(ends) / len(cohort(r)) for ends in found.values()]
  return models, chosen, shares


@pytest.mark.parametrize(
  ("averaging", "devices"),
  slow_but(
    [("models", 2)],
    [("models", 1), ("models", 2), ("gradients", 1)],
  ),
)
def test_it_is_the_papers_recursion(averaging, devices):
  rate = 1.0 if averaging == "models" else ETA
  algorithm = ifca(
    TASK, sgd(ETA), sgd(rate), clusters=CLUSTERS, averaging=averaging
  )
  simulator, state = simulate(algorithm, 4, devices=devices)
  first = simulator.init().server.fedavg.variables.params["w"]
  assert len(np.unique(first, axis=0)) == CLUSTERS
  models, chosen, shares = by_hand(
    list(np.asarray(first, np.float64)), 4, averaging
  )
  assert len(set(chosen.values())) > 1
  found = state.server.fedavg.variables.params["w"]
  np.testing.assert_allclose(found, models, atol=3e-6)
  np.testing.assert_allclose(state.server.shares, shares, atol=1e-6)
  own = jax.device_get(state.clients[0])
  for i, j in chosen.items():
    assert own.cluster[i] == j
    assert own.trained[i]
  told = algorithm.state_metrics(state.server, {})
  assert [f"cluster_{j}/share" for j in range(CLUSTERS)] == list(told)
  # It sends a model and a number for every cluster, and receives all models.
  sent = traffic(algorithm, state, simulator.hparams["algorithm"])
  assert sent.down == 4 * (CLUSTERS * DIM + 1)
  assert (sent.update, sent.up) == (4 * DIM, 4 * (DIM + CLUSTERS + 1))


def test_nobody_takes_a_model_whose_loss_is_no_number():
  algorithm = ifca(TASK, sgd(ETA), sgd(1.0), clusters=CLUSTERS)
  simulator, state = simulate(algorithm, 0)
  server = state.server.fedavg
  models = server.variables
  w = models.params["w"].at[1].set(3e38)
  models = models._replace(params={"w": w})
  server = state.server._replace(fedavg=server._replace(variables=models))
  out = simulator.dispatch(
    state._replace(server=server), simulator.plan(0, 1, state=state)
  )
  assert out.state.server.shares[1] == 0
  assert out.rows[0]["clients_rejected"] == 0


def planted():
  """Six clients; those with odd numbers have the opposite labels."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(6 * 20, DIM)).astype(np.float32)
  flipped = np.repeat(np.arange(6) % 2, 20)
  y = ((x[:, 0] > 0) ^ (flipped == 1)).astype(np.float32)
  part = FederatedData(examples={"x": x, "y": y}, offsets=np.arange(0, 121, 20))
  return FederatedDataset(
    name="planted",
    train=part,
    num_classes=0,
    example_shape=(DIM,),
    seen=part,
  )


def test_it_finds_planted_clusters():
  """Which one model cannot fit, and two fit well."""
  algorithm = ifca(TASK, sgd(1.0), sgd(1.0), clusters=2)
  simulator, state = simulate(
    algorithm,
    8,
    planted(),
    lambda r: [0, 1, 2] if r % 2 else [2, 3, 4],  # never client 5
    batching=LocalBatching(batch_size=20, epochs=4),
  )
  own = jax.device_get(state.clients[0])
  even, odd = own.cluster[[0, 2, 4]], own.cluster[[1, 3]]
  assert len(set(even)) == len(set(odd)) == 1
  assert even[0] != odd[0]
  losses = simulator.evaluate.clients(state, "seen").per_client()["loss"]
  assert losses[:5].max() < 0.4 < np.log(2)
  # Two thirds of the last cohort are even, whose model client 5 gets.
  assert losses[5] > 1
  usual = params_of(simulator, state)["w"]
  models = state.server.fedavg.variables.params["w"]
  np.testing.assert_array_equal(usual, models[even[0]])


@pytest.mark.slow
def test_with_central_privacy_the_shares_get_noise_too():
  algorithm = ifca(TASK, sgd(1.0), sgd(1.0), clusters=2)
  config = CentralDPConfig(
    clip_norm=1.0, noise_multiplier=0.1, denominator=3.0, statistics_norm=1.0
  )
  private, after = simulate(with_central_dp(algorithm, config), 1, planted())
  assert np.isfinite(params_of(private, after)["w"]).all()
  sums = np.sum(after.server.server.shares)
  assert 0 < abs(sums - 1) < 1


@pytest.mark.parametrize(
  ("options", "words"),
  [({"clusters": 1}, "clusters=1"), ({"averaging": "both"}, "'both'")],
)
def test_bad_options_are_named(options, words):
  with pytest.raises(ValueError, match=words):
    ifca(TASK, sgd(1.0), sgd(1.0), **options)
