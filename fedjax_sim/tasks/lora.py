"""Low-rank adapters: clients train and send thin factors beside a frozen model.

Hu et al. 2021 (arXiv 2106.09685): a kernel W becomes W + alpha / rank * A B. W
is frozen, one copy a device; A and B are what trains. The model itself, in nnx,
linen or as a function, does not change: its program is computed with A and B
beside W (`low_rank.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_sim.core import (
  Array,
  Examples,
  Key,
  Loss,
  Metric,
  PyTree,
  Task,
  Variables,
  validate,
)
from fedjax_sim.core.tree import paths_of
from fedjax_sim.tasks.freezing import (
  AdapterConstants,
  KeptBuffers,
  Parts,
  matching,
)
from fedjax_sim.tasks.low_rank import LowRank, evaluate

A, B, SCALE = "lora_a", "lora_b", "lora_scale"  # the ends of paths


def with_lora(
  task: Task,
  targets: Sequence[str],
  rank: int = 8,
  alpha: float | None = None,
  also: Sequence[str] = (),
  fixed_a: bool = False,
) -> Task:
  """Return the task whose clients train low-rank adapters alone.

  The parameters are `PATH/lora_a`, shape=(inputs, rank), and `PATH/lora_b`,
  shape=(rank, outputs), float32, for every kernel that a target matches. The
  outputs are the kernel's last axes, of the shape of the bias beside it, and
  without a bias as many as make the fewest numbers. At first `lora_b` is 0, so
  the model is the one that is given. Where a kernel is multiplied by, as in
  dense layers and attention, its change is never multiplied out, so that a
  further lane takes the memory of the adapters; elsewhere, as in convolutions
  and recurrence, it is, and takes that of the kernel.

  Args:
    task: what is adapted, beginning from its given weights.
    targets: patterns, as `model.frozen` takes them, of the kernels.
    rank: columns of `lora_a`, at least 1.
    alpha: the change is scaled by alpha / rank; None: by 1.
    also: patterns of further parameters that train whole, such as a head.
    fixed_a: keep `lora_a` at its first, random values and train `lora_b`, so
      that the mean of clients' adapters is exactly the adapter of their mean
      (FFA-LoRA, Sun et al. 2024, arXiv 2403.12313).

  Returns:
    A task whose `Variables.frozen` hold all that does not train.

  Raises:
    TypeError, ValueError: a pattern is none or matches nothing; a target is no
      kernel of floats; a rank that is not smaller than both sides of one.

  Example:
    >>> adapted = with_lora(task, (".*/query/kernel", ".*/value/kernel"), 8)
  """
  rank = validate.integer("adapter.rank", rank)
  scale = 1.0
  if alpha is not None:
    scale = validate.number("adapter.alpha", alpha, gt=0) / rank
  shapes = jax.eval_shape(task.init, jax.random.key(0)).params
  treedef = jax.tree.structure(shapes)
  parts = _parts(shapes, targets, also, rank)

  def init(key: Key) -> Variables:
    params, buffers, rest = task.init(key)
    trained: dict[str, PyTree] = {}
    constants: dict[str, dict[str, Array]] = {}
    kept: list[Array | None] = []
    for i, (part, leaf) in enumerate(
      zip(parts, jax.tree.leaves(params), strict=True)
    ):
      kept.append(None if part.whole else leaf)
      if part.whole:
        trained[part.path] = leaf
      elif part.ins:
        a, b = _factors(jax.random.fold_in(key, i), leaf.shape, part.ins, rank)
        constants[part.path] = {SCALE: jnp.float32(scale)}
        trained[part.path] = {B: b}
        (constants if fixed_a else trained)[part.path][A] = a
    beside = AdapterConstants(constants, rest)
    frozen = Parts(jax.tree.unflatten(treedef, kept), beside)
    return Variables(trained, buffers, frozen)

  def joined(variables: Variables) -> Variables:
    """Return the task's own variables, with `LowRank` kernels."""
    trained, buffers, (kept, (constants, rest)) = variables
    bases = iter(jax.tree.leaves(kept))
    leaves: list[Array | LowRank] = []
    for path, ins, whole in parts:
      leaf = trained[path] if whole else next(bases)
      if ins:
        factors = {**constants[path], **trained[path]}
        leaf = LowRank(leaf, factors[A], factors[B], scale)
      leaves.append(leaf)
    return Variables(jax.tree.unflatten(treedef, leaves), buffers, rest)

  def loss(variables: Variables, examples: Examples, key: Key) -> Loss:
    made: Loss = evaluate(task.loss, joined(variables), examples, key)
    return made

  def metrics(variables: Variables, examples: Examples) -> dict[str, Metric]:
    made: dict[str, Metric] = evaluate(
      task.metrics, joined(variables), examples
    )
    return made

  def logits(variables: Variables, examples: Examples) -> Array:
    assert task.logits is not None
    made: Array = evaluate(task.logits, joined(variables), examples)
    return made

  def features(variables: Variables, examples: Examples) -> Array:
    assert task.features is not None
    made: Array = evaluate(task.features, joined(variables), examples)
    return made

  return task._replace(
    init=init,
    loss=loss,
    metrics=metrics,
    logits=None if task.logits is None else logits,
    features=None if task.features is None else features,
  )


class _Part(NamedTuple):
  """What becomes of a parameter: `ins` axes are inputs of a kernel, or 0."""

  path: str
  ins: int
  whole: bool


def _parts(
  shapes: PyTree, targets: Sequence[str], also: Sequence[str], rank: int
) -> list[_Part]:
  """Return what becomes of each parameter.

  Raises:
    TypeError, ValueError: see `with_lora`.
  """
  paths, leaves = paths_of(shapes), jax.tree.leaves(shapes)
  named = dict(zip(paths, leaves, strict=True))
  adapted = matching("adapter.targets", targets, shapes)
  whole = [False] * len(paths)
  if also:
    whole = matching("adapter.also", also, shapes)
  parts = []
  for path, like, hit, trains in zip(
    paths, leaves, adapted, whole, strict=True
  ):
    ins = 0
    if hit:
      if trains:
        raise ValueError(
          f"adapter.targets and adapter.also both match {path!r}; leave it to"
          " one of them."
        )
      bias = named.get(f"{path.rpartition('/')[0]}/bias")
      ins = _inputs(like, bias)
      _check_kernel(path, like, ins, rank)
    parts.append(_Part(path, ins, trains))
  return parts


def _inputs(
  kernel: jax.ShapeDtypeStruct, bias: jax.ShapeDtypeStruct | None
) -> int:
  """Return how many of a kernel's axes are inputs.

  A bias has the shape of the outputs. Without one, as in attention of
  `use_bias=False`, a kernel of three axes may be (inputs, heads, outputs) or
  (heads, inputs, outputs), and its shape decides: the factors have as few
  numbers as they can. Of three axes the first one is then the inputs if it is
  at least as long as the last one. So it is in attention, where a model is no
  narrower than a head, and its heads are fewer than the outputs.
  """
  shape = kernel.shape
  if bias is not None:
    axes = len(bias.shape)
    if 0 < axes < len(shape) and shape[-axes:] == bias.shape:
      return len(shape) - axes
  numbers = lambda ins: math.prod(shape[:ins]) + math.prod(shape[ins:])
  return min(range(1, len(shape)), key=numbers, default=0)


def _check_kernel(
  path: str, like: jax.ShapeDtypeStruct, ins: int, rank: int
) -> None:
  """Refuse a parameter that no adapter of this rank fits."""
  if len(like.shape) < 2 or not jnp.issubdtype(like.dtype, jnp.floating):
    raise ValueError(
      f"adapter.targets matches {path!r}, shape {like.shape}, {like.dtype};"
      " adapters are for kernels, float arrays of two or more axes. End the"
      " pattern with the kernel's name, such as '.*/kernel'."
    )
  least = min(math.prod(like.shape[:ins]), math.prod(like.shape[ins:]))
  if rank >= least:
    raise ValueError(
      f"adapter.rank={rank} is no low rank of {path!r}, shape {like.shape};"
      f" give at most {least - 1}, or leave the kernel out of adapter.targets."
    )


def _factors(
  key: Key, shape: tuple[int, ...], ins: int, rank: int
) -> tuple[Array, Array]:
  """Return A, uniform as a dense layer of PyTorch, and B, which is 0."""
  bound = 1 / math.sqrt(math.prod(shape[:ins]))
  a = jax.random.uniform(key, (*shape[:ins], rank), jnp.float32, -bound, bound)
  return a, jnp.zeros((rank, *shape[ins:]), jnp.float32)


def merged(variables: Variables) -> Variables:
  """Return the variables of the model itself, with its changed kernels.

  Args:
    variables: of a task that `with_lora` made.

  Returns:
    Those of the task that it was given.
  """
  return _itself(variables, LowRank.whole)


def unadapted(variables: Variables) -> Variables:
  """Return the variables of the model itself, without its adapters.

  Args:
    variables: of a task that `with_lora` made.

  Returns:
    Those of the task that it was given; what trains whole is as it is now.
  """
  return _itself(variables, lambda kernel: kernel.base)


def adapters_of(variables: Variables) -> dict[str, LowRank]:
  """Return path -> the parts of a kernel, of every kernel with an adapter.

  Args:
    variables: of any task; empty if `with_lora` did not make it.
  """
  trained, _, frozen = variables
  if isinstance(frozen, KeptBuffers):
    return adapters_of(variables._replace(frozen=frozen.rest))
  if not isinstance(frozen, Parts):
    return {}
  if not isinstance(frozen.rest, AdapterConstants):
    return {}
  leaves = jax.tree.leaves(frozen.params)
  kept = dict(zip(paths_of(frozen.params), leaves, strict=True))
  found = {}
  for path, own in frozen.rest.adapters.items():
    factors = {**own, **trained[path]}
    found[path] = LowRank(kept[path], factors[A], factors[B], factors[SCALE])
  return found


def with_kernels(
  variables: Variables, kernels: Mapping[str, Array]
) -> Variables:
  """Return variables with other frozen kernels beside their adapters.

  Args:
    variables: of a task that `with_lora` made.
    kernels: path -> the new kernel, of its shape and dtype.
  """
  frozen = variables.frozen
  if isinstance(frozen, KeptBuffers):
    inside = with_kernels(variables._replace(frozen=frozen.rest), kernels)
    return inside._replace(frozen=frozen._replace(rest=inside.frozen))
  leaves, treedef = jax.tree.flatten(frozen.params)
  pairs = zip(paths_of(frozen.params), leaves, strict=True)
  made = [kernels.get(path, leaf) for path, leaf in pairs]
  frozen = frozen._replace(params=jax.tree.unflatten(treedef, made))
  return variables._replace(frozen=frozen)


def _itself(
  variables: Variables, kernel: Callable[[LowRank], Array]
) -> Variables:
  """Return the variables of the model itself; `kernel` makes its kernels."""
  trained, buffers, frozen = variables
  if isinstance(frozen, KeptBuffers):
    inside = _itself(variables._replace(frozen=frozen.rest), kernel)
    kept_buffers = KeptBuffers(frozen.buffers, inside.frozen)
    return inside._replace(frozen=kept_buffers)
  adapted = adapters_of(variables)
  kept, (_, rest) = frozen
  # None, where a parameter trains whole, takes part in the order of paths.
  with_gaps = lambda tree: jax.tree.flatten(tree, is_leaf=lambda x: x is None)
  leaves, treedef = with_gaps(kept)
  paths = paths_of(jax.tree.unflatten(treedef, [0] * len(leaves)))
  made = []
  for path, leaf in zip(paths, leaves, strict=True):
    if leaf is None:  # or where `model.frozen` took it away
      leaf = trained.get(path)
    elif path in adapted:
      leaf = kernel(adapted[path])
    made.append(leaf)
  return Variables(jax.tree.unflatten(treedef, made), buffers, rest)


ADAPTERS: dict[str, Callable[..., Task]] = {"lora": with_lora}
