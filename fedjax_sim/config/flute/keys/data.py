"""FLUTE's `data_config`: what is read, in which batches, how much of it."""

from __future__ import annotations

from typing import Any

from fedjax_sim.config.flute.rules import (
  File,
  Key,
  Outcome,
  Rule,
  by_line,
  counts,
  idle,
  of_task,
  refuses,
  sets,
  used,
  without,
)

_SPEECH = "of speech; no task of FLUTE reads it"
_UNREAD = "FLUTE does not read it"
_EVALUATION = 256  # examples, which fit everywhere


def _source(flag: str) -> Rule:
  """Return the rule of a path, which `fedjax-sim data import` reads."""

  def rule(value: str, file: File) -> Outcome:
    if file.has_own_data:
      name = file.task.data["data.name"]
      return idle(f"data.name={name!r} instead; --data=STORE for the file")
    return used(note=f"--data, a store: `data import {flag}={value}`")

  return rule


def _evaluation_batch(value: int, file: File) -> Outcome:
  """Evaluate in the larger of the two batches; the results are the same."""
  paths = [f"server_config.data_config.{x}.batch_size" for x in ("val", "test")]
  largest = max(file.get(path, 1) for path in paths)
  note = "" if largest >= _EVALUATION else f"{_EVALUATION} at least, for speed"
  return used({"runtime.eval_batch_size": max(largest, _EVALUATION)}, note)


def _client_batch(value: int, file: File) -> Outcome:
  if file.strategy == "fedlabels":
    return idle("semisupervision.bs replaces it")
  return used({"client.batch_size": value})


def _most(value: int, file: File) -> Outcome:
  """End a client's round with the step that reaches so many samples."""
  if file.strategy == "fedlabels":
    return idle("FedLabels takes a fixed number of steps")
  what = "words, tokens or characters" if file.task.tokens else "examples"
  return used({"client.max_tokens": value}, f"in {what}")


def _clip(value: float, file: File) -> Outcome:
  if file.strategy == "fedlabels":
    return idle("FLUTE's FedLabels clips nothing")
  return used({"client.max_grad_norm": value})


def _server_clip(value: float, file: File) -> Outcome:
  """Clip the server's update, and replay's steps without a norm of theirs."""
  fields = {"server.max_grad_norm": value}
  if file.get("server_config.server_replay_config.max_grad_norm") is None:
    fields["replay.max_grad_norm"] = value
  return used(fields)


def _length(value: int, file: File) -> Outcome:
  return used(note=f"`data import --sequence-length={value}`")


def _common() -> dict[str, Key]:
  """Return the keys that mean the same for all sets."""
  prepared = counts("`data import`, by a --map")
  return {
    "loader_type": Key(str, without(_UNREAD)),
    "prepend_datapath": Key(bool, without(_UNREAD)),
    "num_workers": Key(int, without("batches are cut on the device")),
    "train_data": Key(str, without("FLUTE's old name")),
    "train_data_server": Key(str, without("it is not the training set")),
    "test_data": Key(str, without("it is not the test set")),
    "val_data": Key(str, without("it is not the validation set")),
    "list_of_train_data": Key(str, without("it is not the training set")),
    "desired_max_samples": Key(int, without("only clients train so")),
    "max_grad_norm": Key(float, without("nothing is trained on it")),
    "tokenizer_type": Key(str, without("always not_applicable")),
    "vocab_dict": Key(str, counts("`data import --vocabulary`")),
    "pin_memory": Key(bool, without("of torch's loaders")),
    "num_frames": Key(int, without(_UNREAD)),
    "max_batch_size": Key(int, without(_UNREAD)),
    "max_num_words": Key(int, _length),
    "unsorted_batch": Key(bool, without("batches are not sorted here")),
    "utterance_mvn": Key(bool, without(_SPEECH)),
    "task": Key(str, counts("the task")),
    "mlm_probability": Key(float, of_task("mlm_probability")),
    "tokenizer_type_fast": Key(bool, prepared),
    "max_seq_length": Key(int, _length),
    "min_words_per_utt": Key(int, prepared),
    "max_samples_per_user": Key(int, prepared),
    "mask_token": Key(str, without(_UNREAD)),
    "cache_dir": Key(str, without("nothing is downloaded")),
    "wantLogits": Key(
      bool, refuses("no run keeps predictions; `export` writes them", (False,))
    ),
    "input_dim": Key(int, without("of a branch that FLUTE never takes")),
    "spm_model": Key(str, without(_SPEECH)),
    "num_clients": Key(int, without("counted, not read")),
    "preencoded": Key(bool, counts("`data import` without --text")),
    "padding": Key(bool, without("of batches, which are all alike here")),
    "tokenizer_name": Key(str, prepared),
    "model_name_or_path": Key(str, of_task("model_name")),
    "process_line_by_line": Key(bool, by_line),
  }


CLIENTS: dict[str, Any] = {
  **_common(),
  "batch_size": Key(int, _client_batch),
  "desired_max_samples": Key(int, _most),
  "max_grad_norm": Key(float, _clip),
  "list_of_train_data": Key(str, _source("--train")),
}
TEST: dict[str, Any] = {
  **_common(),
  "batch_size": Key(int, _evaluation_batch),
  "test_data": Key(str, _source("--test")),
}
VALIDATION: dict[str, Any] = {
  **_common(),
  "batch_size": Key(int, _evaluation_batch),
  "val_data": Key(str, _source("--unseen")),
}
SERVER: dict[str, Any] = {
  **_common(),
  "batch_size": Key(int, sets("replay.batch_size")),
  "max_grad_norm": Key(float, _server_clip),
  "train_data_server": Key(str, _source("--server")),
}
