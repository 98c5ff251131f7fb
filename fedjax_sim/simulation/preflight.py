"""What is refused before anything is compiled: a model that does not fit.

The task is traced on the shapes of the run's batches; the size of the state and
of a round's order are known from shapes and client sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fedjax_sim import aggregators, core, distributed
from fedjax_sim.core import (
  Aggregator,
  Batch,
  PyTree,
  Task,
  Variables,
  validate,
)
from fedjax_sim.core.errors import FedjaxSimError
from fedjax_sim.core.tree import paths_of
from fedjax_sim.data import FederatedData, FederatedDataset, prepared_shapes
from fedjax_sim.distributed import memory
from fedjax_sim.engine import client_metrics, program
from fedjax_sim.engine import plan as plans
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.engine.client_loop import augmented, with_numbers
from fedjax_sim.engine.state import RunState
from fedjax_sim.tasks import fast_layers
from fedjax_sim.tasks.metrics import MetricError

T = TypeVar("T")

MOST_EXAMPLES = 2**31 - 1  # in one round: entries of int32


class ModelError(FedjaxSimError, ValueError):
  """The model fits neither the data nor the devices."""


class DataError(FedjaxSimError, ValueError):
  """The data hold values that would change on a device."""


def check(
  *,
  task: Task,
  data: FederatedDataset,
  splits: Sequence[FederatedData],
  batching: LocalBatching,
  batchings: Sequence[LocalBatching],
  most_clients: int,
  variables: Variables,
  state: RunState,
  aggregator: Aggregator,
  mesh: Mesh,
  eval_batch_size: int,
) -> None:
  """Refuse data and a model that fit neither each other nor the devices.

  Args:
    task: what is trained.
    data: what it is trained and evaluated on.
    splits: for every pass of the algorithm, the data that it goes through.
    batching: what a client does, as it was asked for.
    batchings: for every pass, what a client does.
    most_clients: clients of the largest cohort.
    variables: shapes and dtypes of the global model.
    state: shapes and dtypes of the run's state.
    aggregator: how updates become one.
    mesh: the devices.
    eval_batch_size: examples that are evaluated at once, at most.

  Raises:
    DataError: numbers beyond the dtypes that JAX keeps, or an `augment` that
      makes other shapes.
    ModelError: the model does not fit, or cannot take the values.
    ValueError: a round has too many examples, or the aggregator does not keep
      to its contract.
  """
  capacity = plans.capacity(
    [part.sizes for part in splits], batchings, most_clients, lanes=1, devices=1
  )
  check_order(max(capacity.order), batching)
  check_values(task, data)
  check_augment(data)
  check_parameters(variables.params)
  check_memory(state, mesh)
  aggregators.check(aggregator, variables.params)
  check_task(task, variables, data, batchings, eval_batch_size)


def check_values(task: Task, data: FederatedDataset) -> None:
  """Refuse values that JAX does not keep, or that the model cannot take.

  Args:
    task: what is trained.
    data: what it is trained and evaluated on.

  Raises:
    DataError: numbers beyond the dtype that JAX keeps.
    ModelError: `Task.check` refuses them.
  """
  sets = {**data.all_splits, "seen": data.seen, "unseen": data.unseen}
  parts = {name: part.examples for name, part in sets.items() if part}
  if data.test is not None:
    parts["test"] = data.test
  for name, examples in parts.items():
    for field, array in examples.items():
      kept = jax.dtypes.canonicalize_dtype(array.dtype)
      try:
        validate.representable(f"field {field!r} of {name}", array, kept)
      except ValueError as error:
        raise DataError(str(error)) from error
    try:
      task.check({**examples, **data.tables})
    except ValueError as error:
      raise ModelError(f"{name}: {error}") from error


def check_augment(data: FederatedDataset) -> None:
  """Refuse an `augment` that makes other shapes of a batch.

  Raises:
    DataError: it fails, or fields, shapes or dtypes are not as they were.
  """
  if data.augment is None:
    return
  before = prepared_shapes(data.prepare, data.train.examples)
  try:
    after = dict(jax.eval_shape(data.augment, jax.random.key(0), before))
  except Exception as error:
    text = " ".join(str(error).split())
    raise DataError(f"augment fails: {type(error).__name__}: {text}") from error
  told = lambda x: f"{x.dtype} {x.shape}"
  if changed := validate.differences(
    {field: told(x) for field, x in before.items()},
    {field: told(x) for field, x in after.items()},
  ):
    raise DataError(
      f"augment changes {'; '.join(changed)}; let it keep fields, shapes and"
      " dtypes, since models are evaluated on batches as they were."
    )


def check_order(examples: int, batching: LocalBatching) -> None:
  """Refuse a round whose examples no int32 counts.

  Args:
    examples: of the largest round, padding included.
    batching: what a client does.

  Raises:
    ValueError: there are too many.
  """
  if examples > MOST_EXAMPLES:
    raise ValueError(
      f"client.epochs={batching.epochs}, client.steps={batching.steps}: a round"
      f" has {examples:,} examples, more than {MOST_EXAMPLES:,}; lower one of"
      " them."
    )


def check_task(
  task: Task,
  variables: Variables,
  data: FederatedDataset,
  batchings: Sequence[LocalBatching],
  eval_batch_size: int,
) -> None:
  """Trace the task's loss and metrics on batches as large as the run's.

  Args:
    task: what is trained.
    variables: shapes and dtypes.
    data: what it is trained and evaluated on.
    batchings: for every pass, what a client does; fitted to the clients.
    eval_batch_size: examples that are evaluated at once, at most.

  Raises:
    ModelError: it refuses the batch, or returns another shape or dtype than
      the contract says.
  """

  def metrics(variables: Variables, batch: Batch) -> None:
    batch = batch._replace(examples=data.prepare(batch.examples))
    core.sum_metrics(task, variables, batch)

  stored = data.train.examples
  batch_of = functools.partial(_batch, stored)
  trained = {batching.batch_size for batching in batchings}
  evaluated = {min(eval_batch_size, n) for n in _largest_evaluated(data)}
  try:
    for size in sorted(trained):
      jax.eval_shape(_loss(task, data), variables, batch_of(size), _SEED)
    for size in sorted(evaluated or trained):
      jax.eval_shape(metrics, variables, batch_of(size))
  except MetricError as error:
    raise ModelError(str(error)) from error
  except Exception as error:
    text = " ".join(str(error).split()) or type(error).__name__
    one = [f"{k!r} {x.dtype} {x.shape[1:]}" for k, x in stored.items()]
    raise ModelError(
      f"the model does not fit the data: {text} (examples have"
      f" {', '.join(one)} and {data.num_classes:,} classes)"
    ) from error


def check_parameters(params: PyTree) -> None:
  """Refuse parameters that no gradient can move.

  Args:
    params: of the global model, or their shapes.

  Raises:
    ModelError: there are none, or one is not of floats.
  """
  paths, leaves = paths_of(params), jax.tree.leaves(params)
  if not sum(x.size for x in leaves):
    raise ModelError(
      "the model has no parameters, so nothing would train; let Task.init"
      " return Variables(params={'w': ...})."
    )
  for path, x in zip(paths, leaves, strict=True):
    if jnp.issubdtype(x.dtype, jnp.floating):
      continue
    cure = (
      f"freeze it, by model.frozen=('{path}',), or Variables(params,"
      " frozen=...), or make it floats, by .astype(jnp.float32)"
    )
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
      cure = (
        "keep its parts, by jnp.stack([w.real, w.imag]), and put them together"
        " in the model, by w[0] + 1j * w[1]"
      )
    raise ModelError(
      f"the parameter {path!r} is {x.dtype}, and training takes real floats;"
      f" {cure}."
    )


_SEED = jax.ShapeDtypeStruct((), jnp.uint32)


def _loss(task: Task, data: FederatedDataset) -> Callable[..., jax.Array]:
  """Return (variables, batch as stored, seed) -> the loss of a local step."""

  def loss(variables: Variables, batch: Batch, seed: jax.Array) -> jax.Array:
    key = jax.random.key(seed)
    batch = batch._replace(examples=data.prepare(batch.examples))
    batch = augmented(batch, data.augment, key)
    examples = with_numbers(batch.examples, task.hparams)
    batch = batch._replace(examples=examples)
    return core.mean_loss(task, variables, batch, key)[0]

  return loss


def slow_layers(
  task: Task,
  variables: Variables,
  data: FederatedDataset,
  batchings: Sequence[LocalBatching],
) -> list[str]:
  """Describe which layers are slow on this backend, and what mends them.

  Args:
    task: what is trained.
    variables: shapes and dtypes.
    data: what it is trained on.
    batchings: for every pass, what a client does; fitted to the clients.
  """
  if jax.default_backend() != "cpu":
    return []
  batch = _batch(data.train.examples, batchings[0].batch_size)
  loss, arguments = _loss(task, data), (variables, batch, _SEED)
  slow = fast_layers.slow_layers(loss, *arguments)
  if not slow:
    return []
  left = fast_layers.slow_layers(fast_layers.fast(loss), *arguments)
  mended = [text for text in slow if text not in left]
  few = lambda texts: ", ".join(texts[:5]) + ", ..." * (len(texts) > 5)
  told = []
  if mended:
    told.append(
      f"{few(mended)}: XLA's own, which in a client's loop on a CPU is many"
      " times slower; mend it by task ="
      " fedjax_sim.tasks.fast_layers.with_fast_layers(task)"
    )
  if left:
    told.append(
      f"{few(left)}: XLA's own, which in a client's loop on a CPU is slow; it"
      " has no faster form here"
    )
  return told


def check_round(trace: Callable[[], T]) -> T:
  """Trace a round, so that what its parts refuse shows before anything runs.

  Args:
    trace: traces it.

  Returns:
    What `trace` returns.

  Raises:
    TypeError, ValueError: a part refuses; with its message, on one line.
  """
  try:
    return trace()
  except Exception as error:
    text = " ".join(str(error).split()) or type(error).__name__
    own = isinstance(error, TypeError | ValueError) and "\n" not in str(error)
    if own:
      raise
    raise ValueError(
      f"the round cannot be computed: {type(error).__name__}: {text}"
    ) from error


def metrics_of(
  task: Task, variables: Variables, data: FederatedDataset
) -> dict[str, bool]:
  """Return the names of a task's numbers.

  Args:
    task: what is evaluated.
    variables: shapes and dtypes.
    data: whose examples fit it.

  Returns:
    Name -> whether there are its mean and percentiles over clients.
  """

  def metrics(variables: Variables, batch: Batch) -> dict[str, Any]:
    return task.metrics(variables, data.prepare(batch.examples))

  one = _batch(data.train.examples, 1)
  found: dict[str, bool] = {}
  for metric, shapes in jax.eval_shape(metrics, variables, one).items():
    joint = task.joint.get(metric)
    if joint is None:
      found[metric] = True
    else:
      names = client_metrics.number_names(metric, joint, shapes.values)
      found |= dict.fromkeys(names, joint.names is None)
  return found


def _batch(stored: Mapping[str, np.ndarray], size: int) -> Batch:
  """Return shapes and dtypes of a batch of examples as they are stored."""

  def shape(x: np.ndarray) -> Any:
    dtype = jax.dtypes.canonicalize_dtype(x.dtype)
    return jax.ShapeDtypeStruct((size, *x.shape[1:]), dtype)

  fields = {field: shape(x) for field, x in stored.items()}
  return Batch(fields, shape(np.zeros(1, bool)))


def _largest_evaluated(data: FederatedDataset) -> list[int]:
  """Return the most examples that can be evaluated at once, for every set."""
  sets = [part for part in (data.seen, data.unseen) if part is not None]
  largest = [int(part.sizes.max()) for part in sets]
  if data.test is not None:
    largest.append(len(next(iter(data.test.values()))))
  return largest


def check_memory(state: RunState, mesh: Mesh) -> None:
  """Refuse a state that no device can hold.

  Args:
    state: shapes and dtypes.
    mesh: the devices, over which the table of client states is dealt.

  Raises:
    ModelError: it is too large.
  """
  size = distributed.shard_nbytes(state, mesh, program.state_spec(state, mesh))
  limit = memory.memory_limit(mesh.local_devices[0])
  if size > limit:
    raise ModelError(
      f"the model's parameters and what the algorithm keeps take"
      f" {size / 1e6:,.0f} MB; a device has {limit / 1e6:,.0f} MB to give. Make"
      " the model smaller, or look for a label that is too large."
    )
