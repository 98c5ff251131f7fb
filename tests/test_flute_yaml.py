"""FLUTE's YAML files: what becomes of every key."""

from __future__ import annotations

import math
import types

import pytest

from fedjax_sim.config import completion, flute
from fedjax_sim.config.flute.absent import DEFAULTS, NEEDS
from fedjax_sim.config.flute.keys import KEYS
from fedjax_sim.config.flute.rules import STATES, File, Key
from fedjax_sim.core.validate import UnknownNameError
from fedjax_sim.models import MODELS
from flute_files import DGA, DP, FILES, LR, WORDS, C, S, T, changed, common

# How many keys of each file are used, have no effect, are refused.
COUNTS = {
  "configs/hello_world_mlm_bert_json": (48, 73, 0),
  "configs/hello_world_nlg_gru_json": (29, 55, 0),
  "experiments/classif_cnn/config": (24, 17, 0),
  "experiments/cv/config": (22, 22, 0),
  "experiments/cv_cnn_femnist/config": (20, 20, 0),
  "experiments/cv_lr_mnist/config": (20, 22, 0),
  "experiments/cv_resnet_fedcifar100/config": (20, 20, 0),
  "experiments/ecg_cnn/config": (24, 17, 0),
  "experiments/fednewsrec/config": (21, 20, 0),
  "experiments/nlp_rnn_fedshakespeare/config": (20, 20, 0),
  "experiments/semisupervision/config": (39, 30, 0),
  "testing/hello_world_classif_cnn": (24, 17, 0),
  "testing/hello_world_ecg_cnn": (24, 17, 0),
  "testing/hello_world_mlm_bert": (50, 52, 0),
  "testing/hello_world_nlg_gru": (36, 45, 0),
}


def config_of(translation):
  """What the written file makes: its text is executed as a file would be."""
  module = types.ModuleType("config")
  exec(flute.config_file(translation, "config.yaml"), module.__dict__)
  return module.get_config()


# --- the fifteen files --------------------------------------------------------


@pytest.mark.parametrize("compat", flute.COMPATS)
@pytest.mark.parametrize("name", FILES)
def test_a_file_translates(name, compat):
  translation = flute.translate(FILES[name], compat=compat)
  assert tuple(translation.counts.values()) == COUNTS[name]
  table = flute.table(translation)
  for row in translation.rows:
    assert f"\n{row.path} " in f"\n{table}"
    assert row.outcome.fields or row.outcome.note
  config = config_of(translation)
  model = translation.fields["model.name"]
  if model in MODELS:
    completed = completion.complete(config)
    for field, value in translation.fields.items():
      section, _, key = field.rpartition(".")
      found = completed[section][key] if section else completed[key]
      assert found == value, field
  else:
    with pytest.raises(UnknownNameError, match=f"model.name={model!r}"):
      completion.complete(config)


def test_there_are_fifteen():
  assert len(FILES) == len(COUNTS) == 15
  assert {flute.translate(f).task.name for f in FILES.values()} == set(
    flute.TASKS
  )


# --- single keys --------------------------------------------------------------


@pytest.mark.parametrize(
  ("base", "changes", "expected"),
  [
    (
      LR,
      {f"{S}.num_clients_per_iteration": "5,12"},
      {"sampler.min_clients": 5, "server.clients_per_round": 12},
    ),
    (LR, {f"{S}.stale_prob": 0.3}, {"server.stale_probability": 0.3}),
    (LR, {f"{S}.initial_lr_client": -1.0}, {"client.learning_rate": 0.1}),
    (LR, {f"{S}.model_backup_freq": 7}, {"server.snapshot_every": 7}),
    (LR, {"dump_norm_stats": True}, {"server.client_log": True}),
    (
      LR,
      {"model_config.freeze_layer": "linear/"},
      {"model.frozen": ("linear/",)},
    ),
    (
      LR,
      {"model_config.pretrained_model_path": "w.safetensors"},
      {"model.initial": "w.safetensors"},
    ),
    (
      LR,
      {f"{S}.best_model_criterion": "acc"},
      {"server.best_metrics": ("test/accuracy",)},
    ),
    (
      LR,
      {
        f"{S}.optimizer_config": {
          "type": "adam",
          "lr": 0.1,
          "betas": [0.8, 0.9],
        }
      },
      {"server.optimizer": "adam", "server.b1": 0.8, "server.b2": 0.9},
    ),
    (
      LR,
      {f"{S}.optimizer_config": {"type": "adam", "lr": 0.1, "amsgrad": True}},
      {"server.optimizer": "optax:amsgrad"},
    ),
    (
      LR,
      {
        f"{S}.optimizer_config": {
          "type": "adamW",
          "lr": 0.5,
          "weight_decay": 0.1,
        }
      },
      {
        "server.learning_rate": 0.5 * (1 - 0.05),
        "server.weight_decay": 0.1 / (1 - 0.05),
        "server.eps": 1e-6,
      },
    ),
    (
      LR,
      {f"{C}.optimizer_config": {"type": "adamW", "weight_decay": 0.1}},
      {
        "client.learning_rate": 0.1 * (1 - 0.01),
        "client.weight_decay": 0.1 / (1 - 0.01),
      },
    ),
    (
      LR,
      {f"{S}.optimizer_config": {"type": "lars", "lr": 1.0}},
      {"server.momentum": 0.0},
    ),
    (
      LR,
      {
        f"{C}.optimizer_config": {
          "type": "sgd",
          "momentum": 0.9,
          "nesterov": True,
        }
      },
      {"client.momentum": 0.9, "client.nesterov": True},
    ),
    (
      LR,
      {f"{S}.annealing_config.gamma": 0.5},
      {"server.schedule": "step(every=100, factor=0.5)"},
    ),
    (
      LR,
      {
        f"{S}.annealing_config": {
          "type": "multi_step_lr",
          "gamma": 0.1,
          "milestones": [5, 9],
        }
      },
      {"server.schedule": "multi_step(at=(5, 9), factor=0.1)"},
    ),
    (
      LR,
      {
        f"{S}.optimizer_config": {"type": "sgd"},
        f"{S}.annealing_config": {
          "type": "rampup-keep-expdecay-keep",
          "peak_lr": 2.0,
          "floor_lr": 0.5,
          "sr": 5,
          "si": 20,
          "sf": 30,
        },
      },
      {
        "server.learning_rate": 2.0,
        "server.schedule": "ramp_keep_decay(ramp=5, keep=15, decay=10,"
        " floor=0.25)",
      },
    ),
    (
      LR,
      {
        f"{S}.annealing_config": {
          "type": "val_loss",
          "patience": 2,
          "factor": 0.5,
          "min_lr": 0.1,
        }
      },
      {
        "server.schedule": "plateau(metric='test/loss', patience=3,"
        " factor=0.5, floor=0.1)",
      },
    ),
    (
      LR,
      {
        f"{S}.data_config.train": {
          "batch_size": 8,
          "train_data_server": "server.json",
        },
        f"{S}.server_replay_config": {
          "server_iterations": 20,
          "max_grad_norm": 2.0,
          "optimizer_config": {"type": "sgd", "lr": 0.2},
        },
      },
      {
        "replay.steps": 3,
        "replay.batch_size": 8,
        "replay.learning_rate": 0.2,
        "replay.max_grad_norm": 2.0,
      },
    ),
    (
      LR,
      {f"{C}.quant_thresh": 0.8, f"{C}.quant_anneal": 0.5},
      {
        "transforms.quantize.sparsity": 0.4,
        "transforms.quantize.anneal": 0.5,
        "transforms.quantize.bits": 10,
      },
    ),
    (
      DGA,
      {
        f"{S}.wantRL": True,
        f"{S}.RL": {"initial_epsilon": 0.4, "epsilon_gamma": 0.9},
      },
      {
        "algorithm.name": "dga_rl",
        "aggregator.name": "stack",
        "algorithm.epsilon": 0.4,
        "algorithm.epsilon_decay": 0.9,
      },
    ),
    (
      DGA,
      {f"{S}.aggregate_median": "mean"},
      {"algorithm.weighting": "uniform"},
    ),
    (DGA, {f"{S}.softmax_beta": 5.0}, {"algorithm.beta": 5 / 20}),
    (WORDS, {f"{S}.softmax_beta": 5.0}, {"algorithm.beta": 5 / (20 * 25)}),
    (
      DGA,
      {f"{S}.weight_train_loss": "mag_mean_loss"},
      {"algorithm.statistic": "mean", "algorithm.beta": 1.0},
    ),
    (
      DGA,
      {f"{S}.weight_train_loss": "mag"},
      {"algorithm.statistic": "magnitude"},
    ),
    (
      DGA,
      {"dp_config": DP},
      {
        "local_privacy.mechanism": "gaussian",
        "local_privacy.epsilon": 4.0,
        "local_privacy.clip_norm": 2.0,
        "local_privacy.max_weight": 0.025,
        "local_privacy.min_weight": 0.0005,
        "local_privacy.weight_scale": 0.25,
        "algorithm.reference": 0.0,
      },
    ),
    (
      LR,
      {"dp_config": {**DP, "eps": -1.0}},
      {"local_privacy.mechanism": "clip", "local_privacy.clip_norm": 2.0},
    ),
    (
      LR,
      {
        "dp_config": {
          **DP,
          "eps": -1.0,
          "enable_global_dp": True,
          "global_sigma": 1.5,
        }
      },
      {
        "privacy.mechanism": "gaussian",
        "privacy.noise_multiplier": 1.5,
        "privacy.clip_norm": 2.0,
        "privacy.delta": 1e-5,
      },
    ),
    (
      WORDS,
      {
        "model_config.vocab_size": 100,
        "privacy_metrics_config": {
          "apply_metrics": True,
          "apply_leakage_metric": True,
          "max_allowed_leakage": 3.0,
          "adaptive_leakage_threshold": 0.9,
        },
      },
      {
        "leakage.statistic": "max",
        "leakage.quantile": 0.9,
        "leakage.threshold": math.log(100) * (1 - math.exp(-3)),
      },
    ),
    (
      WORDS,
      {
        f"{C}.ss_config": {
          "ramp_start": 3,
          "ramp_stop": 8,
          "initial_rate": 0.1,
          "final_rate": 0.2,
        }
      },
      {
        "model.scheduled_sampling": 0.2,
        "model.schedule": "linear(rounds=5, start=0.5, begin=3)",
      },
    ),
  ],
)
def test_numbers_are_converted(base, changes, expected):
  found = flute.translate(changed(base, changes))
  for field, value in expected.items():
    wanted = pytest.approx(value) if isinstance(value, float) else value
    assert found.fields[field] == wanted, field
  if base is not WORDS and "aggregator.name" not in expected:
    completion.complete(config_of(found))


@pytest.mark.parametrize(
  ("base", "changes", "expected"),
  [
    (
      DGA,
      {f"{S}.softmax_beta": 5.0},
      {
        "algorithm.beta": 5.0,
        "algorithm.statistic": "loss",
        "algorithm.statistic_of": "batches",
        "algorithm.reference": 0.0,
        "model.sigmoid": True,
      },
    ),
    (
      DGA,
      {f"{S}.weight_train_loss": "mag_mean_loss"},
      {"algorithm.statistic_of": "batches"},
    ),
    (
      DGA,
      {
        f"{S}.weight_train_loss": "mag_mean_loss",
        f"{C}.stats_on_smooth_grad": True,
      },
      {"algorithm.statistic": "mean", "algorithm.statistic_of": None},
    ),
    (
      DGA,
      {f"{S}.weight_train_loss": "mag_var_loss"},
      {"algorithm.weighting": "uniform", "algorithm.beta": None},
    ),
    (
      common("cv_lr_mnist", "LR", "FedProx"),
      {},
      {"algorithm.mu": 0.001, "algorithm.cumulative": True},
    ),
    (LR, {f"{C}.quant_thresh": 0.8}, {"transforms.quantize.sparsity": None}),
    (
      LR,
      {f"{S}.optimizer_config.type": "lamb"},
      {"server.optimizer": "uncorrected_lamb"},
    ),
    (
      DGA,
      {"dp_config": DP},
      {
        "local_privacy.epsilon": None,
        "local_privacy.stddev": math.sqrt(2 * math.log(1.25 / 1e-5))
        * math.hypot(2.0, 0.5)
        / 4
        / 2,
      },
    ),
    (
      common("ecg_cnn", "SuperNet", "DGA"),
      {},
      {"model.double_softmax": True, "model.send_buffers": False},
    ),
    (
      WORDS,
      {f"{C}.ss_config": {"final_rate": 0.2}},
      {"model.scheduled_sampling": None},
    ),
  ],
)
def test_flutes_own_arithmetic(base, changes, expected):
  found = flute.translate(changed(base, changes), compat="flute")
  for field, value in expected.items():
    assert found.fields.get(field) == pytest.approx(value), field
  if base is not WORDS:
    completion.complete(config_of(found))


def test_flutes_defaults_are_named():
  bare = {
    f"{T}.batch_size": ...,
    f"{S}.max_iteration": ...,
    f"{S}.rec_freq": ...,
    f"{S}.best_model_criterion": ...,
  }
  found = flute.translate(changed(LR, bare))
  assert found.fields["client.batch_size"] == 40
  assert found.fields["server.rounds"] == 10000
  assert found.fields["server.test_every"] == 8
  assert found.fields["client.max_grad_norm"] == 5.0
  text = flute.config_file(found, "config.yaml")
  assert "config.server.rounds = 10000" in text
  assert "server_config.max_iteration [FLUTE's default]" in text


@pytest.mark.parametrize(
  ("model", "expected"),
  [
    ("resnet34", {"model.name": "resnet", "model.depth": 34}),
    ("vgg13", {"model.name": "vgg", "model.depth": 13}),
    ("vgg16_bn", {"model.name": "vgg", "model.norm": "batch"}),
  ],
)
def test_a_task_with_several_networks(model, expected):
  tree = changed(
    FILES["experiments/cv/config"], {"model_config.model_type": model}
  )
  for compat in flute.COMPATS:
    found = flute.translate(tree, compat=compat)
    assert expected.items() <= found.fields.items()
    kept = found.fields.get("model.send_buffers")
    assert kept == (None if compat == "meant" or model == "vgg13" else False)
    completion.complete(config_of(found))


SAMPLES = {
  bool: True,
  int: 3,
  float: 0.5,
  str: "text",
  list: [1, 2],
  dict: {},
  object: 1,
}


def leaves(table, prefix=""):
  """Path and `Key` of every entry of the table."""
  for name, entry in table.items():
    if isinstance(entry, Key):
      yield f"{prefix}{name}", entry
    else:
      yield from leaves(entry, f"{prefix}{name}.")


@pytest.mark.parametrize("strategy", ["DGA", "FedAvg", "FedLabels"])
def test_every_key_has_an_outcome(strategy):
  """Also a value that is never right is used, idle, refused, or an error."""
  keys = dict(leaves(KEYS))
  assert len({path.rpartition(".")[2] for path in keys}) > 180
  assert {d.path for d in DEFAULTS} | {n.path for n in NEEDS} <= set(keys)
  values = {path: SAMPLES[key.kind] for path, key in keys.items()}
  values |= {
    "strategy": strategy,
    f"{S}.type": "model_optimization",
    f"{S}.aggregate_median": "softmax",
    f"{S}.annealing_config.type": "step_lr",
    f"{S}.optimizer_config.type": "adamW",
  }
  for compat in flute.COMPATS:
    file = File(values, flute.TASKS["nlg_gru"], compat)
    for path, key in keys.items():
      try:
        outcome = key.rule(values[path], file)
      except ValueError as error:
        assert path.rpartition(".")[0] in str(error)  # noqa: PT017
        continue
      assert outcome.state in STATES
      assert outcome.fields or outcome.note, path
