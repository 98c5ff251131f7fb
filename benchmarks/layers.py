"""How fast convolutions and recurrences are inside a loop.

    python -m benchmarks.layers

Each way trains the same model by SGD in one compiled `fori_loop`, as a client
does; ways take turns, another one first in every turn, and the table holds
medians of ratios to the first, and the bytes that XLA takes for temporaries.
All are on one CPU device, which uses every core for large products.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.turns import rotated
from fedjax_sim.models.layers import lstm, max_pool
from fedjax_sim.tasks.convolution import convolve, patches, winograd

STEPS = 5  # of one call


def xla(padded: Any, kernel: Any, strides: Any) -> Any:
  """Return XLA's own convolution of an input that is padded already."""
  return lax.conv_general_dilated(
    padded,
    kernel,
    strides,
    "VALID",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )


def window_pool(x: Any) -> Any:
  """Return XLA's own pooling of x."""
  shape = (1, 2, 2, 1)
  return lax.reduce_window(x, -jnp.inf, lax.max, shape, shape, "VALID")


def cnn(
  first: Callable[..., Any],
  second: Callable[..., Any],
  pool: Callable[..., Any],
) -> Any:
  """Return the loss of the FEMNIST CNN's convolutions and a dense layer."""

  def loss(params: Mapping[str, Any], x: Any) -> Any:
    x = jax.nn.relu(first(x, params["one"], (1, 1)))
    x = jax.nn.relu(second(x, params["two"], (1, 1)))
    x = pool(x).reshape(len(x), -1)
    return jnp.mean(jax.nn.logsumexp(x @ params["dense"], axis=-1))

  return loss


def one(convolution: Callable[..., Any]) -> Any:
  """Return the loss of a convolution alone, with the gradient of its inputs."""

  def loss(params: Mapping[str, Any], x: Any) -> Any:
    return jnp.mean(convolution(x * params["scale"], params["kernel"]) ** 2)

  return loss


def cell(z: Any, c: Any) -> Any:
  """Return an LSTM's new (h, c) from its gates and c."""
  i, f, g, o = jnp.split(z, 4, axis=-1)
  c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
  return jax.nn.sigmoid(o) * jnp.tanh(c), c


def scanned(gates: Any, kernel: Any) -> Any:
  """Return the outputs of an LSTM whose gradient is autodiff's."""

  def step(state: Any, z: Any) -> Any:
    h, c = state
    h, c = cell(z + h @ kernel, c)
    return (h, c), h

  zero = jnp.zeros((gates.shape[1], kernel.shape[0]))
  return lax.scan(step, (zero, zero), gates)[1]


def inside() -> Any:
  """Return the loss of an LSTM that multiplies its inputs step by step, too."""

  def loss(params: Mapping[str, Any], x: Any) -> Any:
    joined = jnp.concatenate([params["inputs"], params["kernel"]])

    def step(state: Any, x: Any) -> Any:
      h, c = state
      h, c = cell(jnp.concatenate([x, h], axis=-1) @ joined, c)
      return (h, c), h

    zero = jnp.zeros((x.shape[1], params["kernel"].shape[0]))
    return jnp.mean(lax.scan(step, (zero, zero), x)[1] ** 2)

  return loss


def rnn(recurrence: Callable[..., Any]) -> Any:
  """Return the loss of an LSTM layer with one product for all steps' inputs."""

  def loss(params: Mapping[str, Any], x: Any) -> Any:
    return jnp.mean(recurrence(x @ params["inputs"], params["kernel"]) ** 2)

  return loss


def trained(loss: Any, x: Any, params: Any) -> Any:
  """Return some steps of SGD, compiled."""

  @jax.jit
  def run(params: Any) -> Any:
    def step(i: Any, params: Any) -> Any:
      gradient = jax.grad(loss)(params, x + i)
      return jax.tree.map(lambda p, g: p - 0.01 * g, params, gradient)

    return lax.fori_loop(0, STEPS, step, params)

  return run.lower(params).compile()


def compare(
  title: str, ways: Mapping[str, Any], params: Any, x: Any, turns: int
) -> None:
  """Print how many times as fast as the first each way is, and its memory."""
  runs = {name: trained(loss, x, params) for name, loss in ways.items()}
  times: dict[str, list[float]] = {name: [] for name in runs}
  for turn in range(turns + 1):
    for name in rotated(runs, turn):
      began = time.perf_counter()
      jax.block_until_ready(runs[name](params))
      if turn:  # the first warms up
        times[name].append(time.perf_counter() - began)
  first = times[next(iter(times))]
  print(title)
  for name, taken in times.items():
    ratio = statistics.median(a / b for a, b in zip(first, taken, strict=True))
    memory = runs[name].memory_analysis().temp_size_in_bytes / 1e6
    print(f"  {name:<45} {ratio:5.2f} {memory:8.1f} MB")


def main(arguments: Sequence[str] | None = None) -> None:
  """Print the tables."""
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.layers", description="How fast layers are."
  )
  parser.add_argument("--turns", type=int, default=7, help="that count")
  parser.add_argument("--scale", choices=("full", "smoke"), default="full")
  flags = parser.parse_args(arguments)
  if flags.turns < 1:
    parser.error("--turns: give at least 1")
  small = flags.scale == "smoke"
  side, batch = (8, 2) if small else (28, 20)
  length, units = (6, 8) if small else (80, 256)
  features = ((side - 4) // 2) ** 2 * 64
  normal = functools.partial(jax.random.normal, jax.random.key(0))
  params: Any = {
    "one": normal((3, 3, 1, 32)) / 3,
    "two": normal((3, 3, 32, 64)) / 17,
    "dense": normal((features, 62)) / features**0.5,
  }
  compare(
    f"two convolutions of 3 x 3, {side} x {side} images, batch {batch}",
    {
      "XLA's convolutions, XLA's pooling": cnn(xla, xla, window_pool),
      "patches, XLA's pooling": cnn(patches, patches, window_pool),
      "patches": cnn(patches, patches, max_pool),
      # Of one channel, patches are faster; `convolve` chooses so, too.
      "patches first, Winograd second": cnn(patches, winograd, max_pool),
    },
    params,
    normal((batch, side, side, 1)),
    flags.turns,
  )
  side, batch, features, window = (8, 2, 4, 3) if small else (32, 16, 32, 7)
  ends = (window // 2, window // 2)
  filled = lambda x: jnp.pad(x, ((0, 0), ends, ends, (0, 0)))
  compare(
    f"a convolution of {window} x {window}, {features} features,"
    f" {side} x {side} images, batch {batch}",
    {
      "XLA's convolution": one(lambda x, k: xla(filled(x), k, (1, 1))),
      "patches": one(lambda x, k: patches(filled(x), k, (1, 1))),
      "patches in pieces": one(lambda x, k: convolve(x, k, (1, 1), "SAME")),
    },
    {
      "scale": jnp.ones(features),
      "kernel": normal((window, window, features, features)) / 40,
    },
    normal((batch, side, side, features)),
    flags.turns,
  )
  params = {
    "inputs": normal((units, 4 * units)) / units**0.5,
    "kernel": normal((units, 4 * units)) / units**0.5,
  }
  compare(
    f"an LSTM of {units} units, {length} steps, batch 4",
    {
      "one product a step": inside(),
      "inputs multiplied before": rnn(scanned),
      "and a gradient by hand": rnn(lstm),
    },
    params,
    normal((length, 4, units)),
    flags.turns,
  )


if __name__ == "__main__":
  main()
