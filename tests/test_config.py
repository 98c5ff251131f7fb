"""Config files load, wrong ones say what is wrong, and none is half right."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from fedjax_sim import config
from fedjax_sim.config import components, default_config
from fedjax_sim.config.build import build
from fedjax_sim.config.completion import complete
from fedjax_sim.config.field import Field
from fedjax_sim.config.flags import load
from tiers import slow_but

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))
DIGITS = str(CONFIGS[0].parent / "digits_fedavg.py")
TRACE = pathlib.Path(__file__).parent / "trace.npz"
TOKENS = pathlib.Path(__file__).parent / "tokens.npz"  # ids, and the next ones


def section_of(source, field):
  *sections, key = field.split(".")
  for name in sections:
    source = source[name]
  return source, key


PREFERRED = {  # field -> the component that is tried with it
  "algorithm.weighting": "fedavg",
  "algorithm.beta": "dga_rl",
  "algorithm.statistic": "dga_rl",
  "aggregator.max_weight": "secure_mean",
  "data.alpha": "dirichlet",
  "model.width": "resnet",
  "local_privacy.epsilon": "privunit",
  "privacy.bands": "banded",
  "privacy.buffers": "blt",
}
SKIPPED = (  # data sets that are not here, and what another library checks
  "data.num_classes",
  "data.min_characters",
  "data.sequence_length",
  "data.beta",
  "data.iid",
  # of a model that reads files; test_news_recommender.py
  "model.clicked",
  "model.head_size",
  "model.heads",
  "model.negatives",
  "model.pooling",
  "model.padding_id",  # -1 is none
  "model.mask_id",
  *(
    f"{side}.{key}"
    for side in ("client", "server", "replay")
    for key in (
      "accumulator_dtype",
      "bias_correction",
      "centered",
      "decay",
      "eps_in_sqrt",
      "eps_root",
      "initial_accumulator_value",
      "initial_scale",
      "mu_dtype",
      "threshold",
      "trust_coefficient",
    )
  ),
)


def components_with(field):
  """(slot, name) of every component that has a field."""
  section, _, key = field.rpartition(".")
  slots = components.slots_of(section)
  if "." in section:
    slots = [components.labeled_slot(*section.split("."))]
  for slot in slots:
    for name in slot.registry:
      if key in slot.fields(name):
        yield slot, name


def with_field(field, value):
  """A quick config with this field, and what must be for it to matter."""
  source = default_config()
  sections, _, key = field.rpartition(".")
  if "." in sections:
    name, label = sections.split(".")
    source[name][label] = ConfigDict()
    slot = components.labeled_slot(name, label)
    for other, known in slot.fields(label).items():
      if known.required and known.kind is float and other != key:
        source[name][label][other] = 1.0
  elif sections and key not in default_config()[sections]:
    found = list(components_with(field))
    wanted = PREFERRED.get(field), *default_config()[sections].values()
    kept = [x for x in found if x[1] in wanted] or found
    slot, name = kept[0]
    source[sections][slot.key] = name
    if name in ("bert", "gpt2", "llama"):
      source.data.name, source.data.path = "npz", str(TOKENS)
  if field.startswith("privacy.") and key != "mechanism":
    privacy = source.privacy
    if privacy.mechanism is None:
      privacy.mechanism = "gaussian"
    privacy.clip_norm, privacy.delta = 1.0, 1e-3
    privacy.noise_multiplier = 1.0
    source.server.rounds = 6
    source.sampler.name = "cyclic" if key == "buffers" else "poisson"
    if key == "target_epsilon":
      privacy.noise_multiplier = None
    if key == "noise_weights":
      privacy.max_weight = 50.0
    if key == "statistics_norm":
      source.algorithm.name = "dga"
      privacy.max_weight = 10.0
    if key == "max_weight":
      source.algorithm.weighting = "examples"
    if key == "quantile_rate":
      privacy.quantile = 0.5
    if key == "population":
      privacy.noise_cohort_size = 20
    if key == "bands":
      source.sampler.name = "cyclic"
  if source.sampler.name == "cyclic_poisson":
    source.sampler.groups = 2
  if source.sampler.name == "available":
    source.sampler.trace = str(TRACE)
  if source.aggregator.name.startswith("secure"):
    source.aggregator.clip = 1.0
    if key == "noise_multiplier":
      source.server.clients_per_round = 2
  if source.model.name == "resnet":
    source.data.reshape = (8, 8, 1)
  if field.startswith("data.crop"):
    source.data.reshape = (8, 8)
    source.data.crop = 1
  if source.algorithm.name == "gossip":
    source.aggregator.name = "stack"
    source.algorithm.topology = "random_regular"
  if source.algorithm.name == "fedlabels":
    source.data.labelled_fraction = 0.5
  if source.algorithm.name in ("fedper", "fedrep", "lg_fedavg"):
    source.algorithm.private = ("linear/bias",)
  if source.algorithm.name in ("dga_rl", "fedlaw", "fltrust"):
    source.aggregator.name = "stack"
    source.data.server_clients = 5
  if field.startswith("adapter."):
    source.adapter.update({"name": "lora", "targets": (".*kernel",)})
  if source.algorithm.name == "fedex_lora":
    source.aggregator.name = "stack"
    source.adapter.update(
      {"name": "lora", "targets": (".*/kernel",), "rank": 2}
    )
  with_statistic(source, key)
  if sections == "transforms.quantize":
    source.transforms.quantize.sparsity = 0.5
  if field.startswith("local_privacy.") and key != "mechanism":
    with_local_privacy(source.local_privacy, key)
  if field.startswith("replay."):
    source.replay.steps = 2
    source.data.server_clients = 5
  if field.startswith("leakage.") and key != "statistic":
    source.leakage.threshold = 1.0
  section, key = section_of(source, field)
  section[key] = value
  return source


def with_statistic(source, key):
  """Give an algorithm that fits one model alone that model, and conversely."""
  named = {source.algorithm.name, source.model.name}
  for name in {"gbdt", "gmm", "heavy_hitters", "kmeans", "quantiles"} & named:
    source.algorithm.name = source.model.name = name
    if name == "kmeans":
      source.model.clusters = 3
    if name == "gbdt":
      source.model.objective = "squared"
    if name != "heavy_hitters":
      source.model.low = 0.0
      source.model.high = 1.0


def with_local_privacy(section, key):
  """A mechanism that takes this field."""
  section.clip_norm = 1.0
  if key in ("epsilon", "norm_share"):
    section.mechanism = "privunit"
    section.epsilon = 1.0
    return
  section.mechanism = "clip" if key == "per_layer" else "gaussian"
  if section.mechanism == "gaussian":
    section.stddev, section.delta = 1.0, 1e-5
  if key in ("min_weight", "weight_scale"):
    section.max_weight = 1.0


def all_fields():
  """Every field, of the default config and of all components: its `Field`."""
  fields: dict[str, Field] = {}
  slots = list(components.SLOTS)
  for slot in components.LABELED:
    if slot.section == "downlink":  # the functions of `transforms`
      continue
    slots += [components.labeled_slot(slot.section, x) for x in slot.registry]
  for slot in slots:
    label = slot.section.partition(".")[2]
    names = [label] if label else slot.registry
    for name in names:
      for key, field in slot.fields(name).items():
        fields.setdefault(f"{slot.section}.{key}", field)
  for name, _ in config.fields_of(default_config()):
    section, key = section_of(default_config(), name)
    fields[name] = Field(section.get_type(key), section[key])
  return {k: v for k, v in fields.items() if k not in SKIPPED}


FIELDS = all_fields()
WHOLE = [name for name, field in FIELDS.items() if field.kind is int]
REAL = [name for name, field in FIELDS.items() if field.kind is float]
BOOL = [name for name, field in FIELDS.items() if field.kind is bool]

# What 0 may be: a rate of nothing, or nothing held out.
ZERO = {
  "aggregator.f",
  "aggregator.number",
  *(f"algorithm.{key}" for key in ("beta1", "beta2", "lambda_rate", "q")),
  "algorithm.graph_seed",
  "algorithm.learning_rate",
  "aggregator.dropout",
  "algorithm.reference",
  "model.dropout",
  "model.label_smoothing",
  "model.low",
  "model.feature",
  "model.ignored",
  "sampler.scale",
  "transforms.adaptive_clip.learning_rate",
  "transforms.adaptive_clip.quantile",
  "seed",
  "data.seed",
  "privacy.noise_seed",
  "data.unseen_clients",
  "data.heldout_fraction",
  "data.random_label_clients",
  "algorithm.mu",
  "algorithm.alpha",
  "algorithm.alpha_rate",
  "algorithm.inner_rate",
  "algorithm.lam",
  "algorithm.beta",
  "algorithm.burn_in",
  "algorithm.threshold",
  "algorithm.unlabelled_rate",
  "algorithm.unsup_weight",
  "algorithm.consistency_weight",
  "algorithm.l2",
  "algorithm.magnitude",
  "algorithm.epsilon",
  "algorithm.epsilon_decay",
  "algorithm.epsilon_least",
  "algorithm.least_share",
  "algorithm.min_share",
  "algorithm.min_gain",
  "algorithm.min_child_weight",
  "algorithm.decay",
  "algorithm.kl_weight",
  "algorithm.weight_rate",
  "attack.factor",
  "attack.fraction",
  "attack.share",
  "attack.stddev",
  "attack.steps",
  "attack.target",
  "attack.token",
  "attack.value",
  "attack.z",
  "server.stale_probability",
  "leakage.threshold",
  "leakage.quantile",
  "privacy.noise_multiplier",
  "privacy.quantile_rate",
  "transforms.gaussian.stddev",
  "transforms.quantize.sparsity",
  *(
    f"{side}.{key}"
    for side in ("client", "server", "replay")
    for key in ("learning_rate", "momentum", "weight_decay", "b1", "b2")
  ),
}
NEGATIVE = {
  "algorithm.beta",
  "algorithm.reference",
  "attack.factor",
  "attack.value",
  "attack.z",
  "model.low",
}  # and what may be below


def check_refused(field, value):
  """The field is named on one line."""
  with pytest.raises((ValueError, TypeError)) as caught:
    build(with_field(field, value))
  message = str(caught.value)
  assert f"{field}=" in message
  assert "\n" not in message


# --- fields -------------------------------------------------------------------


@pytest.mark.parametrize("field", WHOLE)
@pytest.mark.parametrize("value", [-1, 0, 2**64])
def test_whole_numbers_out_of_range(field, value):
  if value or field not in ZERO:
    check_refused(field, value)
  else:
    build(with_field(field, value))


@pytest.mark.parametrize("field", REAL)
@pytest.mark.parametrize(
  "value",
  slow_but(
    [-1.0, 0.0, 1e39, 1e-60, "nan"],  # of each kind one
    [-1.0, 0.0, 1e39, 1e-60, "nan", "inf", "-inf"],
  ),
)
def test_numbers_out_of_range(field, value):
  value = float(value)
  fine = (value == 0 and field in ZERO) or (value == -1 and field in NEGATIVE)
  if not fine:
    check_refused(field, value)
  else:
    build(with_field(field, value))


@pytest.mark.parametrize("field", [*WHOLE, *REAL])
def test_large_numbers_build_or_are_named(field):
  value = 2**31 - 1 if field in WHOLE else 3e38
  message = f"{field}="
  try:
    build(with_field(field, value))
  except ValueError as error:
    message = str(error)
  assert f"{field}=" in message


@pytest.mark.parametrize("side", ["client", "server"])
@pytest.mark.parametrize("key", ["momentum", "b1", "b2"])
def test_decays_are_below_1(side, key):
  check_refused(f"{side}.{key}", 1.0)
  build(with_field(f"{side}.{key}", 0.999))


@pytest.mark.parametrize("field", BOOL)
def test_neither_true_nor_false(field):
  source = with_field(field, True)
  tree = source.to_dict()
  section, key = section_of(tree, field)
  section[key] = 2
  with pytest.raises(TypeError, match=rf"{field}=2 is a int; give True or Fa"):
    build(ConfigDict(tree))


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("model.hidden_sizes", (0,)),
    ("model.hidden_sizes", (8, 1.5)),
    ("model.hidden_sizes", ("8",)),
    ("model.hidden_sizes", (10**6, 10**6)),
    ("model.hidden_sizes", (2**40,)),
    ("runtime.lanes", "many"),
    ("runtime.lanes", 1.5),
    ("runtime.lanes", 0),
    ("runtime.lanes", -1),
    ("runtime.lanes", 2**31),
    ("runtime.lanes", ""),
    ("data.seed", -1),
    ("data.unseen_clients", 2.5),
    ("data.unseen_clients", "some"),
    ("data.reshape", (8, 9)),
    ("data.reshape", (64, 0)),
    ("data.reshape", (-8, -8)),
    ("data.reshape", (8.0, 8)),
    ("data.reshape", ()),
    ("data.normalize", ()),
    ("data.normalize", (0.5,)),
    ("data.normalize", (0.5, 0)),
    ("data.normalize", (0.5, -1.0)),
    ("data.normalize", (float("nan"), 1.0)),
    ("data.normalize", (0.5, float("inf"))),
    ("data.normalize", (1e39, 1.0)),
    ("data.normalize", (0.5, 1e-60)),
    ("data.normalize", ("0.5", 1.0)),
    ("data.normalize", ((0.5, 0.5), 1.0)),
    ("data.normalize", (True, 1.0)),
    ("data.pad", 63),
    ("data.pad", 0),
    ("data.pad", 64.0),
    ("data.pad", "64"),
    ("data.pad", True),
    ("data.pad", (64, 64)),
    ("data.pad", (64,)),
    ("data.crop", 8),
    ("runtime.devices", 1000),
    ("server.clients_per_round", 101),
    ("data.num_clients", 2000),
    ("data.unseen_clients", 100),
    ("data.heldout_fraction", 1.5),
    ("seed", 2**32),
  ],
)
def test_values_out_of_range(field, value):
  check_refused(field, value)


@pytest.mark.parametrize(
  ("field", "near"),
  [
    ("data.name", "digits"),
    ("data.partition", "dirichlet"),
    ("model.name", "mlp"),
    ("data.crop_fill", "reflect"),
    ("algorithm.name", "fedavg"),
    ("algorithm.weighting", "uniform"),
    ("client.optimizer", "sgd"),
    ("server.optimizer", "yogi"),
    ("sampler.name", "poisson"),
    ("aggregator.name", "weighted_mean"),
    ("runtime.compute_dtype", "bfloat16"),
    ("runtime.frozen_dtype", "bfloat16"),
    ("local_privacy.mechanism", "gaussian"),
  ],
)
def test_unknown_names(field, near):
  with pytest.raises(ValueError, match=f"Did you mean '{near}'") as caught:
    build(with_field(field, near + "x"))
  assert str(caught.value).startswith(f"{field}={near}x".replace("=", "='"))


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    (
      "client.b1",
      0.9,
      r"sgd' does not take 'client\.b1'.*=None",
    ),
    (
      "server.eps",
      0.9,
      r"sgd' does not take 'server\.eps'.*=None",
    ),
    (
      "algorithm.mu",
      1.0,
      r"avg' does not take 'algorithm\.mu'.*=None",
    ),
    (
      "model.hidden_sizes",
      (8,),
      r"model\.name='logistic_regression' does not take .*hidden.*=None",
    ),
    ("server.round", 5, r"'server\.round'.* mean 'server\.rounds'"),
    ("client.batchsize", 5, r"'client\.batchsize'.* 'client\.batch_size'"),
    ("data.exponent", 2.0, r"data\.partition='dirichlet'.*exponent'.*=None"),
    ("data.shards_per_client", 2, r"data\.partition='dirichlet'.*shards_per"),
    (
      "data.crop_fill",
      "zeros",
      r"data\.crop_fill='zeros': .*data\.crop.*=None",
    ),
    ("data.crop", 1, r"data\.crop=1 is for images.*\(64,\).*data\.reshape"),
    ("data.flip", True, r"data\.flip=True is for images.*\(64,\)"),
    (
      "local_privacy.epsilon",
      1.0,
      r"local_privacy\.epsilon=1.0: .*set local_privacy\.mechanism.*=None",
    ),
  ],
)
def test_fields_that_nobody_takes(field, value, message):
  source = default_config()
  section, key = section_of(source, field)
  section[key] = value
  with pytest.raises(ValueError, match=message):
    build(source)


SERVERS = {  # algorithm -> the server's numbers
  "fedavgm": {"learning_rate", "momentum"},
  "fedadagrad": {"learning_rate", "beta1", "tau"},
  "fedadam": {"learning_rate", "beta1", "beta2", "tau"},
  "fedyogi": {"learning_rate", "beta1", "beta2", "tau"},
}


@pytest.mark.parametrize("name", SERVERS)
def test_an_algorithm_that_brings_the_servers_optimizer(name):
  more = {
    "algorithm.name": name,
    "algorithm.learning_rate": "0.03",
    "server.schedule": "step(every=2, factor=0.5)",
  }
  made = build(load(DIGITS, more))
  assert made.config.server.optimizer is None
  server = made.simulator.algorithm.hparams["server"]
  assert server.keys() == SERVERS[name]
  assert server["learning_rate"] == 0.03
  for field, value in (
    ("optimizer", "adam"),
    ("learning_rate", "0.5"),
    ("momentum", "0.9"),
    ("max_grad_norm", "1.0"),
  ):
    message = rf"server\.{field}=.*algorithm\.name={name} brings .*=None"
    with pytest.raises(ValueError, match=message):
      complete(load(DIGITS, {**more, f"server.{field}": value}))


def test_algorithms_that_take_the_population():
  made = build(load(DIGITS, {"algorithm.name": "agnostic"})).simulator
  server = made.states.shapes.server
  assert server.lam.shape == (made.num_clients,)
  most = {"algorithm.name": "fedshuffle", "client.max_examples": "9"}
  made = build(load(DIGITS, most)).simulator
  sizes = np.minimum(made.data.train.sizes, 9)
  found = made.algorithm.hparams["mean_examples"]
  assert found == pytest.approx(sizes.mean())


@pytest.mark.parametrize(
  ("sections", "message"),
  [
    (
      {"algorithm": {"name": "fedper"}},
      r"lacks the argument 'algorithm.private' \(patterns of .*\); give it\.",
    ),
    (
      {"transforms": {"quantize": {"bits": 4}}},
      r"'transforms.quantize.sparsity' \(share of the entries .*\); give it\.",
    ),
    (
      {"model": {"name": "gmm"}},
      r"'fedavg' does not fit model.name='gmm', .*set algorithm.name='gmm'",
    ),
    (
      {"model": {"name": "gbdt"}, "algorithm": {"name": "gbdt"}},
      r"model.objective='logistic' .* the data have 10; set model.objective=",
    ),
    (
      {"model": {"name": "quantiles", "probabilities": (0.5, 2.0)}},
      r"model.probabilities\[1\]=2.0 is out of range",
    ),
    (
      {"transforms": {"random_k": {"share": 0.1, "error_feedback": True}}},
      r"random_k.unbiased=True .*; set transforms.random_k.unbiased=False",
    ),
    (
      {"downlink": {"random_k": {"share": 0.1}}},
      r"downlink.random_k.unbiased=True .*; set downlink.random_k.unbiased",
    ),
    (
      {"transforms": {"k": {"name": "random_k", "share": 0.1, "ef21": True}}},
      r"set transforms.k.unbiased=False",
    ),
    (
      {
        "model": {"name": "gmm"},
        "algorithm": {"name": "gmm"},
        "client": {"finetune_steps": 2},
      },
      r"client.finetune_steps=2 .* algorithm.name='gmm' has none; unset it",
    ),
    (
      {"model": {"name": "heavy_hitters", "field": "x"}},
      r"^algorithm.name='fedavg' does not fit",
    ),
  ],
)
def test_what_cannot_work_is_refused(sections, message):
  source = default_config()
  for name, fields in sections.items():
    for key, value in fields.items():
      source[name][key] = value
  with pytest.raises(ValueError, match=message):
    build(source)


def test_groups_go_with_the_sampling_that_takes_turns():
  source = default_config()
  source.sampler.name = "poisson"
  source.sampler.groups = 3
  with pytest.raises(ValueError, match=r"poisson' does not take 'sampler\.gro"):
    build(source)
  source = default_config()
  source.sampler.name = "cyclic_poisson"
  with pytest.raises(ValueError, match=r"lacks the argument 'sampler\.groups'"):
    build(source)


def test_cyclic_poisson_takes_its_groups():
  source = default_config()
  source.sampler.name = "cyclic_poisson"
  source.server.clients_per_round = 2
  source.sampler.groups = 3
  promise = build(source).simulator.sampler.participation
  assert promise is not None
  assert promise.period == 3
  assert promise.independent


def test_alpha_for_a_loader_that_does_not_take_it(tmp_path):
  source = default_config()
  source.data.name = "npz"
  source.data.alpha = 1.0
  with pytest.raises(ValueError, match=r"npz' does not take 'data\.alpha'"):
    build(source)


def test_missing_data_names_field_and_variable(tmp_path, monkeypatch):
  monkeypatch.delenv("FEDJAX_SIM_DATA", raising=False)
  source = default_config()
  source.data.name = "npz"
  with pytest.raises(ValueError, match=r"data\.path .* FEDJAX_SIM_DATA"):
    build(source)
  source.data.path = str(tmp_path / "nope.npz")
  with pytest.raises(FileNotFoundError, match=r"nope\.npz \(from data\.path"):
    build(source)


@pytest.mark.parametrize(
  "field",
  [
    field
    for field, _ in config.fields_of(default_config())
    if not field.startswith("trackers.")  # which may be left out
  ],
)
def test_a_missing_field_is_named(field):
  source = default_config()
  section, key = section_of(source, field)
  del section[key]
  with pytest.raises(ValueError, match=rf"^{field} is missing"):
    build(source)


@pytest.mark.parametrize(
  "field",
  [
    "sede",
    "runtime.lane",
    "client.learnin_rate",
    "server.round",
    "data.num_client",
    "model.hiden_sizes",
    "algorithm.weightin",
    "transforms.clip.norms",
    "privacy.epsilon",
  ],
)
def test_a_field_too_many_is_named(field):
  source = default_config()
  name, _, rest = field.partition(".")
  if name not in source and rest:
    source[name] = ConfigDict()
  if field.startswith("transforms."):
    source.transforms.clip = ConfigDict()
  section, key = section_of(source, field)
  section[key] = 1
  with pytest.raises(ValueError, match="not take|unknown|nothing") as caught:
    build(source)
  assert (name if name == "privacy" else key) in str(caught.value)


def test_transforms_are_sections():
  source = default_config()
  source.transforms.clip_norm = 1.0
  with pytest.raises(TypeError, match=r"transforms\.clip_norm=1\.0 is no sec"):
    build(source)
  source = default_config()
  source.transforms.clop = ConfigDict({"norm": 1.0})
  with pytest.raises(ValueError, match="'clop' .* Did you mean 'clip'"):
    build(source)


def test_a_pooled_algorithm_checks_the_cohort_too():
  source = default_config()
  source.algorithm.name = "centralized"
  source.server.clients_per_round = 0
  with pytest.raises(ValueError, match=r"server\.clients_per_round=0"):
    build(source)


# --- what is kept -------------------------------------------------------------


def test_resolved_is_json_and_complete():
  source = complete(load(DIGITS))
  plain = config.resolved(source)
  assert plain["model"]["hidden_sizes"] == [64]
  assert plain["client"]["momentum"] is None
  assert set(plain) == set(default_config())


def test_what_json_cannot_hold_is_named():
  source = default_config()
  source.model.activation = jax.nn.relu
  with pytest.raises(TypeError, match=r"model\.activation holds a "):
    config.resolved(source)


def test_differences_name_fields_and_values():
  a = config.resolved(load(DIGITS))
  assert config.differences(a, config.resolved(load(DIGITS))) == []
  b = config.resolved(
    load(DIGITS, {"client.steps": "5", "model.hidden_sizes": "(8,)"})
  )
  del b["data"]["alpha"]
  assert config.differences(a, b) == [
    "client.steps: None -> 5",
    "data.alpha: 1.0 -> '(missing)'",
    "model.hidden_sizes: [64] -> [8]",
  ]


def test_a_dispatch_is_no_longer_than_there_is_nothing_to_do():
  source = load(DIGITS, {"runtime.rounds_per_dispatch": "1000"})
  assert build(source).simulator.runtime.rounds_per_dispatch == 5
  source = load(DIGITS)
  assert build(source).simulator.runtime.rounds_per_dispatch is None


def test_labels_that_are_no_classes_are_refused(tmp_path):
  path = tmp_path / "real.npz"
  np.savez(path, x=np.ones((4, 3)), y=np.ones(4) / 3, client=np.arange(4) % 2)
  source = default_config()
  source.data.name = "npz"
  source.data.path = str(path)
  with pytest.raises(ValueError, match="data.name='npz' has none: its labels"):
    build(source)


def test_labels_of_another_shape_are_refused(tmp_path):
  path = tmp_path / "pairs.npz"
  y = np.zeros((4, 2), int)
  np.savez(path, x=np.ones((4, 3)), y=y, client=np.arange(4) % 2)
  source = default_config()
  source.data.name = "npz"
  source.data.path = str(path)
  source.server.clients_per_round = 1
  with pytest.raises(
    ValueError, match=r"pairs.npz': the model does not fit.*'y' int64 \(2,\)"
  ):
    build(source)


@pytest.mark.parametrize("part", ["x", "test_x"])
def test_numbers_that_a_device_would_change_are_refused(tmp_path, part):
  path = tmp_path / "large.npz"
  ones, y = np.ones((4, 3)), np.zeros(4, int)
  x, test_x = (ones * (1e300 if part == p else 1) for p in ("x", "test_x"))
  client = np.arange(4) % 2
  np.savez(path, x=x, test_x=test_x, y=y, test_y=y, client=client)
  source = default_config()
  source.data.name = "npz"
  source.data.path = str(path)
  source.server.clients_per_round = 1
  with pytest.raises(ValueError, match=r"large.npz': field 'x' of .*beyond fl"):
    build(source)


def test_what_a_loader_refuses_is_named(tmp_path):
  path = tmp_path / "few.npz"
  np.savez(path, x=np.ones(4), y=np.zeros(4, int), client=np.arange(3))
  source = default_config()
  source.data.name = "npz"
  source.data.path = str(path)
  with pytest.raises(
    ValueError, match=r"^data.name='npz', data.path=.*few.npz"
  ):
    build(source)


def test_ids_that_the_model_does_not_know_are_refused(tmp_path):
  path = tmp_path / "ids.npz"
  x, y = np.full((4, 3), 9), np.ones((4, 3), int)
  np.savez(path, x=x, y=y, client=np.arange(4) % 2)
  source = default_config()
  source.data.name = "npz"
  source.data.path = str(path)
  source.model.name = "char_lstm"
  source.server.clients_per_round = 1
  with pytest.raises(
    ValueError, match=r"ids.npz': train: 'x' holds 9; num_cla"
  ):
    build(source)


def test_a_component_need_not_have_a_hash():
  @dataclasses.dataclass(frozen=True)
  class Made:
    table: Any

    def __call__(self, rate: float = 0.5, *, steps: int = 2):
      return self.table, rate, steps

  expected = {"steps": Field(int, 2)}
  tables: list[Any] = [(), []]
  for table in tables:  # a hash, and none
    found = components.fields_of_function(Made(table), ["rate"])
    assert found == expected
