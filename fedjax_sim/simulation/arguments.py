"""What is refused when a simulator is made: arguments that do not fit.

All of it is known from the arguments alone, without tracing the model; what has
to be traced is in `preflight`.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from fedjax_sim.core import (
  Aggregator,
  Algorithm,
  Sampler,
  Task,
  Transform,
  validate,
)
from fedjax_sim.data import FederatedDataset
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.simulation.runtime import Runtime

# Field of `Simulator` -> its type, and an expression that gives one.
KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
  "task": (Task, "function_task(init, loss)"),
  "algorithm": (Algorithm, "fedavg(task, client_optimizer, server_optimizer)"),
  "data": (FederatedDataset, "make_dataset(name, data, num_classes=10)"),
  "sampler": (Sampler, "sampling.uniform(num_clients, 10)"),
  "batching": (LocalBatching, "LocalBatching(batch_size=20, epochs=1)"),
  "aggregator": (Aggregator, "aggregators.weighted_mean()"),
  "transforms": ((list, tuple), "[transforms.clip(1.0)]"),
  "runtime": (Runtime, "Runtime(lanes=1)"),
}


def is_private(algorithm: Algorithm, aggregator: Aggregator) -> bool:
  """Return whether clients are protected by noise, the server's or their own.

  What is then told, be it an epsilon of central or local privacy or the rho of
  secure aggregation, counts on what the sampler promises.

  Args:
    algorithm: how clients train and the server reacts.
    aggregator: how updates become one.
  """
  central = algorithm.privacy is not None
  return central or algorithm.draws_noise or aggregator.draws_noise


def check(fields: Mapping[str, Any]) -> None:
  """Refuse fields of `Simulator` that are wrong, or do not go together.

  Args:
    fields: name -> value, all of them.

  Raises:
    TypeError, ValueError: names the field.
  """
  f = types.SimpleNamespace(**fields)
  check_seeds(f.seed, f.noise_seed)
  check_options(f.log_clients, f.debug)
  check_kinds(**{name: fields[name] for name in KINDS})
  check_transforms(f.transforms)
  check_parts(f.algorithm, f.aggregator, f.data, f.runtime)
  pools_data = f.algorithm.requirements.pools_data
  clients = 1 if pools_data else f.data.train.num_clients
  check_sampler(f.sampler, clients)
  check_cohort(f.sampler, f.aggregator)
  check_unobserved(f.sampler, f.algorithm, f.aggregator)
  check_best(f.best_metrics, f.revert_to_best)


def check_kinds(**fields: Any) -> None:
  """Refuse fields of `Simulator` that have another type than theirs.

  Args:
    **fields: name -> value.

  Raises:
    TypeError: names the field, and an expression that gives one.
  """
  for field, value in fields.items():
    validate.instance(field, value, *KINDS[field])


def check_seeds(seed: int, noise_seed: int | None) -> None:
  """Refuse seeds that do not fit into 32 bits.

  Args:
    seed: seed of the run.
    noise_seed: seed of private noise; None for fresh entropy.

  Raises:
    TypeError, ValueError: names the seed.
  """
  validate.integer("seed", seed, ge=0, le=2**32 - 1)
  if noise_seed is not None:
    validate.integer("noise_seed", noise_seed, ge=0, le=2**32 - 1)


def check_options(log_clients: bool, debug: bool) -> None:
  """Refuse options of another type than theirs.

  Args:
    log_clients: whether clients are logged.
    debug: whether rounds run as a Python loop over clients.

  Raises:
    TypeError: names the option.
    ValueError: several processes debug, each of which has a part of the state.
  """
  validate.boolean("log_clients", log_clients)
  validate.boolean("debug", debug)
  if debug and jax.process_count() > 1:
    raise ValueError(
      f"debug=True runs in one process, and there are {jax.process_count()};"
      " start one, with few clients."
    )


def check_best(best_metrics: Sequence[str], revert_to_best: bool) -> None:
  """Refuse metrics of best models that are none, or going back without one.

  Args:
    best_metrics: metrics, of each of which the best model is kept.
    revert_to_best: whether a run goes back to the best model by the first.

  Raises:
    TypeError: they are no tuple or list of texts.
    ValueError: a metric is there twice, or none to go back by.
  """
  field = "server.best_metrics"
  if isinstance(best_metrics, str):
    raise TypeError(
      f"{field}={best_metrics!r} is a str; give a tuple: ({best_metrics!r},)."
    )
  validate.instance(field, best_metrics, (list, tuple), "('test/accuracy',)")
  for i, metric in enumerate(best_metrics):
    validate.instance(f"{field}[{i}]", metric, str, "'test/accuracy'")
  if twice := [m for m in best_metrics if best_metrics.count(m) > 1]:
    raise ValueError(f"{field} has {twice[0]!r} twice; leave one of them out.")
  validate.boolean("server.revert_to_best", revert_to_best)
  if revert_to_best and not best_metrics:
    raise ValueError(
      "server.revert_to_best=True goes back to the best model, and none is"
      f" kept; set {field}, such as ('test/accuracy',)."
    )


def check_transforms(transforms: Sequence[Transform]) -> None:
  """Refuse transforms that are none, or share a name.

  Args:
    transforms: transforms of the client updates, a list or a tuple.

  Raises:
    TypeError: one is no `Transform`, or it is a single one.
    ValueError: a name is there twice.
  """
  if isinstance(transforms, Transform):  # a tuple, too
    raise TypeError("transforms is a Transform; give a list of them.")
  for i, transform in enumerate(transforms):
    validate.instance(
      f"transforms[{i}]", transform, Transform, "transforms.clip(1.0)"
    )
  names = [t.name for t in transforms]
  if len(set(names)) < len(names):
    twice = next(name for name in names if names.count(name) > 1)
    raise ValueError(
      f"transforms={names} has {twice!r} twice, which would share their"
      " hyper-parameters; rename one of them:"
      f" transform._replace(name='{twice}_2')."
    )


def check_sampler(sampler: Sampler, num_clients: int) -> None:
  """Refuse a sampler with other cohorts than there can be.

  Args:
    sampler: who takes part in a round.
    num_clients: number of clients that may take part.

  Raises:
    TypeError, ValueError: sizes or expected size are no such numbers, or there
      are fewer clients.
  """
  sizes = sampler.sizes
  if not isinstance(sizes, tuple) or not sizes:
    raise TypeError(
      f"sampler.name: Sampler.sizes={sizes!r}; give a tuple of numbers."
    )
  for size in sizes:
    validate.integer("sampler.name: Sampler.sizes", size)
  if any(a >= b for a, b in itertools.pairwise(sizes)):
    raise ValueError(
      f"sampler.name: Sampler.sizes={sizes}: give increasing numbers."
    )
  expected = sampler.expected
  validate.number("sampler.name: Sampler.expected", expected, ge=0)
  if sizes[-1] > num_clients:
    raise ValueError(
      f"The sampler draws up to {sizes[-1]} clients a round;"
      f" there are {num_clients}. Lower server.clients_per_round."
    )
  if (sampler.init is None) != (sampler.observe is None):
    raise ValueError(
      "sampler.name: Sampler.init and Sampler.observe belong together; give"
      " both, or neither."
    )
  if sampler.observe is not None and sampler.participation is not None:
    raise ValueError(
      "sampler.name: Sampler.observe makes a cohort depend on what clients"
      " report, so Sampler.participation cannot hold; set it to None."
    )


def check_cohort(sampler: Sampler, aggregator: Aggregator) -> None:
  """Refuse cohorts that are too small for what an aggregator promises.

  Args:
    sampler: who takes part.
    aggregator: how updates become one.

  Raises:
    ValueError: even the largest cohort is.
  """
  most = sampler.sizes[-1]
  if most < aggregator.min_clients:
    own = aggregator.hparams.items()
    numbers = ", ".join(f"aggregator.{k}={v:.10g}" for k, v in own)
    raise ValueError(
      f"{numbers or 'aggregator.name'} needs cohorts of"
      f" {aggregator.min_clients} clients, and sampler.name draws {most} at"
      " most; withstand fewer attackers, or raise server.clients_per_round."
    )


def check_unobserved(
  sampler: Sampler, algorithm: Algorithm, aggregator: Aggregator
) -> None:
  """Refuse a sampler that privacy mechanisms, or the algorithm, do not take.

  Args:
    sampler: who takes part in a round.
    algorithm: how clients train and the server reacts.
    aggregator: how updates become one.

  Raises:
    ValueError: the run is private, and the sampler observes, or has weights; or
      the algorithm is one that these would lead astray.
  """
  private = is_private(algorithm, aggregator)
  if private and sampler.observe is not None:
    raise ValueError(
      "sampler.name observes what clients report without noise, so who takes"
      " part would reveal their data, which no epsilon covers; take 'uniform'"
      " or 'poisson', or a run that is not private."
    )
  if private and sampler.weights is not None:
    raise ValueError(
      "sampler.name multiplies what clients weigh (Sampler.weights), and what"
      " private clients weigh is bounded, which undoes it; take 'uniform' or"
      " 'poisson', or a run that is not private."
    )
  if algorithm.requirements.own_weights and sampler.weights is not None:
    raise ValueError(
      "sampler.name multiplies what clients weigh (Sampler.weights), and"
      " algorithm.name lets all of a cohort count the same, or its server would"
      " lose track of what they keep; take 'uniform', or another algorithm."
    )


def check_parts(
  algorithm: Algorithm,
  aggregator: Aggregator,
  data: FederatedDataset,
  runtime: Runtime,
) -> None:
  """Refuse parts of an experiment that do not go with each other.

  Args:
    algorithm: how clients train and the server reacts.
    aggregator: how updates become one.
    data: federated data.
    runtime: how fast it goes.

  Raises:
    ValueError: the data lack a split or server's examples that the algorithm
      uses, or the aggregator is not what algorithm and runtime need.
  """
  for p in algorithm.all_passes:
    if p.split not in data.all_splits:
      raise validate.UnknownNameError(
        f"algorithm.name walks over the split {p.split!r}; the data has"
        f" {', '.join(sorted(data.all_splits))}. Set"
        " data.labelled_fraction for 'labelled' and 'unlabelled', or give"
        " FederatedDataset.splits."
      )
  stacked = aggregator.needs_all_updates
  if aggregator.finishes_shares and not stacked:
    name = "coordinatewise" if aggregator.coordinatewise else "by_shares"
    raise ValueError(
      f"Aggregator.{name}=True needs a stack of updates; set"
      " needs_all_updates=True, too, or unset it."
    )
  if algorithm.requirements.all_updates == aggregator.reduces:
    raise ValueError(
      "algorithm.name joins the clients' updates itself; set"
      " aggregator.name='stack', which keeps them all."
      if algorithm.requirements.all_updates
      else "aggregator.name='stack' leaves the joining of updates to the"
      " algorithm, and algorithm.name does not do it; set"
      " aggregator.name='weighted_mean', or another one that is not 'stack'."
    )
  if algorithm.privacy is not None and not aggregator.weighted_mean:
    raise ValueError(
      "privacy.mechanism adds noise to a plain sum, in the place of"
      " aggregator.name; leave it at 'weighted_mean'."
    )
  if algorithm.requirements.weighted_mean and not aggregator.weighted_mean:
    raise ValueError(
      "algorithm.name, or server.stale_probability, counts on a weighted"
      " mean; set aggregator.name='weighted_mean'."
    )
  if algorithm.requirements.server_data and data.server is None:
    raise ValueError(
      "algorithm.name, or replay.steps, asks for examples of the server's own,"
      " and there are none; set data.server_clients, such as to 1, or give"
      " FederatedDataset.server."
    )
  if stacked and runtime.deterministic_reduction is not None:
    raise ValueError(
      f"runtime.deterministic_reduction="
      f"{runtime.deterministic_reduction}: aggregator.name keeps a"
      " stack of updates, which every number of devices computes with in"
      " another way. Unset it, or take one that sums."
    )
