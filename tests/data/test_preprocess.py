"""Batches on the device: against numpy, and by what chance may do."""

import dataclasses
import functools
import itertools
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.config import default_config
from fedjax_sim.config.build import build
from fedjax_sim.core import Purpose, key_for
from fedjax_sim.data import (
  FederatedData,
  FederatedDataset,
  StoredData,
  StoreWriter,
  make_dataset,
  open_store,
  with_random_labels,
)
from fedjax_sim.data.batch_steps import normalize
from fedjax_sim.data.preprocess import (
  random_crop,
  random_flip,
  with_crop,
  with_flip,
  with_lookup,
  with_normalization,
  with_padding,
  with_reshape,
)
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.engine.client_loop import pass_key
from fedjax_sim.privacy.leakage import leakage
from fedjax_sim.run import resume
from fedjax_sim.simulation.runtime import Runtime
from problems import (
  MODELS,
  flat,
  make_simulator,
  params_of,
  quadratic,
  quadratic_data,
  sgd,
  train,
)

KEY = jax.random.key(5)


def images(shape=(5, 6, 2), clients=(3, 4, 6, 2), dtype=np.float32, **parts):
  rng = np.random.default_rng(0)
  count = sum(clients)
  x = rng.integers(0, 256, (count, *shape)).astype(dtype)
  y = rng.integers(0, 3, count).astype(np.int32)
  return FederatedDataset(
    name="images",
    train=FederatedData(
      examples={"x": x, "y": y},
      offsets=np.cumsum([0, *clients]).astype(np.int64),
    ),
    num_classes=3,
    example_shape=shape,
    **parts,
  )


def sequences(x, y, num_classes=0):
  x, y = np.asarray(x), np.asarray(y)
  offsets = np.array([0, 1, len(x)], np.int64)
  data = FederatedData(examples={"x": x, "y": y}, offsets=offsets)
  return make_dataset("sequences", data, num_classes=num_classes)


def prepared(data):
  """All of the training examples, as the model gets them."""
  return jax.jit(data.prepare)(dict(data.train.examples))


# --- every batch, against numpy -----------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.int32])
@pytest.mark.parametrize(
  ("mean", "stddev"),
  [(127.5, 64), (3, (50.0, 60.0)), ([100.0, 120.0], np.array([50.0, 0.5]))],
)
def test_normalization(dtype, mean, stddev):
  data = with_normalization(images(dtype=dtype), mean, stddev)
  found = prepared(data)
  x = data.train.examples["x"].astype(np.float64)
  expected = (x - np.asarray(mean, float)) / np.asarray(stddev, float)
  assert found["x"].dtype == np.float32
  np.testing.assert_allclose(found["x"], expected, 1e-6, 1e-6)
  np.testing.assert_array_equal(found["y"], data.train.examples["y"])


def test_lookup_of_inputs_and_of_labels():
  rng = np.random.default_rng(1)
  x, y = rng.integers(0, 300, (7, 5)), rng.integers(0, 62, 7)
  data = sequences(x.astype(np.int16), y.astype(np.uint8), num_classes=62)
  tokens, classes = rng.integers(0, 9, 300), np.arange(62) % 10
  looked_up = with_lookup(with_lookup(data, tokens), classes, "y")
  assert (looked_up.num_classes, looked_up.stored_classes) == (10, 62)
  assert looked_up.example_shape == (5,)
  found = prepared(looked_up)
  assert {v.dtype for v in found.values()} == {np.dtype(np.int32)}
  np.testing.assert_array_equal(found["x"], [[tokens[i] for i in r] for r in x])
  np.testing.assert_array_equal(found["y"], [i % 10 for i in y])
  # What changes labels as they are stored still draws among all 62.
  changed, _ = with_random_labels(looked_up, 1.0)
  assert changed.train.examples["y"].max() > 9


@pytest.mark.parametrize("channels", [(), (2,)])
def test_padding_of_sequences(channels):
  rng = np.random.default_rng(2)
  x = rng.integers(1, 9, (3, 5, *channels)).astype(np.int32)
  y = rng.integers(1, 9, (3, 5)).astype(np.int32)
  data = with_padding(sequences(x, y), 8)
  assert data.example_shape == (8, *channels)
  found = prepared(data)
  np.testing.assert_array_equal(
    found["x"], np.concatenate([x, np.zeros((3, 3, *channels))], axis=1)
  )
  np.testing.assert_array_equal(
    found["y"], np.concatenate([y, np.zeros((3, 3))], axis=1)
  )
  for other in (np.arange(3), y[:, :4]):  # labels of another length
    found = prepared(with_padding(sequences(x, other), 8))
    np.testing.assert_array_equal(found["y"], other)


@pytest.mark.parametrize("channels", [(), (2,)])
def test_padding_of_images(channels):
  data = images((4, 5, *channels))
  padded = with_padding(data, (7, 7))
  assert padded.example_shape == (7, 7, *channels)
  x = data.train.examples["x"]
  expected = np.zeros((len(x), 7, 7, *channels))
  expected[:, 1:5, 1:6] = x  # of three more rows, two are below
  np.testing.assert_array_equal(prepared(padded)["x"], expected)


def test_steps_are_done_in_turn_and_can_be_pickled():
  data = images((60,))
  whole = with_reshape(data, (5, 6, 2))
  whole = with_padding(with_normalization(whole, 100, (50, 60)), (6, 8))
  whole = with_flip(with_crop(whole, 2, "reflect"))
  whole = pickle.loads(pickle.dumps(whole))
  x = data.train.examples["x"].astype(np.float64).reshape(-1, 5, 6, 2)
  expected = np.zeros((len(x), 6, 8, 2))
  expected[:, :5, 1:7] = (x - 100) / [50, 60]
  found = prepared(whole)
  np.testing.assert_allclose(found["x"], expected, 1e-6, 1e-6)
  # Each step that is random has a key of its own.
  once = whole.augment(KEY, found)["x"]
  cropped = random_crop(
    jax.random.fold_in(KEY, 0), found, pixels=2, fill="reflect"
  )
  twice = random_flip(jax.random.fold_in(KEY, 1), cropped)["x"]
  np.testing.assert_array_equal(once, twice)


# --- training batches, by chance ----------------------------------------------


@pytest.mark.parametrize(
  ("channels", "fill", "mode"),
  [((), "zeros", "constant"), ((2,), "reflect", "reflect")],
)
def test_crops_are_all_as_likely(channels, fill, mode):
  pixels, count = 2, 5000
  image = np.random.default_rng(3).normal(size=(4, 5, *channels))
  image = image.astype(np.float32)
  widths = [(pixels, pixels)] * 2 + [(0, 0)] * len(channels)
  wide = np.pad(image, widths, mode)
  crops = np.array(
    [
      wide[i : i + 4, j : j + 5]
      for i, j in itertools.product(range(2 * pixels + 1), repeat=2)
    ]
  )
  x = np.broadcast_to(image, (count, *image.shape))
  y = np.arange(count)
  crop = jax.jit(functools.partial(random_crop, pixels=pixels, fill=fill))
  found = crop(KEY, {"x": x, "y": y})
  assert found["x"].dtype == np.float32
  np.testing.assert_array_equal(found["y"], y)
  one = lambda a: [a.tobytes() for a in np.ascontiguousarray(a)]
  which = {crop: i for i, crop in enumerate(one(crops))}
  assert len(which) == 25
  drawn = [which[crop] for crop in one(found["x"])]  # each is one of them
  assert scipy.stats.chisquare(np.bincount(drawn, minlength=25)).pvalue > 1e-4
  pairs = np.histogram2d(drawn[:-1], drawn[1:], bins=25)[0]
  assert scipy.stats.chi2_contingency(pairs).pvalue > 1e-4  # by itself
  np.testing.assert_array_equal(found["x"], crop(KEY, {"x": x})["x"])
  other = crop(jax.random.key(6), {"x": x})["x"]
  assert 0.9 < np.mean(np.any(found["x"] != other, (1, 2))) < 1


def test_half_of_the_images_are_mirrored():
  x = np.random.default_rng(4).normal(size=(4000, 4, 5, 2)).astype(np.float32)
  found = np.asarray(jax.jit(random_flip)(KEY, {"x": x})["x"])
  mirrored = (found == x[:, :, ::-1]).all((1, 2, 3))
  as_it_was = (found == x).all((1, 2, 3))
  assert (mirrored ^ as_it_was).all()
  assert scipy.stats.binomtest(int(mirrored.sum()), 4000).pvalue > 1e-4
  runs = np.count_nonzero(mirrored[1:] != mirrored[:-1])
  assert scipy.stats.binomtest(runs, 3999).pvalue > 1e-4
  np.testing.assert_array_equal(found, random_flip(KEY, {"x": x})["x"])
  assert not np.array_equal(
    found, random_flip(jax.random.key(6), {"x": x})["x"]
  )


def test_a_steps_key_follows_from_seed_round_client_and_step():
  """Quadratics whose examples are moved: every step is known.

  The loss, too, is random; its key is the one that it gets without.
  """
  centres = np.array([[1.0, -2.0], [3.0, 0.5], [-1.0, 1.0]], np.float32)

  def move(key, examples):
    x = examples["x"]
    return {**examples, "x": x + jax.random.normal(key, x.shape)}

  def loss(variables, examples, key):
    told = plain.loss(variables, examples, key)
    return told._replace(value=told.value * jax.random.uniform(key))

  data = dataclasses.replace(quadratic_data(centres, copies=4), augment=move)
  batching = LocalBatching(batch_size=4, steps=3, shuffle=False)
  plain = quadratic(2)
  task = plain._replace(loss=loss)
  simulator = make_simulator(
    task, fedavg(task, sgd(0.3), sgd(1.0)), data, batching=batching, seed=7
  )
  w = np.zeros(2)
  for round_ in range(2):
    ends = []
    for client, centre in enumerate(centres):
      local = w.copy()
      for step in range(3):
        own = pass_key(key_for(7, Purpose.CLIENT, round_, client), 0)
        own = jax.random.fold_in(own, step)
        tagged = jax.random.fold_in(own, 0x6175676D)
        moved = centre + np.asarray(jax.random.normal(tagged, (4, 2)), float)
        factor = float(jax.random.uniform(own))
        local = local - 0.3 * factor * (local - moved.mean(0))
      ends.append(local)
    w = np.mean(ends, axis=0)
  found = params_of(simulator, train(simulator, 2))["w"]
  np.testing.assert_allclose(found, w, atol=1e-6)


@pytest.fixture(scope="module")
def augmented(tmp_path_factory):
  """The same data in memory and on the disk, cropped and mirrored."""
  data = images((5, 6), clients=(3, 9, 1, 7, 6, 2), dtype=np.uint8)
  test = {"x": data.train.examples["x"][:6], "y": data.train.examples["y"][:6]}
  path = tmp_path_factory.mktemp("stores") / "images"
  with StoreWriter(path, prepare="bytes", num_classes=3) as store:
    split = store.split("train")
    split.append("abcdef", data.train.sizes, data.train.examples)
    store.split("test").append(["test"], [6], test)
  stored = open_store(path)
  assert isinstance(stored.train, StoredData)
  loaded = dataclasses.replace(stored, train=stored.train.in_memory)
  change = lambda d: with_flip(with_crop(with_normalization(d, 0.5, 0.3), 1))
  return change(loaded), change(stored), with_normalization(loaded, 0.5, 0.3)


def begun(data, **runtime):
  task = MODELS["lr"](data)
  simulator = make_simulator(
    task,
    fedavg(task, sgd(0.1), sgd(1.0)),
    data,
    clients_per_round=4,
    batching=LocalBatching(batch_size=2),
  )
  fast = Runtime(
    **{"lanes": 1, "devices": 1, "rounds_per_dispatch": 2} | runtime
  )
  return dataclasses.replace(simulator, runtime=fast)


@pytest.mark.integration
@pytest.mark.usefixtures("exact")
def test_no_result_depends_on_where_and_how_it_is_computed(augmented):
  memory, disk, plain = augmented
  one = begun(memory, residency="device")
  state = train(one, 4)
  expected = flat(params_of(one, state))
  assert one.compilations == 1

  half = one.states.to_host(train(one, 2))  # and on, as from a checkpoint
  resumed = train_on(one, one.states.to_devices(half), 2, 4)
  np.testing.assert_array_equal(flat(params_of(one, resumed)), expected)
  for data, where in ((memory, "host"), (disk, "disk")):
    other = begun(data, residency=where)
    found = flat(params_of(other, train(other, 4)))
    np.testing.assert_array_equal(found, expected)
  several = begun(memory, lanes=2, devices=min(2, jax.device_count()))
  found = flat(params_of(several, train(several, 4)))
  np.testing.assert_allclose(found, expected, atol=1e-6)

  # Evaluation sees images as they are.
  without = begun(plain)
  assert without.evaluate(state) == one.evaluate(state)


def train_on(simulator, state, done, rounds):
  while done < rounds:
    out = simulator.dispatch(state, simulator.plan(done, rounds - done))
    state, done = out.state, done + len(out.rows)
  return state


def test_a_pass_that_measures_sees_examples_as_they_are():
  data = with_flip(images((5, 6)))
  task = MODELS["lr"](data)
  algorithm = leakage(fedavg(task, sgd(0.1), sgd(1.0)), task, statistic="max")
  assert [p.augmented for p in algorithm.passes] == [True, False]


# --- what is refused ----------------------------------------------------------

IDS = sequences(
  np.array([[1, 2], [0, 6], [3, 4]]), np.array([[1, 2], [0, 1], [2, 0]])
)


@pytest.mark.parametrize(
  ("step", "match"),
  [
    (lambda: with_normalization(images(), (1, 2, 3), 1), r"3 numbers .*mean"),
    (lambda: with_lookup(images(), np.arange(9)), "'x' is float32 before"),
    (
      lambda: with_lookup(IDS, np.arange(6)),
      "data.lookup has entries 0 to 5, and field 'x' of train holds 6",
    ),
    (
      lambda: with_lookup(sequences([[-1], [2]], [0, 0]), np.arange(9)),
      "field 'x' of train holds -1",
    ),
    (
      lambda: with_lookup(
        dataclasses.replace(
          IDS, test={k: v + 5 for k, v in IDS.train.examples.items()}
        ),
        np.arange(7),
        "y",
      ),
      "data.label_lookup .* 0 to 6, and field 'y' of test holds 7",
    ),
    (lambda: with_lookup(IDS, np.arange(7) - 1), "holds -1; .* from 0 to 2147"),
    (lambda: with_lookup(IDS, np.arange(7) + 2**31), "2147483654; .* from 0"),
    (lambda: with_lookup(IDS, np.arange(7.0)), r"float64 of shape \(7,\)"),
    (lambda: with_lookup(IDS, np.zeros((7, 1), int)), r"of shape \(7, 1\)"),
    (lambda: with_lookup(IDS, np.zeros(0, int)), r"of shape \(0,\)"),
    (
      lambda: with_lookup(with_lookup(IDS, np.arange(9)), np.arange(9)),
      "'x' is looked up in a table already",
    ),
    (lambda: with_lookup(IDS, np.ones(3, int), "y"), "turns 0.*into 1; let"),
    (lambda: with_lookup(IDS, np.ones(7, int), "z"), "field='z' is unknown"),
    (lambda: with_padding(images(), 9), r"data.pad=9 .* \(5, 6, 2\)"),
    (lambda: with_padding(images(), (9, 5)), r"\(9, 5\) is smaller"),
    (lambda: with_crop(images(), 5), "data.crop=5 .* from 1 to 4"),
    (lambda: with_crop(images(), 2, "zero"), "Did you mean 'zeros'"),
    (lambda: with_crop(images((187, 1)), 1), r"data.crop=1 .* \(187, 1\)"),
    (lambda: with_flip(images((60,))), r"data.flip=True .* \(60,\)"),
    (
      lambda: dataclasses.replace(images(), prepare=lambda e: {"x": 1 / 0}),
      "prepare fails on a batch of one example: ZeroDivisionError",
    ),
    (
      lambda: dataclasses.replace(
        images(), prepare=lambda e: {**e, "x": e["x"][:, 1:]}
      ),
      r"example_shape=\(5, 6, 2\) but one 'x' .* shape \(4, 6, 2\)",
    ),
  ],
)
def test_steps_that_do_not_fit(step, match):
  with pytest.raises((TypeError, ValueError), match=match):
    step()


@pytest.mark.parametrize(
  ("augment", "match"),
  [
    (lambda key, e: {**e, "x": e["x"][:, :2]}, "augment changes x: 'float32"),
    (lambda key, e: {"x": e["x"]}, r"augment changes y: .*\(missing\)"),
    (lambda key, e: {**e, "x": e["z"]}, "augment fails: KeyError: 'z'"),
  ],
)
def test_an_augment_of_ones_own_keeps_shapes(augment, match):
  data = dataclasses.replace(images((5,)), augment=augment)
  with pytest.raises(ValueError, match=match):
    begun(data).init()


# --- as a config says ---------------------------------------------------------


def characters(folder, **fields):
  """A config of sequences of letters, as bytes, that predict the next."""
  rng = np.random.default_rng(0)
  text = rng.choice([0, *b"abcd"], (12, 7)).astype(np.uint8)
  np.savez(
    folder / "text.npz", x=text[:, :6], y=text[:, 1:], client=np.arange(12) % 4
  )
  table = np.zeros(256, np.int64)
  table[list(b"abcd")] = 1, 2, 3, 4
  np.save(folder / "table.npy", table)
  config = default_config()
  config.data.name = "npz"
  config.data.path = str(folder / "text.npz")
  config.data.num_classes = 256
  config.data.lookup = config.data.label_lookup = str(folder / "table.npy")
  config.data.pad = 9
  config.model.name = "char_lstm"
  config.model.embedding = 2
  config.model.units = (3,)
  config.server.clients_per_round = 2
  for field, value in fields.items():
    config.data[field] = value
  return config


def test_a_vocabulary_is_made_smaller(tmp_path):
  simulator = build(characters(tmp_path)).simulator
  data = simulator.data
  assert (data.num_classes, data.example_shape) == (5, (9,))
  shapes = jax.tree.leaves(simulator.states.shapes.server)
  assert max(math.prod(x.shape) for x in shapes) < 100  # not of 256 characters
  found = prepared(data)
  assert set(np.unique(found["x"])) == {0, 1, 2, 3, 4}
  before = resume.data_digest(simulator)
  np.save(tmp_path / "table.npy", np.arange(256) % 5 * (np.arange(256) > 9))
  config = characters(tmp_path)
  table = np.load(config.data.lookup)
  table[ord("d")] = 3
  np.save(config.data.lookup, table)
  assert resume.data_digest(build(config).simulator) != before


@pytest.mark.parametrize(
  ("write", "match"),
  [
    (lambda path: path.write_text("abc"), "cannot be read as .npy"),
    (lambda path: np.save(path, np.array([{}])), "cannot be read as .npy"),
    (lambda path: np.save(path, np.array(3)), r"int64 of shape \(\)"),
    (lambda path: np.save(path, np.arange(50)), "0 to 49, .* holds 100"),
    (lambda path: np.save(path, np.arange(256)), "'x' holds 255; num_classes"),
  ],
)
def test_tables_that_do_not_fit(tmp_path, write, match):
  config = characters(tmp_path)
  config.data.lookup = str(tmp_path / "other.npy")
  write(tmp_path / "other.npy")
  with pytest.raises((TypeError, ValueError), match=match) as caught:
    build(config)
  assert "\n" not in str(caught.value)
  if "num_classes" not in match:
    assert str(caught.value).startswith(f"data.lookup={config.data.lookup!r}")


def test_a_missing_table_is_named(tmp_path):
  config = characters(tmp_path, label_lookup="no.npy")
  with pytest.raises(FileNotFoundError, match=r"no.npy \(from data.label_loo"):
    build(config)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_is_normalized_in_single(dtype):
  """And stays half precision, with a deviation that it cannot hold itself."""
  x = jnp.array([[[1e-8], [3e-8]]], dtype)
  out = normalize(
    {"x": x}, mean=np.array([1e-8], "f4"), stddev=np.array([1e-9], "f4")
  )["x"]
  assert out.dtype == dtype
  expected = (np.asarray(x, np.float64) - 1e-8) / 1e-9
  eps = float(jnp.finfo(dtype).eps)
  np.testing.assert_allclose(
    np.asarray(out, float), expected, rtol=4 * eps, atol=4 * eps
  )
