"""FLUTE's fifteen YAML files, as keys and values.

Most keys are the same in all of them; a file is what it adds to these.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

PATH = "<add path to data here>"
STEP = {"type": "step_lr", "step_interval": "epoch", "gamma": 1.0}


def common(task: str, model: str, strategy: str) -> dict[str, Any]:
  """What nearly all files hold."""
  return {
    "model_config": {
      "model_type": model,
      "model_folder": f"experiments/{task}/model.py",
    },
    "dp_config": {"enable_local_dp": False},
    "privacy_metrics_config": {"apply_metrics": False},
    "strategy": strategy,
    "server_config": {
      "wantRL": False,
      "resume_from_checkpoint": True,
      "do_profiling": False,
      "optimizer_config": {"type": "sgd", "lr": 1.0},
      "annealing_config": {**STEP, "step_size": 100},
      "val_freq": 50000,
      "rec_freq": 50,
      "initial_val": True,
      "initial_rec": False,
      "max_iteration": 1000,
      "num_clients_per_iteration": 10,
      "data_config": {
        "val": {"batch_size": 10, "val_data": None},
        "test": {"batch_size": 10, "test_data": None},
      },
      "type": "model_optimization",
      "aggregate_median": "softmax",
      "initial_lr_client": 0.1,
      "lr_decay_factor": 1.0,
      "weight_train_loss": "train_loss",
      "best_model_criterion": "loss",
      "fall_back_to_best_model": False,
      "softmax_beta": 1.0,
    },
    "client_config": {
      "do_profiling": False,
      "ignore_subtask": False,
      "data_config": {
        "train": {
          "batch_size": 20,
          "list_of_train_data": None,
          "desired_max_samples": 5000,
        }
      },
      "optimizer_config": {"type": "sgd", "lr": 0.1},
      "type": "optimization",
    },
  }


def changed(tree: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
  """The tree with values set, or with keys removed (`...`), by their paths."""
  tree = copy.deepcopy(tree)
  for path, value in changes.items():
    *sections, key = path.split(".")
    place = tree
    for name in sections:
      place = place.setdefault(name, {})
    if value is ...:
      place.pop(key, None)
    else:
      place[key] = copy.deepcopy(value)
  return tree


def evaluated(batch: int, **others: Any) -> dict[str, Any]:
  """Changes of both evaluation sets."""
  return {
    f"server_config.data_config.{name}.{key}": value
    for name in ("val", "test")
    for key, value in {"batch_size": batch, **others}.items()
  }


S, C, T = "server_config", "client_config", "client_config.data_config.train"
V, E = f"{S}.data_config.val", f"{S}.data_config.test"


def fedml(batch: int, rate: float, rounds: int, evaluation: int = 20):
  """Changes of the files that repeat FedML's benchmarks."""
  return {
    f"{S}.resume_from_checkpoint": False,
    f"{S}.initial_val": False,
    f"{S}.max_iteration": rounds,
    f"{S}.initial_lr_client": rate,
    f"{T}.batch_size": batch,
    f"{C}.optimizer_config.lr": rate,
    **evaluated(evaluation),
  }


_CIFAR = {
  f"{S}.val_freq": 50,
  f"{S}.rec_freq": 100,
  f"{S}.max_iteration": 2000,
  f"{S}.initial_lr_client": 0.001,
  f"{S}.best_model_criterion": "f1_score",
  f"{S}.resume_from_checkpoint": False,
  f"{S}.initial_rec": True,
  f"{T}.batch_size": 4,
  f"{T}.desired_max_samples": 50000,
  f"{C}.optimizer_config": {"type": "sgd", "lr": 0.001, "momentum": 0.9},
  **evaluated(10000),
}
_ECG = {
  f"{S}.resume_from_checkpoint": False,
  f"{S}.initial_rec": True,
  f"{S}.val_freq": 50,
  f"{S}.rec_freq": 500,
  f"{S}.max_iteration": 2000,
  f"{S}.num_clients_per_iteration": 25,
  f"{S}.initial_lr_client": 0.001,
  f"{S}.softmax_beta": 20.0,
  f"{T}.batch_size": 96,
  f"{T}.desired_max_samples": 87000,
  f"{T}.list_of_train_data": "train_data.hdf5",
  f"{V}.val_data": "test_data.hdf5",
  f"{E}.test_data": "test_data.hdf5",
  f"{C}.optimizer_config": {"type": "sgd", "lr": 0.001, "momentum": 0.9},
  **evaluated(10000),
}
_LANGUAGE = {  # of both GRU files and both BERT files
  f"{C}.meta_learning": "basic",
  f"{C}.stats_on_smooth_grad": True,
  f"{C}.copying_train_data": False,
  f"{C}.optimizer_config": {"type": "sgd"},
  f"{C}.annealing_config": {**STEP, "step_size": 1},
  f"{C}.meta_optimizer_config": {"type": "sgd", "lr": 1.0},
  f"{T}.prepend_datapath": False,
  f"{T}.pin_memory": True,
  f"{T}.num_workers": 0,
  **evaluated(2048, prepend_datapath=False, num_workers=0),
}
_WORDS = {
  "max_num_words": 25,
  "tokenizer_type": "not_applicable",
  "unsorted_batch": True,
}
_GRU = {
  **_LANGUAGE,
  "model_config.embed_dim": 160,
  "model_config.vocab_size": 10000,
  "model_config.hidden_dim": 512,
  "model_config.OOV_correct": False,
  f"{S}.initial_lr_client": 1.0,
  f"{S}.softmax_beta": 20.0,
  f"{C}.num_skips_threshold": 10,
  f"{T}.batch_size": 64,
  f"{T}.desired_max_samples": 50000,
  f"{T}.max_grad_norm": 20.0,
  f"{T}.max_batch_size": 128,
  **{f"{T}.{k}": v for k, v in _WORDS.items()},
  **evaluated(
    2048,
    prepend_datapath=False,
    num_workers=0,
    pin_memory=True,
    max_batch_size=2048,
    **_WORDS,
  ),
  f"{V}.num_frames": 2400,
  f"{E}.train_data": None,
  f"{E}.train_data_server": None,
}
_TOKENS = {
  "task": "mlm",
  "mlm_probability": 0.25,
  "tokenizer_type_fast": False,
  "max_seq_length": 256,
  "mask_token": "<mask>",
  "cache_dir": "./cache_dir",
}
_BERT = {
  **_LANGUAGE,
  "model_config.BERT": {
    "loader_type": "text",
    "model": {
      "model_name": "roberta-large",
      "cache_dir": "./cache_dir",
      "use_fast_tokenizer": False,
      "mask_token": "<mask>",
      "task": "mlm",
      "past_index": -1,
      "prediction_loss_only": False,
      "process_line_by_line": False,
    },
    "training": {
      "seed": 12345,
      "label_smoothing_factor": 0,
      "batch_size": 64,
      "max_seq_length": 256,
    },
  },
  f"{S}.fast_aggregation": True,
  f"{S}.optimizer_config": {"type": "adamW", "lr": 1e-5, "weight_decay": 0.01},
  f"{S}.annealing_config.step_size": 1000,
  f"{S}.weight_train_loss": "mag_mean_loss",
  f"{S}.initial_lr_client": 1e-5,
  f"{C}.meta_optimizer_config": {"type": "adam", "lr": 0.01},
  f"{C}.optimizer_config": {
    "type": "adamW",
    "weight_decay": 0.01,
    "amsgrad": True,
  },
  f"{C}.annealing_config.step_size": 2,
  f"{T}.batch_size": 24,
  f"{T}.max_grad_norm": 15.0,
  f"{T}.num_frames": 0,
  f"{T}.min_words_per_utt": 5,
  **{f"{T}.{k}": v for k, v in _TOKENS.items()},
  **evaluated(
    128,
    prepend_datapath=False,
    num_workers=0,
    max_samples_per_user=5000,
    **_TOKENS,
  ),
  f"{V}.min_words_per_utt": 5,
}
_PRIVACY = {
  "enable_local_dp": False,
  "enable_global_dp": False,
  "eps": 100,
  "global_sigma": 0.35,
  "weight_scaler": 0.0001,
  "max_grad": 0.008,
  "max_weight": 0.5,
  "min_weight": 1e-7,
}
_PLACES = {
  f"{T}.list_of_train_data": PATH,
  f"{V}.val_data": PATH,
  f"{E}.test_data": PATH,
}


def _file(task, model, strategy, changes):
  return changed(common(task, model, strategy), changes)


FILES: dict[str, dict[str, Any]] = {
  "configs/hello_world_mlm_bert_json": _file(
    "mlm_bert",
    "BERT",
    "DGA",
    _BERT
    | _PLACES
    | {
      "dp_config": _PRIVACY,
      f"{S}.RL": {
        "RL_path_global": False,
        "marginal_update_RL": True,
        "RL_path": "./RL_models",
        "model_descriptor_RL": "marginalUpdate",
        "network_params": "300,128,128,128,64,100",
        "initial_epsilon": 0.5,
        "final_epsilon": 0.0001,
        "epsilon_gamma": 0.9,
        "max_replay_memory_size": 1000,
        "minibatch_size": 16,
        "gamma": 0.99,
        "optimizer_config": {"type": "adam", "lr": 3e-4, "amsgrad": True},
        "annealing_config": {**STEP, "step_size": 1, "gamma": 0.95},
      },
      f"{S}.val_freq": 4,
      f"{S}.rec_freq": 16,
      f"{S}.max_iteration": 10000,
      f"{S}.num_clients_per_iteration": 200,
    },
  ),
  "configs/hello_world_nlg_gru_json": _file(
    "nlg_gru",
    "GRU",
    "FedProx",
    _GRU
    | _PLACES
    | {
      "model_config.pretrained_model_path": PATH,
      f"{V}.vocab_dict": "<add path to vocab here>",
      f"{E}.vocab_dict": "<add path to vocab here>",
      f"{T}.vocab_dict": "<add path to vocab here>",
      f"{S}.optimizer_config": {
        "type": "lamb",
        "lr": 0.1,
        "weight_decay": 0.005,
      },
      f"{S}.val_freq": 2,
      f"{S}.rec_freq": 4,
      f"{S}.max_iteration": 11,
      f"{C}.mu": 0.001,
    },
  ),
  "experiments/classif_cnn/config": _file("classif_cnn", "CNN", "DGA", _CIFAR),
  "experiments/cv/config": _file(
    "cv",
    "resnet50",
    "DGA",
    {
      "model_config.num_classes": 10,
      f"{S}.type": "personalization",
      f"{S}.resume_from_checkpoint": False,
      f"{S}.save_to_disk": False,
      f"{S}.total_num_clients": 100,
      f"{S}.optimizer_config": {"type": "adam", "lr": 0.001},
      f"{S}.val_freq": 1000,
      f"{S}.rec_freq": 5,
      f"{S}.initial_val": False,
      f"{S}.initial_rec": True,
      f"{S}.softmax_beta": 20.0,
      f"{S}.initial_lr_client": 1.0,
      f"{C}.convex_model_interp": 0.75,
      f"{C}.optimizer_config.lr": 0.001,
      f"{T}.batch_size": 128,
      f"{T}.desired_max_samples": 50000,
      **evaluated(128),
    },
  ),
  "experiments/cv_cnn_femnist/config": _file(
    "cv_cnn_femnist", "CNN", "FedAvg", fedml(20, 0.1, 800)
  ),
  "experiments/cv_lr_mnist/config": _file(
    "cv_lr_mnist",
    "LR",
    "FedAvg",
    {
      **fedml(10, 0.03, 100, 10),
      "model_config.input_dim": 784,
      "model_config.output_dim": 10,
      f"{S}.val_freq": 1000,
      f"{S}.rec_freq": 20,
    },
  ),
  "experiments/cv_resnet_fedcifar100/config": _file(
    "cv_resnet_fedcifar100", "RESNET", "FedAvg", fedml(20, 0.1, 4000)
  ),
  "experiments/ecg_cnn/config": _file("ecg_cnn", "SuperNet", "DGA", _ECG),
  "experiments/fednewsrec/config": _file(
    "fednewsrec",
    "FEDNEWS",
    "FedAvg",
    {
      **fedml(64, 0.1, 1500, 1),
      "model_config.embbeding_path": "/mnt/data/MIND_large",
      f"{S}.resume_from_checkpoint": True,
      f"{S}.initial_val": True,
      f"{S}.val_freq": 50,
      f"{S}.rec_freq": 2000,
      f"{S}.num_clients_per_iteration": 500,
      f"{S}.best_model_criterion": "auc",
      f"{T}.desired_max_samples": 50000,
    },
  ),
  "experiments/nlp_rnn_fedshakespeare/config": _file(
    "nlp_rnn_fedshakespeare", "RNN", "FedAvg", fedml(4, 0.8, 1200, 4)
  ),
  "experiments/semisupervision/config": _file(
    "semisupervision",
    "Res",
    "FedLabels",
    {
      "model_config.num_classes": 100,
      f"{S}.send_dicts": True,
      f"{S}.val_freq": 1,
      f"{S}.rec_freq": 5000,
      f"{S}.max_iteration": 2000,
      f"{S}.softmax_beta": 20.0,
      f"{S}.initial_lr_client": 0.003,
      f"{T}.batch_size": 64,
      f"{T}.desired_max_samples": 87000,
      f"{C}.optimizer_config": {"type": "sgd", "lr": 0.003, "momentum": 0},
      f"{C}.semisupervision": yaml.safe_load(
        "{uda: 1, num_classes: 100, isclust: 0, alpha: 0.1, train_ratio: 0.2,"
        " test_ratio: 0.0, val_ratio: 0.8, vat_ptb: 0, vat_consis: 0.05,"
        " lamb_consist: 0.05, unsup_lamb: 1, l2_lambda: 10, burnout_round: 50,"
        " thre: 0.3, comp: var, eta: 0.003, bs: 64, unl_bs: 128, train_ep: 30,"
        " unsuptrain_ep: 10, ensize: 100, seed: 0, temp: 1, device: cuda,"
        " size: 10, shuffle: 1}"
      ),
      **evaluated(64),
    },
  ),
  "testing/hello_world_classif_cnn": _file(
    "classif_cnn",
    "CNN",
    "DGA",
    _CIFAR
    | {
      f"{S}.max_iteration": 3,
      f"{S}.num_clients_per_iteration": 3,
      f"{S}.val_freq": 1,
      f"{S}.rec_freq": 5,
    },
  ),
  "testing/hello_world_ecg_cnn": _file(
    "ecg_cnn",
    "SuperNet",
    "DGA",
    _ECG
    | {
      f"{S}.initial_val": False,
      f"{S}.initial_rec": False,
      f"{S}.max_iteration": 3,
      f"{S}.num_clients_per_iteration": 3,
      f"{S}.val_freq": 5,
      f"{S}.rec_freq": 3,
      f"{T}.list_of_train_data": "data/ecg_cnn/train_data.hdf5",
      f"{V}.val_data": "data/ecg_cnn/test_data.hdf5",
      f"{E}.test_data": "data/ecg_cnn/test_data.hdf5",
    },
  ),
  "testing/hello_world_mlm_bert": _file(
    "mlm_bert",
    "BERT",
    "DGA",
    _BERT
    | {
      f"{T}.list_of_train_data": "data/mlm_bert/train_data.txt",
      f"{V}.val_data": "data/mlm_bert/val_data.txt",
      f"{E}.test_data": "data/mlm_bert/test_data.txt",
      "dp_config": _PRIVACY,
      f"{S}.weight_train_loss": "train_loss",
      f"{S}.fast_aggregation": ...,
      f"{S}.initial_val": False,
      f"{S}.max_iteration": 2,
      f"{S}.num_clients_per_iteration": 2,
      f"{S}.val_freq": 5,
      f"{S}.rec_freq": 5,
    },
  ),
  "testing/hello_world_nlg_gru": _file(
    "nlg_gru",
    "GRU",
    "DGA",
    _GRU
    | {
      f"{V}.batch_size": ...,
      f"{T}.list_of_train_data": "data/nlg_gru/train_data.json",
      f"{V}.val_data": "data/nlg_gru/val_data.json",
      f"{E}.test_data": "data/nlg_gru/test_data.json",
      f"{V}.vocab_dict": "models/vocab_reddit.vocab",
      f"{E}.vocab_dict": "models/vocab_reddit.vocab",
      f"{T}.vocab_dict": "models/vocab_reddit.vocab",
      f"{S}.optimizer_config": {"type": "adam", "lr": 0.003, "amsgrad": True},
      f"{S}.val_freq": 1,
      f"{S}.rec_freq": 5,
      f"{S}.max_iteration": 3,
    },
  ),
}


# Files to change.
LR = common("cv_lr_mnist", "LR", "FedAvg")
DGA = common("cv_lr_mnist", "LR", "DGA")
WORDS = changed(common("nlg_gru", "GRU", "DGA"), {f"{T}.max_num_words": 25})
DP = {
  "enable_local_dp": True,
  "eps": 4.0,
  "delta": 1e-5,
  "max_grad": 2.0,
  "max_weight": 0.5,
  "min_weight": 0.01,
  "weight_scaler": 20.0,
}


def write(path: Path, tree: Mapping[str, Any]) -> Path:
  """Write a file, and return its path."""
  path.write_text(yaml.safe_dump(dict(tree), sort_keys=False))
  return path
