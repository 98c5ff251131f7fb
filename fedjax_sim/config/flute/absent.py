"""Keys that are not in a file: FLUTE's defaults, and what it stops without.

A value that is null, or a placeholder, is as if it were not there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fedjax_sim.config.flute.rules import File

_CLIENTS = "client_config.data_config.train"
_SERVER = "server_config"
_DP = "dp_config"
_REPLAY = f"{_SERVER}.server_replay_config"
_LABELS = "client_config.semisupervision"

Condition = Callable[[File], Any]


class Default(NamedTuple):
  """What FLUTE takes where a key is not in the file.

  Attributes:
    path: of the key.
    value: FLUTE's.
    applies: file -> whether the key matters in it.
  """

  path: str
  value: Any
  applies: Condition = lambda file: True


class Need(NamedTuple):
  """A key without which FLUTE stops.

  Attributes:
    path: of the key.
    reason: what needs it, and what to give.
    applies: file -> whether the key matters in it.
  """

  path: str
  reason: str
  applies: Condition = lambda file: True


# --- which files --------------------------------------------------------------

_OPTIMIZERS = (
  f"{_SERVER}.optimizer_config",
  "client_config.optimizer_config",
  f"{_REPLAY}.optimizer_config",
)
_WITH_RATE = ("adam", "adamax", "adamW", "lamb")  # 1e-3, of torch and of FLUTE
_WITHOUT_RATE = ("sgd", "lars")  # torch.optim.SGD's


def _is_replaying(file: File) -> bool:
  return file.get(f"{_SERVER}.data_config.train.train_data_server") is not None


def _is_used(path: str) -> Condition:
  """Return whether the optimizer at a path trains anything."""
  return lambda file: not path.startswith(_REPLAY) or _is_replaying(file)


def _is(path: str, *names: str) -> Condition:
  """Return whether the optimizer at a path is one of these."""
  used = _is_used(path)
  return lambda file: used(file) and file.get(f"{path}.type") in names


def _lacks_rate(path: str, names: Sequence[str]) -> Condition:
  """Return whether an optimizer is one of these, with no rate from elsewhere.

  The rate of clients, and that at the top of a ramp, replace its own.
  """
  is_one = _is(path, *names)
  peak = path.replace("optimizer_config", "annealing_config.peak_lr")

  def lacks(file: File) -> bool:
    if path.startswith("client_config"):
      other = file.get(f"{_SERVER}.initial_lr_client", -1.0) > 0
    else:
      other = file.get(peak) is not None
    return is_one(file) and not other

  return lacks


def _is_private(file: File) -> Any:
  return file.get(f"{_DP}.enable_local_dp")


def _is_central(file: File) -> Any:
  return _is_private(file) and file.get(f"{_DP}.enable_global_dp")


def _is_local(file: File) -> Any:
  return _is_private(file) and not file.get(f"{_DP}.enable_global_dp")


def _weighs_by_noise(file: File) -> bool:
  """Return whether clients add noise to a weight of their own."""
  noisy = _is_local(file) and file.get(f"{_DP}.eps", -1.0) >= 0
  return bool(noisy and file.is_softmax)


# --- the tables ---------------------------------------------------------------

DEFAULTS = (
  Default(f"{_CLIENTS}.batch_size", 40),
  Default(f"{_CLIENTS}.max_grad_norm", 5.0),
  Default(f"{_SERVER}.val_freq", 1),
  Default(f"{_SERVER}.rec_freq", 8),
  Default(f"{_SERVER}.initial_val", True),
  Default(f"{_SERVER}.max_iteration", 10000),
  Default(f"{_SERVER}.num_clients_per_iteration", 1),
  Default(f"{_SERVER}.best_model_criterion", "loss"),
  Default(f"{_SERVER}.weight_train_loss", "train_loss", lambda f: f.is_softmax),
  Default(f"{_SERVER}.data_config.train.batch_size", 40, _is_replaying),
  Default(f"{_SERVER}.data_config.train.max_grad_norm", 5.0, _is_replaying),
  Default(
    f"{_SERVER}.send_dicts", False, lambda f: f.as_flute and f.has_buffers
  ),
  Default("client_config.mu", 0.001, lambda f: f.strategy == "fedprox"),
  Default(
    "client_config.convex_model_interp", 0.75, lambda f: f.strategy == "apfl"
  ),
  Default(
    "client_config.quant_bits",
    10,
    lambda f: f.get("client_config.quant_thresh") is not None,
  ),
  Default(f"{_DP}.delta", 1e-7, _is_private),
  *(Default(f"{p}.lr", 1e-3, _lacks_rate(p, _WITH_RATE)) for p in _OPTIMIZERS),
  *(Default(f"{p}.weight_decay", 0.0, _is(p, "adamW")) for p in _OPTIMIZERS),
  *(Default(f"{p}.eps", 1e-6, _is(p, "adamW")) for p in _OPTIMIZERS),
  *(Default(f"{p}.momentum", 0.0, _is(p, "lars")) for p in _OPTIMIZERS),
)
NEEDS = (
  Need(
    f"{_SERVER}.aggregate_median",
    "DGA needs it: give softmax, or mean, where all clients weigh the same",
    lambda f: f.is_dga,
  ),
  Need(
    f"{_SERVER}.softmax_beta",
    "DGA's softmax needs it: give a number; 0 weighs all clients the same",
    lambda f: f.is_softmax,
  ),
  *(
    Need(f"{p}.type", "give the optimizer, such as sgd", _is_used(p))
    for p in _OPTIMIZERS
  ),
  *(
    Need(
      f"{p}.lr",
      "torch's SGD has no rate by itself: give one"
      + (
        ", or server_config.initial_lr_client"
        if p.startswith("client_config")
        else ""
      ),
      _lacks_rate(p, _WITHOUT_RATE),
    )
    for p in _OPTIMIZERS
  ),
  Need(
    f"{_REPLAY}.server_iterations",
    "train_data_server needs it: give how many examples to replay",
    _is_replaying,
  ),
  Need(
    f"{_DP}.eps",
    "local privacy needs it: give a number above 0, or -1, which clips alone"
    " and adds no noise",
    _is_local,
  ),
  Need(
    f"{_DP}.max_grad",
    "privacy needs it: give the norm that updates are clipped to",
    _is_private,
  ),
  Need(
    f"{_DP}.max_weight",
    "privacy needs it with DGA's softmax: give the largest weight, times"
    " weight_scaler",
    lambda f: (f.is_softmax and _is_central(f)) or _weighs_by_noise(f),
  ),
  Need(
    f"{_DP}.min_weight",
    "local privacy needs it with DGA's softmax: give the least weight, times"
    " weight_scaler",
    _weighs_by_noise,
  ),
  Need(
    f"{_DP}.global_sigma",
    "global privacy needs it: give the noise, in units of max_grad",
    _is_central,
  ),
  *(
    Need(
      f"{_LABELS}.{name}",
      "FedLabels needs it",
      lambda f: f.strategy == "fedlabels",
    )
    for name in (
      "uda",
      "vat_consis",
      "unsup_lamb",
      "l2_lambda",
      "burnout_round",
      "thre",
      "comp",
      "eta",
      "bs",
      "train_ep",
      "unsuptrain_ep",
      "temp",
    )
  ),
)


def defaults(file: File) -> list[Default]:
  """Return FLUTE's defaults of keys that are not in a file and matter."""
  return [d for d in DEFAULTS if d.path not in file.values and d.applies(file)]


def check(file: File) -> None:
  """Refuse a file that lacks what FLUTE stops without.

  Args:
    file: with FLUTE's defaults.

  Raises:
    ValueError: names the key.
  """
  for need in NEEDS:
    if need.path not in file.values and need.applies(file):
      raise ValueError(f"{need.path} is missing; {need.reason}.")
