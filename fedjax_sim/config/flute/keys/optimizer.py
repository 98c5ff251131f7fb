"""FLUTE's keys of optimizers and of annealing, wherever they stand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from fedjax_sim.config.flute.rules import (
  File,
  Key,
  Outcome,
  idle,
  refused,
  sets,
  used,
  without,
)
from fedjax_sim.core import validate

_NAMES = {
  "sgd": "sgd",
  "adam": "adam",
  "adamax": "adamax",
  "lars": "lars",
  "lamb": "lamb",
  "adamW": "adamw",
}
_NESTED = {"sgd", "lars", "LarsSGD"}  # torch.optim.SGD's arguments
_RATE = "server_config.initial_lr_client"


def optimizer(path: str, section: str) -> dict[str, Key]:
  """Return the table of an `optimizer_config`.

  Args:
    path: of it, such as "server_config.optimizer_config".
    section: of our config.
  """
  kind = lambda file: file.get(f"{path}.type")

  def name(value: str, file: File) -> Outcome:
    if value == "LarsSGD":
      return refused("no optimizer here is LarsSGD; the nearest is lars")
    if value not in _NAMES:
      known = ", ".join([*_NAMES, "LarsSGD"])
      raise ValueError(f"{path}.type={value!r} is unknown. Known: {known}.")
    ours = _NAMES[value]
    if value == "adam" and file.get(f"{path}.amsgrad") is True:
      ours = "optax:amsgrad"
    if value == "lamb" and file.as_flute:
      ours = "uncorrected_lamb"
    return used({f"{section}.optimizer": ours})

  def rate(value: float, file: File) -> Outcome:
    if section == "client" and file.get(_RATE, -1.0) > 0:
      return idle("initial_lr_client replaces it")
    return learning_rate(value, file, path, section)

  def decay(value: float, file: File) -> Outcome:
    if kind(file) != "adamW":
      return used({f"{section}.weight_decay": value})
    rate_path, lr = _rate_of(file, path, section)
    kept = _kept(rate_path, lr, f"{path}.weight_decay", value)
    fields = {f"{section}.weight_decay": value / kept}
    return used(fields, "weight_decay / (1 - lr weight_decay)" if value else "")

  def amsgrad(value: bool, file: File) -> Outcome:
    if kind(file) == "adam":
      return used(note="optax:amsgrad" if value else "off")
    if kind(file) in ("adamW", "adamax") or not value:
      return idle(f"FLUTE drops it for {kind(file)}")
    return refused(f"torch's {kind(file)} has no amsgrad")

  def of_sgd(field: str) -> Callable[[Any, File], Outcome]:
    def rule(value: Any, file: File) -> Outcome:
      if kind(file) in _NESTED:
        return used({f"{section}.{field}": value})
      return refused(f"torch's {kind(file)} has no {field}")

    return rule

  def dampening(value: float, file: File) -> Outcome:
    return idle("none, as here") if value == 0 else refused("not here")

  def betas(value: list[Any], file: File) -> Outcome:
    if len(value) != 2:
      raise ValueError(f"{path}.betas={value!r}: give two numbers.")
    return used({f"{section}.b1": value[0], f"{section}.b2": value[1]})

  def correct(value: bool, file: File) -> Outcome:
    return idle("as it is here") if value else refused("adamw always corrects")

  return {
    "type": Key(str, name),
    "lr": Key(float, rate),
    "weight_decay": Key(float, decay),
    "momentum": Key(float, of_sgd("momentum")),
    "nesterov": Key(bool, of_sgd("nesterov")),
    "amsgrad": Key(bool, amsgrad),
    "dampening": Key(float, dampening),
    "betas": Key(list, betas),
    "eps": Key(float, sets(f"{section}.eps")),
    "adam": Key(bool, without("no config of FLUTE sets it")),
    "correct_bias": Key(bool, correct),
  }


def _rate_of(file: File, path: str, section: str) -> tuple[str, float]:
  """Return the key of an optimizer's learning rate in FLUTE, and its value."""
  first = file.get(_RATE, -1.0) if section == "client" else -1.0
  if first > 0:
    return _RATE, float(first)
  return f"{path}.lr", float(file.get(f"{path}.lr", 0.0))


def _kept(rate: str, lr: float, decay: str, value: float) -> float:
  """Return 1 - lr weight_decay, which a step of FLUTE's adamW multiplies by.

  Args:
    rate: the key of the learning rate.
    lr: the rate.
    decay: the key of the weight decay.
    value: the decay.

  Raises:
    ValueError: nothing would be left of the weights.
  """
  kept = 1 - lr * value
  if not kept > 0:
    raise ValueError(
      f"{decay}={value!r} with {rate}={lr!r} leaves nothing of the weights in a"
      " step of adamW; lower one of them, so that their product is below 1."
    )
  return kept


def learning_rate(value: float, file: File, path: str, section: str) -> Outcome:
  """Return what a learning rate of FLUTE sets.

  Args:
    value: the rate.
    file: that it is of.
    path: of the `optimizer_config`.
    section: of our config.
  """
  decay = file.get(f"{path}.weight_decay", 0.0)
  if file.get(f"{path}.type") == "adamW" and decay:
    rate_path, _ = _rate_of(file, path, section)
    rate = value * _kept(rate_path, value, f"{path}.weight_decay", decay)
    return used({f"{section}.learning_rate": rate}, "lr (1 - lr weight_decay)")
  return used({f"{section}.learning_rate": value})


# --- annealing ----------------------------------------------------------------


def annealing(path: str, section: str) -> dict[str, Key]:
  """Return the table of an `annealing_config`.

  Args:
    path: of it, such as "server_config.annealing_config".
    section: of our config, whose schedule it is.
  """

  def part(value: Any, file: File) -> Outcome:
    text = _schedule(file, path)
    if not text:
      return idle("a factor of 1 changes nothing")
    return used({f"{section}.schedule": text})

  def peak(value: float, file: File) -> Outcome:
    return used({f"{section}.learning_rate": value}, "the rate at the top")

  keys = ("gamma", "floor_lr", "factor", "min_lr")
  rounds = ("step_size", "sr", "si", "sf", "patience")
  zero = lambda value, file: (
    idle("as it is here") if value == 0 else refused("plateau has none")
  )
  return {
    "type": Key(str, part),
    "step_interval": Key(str, without("a round is one step on the server")),
    **{key: Key(float, part) for key in keys},
    **{key: Key(int, part) for key in rounds},
    "milestones": Key(list, part),
    "peak_lr": Key(float, peak),
    "mode": Key(str, without("the metric says which way is better")),
    "threshold": Key(float, zero),
    "threshold_mode": Key(str, without("there is no threshold")),
    "cooldown": Key(int, zero),
    "verbose": Key(bool, without("metrics.jsonl has the rate")),
  }


def _schedule(file: File, path: str) -> str:
  """Return the schedule here, as text; "" if the rate stays.

  Raises:
    ValueError: no such annealing, or one of its numbers is missing.
  """
  given = lambda name, default=None: file.get(f"{path}.{name}", default)

  def needed(name: str) -> Any:
    value = given(name)
    if value is None:
      raise ValueError(f"{path}.{name} is missing; {kind} needs it.")
    return value

  kind = given("type")
  if kind == "step_lr":
    factor = needed("gamma")
    if factor == 1:
      return ""
    return f"step(every={needed('step_size')}, factor={factor})"
  if kind == "multi_step_lr":
    factor = needed("gamma")
    if factor == 1:
      return ""
    at = tuple(needed("milestones"))
    return f"multi_step(at={at}, factor={factor})"
  if kind == "rampup-keep-expdecay-keep":
    ramp, keep, fall = (needed(name) for name in ("sr", "si", "sf"))
    rates = [needed(name) for name in ("floor_lr", "peak_lr")]
    for name, value in zip(("floor_lr", "peak_lr"), rates, strict=True):
      validate.number(f"{path}.{name}", value, gt=0)
    floor = rates[0] / rates[1]
    return (
      f"ramp_keep_decay(ramp={ramp}, keep={keep - ramp}, decay={fall - keep},"
      f" floor={floor})"
    )
  if kind == "val_loss":
    rate = given("min_lr", 0.0)
    lr = file.get(path.replace("annealing_config", "optimizer_config.lr"), 1.0)
    floor = rate / lr if math.isfinite(lr) and lr > 0 else 0.0
    return (
      f"plateau(metric='test/loss', patience={given('patience', 10) + 1},"
      f" factor={given('factor', 0.1)}, floor={floor})"
    )
  known = "step_lr, multi_step_lr, rampup-keep-expdecay-keep, val_loss"
  raise ValueError(f"{path}.type={kind!r} is unknown. Known: {known}.")


def dead(table: Mapping[str, Any], note: str) -> dict[str, Key]:
  """Return a table with all of its keys without effect."""
  return {name: Key(key.kind, without(note)) for name, key in table.items()}
