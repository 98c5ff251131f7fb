"""FLUTE's `model_config`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedjax_sim.config.flute.rules import (
  File,
  Key,
  Outcome,
  by_line,
  counts,
  idle,
  of_task,
  refused,
  refuses,
  sets,
  used,
  without,
)
from fedjax_sim.config.flute.tasks import NETWORKS, network

_WEIGHTS = (".safetensors", ".npz", ".msgpack")
_DATA = "from the data"
_GLOVE = "glove.840B.300d.txt"
_IMPORT = "texts become ids by `data import`"


def _network(value: str, file: File) -> Outcome:
  """Choose the network, where a task has several."""
  if file.task.is_own:
    return used(file.task.model)
  if not file.task.by_type:
    return used(file.task.model, f"the model of {file.task.name}")
  fields = network(file.task, value)
  if fields is None:
    raise ValueError(
      f"model_config.model_type={value!r}: there is no such network here; give"
      f" {NETWORKS}."
    )
  return used(fields)


def _weights(value: str, file: File) -> Outcome:
  """Begin from a file of weights, which must not be a pickle."""
  if Path(value).suffix in _WEIGHTS:
    return used({"model.initial": value})
  return refused(
    "weights that torch has pickled; save the state dict as .safetensors"
  )


def _initial(value: str, file: File) -> Outcome:
  if value == "default":
    return idle("the model begins as torch's does, or as its file here says")
  return refused("models here have one way to begin each")


def _frozen(value: str, file: File) -> Outcome:
  return used(
    {"model.frozen": (value,)}, "a pattern of the parameters' paths here"
  )


def _vectors(value: str, file: File) -> Outcome:
  """Take the words' vectors, of which FLUTE names the folder."""
  if file.task.name != "fednewsrec":
    return idle(f"task {file.task.name} has no such option")
  path = Path(value)
  return used({"model.embedding": str(path if path.suffix else path / _GLOVE)})


_BERT_MODEL: dict[str, Any] = {
  "model_name": Key(str, of_task("model_name")),
  "model_name_or_path": Key(str, of_task("model_name")),
  "cache_dir": Key(str, without("nothing is downloaded")),
  "use_fast_tokenizer": Key(bool, counts(_IMPORT)),
  "mask_token": Key(str, without("FLUTE does not read it")),
  "task": Key(str, without("FLUTE reads data_config.task")),
  "past_index": Key(int, without("of XLNet alone")),
  "prediction_loss_only": Key(bool, without("metrics are always computed")),
  "process_line_by_line": Key(bool, by_line),
  "gradient_accumulation_steps": Key(
    int, without("FLUTE only divides the loss by it")
  ),
  "eval_accumulation_steps": Key(int, without("FLUTE does not read it")),
  "label_names": Key(list, without("FLUTE does not read it")),
  "config_name": Key(str, of_task("model_name")),
  "tokenizer_name": Key(str, counts(_IMPORT)),
  "adapter": Key(bool, refuses("adapters here are LoRA's", (False,))),
}
_BERT_TRAINING: dict[str, Any] = {
  "seed": Key(int, sets("seed")),
  "label_smoothing_factor": Key(float, of_task("label_smoothing_factor")),
  "batch_size": Key(int, without("FLUTE evaluates the loss again and again")),
  "max_seq_length": Key(int, without("FLUTE reads data_config's")),
}
MODEL: dict[str, Any] = {
  "model_type": Key(str, _network),
  "model_folder": Key(str, counts("names the task")),
  "pretrained_model_path": Key(str, _weights),
  "weight_init": Key(str, _initial),
  "freeze_layer": Key(str, _frozen),
  "embed_dim": Key(int, of_task("embed_dim")),
  "vocab_size": Key(int, of_task("vocab_size")),
  "hidden_dim": Key(int, of_task("hidden_dim")),
  "OOV_correct": Key(bool, without("FLUTE's GRU never gets it")),
  "input_dim": Key(int, without(_DATA)),
  "output_dim": Key(int, without(_DATA)),
  "num_classes": Key(int, of_task("num_classes")),
  "embbeding_path": Key(str, _vectors),
  "BERT": {
    "loader_type": Key(str, without("FLUTE does not read it")),
    "model": _BERT_MODEL,
    "training": _BERT_TRAINING,
  },
}
