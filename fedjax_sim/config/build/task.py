"""Build the task of a config."""

from __future__ import annotations

import jax.numpy as jnp
from ml_collections import ConfigDict

from fedjax_sim import tasks
from fedjax_sim.config import components
from fedjax_sim.core import Task, references, validate
from fedjax_sim.core.weights import read_weights
from fedjax_sim.data import FederatedDataset
from fedjax_sim.tasks.freezing import (
  with_frozen,
  with_frozen_dtype,
  with_kept_buffers,
)
from fedjax_sim.tasks.initial import with_initial
from fedjax_sim.tasks.measures import named_measure
from fedjax_sim.tasks.metrics import ExampleMetric, with_metrics
from fedjax_sim.tasks.mixture import with_mixture
from fedjax_sim.tasks.scheduled_sampling import with_scheduled_sampling

COMPUTE_DTYPES = {"float32": None, "bfloat16": jnp.bfloat16}


def build_task(config: ConfigDict, data: FederatedDataset) -> Task:
  """Return the model's task, in the precision that the config asks for.

  Args:
    config: complete.
    data: what it is trained on.
  """
  section = config.model
  own = references.is_reference(section.name)  # it may be no classifier
  if not data.num_classes and not own:
    raise ValueError(
      f"model.name={section.name!r} tells classes apart, but"
      f" data.name={config.data.name!r} has none: its labels 'y' are no whole"
      " numbers, or data.num_classes is 0. Give integer labels from 0, and"
      " leave data.num_classes out."
    )
  (slot,) = components.slots_of("model")
  task: Task = components.make(
    config, slot, data.example_shape, data.num_classes
  )
  if section.scheduled_sampling is not None:
    task = with_scheduled_sampling(task, section.scheduled_sampling)
  task = _begun(section, task)
  if section.frozen is not None:
    task = with_frozen(task, section.frozen)
  if config.adapter.name is not None:
    (slot,) = components.slots_of("adapter")
    task = components.make(config, slot, task)
  dtype = validate.lookup(
    "runtime.compute_dtype", config.runtime.compute_dtype, COMPUTE_DTYPES
  )
  if dtype is not None:
    task = tasks.with_compute_dtype(task, dtype)
  dtype = validate.lookup(
    "runtime.frozen_dtype", config.runtime.frozen_dtype, COMPUTE_DTYPES
  )
  if dtype is not None:
    task = with_frozen_dtype(task, dtype)
  if not section.send_buffers:  # in their own precision
    task = with_kept_buffers(task)
  if config.runtime.remat:
    task = tasks.with_remat(task)
  if section.mixture is not None:
    task = with_mixture(task, section.mixture)
  if section.metrics is not None:
    task = with_metrics(task, [_metric(x) for x in section.metrics])
  return task


def _metric(name: str) -> ExampleMetric:
  """Return a metric that the config names: one of ours, or a reference."""
  if references.is_reference(name):
    return references.load("model.metrics", name)
  return named_measure("model.metrics", name)


def _begun(section: ConfigDict, task: Task) -> Task:
  """Return the task, beginning from the weights that the section names."""
  if section.initial is None:
    if section.initial_only is not None:
      raise ValueError(
        f"model.initial_only={section.initial_only!r} does nothing without"
        " model.initial; set that, or unset it."
      )
    return task
  source = f"model.initial={section.initial!r}"
  try:
    arrays = read_weights(section.initial).arrays
  except OSError as error:
    raise type(error)(
      f"{source} cannot be read: {error.strerror}; give a weights file."
    ) from error
  except (ValueError, ImportError) as error:
    raise type(error)(f"model.initial: {error}") from error
  return with_initial(task, arrays, section.initial_only, source=source)
