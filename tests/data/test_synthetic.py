"""synthetic(alpha, beta): shapes, and statistics against closed forms."""

import numpy as np
import pytest

from fedjax_sim.data import load_synthetic

VARIANCES = np.arange(1, 61) ** -1.2


def clients(data):
  return [data.train.client(i) for i in range(data.train.num_clients)]


def test_shapes():
  data = load_synthetic()
  assert data.seen
  assert (data.num_classes, data.example_shape) == (10, (60,))
  stored = data.train.examples
  assert [str(stored[field].dtype) for field in "xy"] == ["float32", "int32"]
  sizes = data.train.sizes + data.seen.sizes
  assert len(sizes) == 30
  assert sizes.min() >= 50
  np.testing.assert_array_equal(data.seen.sizes, np.rint(0.2 * sizes))


def test_sizes_are_50_and_lognormal():
  data = load_synthetic(num_clients=500, iid=True, heldout_fraction=0)
  logs = np.log(data.train.sizes - 50 + 0.5)  # they are rounded down
  for share, normal in [(0.5, 0.0), (0.8413, 1.0), (0.9772, 2.0)]:
    assert np.quantile(logs, share) == pytest.approx(4 + 2 * normal, abs=0.5)


def test_inputs_of_a_client_have_the_covariance():
  data = load_synthetic(num_clients=300, alpha=0.0, beta=0.0)
  largest = clients(data)[int(np.argmax(data.train.sizes))]["x"]
  assert len(largest) > 5000
  covariance = np.cov(largest.T)
  np.testing.assert_allclose(np.diag(covariance), VARIANCES, rtol=0.1)
  scale = np.sqrt(np.outer(VARIANCES, VARIANCES))
  off = (covariance / scale)[~np.eye(60, dtype=bool)]
  assert np.abs(off).max() < 5.5 / np.sqrt(len(largest))


@pytest.mark.parametrize(
  ("beta", "spread"), [(0.0, 0.0), (0.5, 0.5), (3.0, 3.0)]
)
def test_beta_is_the_spread_of_the_centres(beta, spread):
  data = load_synthetic(num_clients=300, alpha=0.0, beta=beta)
  centres = np.stack([client["x"].mean(axis=0) for client in clients(data)])
  # v_kj = B_k + N(0, 1), seen with noise of variance_j / size.
  noise = VARIANCES[:, np.newaxis] / data.train.sizes
  within = centres.var(axis=1, ddof=1).mean() - noise.mean()
  assert within == pytest.approx(1, abs=0.05)
  between = centres.mean(axis=1).var(ddof=1) - 1 / 60 - noise.mean() / 60
  assert between == pytest.approx(spread**2, rel=0.35, abs=0.01)


def test_alpha_alone_changes_no_label():
  """It shifts all logits of x alike, by u_k (sum(x) + 1); rounding aside."""
  one, two = (load_synthetic(alpha=a, beta=0.0) for a in (0.0, 1.0))
  x, y = one.train.examples["x"], one.train.examples["y"]
  np.testing.assert_array_equal(x, two.train.examples["x"])
  assert (y == two.train.examples["y"]).mean() > 0.999


def accuracy_on_other_clients(data):
  """Of least squares, with a bias, fitted to every second client."""
  x, y = data.train.examples["x"], data.train.examples["y"]
  inputs = np.column_stack([x, np.ones(len(x))])
  owner = np.repeat(np.arange(data.train.num_clients), data.train.sizes)
  mine = owner % 2 == 0
  weights, *_ = np.linalg.lstsq(inputs[mine], np.eye(10)[y[mine]], rcond=None)
  return ((inputs[~mine] @ weights).argmax(axis=1) == y[~mine]).mean()


def test_iid_clients_share_a_model_and_others_do_not():
  shared = load_synthetic(iid=True)
  assert accuracy_on_other_clients(shared) > 0.6
  assert accuracy_on_other_clients(load_synthetic(num_clients=100)) < 0.25
  x = shared.train.examples["x"]
  scores = x.mean(axis=0) / np.sqrt(VARIANCES / len(x))
  assert np.abs(scores).max() < 4.5


def test_a_seed_is_a_data_set():
  one, same, other = (load_synthetic(seed=s) for s in (0, 0, 1))
  np.testing.assert_array_equal(
    one.train.examples["x"], same.train.examples["x"]
  )
  assert one.train.num_examples != other.train.num_examples


@pytest.mark.parametrize(
  ("options", "error", "match"),
  [
    ({"alpha": -1.0}, ValueError, "data.alpha=-1.0 is out of range"),
    ({"beta": float("nan")}, ValueError, "data.beta=nan is out of range"),
    ({"beta": 0.5, "iid": True}, ValueError, "data.beta=0.5 makes clients dif"),
    ({"iid": 1}, TypeError, "data.iid is a int"),
    ({"num_clients": 0}, ValueError, "data.num_clients=0 is out of range"),
  ],
)
def test_refuses(options, error, match):
  with pytest.raises(error, match=match):
    load_synthetic(**options)
