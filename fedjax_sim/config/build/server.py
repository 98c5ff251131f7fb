"""Build the schedules, aggregator, sampler and transforms of a config."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from fedjax_sim import core, sampling
from fedjax_sim.config import components
from fedjax_sim.core import Aggregator, Algorithm, Task, Transform
from fedjax_sim.data import (
  FederatedData,
  FederatedDataset,
  client_numbers,
)
from fedjax_sim.data.profile import class_counts
from fedjax_sim.engine import hparams
from fedjax_sim.privacy.secure.aggregators import SECURE, fixed_cohort
from fedjax_sim.tasks.scheduled_sampling import FIELD as SCHEDULED_SAMPLING
from fedjax_sim.training import schedules
from fedjax_sim.transforms import downlink, ef21, error_feedback

SCHEDULED = {  # section -> the hyper-parameter that its schedule multiplies
  "model": f"task.{SCHEDULED_SAMPLING}",
  "client": "client.learning_rate",
  "server": "server.learning_rate",
}


def build_schedules(
  config: ConfigDict, algorithm: Algorithm, task: Task
) -> dict[str, hparams.Schedule]:
  """Return the schedules of a config: hyper-parameter -> schedule.

  Raises:
    TypeError, ValueError: a text is no schedule, or the run does not have its
      hyper-parameter; names the field.
  """
  result = {}
  there = hparams.named(algorithm.hparams) | hparams.named(
    {"task": dict(task.hparams)}
  )
  for section, name in SCHEDULED.items():
    text = config[section].schedule
    if text is None:
      continue
    result[name] = schedules.parse(f"{section}.schedule", text)
    if name not in there:
      where = f"algorithm.name={config.algorithm.name!r} has no {name}"
      if section == "model":
        where = "model.scheduled_sampling is not set"
      raise ValueError(
        f"{section}.schedule={text!r}: {where}, which it would multiply; unset"
        f" it by --config.{section}.schedule=None."
      )
    first = result[name].factor(jnp.int32(0), result[name].init())
    if section == "model" and float(first) * there[name] > 1:
      raise ValueError(
        f"model.schedule={text!r} makes the probability"
        f" {float(first) * there[name]:g}; let it be at most 1."
      )
  return result


def build_aggregator(
  config: ConfigDict, sampler: core.Sampler, data: FederatedDataset
) -> Aggregator:
  """Return the aggregator; secure ones are given the largest cohort and weight.

  Args:
    config: complete.
    sampler: who takes part.
    data: whose clients.
  """
  section, most = config.aggregator, sampler.sizes[-1]
  slot, inner = components.slots_of("aggregator")
  filled: dict[str, Any] = {"clients": most}
  if section.name in SECURE and section.noise_multiplier is not None:
    promised = sampler.participation is not None
    fixed_cohort(sampler.expected, most, promised)
  elif section.name == "secure_mean" and section.max_weight is None:
    if config.algorithm.get("weighting") == "tokens":
      raise ValueError(
        "algorithm.weighting='tokens': the largest weight is not known from the"
        " numbers of examples; set aggregator.max_weight."
      )
    largest = float(data.train.sizes.max())
    used = config.client.max_examples or largest
    filled["max_weight"] = float(min(largest, used))
  if inner.key not in section:
    made: Aggregator = components.make(config, slot, **filled)
    return made
  try:
    options = components.given_fields(config, inner)
    made = components.make(config, slot, **options)
  except (TypeError, ValueError) as error:
    text = components.in_section(inner, section[inner.key], str(error))
    raise type(error)(text) from error
  return made


def build_sampler(
  config: ConfigDict,
  sizes: np.ndarray,
  label_counts: Callable[[], np.ndarray],
) -> Callable[[int, float], core.Sampler]:
  """Return a function of (clients, clients a round) that makes the sampler.

  Args:
    config: complete.
    sizes: shape=(clients,); how many examples each client has, for samplers
      that take it.
    label_counts: returns shape=(clients, classes); how many examples of each
      label each client has, for samplers that take it.
  """
  (slot,) = components.slots_of("sampler")
  known: dict[str, Any] = {"sizes": sizes}
  function = slot.factory(config.sampler.name)
  if "label_counts" in inspect.signature(function).parameters:
    known["label_counts"] = label_counts()  # it reads all labels

  def draw(num_clients: int, clients_per_round: float) -> core.Sampler:
    made: core.Sampler = components.make(
      config, slot, num_clients, clients_per_round, **known
    )
    return made

  return draw


def label_counts(data: FederatedDataset) -> np.ndarray:
  """Return how many examples of each label each training client has.

  Args:
    data: the data.

  Returns:
    Shape=(clients, classes), integer; without classes where there are none.
  """
  train, classes = data.train, data.stored_classes
  if "y" not in train.examples or not classes:
    return np.zeros((train.num_clients, 0), int)
  return class_counts(train, np.arange(train.num_clients), classes)


def leave_out(
  config: ConfigDict,
  sampler: core.Sampler,
  data: FederatedData,
  algorithm: Algorithm,
) -> core.Sampler:
  """Return the sampler without the clients of `server.leave_out`.

  Args:
    config: complete.
    sampler: who takes part otherwise.
    data: the training clients.
    algorithm: what they do.

  Raises:
    TypeError, ValueError: there is no such client, one comes twice, none is
      left, or the run is private, pools all data, or observes clients.
  """
  given = config.server.leave_out
  if not given:
    return sampler
  field, name = f"server.leave_out={given!r}", config.algorithm.name
  if algorithm.requirements.pools_data:
    raise ValueError(
      f"{field}: algorithm.name={name!r} pools the data of all clients, and has"
      " no cohorts to drop any from; take another algorithm."
    )
  if config.privacy.mechanism is not None:
    raise ValueError(
      f"{field}: privacy.mechanism={config.privacy.mechanism!r} counts on what"
      " sampler.name promises of all clients, and whom one leaves out is a"
      " choice that no epsilon covers; unset one of them."
    )
  numbers = client_numbers("server.leave_out", data, given)
  return sampling.without(sampler, numbers, data.num_clients)


def build_transforms(config: ConfigDict) -> list[Transform]:
  """Return the transforms, in their order, by the names of their sections.

  Args:
    config: complete.
  """
  chain = []
  for label in config.transforms.order:
    made, section = (
      _transform(config, "transforms", label),
      f"transforms.{label}",
    )
    fields = config.transforms[label]
    if fields.error_feedback and fields.ef21:
      raise ValueError(
        f"{section}.error_feedback=True and {section}.ef21=True: both feed an"
        " error back; set one of them to False."
      )
    if fields.error_feedback or fields.ef21:
      _check_feedback(section, label, fields)
    if fields.error_feedback:
      made = error_feedback(made)
    chain.append(ef21(made) if fields.ef21 else made)
  return chain


def _check_feedback(section: str, label: str, fields: ConfigDict) -> None:
  """Refuse a transform whose error grows without end when it is fed back.

  The error of unbiased `random_k` is n/k - 1 times the squared update. That of
  `drive` is below 1 either way.
  """
  name = fields.get("name") or label
  if name == "random_k" and fields.unbiased and fields.share <= 0.5:
    raise ValueError(
      f"{section}.unbiased=True multiplies what is kept, so an error that is"
      f" fed back grows; set {section}.unbiased=False."
    )


def build_downlink(config: ConfigDict, algorithm: Algorithm) -> Algorithm:
  """Return the algorithm with the transforms of what the server sends, if any.

  Args:
    config: complete.
    algorithm: as it is without.

  Raises:
    TypeError, ValueError: these do not go together; names the field.
  """
  labels = config.downlink.order
  if not labels:
    return algorithm
  if config.server.revert_to_best:
    raise ValueError(
      f"downlink.{labels[0]}: server.revert_to_best=True would take back what"
      " clients know, which no broadcast does; unset one of them."
    )
  for label in labels:  # what clients do not know yet is an error fed back
    _check_feedback(f"downlink.{label}", label, config.downlink[label])
  chain = [_transform(config, "downlink", label) for label in labels]
  return downlink(algorithm, chain)


def _transform(config: ConfigDict, section: str, label: str) -> Transform:
  """Return the transform of a labeled section, by the label's name."""
  slot = components.labeled_slot(section, label)
  made: Transform = components.make(config, slot)
  return made._replace(name=label)
