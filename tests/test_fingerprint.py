"""Fingerprints: equal for one program, different for two."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from flax.core import FrozenDict

from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.algorithms.fedprox import fedprox
from fedjax_sim.config.build.parts import program_of
from fedjax_sim.core import Algorithm
from fedjax_sim.engine.fingerprint import fingerprint
from fedjax_sim.privacy.central import CentralDPConfig, with_central_dp
from fedjax_sim.training import schedules
from fedjax_sim.training.optimizers import Optimizer, optimizer
from problems import make_simulator, quadratic, quadratic_data, sgd

DATA = quadratic_data(np.eye(2))
TASK = quadratic(2)


def program(algorithm, **more):
  made = make_simulator(TASK, algorithm, DATA)
  return program_of(dataclasses.replace(made, **more))


def private(clip, multiplier, **more):
  settings = CentralDPConfig(
    clip_norm=clip, noise_multiplier=multiplier, denominator=2.0, **more
  )
  return with_central_dp(fedavg(TASK, sgd(0.1), sgd(1.0)), settings)


@pytest.mark.parametrize(
  ("a", "b"),
  [
    (
      fedprox(TASK, sgd(0.1), sgd(1.0), mu=0.1),
      fedprox(TASK, sgd(0.2), sgd(0.5), mu=0.3),
    ),
    (private(1.0, 1.0), private(2.0, 0.5)),
    (
      private(1.0, 1.0, quantile=0.5, quantile_rate=0.1),
      private(1.0, 1.0, quantile=0.9, quantile_rate=0.2),
    ),
  ],
)
def test_values_of_traced_numbers_do_not_count(a, b):
  assert program(a) == program(b)


@pytest.mark.parametrize(
  "other",
  [
    fedavg(TASK, sgd(0.1), sgd(1.0), weighting="uniform"),
    fedavg(TASK, optimizer("adam", learning_rate=0.1), sgd(1.0)),
    fedprox(TASK, sgd(0.1), sgd(1.0)),
    fedavg(TASK, sgd(0.1), sgd(1.0))._replace(hparams={"other": 1.0}),
    private(1.0, 1.0),
  ],
)
def test_other_code_or_constants_count(other):
  usual = fedavg(TASK, sgd(0.1), sgd(1.0))
  assert program(usual) == program(fedavg(TASK, sgd(0.1), sgd(1.0)))
  assert program(other) != program(usual)


@pytest.mark.parametrize(
  "more", [{"noise": "laplace"}, {"per_layer": True}, {"quantile": 0.5}]
)
def test_kinds_of_privacy_count(more):
  assert program(private(1.0, 1.0, **more)) != program(private(1.0, 1.0))


def test_schedules_count_but_for_what_they_do_on_the_host():
  algorithm = fedavg(TASK, sgd(0.1), sgd(1.0))
  named = lambda text: {
    "client.learning_rate": schedules.parse("client.schedule", text)
  }
  of = lambda text: program(algorithm, schedules=named(text))
  assert of("step(every=2, factor=0.5)") == of("step(every=2, factor=0.5)")
  assert of("step(every=2, factor=0.5)") != of("step(every=3, factor=0.5)")
  assert of("step(every=2, factor=0.5)") != program(algorithm)


class Settings(NamedTuple):
  """Numbers of a user's own, that are read while a round is traced."""

  hparams: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Frozen:
  """The same as a dataclass, with an attribute that is no field."""

  hparams: Any

  def __post_init__(self):
    object.__setattr__(self, "beside", self.hparams)


class Module(linen.Module):
  """A module with such a field."""

  hparams: Any = None


class Named(dict):
  """A dict with attributes."""


def named(**attributes):
  made = Named(a=1)
  vars(made).update(attributes)
  return made


def held(value):
  return lambda x: x + value


def with_attribute(value):
  function = held(1)
  function.scale = value
  return function


def with_rule(rule):
  made = jax.custom_jvp(held(1))
  made.defjvp(rule)
  return made


@pytest.mark.parametrize(
  ("a", "b"),
  [
    (0.0, -0.0),
    (1, 1.0),
    (1, True),
    (np.float32(1), np.float64(1)),
    (np.float32(1), jnp.float32(1)),
    (jnp.asarray(1.0), jnp.asarray(1.0, jnp.float32)),
    (np.zeros(2), np.zeros(3)),
    (jnp.zeros(2), jnp.ones(2)),
    (jax.random.key(0), jax.random.key(1)),
    ("x", b"x"),
    ([1, 2], (1, 2)),
    ({"a": 1}, {"a": 2}),
    ({"a": 1}, named()),
    (named(b=1), named(b=2)),
    (functools.partial(max, 1), functools.partial(max, 2)),
    (functools.cache(held(1)), functools.cache(held(2))),
    (jax.jit(held(1)), jax.jit(held(2))),
    (with_attribute(1), with_attribute(2)),
    (with_rule(lambda p, t: (p, t)), with_rule(lambda p, t: (p, p))),
    (Settings({"shrink": 1.0}), Settings({"shrink": 0.1})),
    (Frozen((1.0,)), Frozen((2.0,))),
    (Module({"a": 1}), Module({"a": 2})),
    (
      FrozenDict({"x": {"k": 1}, "y": {"k": 2}, "z": {"k": 3}}),
      FrozenDict({"x": {"k": 1}, "y": {"k": 2}, "z": {"k": 2}}),
    ),
    (Optimizer(held(1), {"a": 1.0}), Optimizer(held(2), {"a": 1.0})),
    (Optimizer(max, {"a": 1.0}), Optimizer(max, {"b": 1.0})),
  ],
)
def test_what_a_function_holds_counts(a, b):
  of = lambda value: fingerprint(held(value), [Algorithm, Optimizer])
  assert of(a) == of(a)
  assert of(a) != of(b)


def test_what_is_seen_once_is_not_taken_for_another():
  # Temporary objects, whose ids are used again at once.
  class Fresh(dict):
    def __getitem__(self, key):
      return [super().__getitem__(key)]

  a, b = (Fresh({i: i for i in range(50)}) for _ in range(2))
  b[49] = 0
  assert fingerprint(a) == fingerprint(Fresh(a))
  assert fingerprint(a) != fingerprint(b)


def test_a_function_may_hold_itself():
  def made(step):
    def down(n):
      return down(n - step) if n > 0 else n

    return down

  assert fingerprint(made(1)) == fingerprint(made(1))
  assert fingerprint(made(1)) != fingerprint(made(2))
