"""FLUTE's `client_config`."""

from __future__ import annotations

from typing import Any

from fedjax_sim.config.flute.keys import data
from fedjax_sim.config.flute.keys.optimizer import annealing, dead, optimizer
from fedjax_sim.config.flute.rules import (
  File,
  Key,
  Outcome,
  counts,
  gather,
  idle,
  only_for,
  only_if,
  refused,
  sets,
  used,
  without,
)

_AT = "client_config"
_QUANTIZE = "transforms.quantize"
_UNREAD = "FLUTE does not read it"


def _smooth(value: bool, file: File) -> Outcome:
  """Say of which gradients the statistics are."""
  if not file.is_softmax:
    return idle("no softmax of DGA")
  name = file.get("server_config.weight_train_loss", "train_loss")
  if name == "train_loss":
    return idle("weight_train_loss is no statistic of gradients")
  if value:
    return used(note="algorithm.statistic_of='update'")
  if file.as_flute:
    return used(note="algorithm.statistic_of='batches'")
  return used(note="of the pseudo-gradient; --compat=flute: of all batches")


def _type(value: str, file: File) -> Outcome:
  if value == "optimization":
    return idle("as it is here")
  return refused("clients then send a gradient: algorithm.name='fedsgd'")


def _mu(value: float, file: File) -> Outcome:
  """Set the proximal term, in FLUTE's code a running sum."""
  if not file.as_flute:
    return used({"algorithm.mu": value})
  fields = {"algorithm.mu": value, "algorithm.cumulative": True}
  return used(fields, "arrays in the order of paths, not torch's")


# --- quantization -------------------------------------------------------------


def _sparsity(value: float, file: File) -> Outcome:
  """Anneal once, as FLUTE does before the first round."""
  factor = file.get(f"{_AT}.quant_anneal", 1.0)
  note = "" if factor == 1 else "quant_thresh quant_anneal"
  return used({f"{_QUANTIZE}.sparsity": value * factor}, note)


def _quantized(file: File) -> bool:
  return file.get(f"{_AT}.quant_thresh") is not None and (
    file.strategy == "dga" or not file.as_flute
  )


_QUANTIZATION = {
  "quant_thresh": Key(float, _sparsity),
  "quant_bits": Key(int, sets(f"{_QUANTIZE}.bits")),
  "quant_anneal": Key(float, sets(f"{_QUANTIZE}.anneal")),
}


# --- scheduled sampling -------------------------------------------------------


def _sampling(value: float, file: File) -> Outcome:
  """Set the final rate, and the way to it."""
  if file.as_flute:
    return idle("FLUTE's schedule never takes a step")
  get = lambda name, default: file.get(f"{_AT}.ss_config.{name}", default)
  final, first = get("final_rate", 0.0), get("initial_rate", 0.0)
  if not final > 0:
    return idle("final_rate is 0")
  begin = get("ramp_start", 0)
  rounds = get("ramp_stop", begin + 1) - begin
  if rounds < 1:
    raise ValueError(
      f"{_AT}.ss_config.ramp_stop={begin + rounds} is not after"
      f" ramp_start={begin}; give a later round."
    )
  return used(
    {
      "model.scheduled_sampling": final,
      "model.schedule": f"linear(rounds={rounds}, start={first / final},"
      f" begin={begin})",
    }
  )


# --- FedLabels ----------------------------------------------------------------


def _augment(value: int, file: File) -> Outcome:
  if value == 0:
    return used({"algorithm.magnitude": 0.0})
  return used(
    {"algorithm.flip": True}, "and algorithm.magnitude, of other operations"
  )


def _comparison(value: str, file: File) -> Outcome:
  names = {"var": "variance", "ent": "entropy"}
  if value not in names:
    raise ValueError(
      f"{_AT}.semisupervision.comp={value!r} is unknown. Known: ent, var."
    )
  return used({"algorithm.comparison": names[value]})


def _dealt(field: str) -> Any:
  """Return the rule of a number by which clients are made."""

  def rule(value: Any, file: File) -> Outcome:
    if file.has_own_data and "data.partition" in file.task.data:
      return used({field: value})
    return used(note=f"{field} of `data partition`, as a store has clients")

  return rule


def _alpha(value: float, file: File) -> Outcome:
  """Sum the concentrations, of which FLUTE gives that of each class."""
  if not file.has_own_data:
    return _dealt("data.alpha")(value, file)
  classes = file.get(f"{_AT}.semisupervision.num_classes", 100)
  return used({"data.alpha": value * classes}, "alpha num_classes")


_SEMISUPERVISION = {
  "uda": Key(int, _augment),
  "num_classes": Key(int, counts("from the data")),
  "isclust": Key(int, without("1 and 2 call what FLUTE does not have")),
  "alpha": Key(float, _alpha),
  "train_ratio": Key(float, sets("data.labelled_fraction")),
  "test_ratio": Key(float, without("FLUTE does not use it")),
  "val_ratio": Key(float, counts("the rest is unlabelled")),
  "vat_ptb": Key(float, without(_UNREAD)),
  "vat_consis": Key(float, sets("algorithm.consistency_weight")),
  "lamb_consist": Key(float, without(_UNREAD)),
  "unsup_lamb": Key(float, sets("algorithm.unsup_weight")),
  "l2_lambda": Key(float, sets("algorithm.l2")),
  "burnout_round": Key(int, sets("algorithm.burn_in")),
  "thre": Key(float, sets("algorithm.threshold")),
  "comp": Key(str, _comparison),
  "eta": Key(float, sets("algorithm.unlabelled_rate")),
  "bs": Key(int, sets("client.batch_size")),
  "unl_bs": Key(int, without("FLUTE uses the first bs of them")),
  "train_ep": Key(int, sets("algorithm.labelled_steps")),
  "unsuptrain_ep": Key(int, sets("algorithm.unlabelled_steps")),
  "ensize": Key(int, _dealt("data.num_clients")),
  "seed": Key(int, sets("data.seed")),
  "temp": Key(float, sets("algorithm.temperature")),
  "device": Key(str, without("JAX finds its devices")),
  "size": Key(int, without(_UNREAD)),
  "shuffle": Key(int, without("batches are always shuffled")),
}

CLIENT: dict[str, Any] = {
  "meta_learning": Key(str, without("FLUTE ignores it")),
  "stats_on_smooth_grad": Key(bool, _smooth),
  "ignore_subtask": Key(bool, without("no model of FLUTE has a subtask")),
  "num_skips_threshold": Key(int, without("FLUTE ignores it")),
  "copying_train_data": Key(bool, without("FLUTE ignores it")),
  "do_profiling": Key(bool, without("`fedjax-sim run --profile` does")),
  "type": Key(str, _type),
  "mu": Key(float, only_for(("fedprox",), _mu)),
  "convex_model_interp": Key(
    float, only_for(("apfl",), sets("algorithm.alpha"))
  ),
  **gather(
    _QUANTIZATION,
    lambda rule: only_if(
      _quantized, rule, "no quant_thresh, or FLUTE's strategy does not read it"
    ),
  ),
  "trainer_config": {
    "updatable_names": Key(list, without("FLUTE throws the result away")),
  },
  "ss_config": {
    "ramp_start": Key(int, _sampling),
    "ramp_stop": Key(int, _sampling),
    "initial_rate": Key(float, _sampling),
    "final_rate": Key(float, _sampling),
  },
  "meta_optimizer_config": dead(optimizer("", "client"), _UNREAD),
  "semisupervision": gather(
    _SEMISUPERVISION, lambda rule: only_for(("fedlabels",), rule)
  ),
  "optimizer_config": optimizer(f"{_AT}.optimizer_config", "client"),
  "annealing_config": dead(
    annealing("", "client"), "FLUTE makes it anew in every round"
  ),
  "data_config": {"train": data.CLIENTS},
}
