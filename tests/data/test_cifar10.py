"""CIFAR-10 from sprites, on small ones and on the real ones."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from fedjax_sim.data import load_cifar10
from fedjax_sim.data.loaders import cifar10

TRAIN, TEST = 1_100, 12


def sprite(file, images, mode="RGB"):
  """Writes pixel after pixel, an image a row."""
  picture = Image.new("RGB", (1024, len(images)))
  for row, image in enumerate(images):
    for i, pixel in enumerate(image.reshape(1024, 3)):
      if pixel.any():
        picture.putpixel((i, row), tuple(map(int, pixel)))
  picture.convert(mode).save(file)


def pictures(count):
  """Images that say their number, with a corner that tells axes apart."""
  x = np.zeros((count, 32, 32, 3), np.uint8)
  x[:, 0, 0, 0], x[:, 0, 0, 1] = np.divmod(np.arange(count), 200)
  x[:, 3, 31] = [10, 20, 30]
  return x


@pytest.fixture
def folder(tmp_path):
  here = tmp_path / "cifar10"
  here.mkdir()
  x = pictures(TRAIN)
  sprite(here / "cifar10_batch_0.png", x[:1000])
  sprite(here / "cifar10_batch_1.png", x[1000:])
  sprite(here / "cifar10_batch_50.png", pictures(TEST))
  labels(here, np.arange(TRAIN) % 10, np.arange(TEST) % 10)
  return tmp_path


def labels(here, train, test):
  np.savez(
    here / "labels.npz",
    train_y=train.astype(np.uint8),
    test_y=test.astype(np.uint8),
    class_names=np.array(list("abcdefghij")),
  )


def numbers(examples):
  return examples["x"][:, 0, 0, :2].astype(int) @ [200, 1]


def test_cifar10(folder):
  data = load_cifar10(
    path=folder, heldout_fraction=0.2, unseen_clients=2, alpha=0.1
  )
  assert data.seen
  assert data.unseen
  assert data.test
  assert (data.num_classes, data.example_shape) == (10, (32, 32, 3))
  assert (data.train.num_clients, data.unseen.num_clients) == (18, 2)
  sets = [data.train.examples, data.seen.examples, data.unseen.examples]
  owned = np.concatenate([numbers(part) for part in sets])
  np.testing.assert_array_equal(np.sort(owned), np.arange(TRAIN))
  for part in sets:
    np.testing.assert_array_equal(numbers(part) % 10, part["y"])
    np.testing.assert_array_equal(part["x"][0, 3, 31], [10, 20, 30])
  np.testing.assert_array_equal(data.test["x"], pictures(TEST))


def test_prepare():
  x = np.full((2, 32, 32, 3), 100, np.uint8)
  stored = {"x": jnp.asarray(x), "y": jnp.asarray([1, 9], jnp.uint8)}
  ready = cifar10.prepare(stored)
  assert (ready["x"].dtype, ready["y"].dtype) == (jnp.float32, jnp.int32)
  assert ready["x"].shape == x.shape
  for channel, (mean, stddev) in enumerate(
    [(0.4914, 0.2470), (0.4822, 0.2435), (0.4465, 0.2616)]
  ):
    expected = (100 / 255 - mean) / stddev
    np.testing.assert_allclose(ready["x"][..., channel], expected, rtol=1e-4)


def test_refuses_sprites_of_another_size(folder):
  file = folder / "cifar10" / "cifar10_batch_1.png"
  sprite(file, pictures(99))
  with pytest.raises(
    ValueError, match=r"batch_1.png: size: expected 1024 x 100 .* 1024 x 99"
  ):
    load_cifar10(path=folder)
  sprite(file, pictures(100), mode="L")
  with pytest.raises(ValueError, match="RGB pixels.*found 1024 x 100 L"):
    load_cifar10(path=folder)


@pytest.mark.parametrize("share", [0, 0.01, 0.5])
def test_refuses_a_damaged_sprite(folder, share):
  file = folder / "cifar10" / "cifar10_batch_50.png"
  whole = file.read_bytes()
  file.write_bytes(whole[: int(share * len(whole))])
  with pytest.raises(ValueError, match="batch_50.png cannot be read as PNG"):
    load_cifar10(path=folder)


def test_refuses_files_that_do_not_fit(folder):
  here = folder / "cifar10"
  labels(here, np.zeros((2, 2)), np.zeros(TEST))
  with pytest.raises(ValueError, match=r"shape of train_y: expected \(any,\)"):
    load_cifar10(path=folder)
  labels(here, np.full(TRAIN, 10), np.zeros(TEST))
  with pytest.raises(ValueError, match="holds label 10"):
    load_cifar10(path=folder)
  labels(here, np.zeros(2001), np.zeros(TEST))
  with pytest.raises(
    ValueError, match="batch_1.png: size: expected 1024 x 100"
  ):
    load_cifar10(path=folder)
  (here / "cifar10_batch_0.png").unlink()
  with pytest.raises(FileNotFoundError, match="holds no cifar10_batch_0.png"):
    load_cifar10(path=folder)


def test_real(data_folder):
  data = load_cifar10(path=data_folder)
  assert (data.train.num_clients, data.train.num_examples) == (20, 4000)
  assert data.test
  assert len(data.test["y"]) == 1000
  assert data.train.examples["x"].dtype == np.uint8
  here = data_folder / "cifar10"
  files = [here / f"cifar10_batch_{i}.png" for i in range(4)]
  x = np.concatenate([np.asarray(Image.open(file)) for file in files])
  with np.load(here / "labels.npz") as saved:
    y = saved["train_y"]
  stored = data.train.examples
  flat = np.column_stack([stored["x"].reshape(4000, -1), stored["y"]])
  expected = np.column_stack([x.reshape(4000, -1), y])
  assert sorted(map(bytes, flat)) == sorted(map(bytes, expected))
  ready = data.prepare({k: jnp.asarray(v) for k, v in stored.items()})
  np.testing.assert_allclose(ready["x"].mean(axis=(0, 1, 2)), 0, atol=0.03)
  np.testing.assert_allclose(ready["x"].std(axis=(0, 1, 2)), 1, atol=0.03)
