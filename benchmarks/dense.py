"""How fast a step of SGD is on a dense layer with few outputs.

    taskset -c 0 python -m benchmarks.dense
    taskset -c 0 python -m benchmarks.dense --tables=10000x8x5,10000x16x5

As in a client's loop: the plain product with kernels by rows, and the forms of
`tasks/dense.py` with transposed kernels, which `engine/layouts.py` takes for
narrow ones. They take turns; the table holds medians of ratios to the first.
With `--tables` steps on tables of embeddings, by rows and by columns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from benchmarks.turns import rotated
from fedjax_sim.core.tree import is_narrow
from fedjax_sim.tasks.dense import dense

SHAPES = (
  "784x10x10,784x10x64,784x16x10,784x32x10,784x62x10,512x2x10,512x32x20,"
  "512x128x20,128x10x20,32x10x10,9216x10x20"
)
FLOPS = 2e8  # of a call
BATCH = 10  # of tables


def as_it_is(kernel: Any) -> Any:
  """Return the kernel."""
  return kernel


def transposed(kernel: Any) -> Any:
  """Return the kernel's transpose."""
  return kernel.T


def by_columns(kernel: Any) -> Any:
  """Return the kernel, laid out by columns."""
  return with_layout_constraint(kernel, Layout(major_to_minor=(1, 0)))


def trained(
  product: Callable[..., Any],
  x: Any,
  kernel: Any,
  leave: Callable[[Any], Any] = as_it_is,
  enter: Callable[[Any], Any] = as_it_is,
) -> Callable[[], Any]:
  """Return compiled steps of SGD, as many as make a call long enough.

  Args:
    product: (x, kernel) -> outputs.
    x: the inputs of a step.
    kernel: before the first.
    leave: kernel -> what the loop carries of it.
    enter: the other way round.
  """
  size = max(x.size * kernel.shape[1], kernel.size)
  steps = max(20, int(FLOPS / (4 * size)))

  def loss(kernel: Any, x: Any) -> Any:
    return jnp.mean(jax.nn.logsumexp(product(x, kernel), axis=-1))

  def step(i: Any, carry: Any) -> Any:
    x, kernel = carry[0], enter(carry[1])
    kernel -= 0.01 * jax.grad(loss)(kernel, x)
    # The inputs differ from step to step, or XLA would keep what they give.
    changed = kernel[:1, :1].astype(x.dtype)
    return lax.dynamic_update_slice(x, changed, (0, 0)), leave(kernel)

  run = jax.jit(lambda *carry: lax.fori_loop(0, steps, step, carry))
  carry = x, jax.jit(leave)(kernel)
  compiled = run.lower(*carry).compile()
  return lambda: jax.block_until_ready(compiled(*carry))


def looked_up(ids: Any, table: Any) -> Any:
  """Return the mean of rows of a table, (batch, columns)."""
  return jnp.mean(table[ids], axis=1)


def speed_of_table(shape: Sequence[int], turns: int) -> float:
  """Return how many times as fast a table is by columns as by rows."""
  rows, columns, words = shape
  rng = np.random.default_rng(0)
  ids = rng.integers(0, rows, (BATCH, words)).astype(np.int32)
  table = rng.standard_normal((rows, columns), dtype=np.float32)
  runs = {
    "plain": trained(looked_up, ids, table),
    "narrow": trained(looked_up, ids, table, by_columns),
  }
  return ratio_of(runs, turns)


def speed(shape: Sequence[int], turns: int) -> float:
  """Return how many times as fast the narrow form is as the plain one."""
  inputs, outputs, batch = shape
  rng = np.random.default_rng(0)
  x = rng.standard_normal((batch, inputs), dtype=np.float32)
  kernel = rng.standard_normal((inputs, outputs), dtype=np.float32)
  runs = {
    "plain": trained(jnp.matmul, x, kernel),
    "narrow": trained(dense, x, kernel, transposed, transposed),
  }
  return ratio_of(runs, turns)


def ratio_of(runs: Mapping[str, Callable[[], Any]], turns: int) -> float:
  """Return the median over turns of the plain time by the narrow one."""
  ratios = []
  for turn in range(turns + 1):
    seconds = {}
    for name in rotated(runs, turn):
      began = time.perf_counter()
      runs[name]()
      seconds[name] = time.perf_counter() - began
    if turn:  # the first warms up
      ratios.append(seconds["plain"] / seconds["narrow"])
  return statistics.median(ratios)


def main(arguments: Sequence[str] | None = None) -> None:
  """Print the table."""
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.dense", description="How fast dense layers are."
  )
  parser.add_argument("--turns", type=int, default=15, help="that count")
  parser.add_argument(
    "--shapes", default=SHAPES, help="inputs x outputs x batch: %(default)s"
  )
  parser.add_argument(
    "--tables", help="rows x columns x words of an example, in place of shapes"
  )
  flags = parser.parse_args(arguments)
  if flags.turns < 1:
    parser.error("--turns: give at least 1")
  if flags.tables:
    print("| table | words | by columns |\n| --- | --- | --- |")
    for text in flags.tables.split(","):
      rows, columns, words = map(int, text.split("x"))
      ratio = speed_of_table((rows, columns, words), flags.turns)
      print(f"| {rows} x {columns} | {words} | {ratio:.1f} |")
    return
  print("| kernel | batch | speed | taken |\n| --- | --- | --- | --- |")
  for text in flags.shapes.split(","):
    inputs, outputs, batch = map(int, text.split("x"))
    kernel = jax.ShapeDtypeStruct((inputs, outputs), jnp.float32)
    taken = "yes" if is_narrow(kernel) else "no"
    ratio = speed((inputs, outputs, batch), flags.turns)
    print(f"| {inputs} x {outputs} | {batch} | {ratio:.1f} | {taken} |")


if __name__ == "__main__":
  main()
