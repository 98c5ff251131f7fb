"""Every algorithm under every privacy: it keeps its bound or is refused.

A compiled round is run on neighboring federations, one client having extreme
examples, or none that it sends, and what the server gets before noise, or with
the same noise, is compared with the distance that noise is made for. Whatever
else the server gets must be the same, bit by bit.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_contract import (
  FEATURES,
  SIZES,
  build,
  task_of,
  with_everything,
)

from fedjax_sim.algorithms import ALGORITHMS
from fedjax_sim.config import components
from fedjax_sim.core import Sampler
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.privacy.central import CentralDPConfig, with_central_dp
from fedjax_sim.privacy.local import with_local_dp
from fedjax_sim.privacy.local.additive import gaussian
from fedjax_sim.privacy.secure import secure
from fedjax_sim.privacy.secure.distributed_gaussian import (
  distributed_gaussian,
  grid,
  squared_sensitivity,
)
from problems import blobs, make_simulator

CLIP, STATISTICS, WEIGHT = 0.5, 0.25, 3.0
EVERYBODY = list(range(len(SIZES)))
EXTREME = (1e4, -1e3)

ONE_BY_ONE = "every client's update|every update by itself"
STACK = "set aggregator.name='stack'"
MEAN = "set aggregator.name='weighted_mean'"
MORE = r"send statistics, too|makes it send statistics, too"
SURVEY = "survey"
POOLED = "pools the data|trains on everybody's data"
# Why an algorithm cannot be private in this way; all others keep their bounds.
REFUSED = {
  "central": {
    "agnostic": "wants numbers of every client by itself",
    "centralized": POOLED,
    **dict.fromkeys(
      ("dga_rl", "fedex_lora", "fedlaw", "fltrust", "gossip"), ONE_BY_ONE
    ),
    "fedem": "has buffers",
    "fedlin": SURVEY,
    "hierarchical": "several groups of clients",
    "mime": SURVEY,
  },
  "local": {
    "agnostic": "wants other numbers of every client",
    "centralized": POOLED,
    **dict.fromkeys(
      ("dga_rl", "fedex_lora", "fedlaw", "fltrust", "gossip"), ONE_BY_ONE
    ),
    "fedem": "send buffers, too",
    "fedlin": SURVEY,
    "hierarchical": "which group of clients it belongs to",
    "mime": SURVEY,
    **dict.fromkeys(("dga", "fedexp", "fedlabels", "fednova", "ifca"), MORE),
    **dict.fromkeys(("mime_lite", "q_fedavg", "scaffold"), MORE),
  },
  "secure": {
    "agnostic": MEAN,
    "centralized": POOLED,
    **dict.fromkeys(
      ("dga_rl", "fedex_lora", "fedlaw", "fltrust", "gossip"), STACK
    ),
    "fedem": "send buffers, too",
    "fedexp": MEAN,
    "fedlin": SURVEY,
    "hierarchical": "a sum for each group of clients",
    "ifca": MEAN,
    "mime": SURVEY,
    "dga": "every client weighs 1",
    **dict.fromkeys(("fedlabels", "fednova"), MORE),
    **dict.fromkeys(("mime_lite", "q_fedavg", "scaffold"), MORE),
  },
}
# Whose clients send more than an update, which central privacy has to bound.
WITH_STATISTICS = (
  *("dga", "fedexp", "fedlabels", "fednova", "ifca", "mime_lite"),
  *("q_fedavg", "scaffold"),
)
QUICK = {"central": ("ifca",), "local": (), "secure": ("quantiles",)}


class Got(NamedTuple):
  """What the server's part of an algorithm was given in a round."""

  aggregate: Any
  survey: Any


def unbuffered(name):
  """The task of the contract's tests without buffers, which privacy refuses."""
  task = task_of(name)
  # FedEM's are refused, and FedBN's stay with the clients.
  if name in ("fedem", "fedbn") or not jax.tree.leaves(
    jax.eval_shape(task.init, jax.random.key(0)).buffers
  ):
    return task

  def loss(variables, examples, key):
    zeros = {"mean": jnp.zeros(FEATURES)}
    made = task.loss(variables._replace(buffers=zeros), examples, key)
    return made._replace(buffers=())

  init = lambda key: task.init(key)._replace(buffers=())
  return task._replace(init=init, loss=loss)


class Rounds:
  """First rounds of an algorithm under a kind of privacy.

  Called with clients, and perhaps a number that all features of client 0 have,
  it returns what the server got.
  """

  def __init__(self, kind, name):
    self.cohort, self.got = EVERYBODY, list[Got]()
    task = unbuffered(name)
    inner = build(name, task)

    def apply(server, aggregate, context):
      keep = lambda *given: self.got.append(Got(*given))
      jax.debug.callback(keep, aggregate, context.survey)
      return inner.apply(server, aggregate, context)

    algorithm, aggregator = inner._replace(apply=apply), None
    if kind == "central":
      bound = STATISTICS if name in WITH_STATISTICS else None
      algorithm = with_central_dp(
        algorithm,
        CentralDPConfig(
          clip_norm=CLIP,
          noise_multiplier=0.0,
          denominator=1.0,
          max_weight=WEIGHT,
          statistics_norm=bound,
        ),
      )
    elif kind == "local":
      noise = gaussian(CLIP, delta=0.1, stddev=1.0, max_weight=WEIGHT)
      algorithm = with_local_dp(algorithm, noise)
    else:
      code = distributed_gaussian(len(SIZES), clip=CLIP, noise_multiplier=1.0)
      aggregator = secure(code, neighbors=2)
    clients = 1 if inner.requirements.pools_data else len(SIZES)
    everybody = Sampler(
      lambda seed, round_: np.array(self.cohort[:clients]), (clients,), clients
    )
    self.simulator = make_simulator(
      task,
      algorithm,
      with_everything(blobs(SIZES, features=FEATURES)),
      sampler=everybody,
      batching=LocalBatching(batch_size=2),
      aggregator=aggregator,
    )
    self.first = self.simulator.states.shapes  # which may be refused, too

  @functools.cached_property
  def state(self):
    return self.simulator.init()

  def __call__(self, clients, features=None):
    self.cohort = clients
    planned = self.simulator.plan(0, 1)
    if features is not None:
      planned = planned._replace(
        examples={
          split: self.changed(split, examples, features)
          for split, examples in planned.examples.items()
        }
      )
    traced = self.simulator.states.traced()
    self.simulator.compiler.call(self.state, planned, traced)
    jax.effects_barrier()
    return jax.device_get(self.got.pop())

  def changed(self, split, examples, features):
    """The examples, those of client 0 having the features."""
    end = self.simulator.data.all_splits[split].offsets[1]
    x = np.array(examples["x"])
    x[:end] = features
    return {**examples, "x": jax.device_put(x, examples["x"].sharding)}


def vector(tree):
  flat = [np.ravel(x).astype(np.float64) for x in jax.tree.leaves(tree)]
  return np.concatenate(flat) if flat else np.zeros(0)


def distance(one, other):
  return np.linalg.norm(vector(one) - vector(other))


def same(one, other, *parts):
  """Whether all but these parts of the aggregates are the same."""
  drop = lambda got: got._replace(
    aggregate=got.aggregate._replace(**dict.fromkeys(parts, ()))
  )
  return np.array_equal(vector(drop(one)), vector(drop(other)))


@pytest.mark.parametrize(
  ("kind", "name"), [(kind, name) for kind in REFUSED for name in REFUSED[kind]]
)
def test_what_noise_would_not_cover_is_refused(kind, name):
  with pytest.raises(ValueError, match=REFUSED[kind][name]):
    Rounds(kind, name)


def private(kind):
  """Parametrize by the others; what is not in the gate is slow."""
  marks = dict.fromkeys(QUICK[kind], pytest.mark.integration)
  return pytest.mark.parametrize(
    "name",
    [
      pytest.param(name, marks=marks.get(name, pytest.mark.slow))
      for name in ALGORITHMS
      if name not in REFUSED[kind]
    ],
  )


@private("central")
def test_no_client_moves_what_a_private_server_gets(name):
  rounds = Rounds("central", name)
  absent, farthest = rounds(EVERYBODY[1:]), 0.0
  for features in (None, *EXTREME):
    got = rounds(EVERYBODY, features)
    moved = distance(got.aggregate.update, absent.aggregate.update)
    farthest = max(farthest, moved)
    beside = distance(got.aggregate.statistics, absent.aggregate.statistics)
    assert moved <= CLIP * (1 + 1e-5)
    assert beside <= STATISTICS * (1 + 1e-5)
    assert same(got, absent, "update", "statistics")
    # Who sends nothing has no say in what others send.
    assert same(rounds(EVERYBODY[1:], features), absent)
  assert farthest > 0  # the comparison sees something


@private("local")
def test_no_two_reports_are_further_apart_than_noise_is_made_for(name):
  rounds = Rounds("local", name)
  one, other = (rounds([0], features).aggregate for features in EXTREME)
  moved = distance(one.update, other.update) / CLIP
  weighs = distance(one.weight, other.weight) / WEIGHT
  assert np.hypot(moved, weighs) <= np.sqrt(5) * (1 + 1e-5)
  hidden = lambda x: x._replace(members=x.members._replace(weight=()))
  assert not one.members.values
  assert same(Got(hidden(one), ()), Got(hidden(other), ()), "update", "weight")


@private("secure")
def test_no_client_moves_what_secure_noise_covers_or_anything_else(name):
  rounds = Rounds("secure", name)
  one, other = (rounds(EVERYBODY, features) for features in EXTREME)
  made = grid(len(SIZES), 1.0)
  size = vector(one.aggregate.update).size
  most = 2 * np.sqrt(squared_sensitivity(made.scale, size)) / made.scale
  assert distance(one.aggregate.update, other.aggregate.update) <= most * CLIP
  assert same(one, other, "update")
  assert not one.aggregate.members.values
  assert one.aggregate.weight == len(SIZES)  # whatever they have
  np.testing.assert_array_equal(one.aggregate.members.weight, 1)
  assert rounds.simulator.states.num_sent == size


def test_what_algorithms_are_told_of_all_clients():
  """No more than their number; else `check_weighting` has to know of it."""
  (slot,) = components.slots_of("algorithm")
  public = {"client_optimizer", "server_optimizer", "num_clients"}
  assert set(slot.filled) - public == {"mean_examples"}
