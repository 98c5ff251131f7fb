"""The planner: every example once an epoch, whatever the layout."""

import dataclasses
import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_sim.engine import plan as plan_
from fedjax_sim.engine.batching import LocalBatching, batches

batchings = st.builds(
  LocalBatching,
  batch_size=st.integers(1, 9),
  epochs=st.integers(1, 3),
  steps=st.none() | st.integers(1, 12),
  max_examples=st.none() | st.integers(1, 12),
  shuffle=st.booleans(),
)
populations = st.lists(st.integers(1, 25), min_size=1, max_size=12)


def offsets_of(sizes):
  return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def read(plan, batching, p=0):
  """Client -> list of its batches, each a list of entries."""
  found = {}
  for where in np.ndindex(plan.client.shape):
    client = plan.client[where]
    if client < 0:
      assert plan.num_steps[where][p] == 0
      continue
    device, wave, _ = where
    assert wave < plan.num_waves[device]
    assert client not in found, "a client is in two places"
    first = plan.start[where][p]
    found[int(client)] = [
      plan.order[p][first + i * batching.batch_size :][: batching.batch_size]
      for i in range(plan.num_steps[where][p])
    ]
  return found


@settings(max_examples=200)
@given(
  sizes=populations,
  batching=batchings,
  lanes=st.integers(1, 6),
  devices=st.integers(1, 3),
  seed=st.integers(0, 2**32 - 1),
  data=st.data(),
)
def test_every_example_is_visited_exactly_once_an_epoch(
  sizes, batching, lanes, devices, seed, data
):
  sizes = np.array(sizes)
  offsets = offsets_of(sizes)
  batching = batching.fitted(sizes)
  ids = data.draw(st.permutations(range(len(sizes))))
  ids = np.array(ids[: data.draw(st.integers(1, len(sizes)))])
  shape = plan_.capacity(
    [sizes], [batching], len(ids), lanes=lanes, devices=devices
  )
  plan = plan_.plan([offsets], [batching], ids, shape, seed=seed, round_=3)
  batches = read(plan, batching)
  assert sorted(batches) == sorted(ids.tolist())

  for client, rows in batches.items():
    own = np.arange(offsets[client], offsets[client + 1])
    used = min(len(own), batching.max_examples or len(own))
    per_epoch = -(-used // batching.batch_size)
    expected_steps = batching.steps or batching.epochs * per_epoch
    assert len(rows) == expected_steps
    for row in rows:
      assert len(row) == batching.batch_size  # never cut by the end of `order`
      filled = np.where(row < 0, ~row, row)
      assert np.isin(filled, own).all(), "another client's example"
    chosen = None
    for e in range(0, len(rows), per_epoch):
      epoch = rows[e : e + per_epoch]
      seen = np.concatenate(epoch)
      seen = seen[seen >= 0]
      assert len(np.unique(seen)) == len(seen), "an example twice an epoch"
      if len(epoch) == per_epoch:
        assert len(seen) == used
        if chosen is not None:
          assert set(seen.tolist()) == chosen
        chosen = set(seen.tolist())
        if not batching.shuffle:
          np.testing.assert_array_equal(seen, own[:used])


@settings(max_examples=50)
@given(sizes=populations, batching=batchings, seed=st.integers(0, 2**32 - 1))
def test_a_clients_batches_do_not_depend_on_the_layout(sizes, batching, seed):
  sizes = np.array(sizes)
  offsets = offsets_of(sizes)
  batching = batching.fitted(sizes)
  everyone = np.arange(len(sizes))

  def plan(ids, lanes, devices):
    shape = plan_.capacity(
      [sizes], [batching], len(ids), lanes=lanes, devices=devices
    )
    return read(
      plan_.plan([offsets], [batching], ids, shape, seed=seed, round_=7),
      batching,
    )

  together = plan(everyone, 3, 2)
  for client in everyone:
    alone = plan(np.array([client]), 1, 1)[client]
    np.testing.assert_array_equal(alone, together[client])


@settings(max_examples=50)
@given(
  sizes=populations,
  size=st.integers(1, 12),
  lanes=st.integers(1, 6),
  devices=st.integers(1, 4),
  batching=batchings,
  seed=st.integers(0, 1000),
)
def test_the_capacity_holds_any_cohort(
  sizes, size, lanes, devices, batching, seed
):
  sizes = np.array(sizes)
  size = min(size, len(sizes))
  batching = batching.fitted(sizes)
  shape = plan_.capacity(
    [sizes], [batching], size, lanes=lanes, devices=devices
  )
  largest = np.argsort(-batching.order_length(sizes), kind="stable")[:size]
  rng = np.random.default_rng(seed)
  for ids in (largest, rng.choice(len(sizes), size, replace=False)):
    plan = plan_.plan(
      [offsets_of(sizes)], [batching], ids, shape, seed=0, round_=0
    )
    assert plan.client.shape == (devices, shape.waves, shape.lanes)
    assert (plan.client >= 0).sum() == size


def test_epochs_and_rounds_have_their_own_order():
  offsets = offsets_of([64])
  batching = LocalBatching(batch_size=64, epochs=2)
  shape = plan_.capacity([np.array([64])], [batching], 1, lanes=1, devices=1)
  plans = [
    plan_.plan([offsets], [batching], np.array([0]), shape, seed=0, round_=r)
    for r in range(2)
  ]
  orders = np.concatenate([p.order[0].reshape(2, 64) for p in plans])
  assert len({tuple(o) for o in orders}) == 4
  for order in orders:
    np.testing.assert_array_equal(np.sort(order), np.arange(64))


def test_shuffling_is_uniform():
  """Chi-square over the 24 orders of 4 examples, 4,800 clients."""
  count, n = 4800, 4
  offsets = offsets_of(np.full(count, n))
  batching = LocalBatching(batch_size=n)
  order = batches(offsets, np.arange(count), batching, seed=0, round_=0).order()
  local = order.reshape(count, n) - offsets[:-1, None]
  _, found = np.unique(local @ n ** np.arange(n), return_counts=True)
  assert len(found) == 24
  chi2 = ((found - 200) ** 2 / 200).sum()
  assert chi2 < 52.6  # 23 degrees of freedom, p = 0.0004


def test_max_examples_draws_every_example_alike():
  count = 3000
  offsets = offsets_of(np.full(count, 5))
  batching = LocalBatching(batch_size=2, max_examples=2)
  order = batches(offsets, np.arange(count), batching, seed=1, round_=0).order()
  found = np.bincount(order % 5, minlength=5)
  chi2 = ((found - 1200) ** 2 / 1200).sum()
  assert chi2 < 20  # 4 degrees of freedom (negatively correlated), p < 0.0005


def test_devices_get_about_the_same_number_of_steps():
  rng = np.random.default_rng(0)
  sizes = rng.lognormal(3, 1, 1000).astype(int) + 1
  batching = LocalBatching(batch_size=10)
  for lanes, most in ((1, 0.01), (10, 0.05)):
    shape = plan_.capacity([sizes], [batching], 1000, lanes=lanes, devices=4)
    plan = plan_.plan(
      [offsets_of(sizes)], [batching], np.arange(1000), shape, seed=0, round_=0
    )
    loads = plan.num_steps.max(axis=2).sum(axis=(1, 2))
    assert loads.max() / loads.mean() - 1 < most


def test_waste_counts_what_is_computed_in_vain():
  sizes = np.array([5, 3, 8])
  batching = LocalBatching(batch_size=4)
  shape = plan_.capacity([sizes], [batching], 3, lanes=2, devices=1)
  plan = plan_.plan(
    [offsets_of(sizes)], [batching], np.arange(3), shape, seed=0, round_=0
  )
  # Steps 2, 1, 2: waves (0, 2) and (1, nobody); rows 8 + 8 and 4 + 4.
  waste = plan_.waste(plan, [batching])
  assert waste == plan_.PaddingWaste(useful=16, batch=4, step=4, idle=0)
  assert waste.computed == 24
  assert plan_.wave_steps(plan) == 3


def test_waste_of_steps_that_end_within_an_epoch():
  sizes = np.array([5, 5])
  batching = LocalBatching(batch_size=2, steps=4)  # 2 + 2 + 1, then 2
  shape = plan_.capacity([sizes], [batching], 2, lanes=1, devices=2)
  plan = plan_.plan(
    [offsets_of(sizes)], [batching], np.arange(2), shape, seed=0, round_=0
  )
  assert plan_.waste(plan, [batching]) == plan_.PaddingWaste(
    useful=14, batch=2, step=0, idle=0
  )


def test_drop_remainder_leaves_out_partial_batches():
  sizes = np.array([7, 4])
  batching = LocalBatching(batch_size=3, drop_remainder=True).fitted(sizes)
  shape = plan_.capacity([sizes], [batching], 2, lanes=1, devices=1)
  plan = plan_.plan(
    [offsets_of(sizes)], [batching], np.arange(2), shape, seed=0, round_=0
  )
  rows = read(plan, batching)
  assert [len(rows[0]), len(rows[1])] == [2, 1]
  assert all((row >= 0).all() for batches in rows.values() for row in batches)


def test_drop_remainder_refuses_clients_without_a_batch():
  batching = LocalBatching(batch_size=4, drop_remainder=True)
  with pytest.raises(ValueError, match=r"client 1, which has 3.*min_examples"):
    batching.fitted(np.array([5, 3]))


def test_a_batch_is_not_larger_than_any_client_can_fill():
  batching = LocalBatching(batch_size=100)
  assert batching.fitted(np.array([5, 9])).batch_size == 9
  capped = dataclasses.replace(batching, max_examples=4)
  assert capped.fitted(np.array([5, 9])).batch_size == 4


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"batch_size": 0}, "client.batch_size=0"),
    ({"epochs": 0}, "client.epochs=0"),
    ({"steps": -1}, "client.steps=-1"),
    ({"max_examples": 0}, "client.max_examples=0"),
  ],
)
def test_numbers_below_one_are_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    LocalBatching(**arguments)


@pytest.mark.parametrize(
  ("ids", "message"),
  [([0, 1, 0], "client 0 2 times"), ([3], "client 3"), ([-1], "client -1")],
)
def test_bad_cohorts_are_refused(ids, message):
  sizes = np.array([2, 2, 2])
  batching = LocalBatching(batch_size=2)
  shape = plan_.capacity([sizes], [batching], 3, lanes=1, devices=1)
  with pytest.raises(ValueError, match=message):
    plan_.plan(
      [offsets_of(sizes)], [batching], np.array(ids), shape, seed=0, round_=0
    )


def test_a_cohort_beyond_the_capacity_is_refused():
  sizes = np.array([2, 2, 2])
  batching = LocalBatching(batch_size=2)
  shape = plan_.capacity([sizes], [batching], 1, lanes=1, devices=1)
  with pytest.raises(ValueError, match="exceeds"):
    plan_.plan(
      [offsets_of(sizes)], [batching], np.arange(3), shape, seed=0, round_=0
    )


@settings(max_examples=60)
@given(
  sizes=st.lists(st.integers(0, 12), min_size=2, max_size=8).filter(any),
  batching=batchings,
  drop=st.booleans(),
  lanes=st.integers(1, 4),
)
def test_a_client_never_reads_anothers_examples(sizes, batching, drop, lanes):
  """With empty clients, and those that fill no batch, among the others."""
  sizes = np.array(sizes)
  offsets = offsets_of(sizes)
  batching = dataclasses.replace(batching, drop_remainder=drop)
  ids = np.arange(len(sizes))
  shape = plan_.capacity([sizes], [batching], len(ids), lanes=lanes, devices=2)
  plan = plan_.plan([offsets], [batching], ids, shape, seed=0, round_=0)
  for client, rows in read(plan, batching).items():
    for row in rows:
      filled = np.where(row < 0, ~row, row)
      assert np.all(filled >= offsets[client])
      assert np.all(filled < offsets[client + 1])
    if not batching.batches_per_epoch(sizes)[client]:
      assert not rows


@settings(max_examples=100)
@given(
  sizes=populations,
  batching=batchings,
  lanes=st.integers(1, 4),
  devices=st.integers(1, 3),
  data=st.data(),
)
def test_rounds_planned_together_are_the_rounds_planned_alone(
  sizes, batching, lanes, devices, data
):
  sizes = np.array(sizes)
  offsets = offsets_of(sizes)
  batching = batching.fitted(sizes)
  both = [batching, dataclasses.replace(batching, epochs=2)]
  drawn = data.draw(
    st.lists(st.sets(st.integers(0, len(sizes) - 1)), min_size=1, max_size=4)
  )
  cohorts = [np.array(sorted(ids), np.int64) for ids in drawn]
  shape = plan_.capacity(
    [sizes] * 2, both, len(sizes), lanes=lanes, devices=devices
  )
  planned = functools.partial(
    plan_.plan_rounds,
    [offsets] * 2,
    both,
    cohorts,
    shape,
    seed=5,
    first=3,
    rounds=5,
  )
  together, nothing = planned()
  assert nothing == []
  alone = [
    plan_.plan([offsets] * 2, both, ids, shape, seed=5, round_=3 + r)
    for r, ids in enumerate(cohorts)
  ]
  nobody = plan_.blank(shape, 2)
  for r in range(5):
    expected = alone[r] if r < len(cohorts) else nobody
    got = plan_.at_round(together, r)
    for one, other in zip(expected[:-1], got[:-1], strict=True):
      np.testing.assert_array_equal(one, other)
    for one, other in zip(expected.order, got.order, strict=True):
      np.testing.assert_array_equal(one, other)
  wastes = [plan_.waste(plan, both) for plan in alone]
  assert sum(wastes, plan_.PaddingWaste()) == plan_.waste(together, both)

  # The same examples, but where each device finds its own.
  sliced, slices = planned(sliced=True)
  for one, other in zip(together[:-1], sliced[:-1], strict=True):
    np.testing.assert_array_equal(one, other)
  rows = np.arange(offsets[-1]) + 1  # 0 is where nothing lies
  for p, (part, length) in enumerate(zip(slices, shape.examples, strict=True)):
    fill = functools.partial(plan_.fill, part, rows, rounds=5, length=length)
    held = fill(devices=range(devices))
    for d in range(devices):
      np.testing.assert_array_equal(fill(devices=[d])[:, 0], held[:, d])
    for r in range(len(cohorts)):
      here = plan_.at_round(sliced, r)
      found = read(here, both[p], p)
      for where in np.argwhere(here.client >= 0):
        client = int(here.client[tuple(where)])
        wanted = read(alone[r], both[p], p)[client]
        for got, expected in zip(found[client], wanted, strict=True):
          np.testing.assert_array_equal(got < 0, expected < 0)
          place = np.where(got < 0, ~got, got)
          row = np.where(expected < 0, ~expected, expected)
          np.testing.assert_array_equal(held[r, where[0], place], row + 1)
