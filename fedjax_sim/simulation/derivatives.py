"""What `hypergradient` refuses: numbers and parts without a derivative."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sim.core import Array, validate
from fedjax_sim.engine import hparams as numbers
from fedjax_sim.simulation import preflight
from fedjax_sim.simulation.dispatch import DivergedError
from fedjax_sim.simulation.simulator import Simulator

WEIGHTS = "weights"  # the name of the clients' factors


def check(
  simulator: Simulator, rounds: int, of: Sequence[str]
) -> dict[str, str]:
  """Return the path of every number that is asked for; "" for `weights`.

  Args:
    simulator: the run.
    rounds: number of rounds.
    of: names of the run's numbers.

  Raises:
    TypeError, ValueError: a number, or a part of the run, has no derivative.
  """
  validate.instance("simulator", simulator, Simulator, "fs.Simulator(...)")
  _check_parts(simulator)
  _check_devices(simulator)
  simulator.account.check_round(rounds)
  if isinstance(of, str) or not isinstance(of, Sequence) or not of:
    raise TypeError(
      f"of={of!r} names no numbers; give for example"
      " of=('server.learning_rate', 'client.learning_rate')."
    )
  own = numbers.named(simulator.hparams)
  paths: dict[str, str] = {}
  for name in of:
    path = "" if name == WEIGHTS else numbers.path_of(name, own)
    if path is None:
      _unknown(name, [*(numbers.short_name(p, own) for p in own), WEIGHTS])
    if name in paths or (path and path in paths.values()):
      raise ValueError(f"of names {name!r} twice; leave one out.")
    assert path is not None
    paths[name] = path
  if WEIGHTS in paths:
    _check_weights(simulator)
  return paths


def _unknown(name: Any, names: list[str]) -> None:
  """Refuse a name that is no number with a derivative."""
  try:
    validate.one_of("of", name, names)
  except validate.UnknownNameError as error:
    raise validate.UnknownNameError(
      f"{error} These are the run's numbers with a derivative; whole numbers,"
      " such as epochs, batch sizes and clients of a round, have none."
    ) from None


def _check_parts(simulator: Simulator) -> None:
  """Refuse a run a part of which has no derivative."""
  for transform in simulator.transforms:
    if not transform.differentiable:
      raise ValueError(
        f"transforms.{transform.name} rounds numbers, which has no useful"
        " derivative; leave it out."
      )
  if not simulator.algorithm.differentiable:
    raise ValueError(
      "downlink rounds numbers (Algorithm.differentiable is False), which has"
      " no useful derivative; leave it out."
    )
  if not simulator.effective_aggregator.differentiable:
    raise ValueError(
      "aggregator.name rounds numbers (Aggregator.differentiable is False),"
      " which has no useful derivative; take for example weighted_mean()."
    )
  release = simulator.algorithm.privacy
  if release is not None and release.noise == "discrete_gaussian":
    raise ValueError(
      "privacy.mechanism='discrete_gaussian' rounds numbers, which has no"
      " useful derivative; take 'gaussian'."
    )
  if simulator.planner.cohorts.observes:
    raise ValueError(
      "sampler.name observes what clients report, so cohorts jump where"
      " numbers change, and have no derivative; take one such as uniform()."
    )
  if followers := simulator.react.followers:
    raise ValueError(
      f"{followers[0]} follows evaluations, which these rounds have none of;"
      " leave it out."
    )


def _check_devices(simulator: Simulator) -> None:
  """Refuse what needs more than one device, or data beside it."""
  runtime = simulator.runtime
  for field in ("devices", "model_devices"):
    value = getattr(runtime, field)
    if value is not None and value > 1:
      raise ValueError(
        f"runtime.{field}={value}: hypergradients are computed on one device;"
        f" set it to {1 if field == 'devices' else None}."
      )
  if simulator.mesh.is_multi_process:
    raise ValueError(
      "Hypergradients are computed on one device of one process; start a"
      " single process."
    )
  name = simulator.residency.name
  if name != "device":
    raise ValueError(
      f"runtime.residency={name!r}: hypergradients need the examples on the"
      " device; set it to 'device', with data that fit."
    )

  if simulator.states.rows is not None:
    raise ValueError(
      "runtime.state_residency: client states are on the disk, and"
      " hypergradients need them on the device; set it to 'device', with fewer"
      " clients."
    )


def _check_weights(simulator: Simulator) -> None:
  """Refuse weights where the weight of a client has no influence."""
  if simulator.algorithm.privacy is not None:
    raise ValueError(
      "of='weights' does not go with central privacy, which takes a plain sum"
      " of contributions; leave it out."
    )
  aggregator = simulator.effective_aggregator
  stack = simulator.algorithm.requirements.all_updates
  if not aggregator.weighted_mean and not stack:
    raise ValueError(
      "of='weights': aggregator.name takes no weighted mean"
      " (Aggregator.weighted_mean is False), so weights of clients do nothing;"
      " take weighted_mean(), or leave it out."
    )


def check_loss(loss: str | Callable[..., Array], simulator: Simulator) -> None:
  """Refuse a validation loss that the run does not have.

  Args:
    loss: name of a set, or a function.
    simulator: the run.

  Raises:
    TypeError, ValueError: it is neither, or the set has no `loss`.
  """
  if callable(loss):
    return
  validate.instance("loss", loss, str, "'test', or a function of Variables")
  sets = [*simulator.evaluate.parts]
  if simulator.data.server is not None:
    sets.append("server")
  if not sets:
    raise ValueError(
      f"loss={loss!r}: the data have no examples to evaluate; give a test set,"
      " or a function of the model's Variables."
    )
  validate.one_of("loss", loss, sets)
  variables, data = simulator.states.variables, simulator.data
  names = preflight.metrics_of(simulator.task, variables, data)
  if "loss" not in names:
    raise ValueError(
      f"loss={loss!r}: the task's metrics have no 'loss', but"
      f" {', '.join(names)}; give a function of the model's Variables."
    )


def checked_values(
  values: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
  """Return a number for every name.

  Args:
    values: those that are not the run's own.
    defaults: the run's own.

  Raises:
    TypeError, ValueError: an unknown name, or no finite number.
  """
  validate.instance("values", values, Mapping, "{'server.momentum': 0.5}")
  for name in values:
    validate.one_of("values", name, defaults)
  checked: dict[str, Any] = {}
  for name, default in defaults.items():
    value = values.get(name, default)
    if name != WEIGHTS:
      if shape := np.shape(value):
        raise ValueError(f"{name} has shape {shape}; give one number.")
      plain = value.item() if hasattr(value, "item") else value
      checked[name] = validate.number(name, plain)
      continue
    factors = np.asarray(value, np.float64)
    if factors.shape != default.shape:
      raise ValueError(
        f"weights has shape {factors.shape}; give a factor for each of the"
        f" {len(default)} clients."
      )
    if not (np.isfinite(factors) & (factors >= 0)).all():
      raise ValueError(
        "weights has a factor that is negative or not finite; give numbers"
        " >= 0."
      )
    checked[name] = factors
  return checked


def scalar(loss: Any) -> Array:
  """Return a validation loss, if it is a float.

  Raises:
    TypeError: it is none of shape=().
  """
  shape, dtype = jnp.shape(loss), jnp.result_type(loss)
  if shape or not jnp.issubdtype(dtype, jnp.floating):
    raise TypeError(
      f"loss returned {dtype} of shape {shape}; let it return one float."
    )
  return jnp.asarray(loss)


@contextlib.contextmanager
def explained(reverse: bool) -> Iterator[None]:
  """Explain what JAX says of functions with a reverse derivative alone."""
  try:
    yield
  except TypeError as error:
    if reverse or "custom_vjp" not in str(error):
      raise
    raise TypeError(
      "Forward mode: the model has a function with a derivative of its own in"
      " reverse mode alone (jax.custom_vjp); give mode='reverse'."
    ) from error


def check_rounds(
  inputs: Mapping[str, Any], rejected: Any, finite: Any, first: int
) -> None:
  """Refuse rounds in which something was not finite.

  Args:
    inputs: the numbers, by name.
    rejected: shape=(rounds,), int; clients left out.
    finite: shape=(rounds,), bool; whether the model was, afterwards.
    first: rounds done before.

  Raises:
    DivergedError: names the first such round.
  """
  bad = np.flatnonzero((np.asarray(rejected) > 0) | ~np.asarray(finite))
  if bad.size:
    i = int(bad[0])
    what = (
      f"{int(rejected[i])} clients were left out, as what they sent is not"
      " finite"
      if rejected[i]
      else "the global model is not finite"
    )
    raise DivergedError(
      f"Round {first + i + 1}: {what}, which has no useful derivative"
      f" ({_shown(inputs)}); lower the rates."
    )


def check_finite(
  inputs: Mapping[str, Any], loss: Array, gradient: Mapping[str, Array]
) -> None:
  """Refuse a loss or a gradient that is not finite.

  Args:
    inputs: the numbers, by name.
    loss: shape=().
    gradient: name -> array.

  Raises:
    DivergedError: one is not.
  """
  values = jax.device_get({"loss": loss, **gradient})
  bad = [k for k, x in values.items() if not np.isfinite(x).all()]
  if not bad:
    return
  if bad[0] == "loss":
    what = f"The validation loss is {float(values['loss'])}"
  else:
    what = f"The derivative in {', '.join(bad)} is not finite"
  raise DivergedError(
    f"{what} ({_shown(inputs)}); lower the rates, or give Adam and its like an"
    " eps_root > 0, as the root of 0 has no derivative."
  )


def _shown(inputs: Mapping[str, Any]) -> str:
  """Return the numbers, for messages."""
  plain = {k: x for k, x in inputs.items() if k != WEIGHTS}
  return ", ".join(f"{k}={float(x):g}" for k, x in plain.items()) or "weights"
