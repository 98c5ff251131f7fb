"""FLUTE's `server_config`."""

from __future__ import annotations

import math
import re
from typing import Any

from fedjax_sim.config.flute.keys import data
from fedjax_sim.config.flute.keys.optimizer import (
  annealing,
  dead,
  learning_rate,
  optimizer,
)
from fedjax_sim.config.flute.rules import (
  DGA,
  LENGTHS,
  File,
  Key,
  Outcome,
  Rule,
  counts,
  gather,
  idle,
  only_for,
  only_if,
  refused,
  refuses,
  sets,
  used,
  without,
)

_AT = "server_config"
_TRAIN = "client_config.data_config.train"
_LABELLED_RATE = 0.003  # of FedLabels, whatever the file says
_METRICS = {
  "loss": "test/loss",
  "acc": "test/accuracy",
  "f1_score": "test/accuracy",  # micro-averaged, which is the accuracy
  "auc": "test/auc",
  "mrr": "test/mrr",
  "ndcg5": "test/ndcg5",
  "ndcg10": "test/ndcg10",
}
_STATISTICS = {
  "train_loss": "loss",
  "mag_mean_loss": "mean",
  "mag_var_loss": "variance",
}


# --- rounds and evaluations ---------------------------------------------------


def _clients(value: Any, file: File) -> Outcome:
  """Read a number of clients, or "lo,hi"."""
  path = f"{_AT}.num_clients_per_iteration"
  found = re.fullmatch(r"\s*(\d+)\s*(?:,\s*(\d+)\s*)?", str(value))
  if not found or isinstance(value, bool):
    raise TypeError(
      f"{path}={value!r} is no number of clients; give one, or 'lo,hi'."
    )
  low, high = int(found[1]), int(found[2] or found[1])
  if not low:
    return refused("0 means all clients; give their number")
  if low == high:
    return used({"server.clients_per_round": low})
  if low > high:
    raise ValueError(f"{path}={value!r}: the first is the larger one.")
  fields = {"sampler.min_clients": low, "server.clients_per_round": high}
  return used(fields)


def _first(value: bool, file: File) -> Outcome:
  """Evaluate before the first round, if either of the two asks for it."""
  both = [file.get(f"{_AT}.{x}", False) for x in ("initial_val", "initial_rec")]
  return used({"server.initial_eval": any(both)})


def _best(value: str, file: File) -> Outcome:
  """Keep the best model by a metric of the test set."""
  if file.task.is_own and value not in _METRICS:
    return used({"server.best_metrics": (f"test/{value}",)}, "of the model")
  if value not in _METRICS:
    known = ", ".join(_METRICS)
    return refused(f"no such metric here; give one of {known}")
  note = "micro F1 is the accuracy" if value == "f1_score" else ""
  return used({"server.best_metrics": (_METRICS[value],)}, note)


def _first_rate(value: float, file: File) -> Outcome:
  """Take the rate of clients, which replaces that of their optimizer."""
  if file.strategy == "fedlabels" and file.as_flute:
    return used({"client.learning_rate": _LABELLED_RATE}, "fixed in FLUTE")
  if value <= 0:
    return idle("their optimizer's rate counts")
  path = "client_config.optimizer_config"
  return learning_rate(value, file, path, "client")


def _buffers(value: bool, file: File) -> Outcome:
  """Send the running statistics of batch norm, or not."""
  if not file.has_buffers:
    return idle("the model has no buffers")
  return used({"model.send_buffers": value})


def _type(value: str, file: File) -> Outcome:
  if value == "model_optimization":
    return idle("as it is here")
  if value != "personalization":
    raise ValueError(
      f"{_AT}.type={value!r} is unknown. Known: model_optimization,"
      " personalization."
    )
  note = "the paper's APFL; FLUTE's stops with an error"
  return used({"algorithm.name": "apfl"}, note)


def _rl(value: bool, file: File) -> Outcome:
  if not value:
    return idle("off")
  if file.strategy != "dga_rl":
    return idle("FLUTE's agent is a part of DGA")
  fields = {"algorithm.name": "dga_rl", "aggregator.name": "stack"}
  return used(fields, "another agent; it needs examples of the server")


# --- the weights of DGA -------------------------------------------------------


def _weighting(value: str, file: File) -> Outcome:
  """Weigh by a softmax, or not."""
  if value not in ("softmax", "mean"):
    raise ValueError(
      f"{_AT}.aggregate_median={value!r} is unknown. Known: mean, softmax."
    )
  if file.strategy == "dga_rl":
    if value == "softmax":
      return used(note="dga_rl always weighs by a softmax")
    return used({"algorithm.beta": 0.0}, "a softmax of equal weights")
  ours = "softmax" if value == "softmax" and not file.is_even else "uniform"
  return used({"algorithm.weighting": ours})


def _statistic(value: str, file: File) -> Outcome:
  """Name the s of the softmax."""
  if file.is_even:
    return used(note="0 in FLUTE, so that all clients weigh the same")
  fields: dict[str, Any] = {
    "algorithm.statistic": _STATISTICS.get(value, "magnitude")
  }
  smooth = file.get("client_config.stats_on_smooth_grad", False)
  of_batches = value == "train_loss" or not smooth
  if file.as_flute and file.strategy == "dga":
    if of_batches:
      fields["algorithm.statistic_of"] = "batches"
    fields["algorithm.reference"] = 0.0
    return used(fields)
  if value == "train_loss":
    return used(fields, "of an example, whatever the batch size")
  if smooth:
    return used(fields)
  return used(fields, "of the pseudo-gradient; --compat=flute: of all batches")


def _beta(value: float, file: File) -> Outcome:
  """Convert the sharpness of the softmax: FLUTE divides by examples twice."""
  if file.is_even:
    return idle("FLUTE's s is 0")
  exact = file.as_flute and file.strategy == "dga"
  name = file.get(f"{_AT}.weight_train_loss", "train_loss")
  if name != "train_loss" or exact:
    return used({"algorithm.beta": value})
  batch = file.positive(f"{_TRAIN}.batch_size")
  what = "batch_size"
  if file.task.tokens:
    key = next((k for k in LENGTHS if file.get(f"{_TRAIN}.{k}")), None)
    if key is None:
      return refused("the words of a batch are unknown: give max_num_words")
    batch *= file.positive(f"{_TRAIN}.{key}")
    what = f"({what} {key})"
  return used({"algorithm.beta": value / batch}, f"softmax_beta / {what}")


# --- replay -------------------------------------------------------------------


def _iterations(value: int, file: File) -> Outcome:
  """Turn a number of examples into one of steps."""
  batch = file.positive(f"{_AT}.data_config.train.batch_size")
  steps = math.ceil(value / batch)
  note = "ceil(server_iterations / batch_size), FLUTE's of an epoch at most"
  return used({"replay.steps": steps}, note)


_REPLAY = {
  "server_iterations": Key(int, _iterations),
  "max_grad_norm": Key(float, sets("replay.max_grad_norm")),
  "optimizer_config": optimizer(
    f"{_AT}.server_replay_config.optimizer_config", "replay"
  ),
  "trainer_config": {
    "updatable_names": Key(list, without("FLUTE throws the result away")),
  },
  "ignore_subtask": Key(bool, without("no model of FLUTE has a subtask")),
  "annealing_config": {
    "type": Key(str, without("gamma says whether the rate changes")),
    "step_interval": Key(str, without("gamma says whether it changes")),
    "gamma": Key(float, refuses("replay has no schedule", (1, 1.0))),
    "step_size": Key(int, without("gamma says whether the rate changes")),
  },
}


def _with_replay(rule: Rule) -> Rule:
  path = f"{_AT}.data_config.train.train_data_server"
  return only_if(lambda file: file.get(path), rule, "no train_data_server")


# --- the agent ----------------------------------------------------------------

_AGENT = "the agent here is a ridge regression"
_RL = {
  "RL_path": Key(str, without("checkpoints hold the agent")),
  "RL_path_global": Key(bool, without("checkpoints hold the agent")),
  "model_descriptor_RL": Key(str, without("checkpoints hold the agent")),
  "marginal_update_RL": Key(bool, without("at a tie the agent wins")),
  "network_params": Key(object, without(_AGENT)),
  "initial_epsilon": Key(float, sets("algorithm.epsilon")),
  "final_epsilon": Key(
    float,
    lambda value, file: used(
      {"algorithm.epsilon_least": 0.0}, "the distance to it would decay"
    ),
  ),
  "epsilon_gamma": Key(float, sets("algorithm.epsilon_decay")),
  "max_replay_memory_size": Key(int, sets("algorithm.memory_rounds")),
  "minibatch_size": Key(int, without("a regression takes all")),
  "gamma": Key(float, without("FLUTE does not read it")),
  "wantLSTM": Key(bool, without(_AGENT)),
  "batchNorm": Key(bool, without(_AGENT)),
  "optimizer_config": dead(optimizer("", "client"), _AGENT),
  "annealing_config": dead(annealing("", "client"), _AGENT),
}

SERVER: dict[str, Any] = {
  "wantRL": Key(bool, _rl),
  "RL": gather(_RL, lambda rule: only_for(("dga_rl",), rule)),
  "resume_from_checkpoint": Key(bool, counts("always; anew in a new workdir")),
  "do_profiling": Key(bool, without("`fedjax-sim run --profile` does")),
  "val_freq": Key(int, sets("server.eval_every")),
  "rec_freq": Key(int, sets("server.test_every")),
  "initial_val": Key(bool, _first),
  "initial_rec": Key(bool, _first),
  "max_iteration": Key(int, sets("server.rounds")),
  "num_clients_per_iteration": Key(object, _clients),
  "type": Key(str, _type),
  "aggregate_median": Key(str, only_for(DGA, _weighting)),
  "weight_train_loss": Key(
    str,
    only_if(lambda file: file.is_softmax, _statistic, "no softmax of DGA"),
  ),
  "softmax_beta": Key(
    float, only_if(lambda file: file.is_softmax, _beta, "no softmax of DGA")
  ),
  "max_weight": Key(float, without("FLUTE does not read it")),
  "initial_lr_client": Key(float, _first_rate),
  "lr_decay_factor": Key(
    float, without("FLUTE never reaches it; client.schedule='plateau(...)'")
  ),
  "best_model_criterion": Key(str, _best),
  "fall_back_to_best_model": Key(bool, sets("server.revert_to_best")),
  "server_replay_config": gather(_REPLAY, _with_replay),
  "nbest_task_scheduler": {
    "num_tasks": Key(int, without("FLUTE's class has no caller")),
    "iteration_per_task": Key(int, without("FLUTE's class has no caller")),
  },
  "clustering": Key(bool, without("FLUTE only leaves workers running")),
  "send_dicts": Key(bool, _buffers),
  "fast_aggregation": Key(bool, without("sums always stream here")),
  "stale_prob": Key(float, sets("server.stale_probability")),
  "model_backup_freq": Key(int, sets("server.snapshot_every")),
  "trainer_config": Key(dict, without("FLUTE does not read it")),
  "save_to_disk": Key(bool, without("FLUTE does not read it")),
  "total_num_clients": Key(int, without("FLUTE does not read it")),
  "optimizer_config": optimizer(f"{_AT}.optimizer_config", "server"),
  "annealing_config": annealing(f"{_AT}.annealing_config", "server"),
  "data_config": {
    "val": data.VALIDATION,
    "test": data.TEST,
    "train": gather(data.SERVER, _with_replay),
  },
}
