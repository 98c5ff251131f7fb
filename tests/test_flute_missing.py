"""FLUTE's YAML files: keys that are missing, and numbers that nothing converts.

FLUTE's default counts, or the file is refused where FLUTE stops; a default of
ours never takes the place of a key.
"""

from __future__ import annotations

import math

import pytest

from fedjax_sim.config import flute
from flute_files import DGA, DP, FILES, LR, WORDS, C, S, T, changed


def rows_of(translation):
  """The rows of FLUTE's defaults, by path."""
  return {row.path: row for row in translation.rows if row.is_default}


REPLAY = {
  f"{S}.data_config.train.train_data_server": "server.json",
  f"{S}.server_replay_config": {
    "server_iterations": 20,
    "optimizer_config": {"type": "adam"},
  },
}


@pytest.mark.parametrize("kind", ["adam", "adamax", "adamW", "lamb"])
def test_an_optimizer_without_a_rate_has_torchs(kind):
  """That of clients counts only where initial_lr_client gives none."""
  changes = {
    f"{S}.optimizer_config": {"type": kind},
    f"{C}.optimizer_config": {"type": kind},
  }
  found = flute.translate(changed(LR, changes))
  assert found.fields["server.learning_rate"] == 1e-3
  assert found.fields["client.learning_rate"] == 0.1
  rows = rows_of(found)
  assert rows[f"{S}.optimizer_config.lr"].value == 1e-3
  assert f"{C}.optimizer_config.lr" not in rows
  for rate in (..., -1.0, None):
    own = {**changes, f"{S}.initial_lr_client": rate}
    found = flute.translate(changed(LR, own))
    assert found.fields["client.learning_rate"] == 1e-3


def test_a_replay_without_numbers_has_flutes():
  found = flute.translate(changed(LR, REPLAY))
  expected = {
    "replay.learning_rate": 1e-3,
    "replay.batch_size": 40,
    "replay.steps": 1,
    "replay.max_grad_norm": 5.0,
    "server.max_grad_norm": 5.0,
  }
  for field, value in expected.items():
    assert found.fields[field] == value, field


def test_an_agent_beside_a_mean_weighs_evenly():
  """dga_rl has a softmax alone, which a beta of 0 makes a mean."""
  changes = {f"{S}.wantRL": True, f"{S}.aggregate_median": "mean"}
  found = flute.translate(changed(DGA, changes))
  assert found.fields["algorithm.name"] == "dga_rl"
  assert found.fields["algorithm.beta"] == 0.0


def test_dga_under_global_privacy_says_how_much_smaller_steps_are():
  changes = {
    "dp_config": {
      **DP,
      "eps": -1.0,
      "enable_global_dp": True,
      "global_sigma": 1.5,
    }
  }
  found = flute.translate(changed(DGA, changes))
  assert found.fields["privacy.max_weight"] == 0.5 / 20
  assert "privacy.noise_weights" not in found.fields
  told = "FLUTE's step times (mean weight / privacy.max_weight)"
  assert told in flute.table(found)
  (line,) = (
    line
    for line in flute.table(found).splitlines()
    if line.startswith("dp_config.max_weight ")
  )
  assert told in line


def test_even_weights_have_no_reference_under_privacy():
  """FLUTE's mag_var_loss is 0, so that its softmax is none here."""
  changes = {"dp_config": DP, f"{S}.weight_train_loss": "mag_var_loss"}
  found = flute.translate(changed(DGA, changes), compat="flute")
  assert found.fields["algorithm.weighting"] == "uniform"
  assert "algorithm.reference" not in found.fields
  assert "algorithm.beta" not in found.fields


NOISY = {"dp_config": DP}
GLOBAL = {
  "dp_config": {
    **DP,
    "eps": -1.0,
    "enable_global_dp": True,
    "global_sigma": 1.5,
  }
}
LABELS = FILES["experiments/semisupervision/config"]
RAMP = {
  "type": "rampup-keep-expdecay-keep",
  "peak_lr": 2.0,
  "floor_lr": 0.5,
  "sr": 5,
  "si": 20,
  "sf": 30,
}


@pytest.mark.parametrize("compat", flute.COMPATS)
@pytest.mark.parametrize("absent", [..., None, "<add eps here>"])
@pytest.mark.parametrize(
  ("base", "changes", "path"),
  [
    (LR, NOISY, "dp_config.eps"),
    (DGA, NOISY, "dp_config.eps"),
    (LR, NOISY, "dp_config.max_grad"),
    (LR, GLOBAL, "dp_config.max_grad"),
    (LR, GLOBAL, "dp_config.global_sigma"),
    (DGA, GLOBAL, "dp_config.max_weight"),
    (DGA, NOISY, "dp_config.max_weight"),
    (DGA, NOISY, "dp_config.min_weight"),
    (DGA, {}, f"{S}.aggregate_median"),
    (DGA, {f"{S}.wantRL": True}, f"{S}.aggregate_median"),
    (DGA, {}, f"{S}.softmax_beta"),
    (LR, {}, f"{S}.optimizer_config.type"),
    (LR, {}, f"{C}.optimizer_config.type"),
    (LR, {}, f"{S}.optimizer_config.lr"),
    (LR, {f"{S}.optimizer_config.type": "lars"}, f"{S}.optimizer_config.lr"),
    (LR, {f"{S}.initial_lr_client": ...}, f"{C}.optimizer_config.lr"),
    (LR, REPLAY, f"{S}.server_replay_config.server_iterations"),
    (LR, REPLAY, f"{S}.server_replay_config.optimizer_config.type"),
    (LABELS, {}, f"{C}.semisupervision.burnout_round"),
    (LABELS, {}, f"{C}.semisupervision.l2_lambda"),
  ],
)
def test_what_flute_stops_without_is_an_error(
  base, changes, path, absent, compat
):
  """Missing, null or a placeholder: never a default of ours instead."""
  tree = changed(base, changes)
  assert flute.translate(tree, compat=compat).counts["used"] > 0
  with pytest.raises(ValueError, match=rf"^{path} is missing; ") as caught:
    flute.translate(changed(tree, {path: absent}), compat=compat)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("base", [LR, DGA])
def test_what_is_off_may_be_missing(base):
  """Nothing is needed of a feature that the file does not use."""
  even = {f"{S}.aggregate_median": "mean", f"{S}.softmax_beta": ...}
  tree = changed(
    base,
    {
      **even,
      "dp_config": {"enable_local_dp": False, "eps": 0, "max_grad": 0},
      f"{C}.optimizer_config.lr": ...,
      f"{S}.server_replay_config.optimizer_config": {},
    },
  )
  for compat in flute.COMPATS:
    found = flute.translate(tree, compat=compat)
    assert "local_privacy.mechanism" not in found.fields
  clips = {"dp_config": {"enable_local_dp": True, "eps": -1, "max_grad": 2}}
  found = flute.translate(changed(base, {**even, **clips}))
  assert found.fields["local_privacy.mechanism"] == "clip"
  tree = changed(LR, {f"{S}.aggregate_median": ..., f"{S}.softmax_beta": ...})
  assert flute.translate(tree).fields["algorithm.name"] == "fedavg"


@pytest.mark.parametrize("compat", flute.COMPATS)
@pytest.mark.parametrize(
  ("base", "changes", "words"),
  [
    (LR, {**NOISY, "dp_config.eps": 0}, ["dp_config.eps=0", "above 0, or -1"]),
    (LR, {**NOISY, "dp_config.eps": math.inf}, ["dp_config.eps=inf", "finite"]),
    (LR, {**NOISY, "dp_config.eps": math.nan}, ["dp_config.eps=nan", "finite"]),
    (LR, {**NOISY, "dp_config.delta": 0}, ["dp_config.delta=0", "> 0 and < 1"]),
    (LR, {**NOISY, "dp_config.delta": 1.5}, ["dp_config.delta=1.5", "< 1"]),
    (LR, {**GLOBAL, "dp_config.delta": 0}, ["dp_config.delta=0", "> 0"]),
    (LR, {**NOISY, "dp_config.max_grad": 0}, ["dp_config.max_grad=0", "> 0"]),
    (LR, {**GLOBAL, "dp_config.max_grad": 0}, ["dp_config.max_grad=0", "> 0"]),
    (DGA, {**NOISY, "dp_config.max_grad": 0}, ["dp_config.max_grad=0", "> 0"]),
    (LR, {**GLOBAL, "dp_config.global_sigma": -1}, ["global_sigma=-1", ">= 0"]),
    *(
      (DGA, {**dp, f"dp_config.{name}": 0}, [f"dp_config.{name}=0", "> 0"])
      for dp in (NOISY, GLOBAL)
      for name in ("weight_scaler", "max_weight")
    ),
    (DGA, {**NOISY, "dp_config.min_weight": 0}, ["min_weight=0", "> 0"]),
    *(
      (
        LR,
        {f"{place}.optimizer_config": {"type": "adamW", **numbers}},
        [f"{place}.optimizer_config.weight_decay=10", rate, "below 1"],
      )
      for place, numbers, rate in (
        (S, {"lr": 0.1, "weight_decay": 10}, f"{S}.optimizer_config.lr=0.1"),
        (C, {"weight_decay": 10}, f"{S}.initial_lr_client=0.1"),
      )
    ),
    (
      LR,
      {f"{S}.optimizer_config": {"type": "adamW", "lr": 2, "weight_decay": 1}},
      ["weight_decay=1", "optimizer_config.lr=2", "below 1"],
    ),
    *(
      (
        LR,
        {
          f"{S}.optimizer_config": {"type": "sgd"},
          f"{S}.annealing_config": {**RAMP, name: 0},
        },
        [f"{S}.annealing_config.{name}=0", "> 0"],
      )
      for name in ("peak_lr", "floor_lr")
    ),
    (
      LR,
      {**REPLAY, f"{S}.data_config.train.batch_size": 0},
      [f"{S}.data_config.train.batch_size=0", "> 0"],
    ),
    (
      WORDS,
      {
        "model_config.vocab_size": -3,
        "privacy_metrics_config": {
          "apply_metrics": True,
          "apply_leakage_metric": True,
          "max_allowed_leakage": 3.0,
        },
      },
      ["model_config.vocab_size=-3", "> 1"],
    ),
    (
      WORDS,
      {
        "model_config.vocab_size": 100,
        "privacy_metrics_config": {
          "apply_metrics": True,
          "apply_leakage_metric": True,
          "max_allowed_leakage": -1000.0,
        },
      },
      ["max_allowed_leakage=-1000", ">= 0"],
    ),
  ],
)
def test_a_number_that_cannot_be_converted_is_named(
  base, changes, words, compat
):
  with pytest.raises(ValueError, match=r"^\w+\.[\w.]+=\S+ ?") as caught:
    flute.translate(changed(base, changes), compat=compat)
  assert type(caught.value) is ValueError
  assert "\n" not in str(caught.value)
  assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("base", [DGA, WORDS])
def test_beta_wants_a_batch_with_examples(base):
  """Of the papers' softmax alone: FLUTE's own is not divided."""
  with pytest.raises(ValueError, match=rf"{T}.batch_size=0.* > 0"):
    flute.translate(changed(base, {f"{T}.batch_size": 0}))


def test_scheduled_sampling_wants_a_way():
  changes = {
    f"{C}.ss_config": {"ramp_start": 8, "ramp_stop": 8, "final_rate": 0.2}
  }
  with pytest.raises(ValueError, match=r"ramp_stop=8 is not after ramp_start"):
    flute.translate(changed(WORDS, changes))
