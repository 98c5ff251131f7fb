"""Which clients hold which version of the model."""

import numpy as np
import pytest
import scipy.stats

from fedjax_sim.sampling import by_size, delayed, in_flight, uniform


def test_staleness_is_half_normal_and_a_clients_own():
  scale, rounds = 1.7, 300
  sampler = delayed(uniform(200, 200), versions=50, scale=scale)
  ids = np.arange(200)
  held = np.stack(
    [sampler.versions(3, round_, ids) for round_ in range(100, 100 + rounds)]
  )
  edges = np.arange(8)
  cut = 2 * scipy.stats.norm.cdf(edges / scale) - 1
  expected = np.diff(np.append(cut, 1))
  counts = np.bincount(np.minimum(held.ravel(), 7), minlength=8)
  assert scipy.stats.chisquare(counts, expected * held.size).pvalue > 0.01
  assert abs(np.corrcoef(held[:, 0], held[:, 1])[0, 1]) < 0.2
  assert abs(np.corrcoef(held[1:, 0], held[:-1, 0])[0, 1]) < 0.2

  some = np.array([5, 17, 190])
  np.testing.assert_array_equal(sampler.versions(3, 100, some), held[0][some])
  assert np.any(sampler.versions(4, 100, ids) != held[0])


def test_no_version_is_older_than_there_are():
  sampler = delayed(uniform(100, 100), versions=4, scale=10.0)
  for round_, oldest in ((0, 0), (1, 1), (2, 2), (3, 3), (9, 3)):
    assert sampler.versions(0, round_, np.arange(100)).max() == oldest
  assert sampler.versions(0, 5, np.array([], np.int64)).shape == (0,)
  still = delayed(uniform(100, 100), versions=4, scale=0.0)
  assert not still.versions(0, 9, np.arange(100)).any()


def test_who_takes_part_stays_as_it_is():
  inner = by_size(50, 10, np.arange(1, 51))
  sampler = delayed(inner, 3)
  np.testing.assert_array_equal(sampler.sample(1, 7), inner.sample(1, 7))
  assert sampler._replace(versions=inner.versions) == inner
  np.testing.assert_array_equal(
    in_flight(50, 10).sample(1, 7), uniform(50, 10).sample(1, 7)
  )


@pytest.mark.parametrize(
  ("options", "field"),
  [({"versions": 0}, "versions"), ({"scale": -1.0}, "scale")],
)
def test_what_it_refuses(options, field):
  with pytest.raises(ValueError, match=rf"\b{field}="):
    in_flight(50, 10, **options)
