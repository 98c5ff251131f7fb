"""Build the schedules, the aggregator and the sampler of a config."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax.numpy as jnp
from ml_collections import ConfigDict

from fedjax_sim import aggregators, core
from fedjax_sim.config.build.sections import given_fields
from fedjax_sim.core import Aggregator, Algorithm, Task, references, validate
from fedjax_sim.data import FederatedDataset
from fedjax_sim.engine import hparams
from fedjax_sim.privacy.secure.aggregators import SECURE, fixed_cohort
from fedjax_sim.sampling import SAMPLERS
from fedjax_sim.tasks.scheduled_sampling import FIELD as SCHEDULED_SAMPLING
from fedjax_sim.training import schedules

_SCHEDULED = {  # section -> the hyper-parameter that its schedule multiplies
  "model": f"task.{SCHEDULED_SAMPLING}",
  "client": "client.learning_rate",
  "server": "server.learning_rate",
}


def build_schedules(
  config: ConfigDict, algorithm: Algorithm, task: Task
) -> dict[str, hparams.Schedule]:
  """The schedules of a config: hyper-parameter -> schedule.

  Raises:
    TypeError, ValueError: a text that calls none, or one of what the run does
      not have; names the field.
  """
  result = {}
  there = hparams.named(algorithm.hparams) | hparams.named(
    {"task": dict(task.hparams)}
  )
  for section, name in _SCHEDULED.items():
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
  """The aggregator; secure ones know the largest cohort."""
  name = config.server.aggregator
  make = references.lookup(
    "server.aggregator",
    name,
    {**aggregators.AGGREGATORS, **SECURE},
    Aggregator,
  )
  given = given_fields(config.secure)
  if name not in SECURE:
    for field, value in given.items():
      raise ValueError(
        f"secure.{field}={value!r}: server.aggregator={name!r} is not secure;"
        f" give one of {', '.join(SECURE)}, or unset it, by"
        f" --config.secure.{field}=None."
      )
    return make()
  most = sampler.sizes[-1]
  if "noise_multiplier" in given:
    promised = sampler.participation is not None
    fixed_cohort(sampler.expected, most, promised)
  elif name == "secure_mean":
    if config.algorithm.weighting == "tokens" and "most_weight" not in given:
      raise ValueError(
        "algorithm.weighting='tokens': the largest weight is not known from the"
        " numbers of examples; set secure.most_weight."
      )
    largest = float(data.train.sizes.max())
    used = config.client.max_examples or largest
    given.setdefault("most_weight", float(min(largest, used)))
  owner = f"server.aggregator={name!r}"
  validate.arguments(owner, given, make, hidden=("clients",), section="secure")
  return make(most, **given)


def build_sampler(config: ConfigDict) -> Callable[..., core.Sampler]:
  """(clients, clients a round) -> the sampler, with its other arguments."""
  server = config.server
  sampler = references.lookup(
    "server.sampling", server.sampling, SAMPLERS, core.Sampler
  )
  least = server.least_clients_per_round
  if least is not None:
    if server.sampling != "uniform":
      raise ValueError(
        f"server.least_clients_per_round={least} does not go with"
        f" server.sampling={server.sampling!r}; unset one of them."
      )
    sampler = functools.partial(sampler, least=least)
  groups = server.sampling_groups
  if (groups is not None) != (server.sampling == "cyclic_poisson"):
    raise ValueError(
      f"server.sampling_groups={groups} with server.sampling="
      f"{server.sampling!r}; 'cyclic_poisson' needs a number of groups, and no"
      " other sampling takes one."
    )
  if groups is not None:
    sampler = functools.partial(sampler, groups=groups)
  population = server.sampling_population
  if population is not None:
    if server.sampling != "poisson":
      raise ValueError(
        f"server.sampling_population={population} is of"
        f" server.sampling='poisson', and it is {server.sampling!r}; unset one"
        " of them."
      )
    sampler = functools.partial(sampler, population=population)
  traced = {
    k: server[k] for k in ("trace", "round_seconds") if server[k] is not None
  }
  if traced and server.sampling != "available":
    field, value = next(iter(traced.items()))
    raise ValueError(
      f"server.{field}={value!r} is of server.sampling='available', and it is"
      f" {server.sampling!r}; unset one of them."
    )
  if server.sampling == "available":
    if "trace" not in traced:
      raise ValueError(
        "server.sampling='available' needs server.trace, an .npz file of when"
        " devices are ready."
      )
    sampler = functools.partial(sampler, **traced)
  return sampler
