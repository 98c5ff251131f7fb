"""FLUTE's `dp_config` and `privacy_metrics_config`."""

from __future__ import annotations

import math
from typing import Any

from fedjax_sim.config.flute.keys.optimizer import dead, optimizer
from fedjax_sim.config.flute.rules import (
  File,
  Key,
  Outcome,
  Rule,
  gather,
  idle,
  only_if,
  refused,
  sets,
  used,
  without,
)
from fedjax_sim.core import validate

_AT = "dp_config"
_LOCAL, _GLOBAL = f"{_AT}.enable_local_dp", f"{_AT}.enable_global_dp"


def _central(file: File) -> bool:
  return bool(file.get(_GLOBAL))


def _local(file: File) -> bool:
  """Whether clients add noise, or clip without a server's noise."""
  return bool(file.get(_LOCAL)) and not _central(file)


def _clips(file: File) -> bool:
  """Whether local privacy is clipping alone."""
  return bool(file.get(f"{_AT}.eps", -1.0) < 0)


def _fixed(file: File) -> dict[str, Any]:
  """Return what makes DGA's weights those of a report by itself."""
  weighs = file.is_softmax and not file.is_even
  return {"algorithm.reference": 0.0} if weighs else {}


def _enable_local(value: bool, file: File) -> Outcome:
  if not value:
    return idle("off")
  if _central(file):
    return idle("privacy.mechanism clips what clients send")
  name = "clip" if _clips(file) else "gaussian"
  return used({"local_privacy.mechanism": name, **_fixed(file)})


def _enable_global(value: bool, file: File) -> Outcome:
  if not value:
    return idle("off")
  if not file.get(_LOCAL):
    raise ValueError(
      f"{_GLOBAL}=true needs {_LOCAL}=true, as in FLUTE: clients clip by it."
    )
  return used({"privacy.mechanism": "gaussian", **_fixed(file)})


def _sigma(file: File) -> float:
  """Return FLUTE's noise on the update and on the weight."""
  lengths = [_grad(file)]
  if file.is_softmax:
    lengths.append(file.positive(f"{_AT}.max_weight"))
  spread = math.sqrt(2 * math.log(1.25 / _failure(file)))
  return spread * math.hypot(*lengths) / file.positive(f"{_AT}.eps")


def _grad(file: File) -> float:
  return file.positive(f"{_AT}.max_grad")


def _failure(file: File) -> float:
  """Return the probability with which epsilon need not hold."""
  return file.positive(f"{_AT}.delta", lt=1)


def _eps(value: float, file: File) -> Outcome:
  """Give the epsilon that holds, or FLUTE's noise."""
  if _central(file):
    if value < 0:
      return used(note="clipping alone, before the server's noise")
    return refused("clients' noise beside the server's; give eps: -1")
  if value < 0:
    return used(note="clipping alone")
  if value == 0:
    raise ValueError(
      f"{_AT}.eps={value!r}: no noise has this epsilon; give a number above 0,"
      " or -1, which clips alone."
    )
  if not file.as_flute:
    return used({"local_privacy.epsilon": value}, "the epsilon that holds")
  fields = {"local_privacy.stddev": _sigma(file) / _grad(file)}
  return used(fields, "FLUTE's noise; the epsilon that holds is told")


def _delta(value: float, file: File) -> Outcome:
  if _central(file):
    return used({"privacy.delta": _failure(file)})
  if _clips(file):
    return idle("clipping alone")
  return used({"local_privacy.delta": _failure(file)})


def _max_grad(value: float, file: File) -> Outcome:
  bound = _grad(file)
  if _central(file):
    return used({"privacy.clip_norm": bound})
  return used(
    {"local_privacy.clip_norm": bound}, "shorter updates are not scaled up"
  )


def _global_sigma(value: float, file: File) -> Outcome:
  path = f"{_AT}.global_sigma"
  return used({"privacy.noise_multiplier": validate.number(path, value, ge=0)})


def _max_weight(value: float, file: File) -> Outcome:
  if not file.is_softmax:
    return idle("all clients weigh the same under noise")
  if _central(file):
    return used(
      {"privacy.max_weight": _bound(file)},
      "max_weight / weight_scaler; FLUTE's step times (mean weight /"
      " privacy.max_weight), as the sum of the weights is secret",
    )
  if _clips(file):
    return idle("clipping alone")
  fields = {
    "local_privacy.max_weight": _bound(file),
    "local_privacy.weight_scale": value / _grad(file),
  }
  return used(fields, "max_weight / weight_scaler, / max_grad")


def _min_weight(value: float, file: File) -> Outcome:
  if not file.is_softmax or _central(file) or _clips(file):
    return idle("weights get no noise")
  least = file.positive(f"{_AT}.min_weight") / _scaler(file)
  fields = {"local_privacy.min_weight": least}
  return used(fields, "min_weight / weight_scaler")


def _scaler(file: File) -> float:
  return file.positive(f"{_AT}.weight_scaler", 1.0)


def _bound(file: File) -> float:
  """Return the largest weight of a client."""
  return file.positive(f"{_AT}.max_weight") / _scaler(file)


def _weight_scaler(value: float, file: File) -> Outcome:
  if not file.is_softmax:
    return idle("all clients weigh the same under noise")
  return used(note="in max_weight and min_weight")


def _noisy(rule: Rule) -> Rule:
  return only_if(
    lambda file: _local(file) or _central(file), rule, "no privacy is enabled"
  )


PRIVACY: dict[str, Any] = {
  "enable_local_dp": Key(bool, _enable_local),
  "enable_global_dp": Key(bool, _enable_global),
  **gather(
    {
      "eps": Key(float, _eps),
      "delta": Key(float, _delta),
      "max_grad": Key(float, _max_grad),
      "max_weight": Key(float, _max_weight),
      "min_weight": Key(float, _min_weight),
      "weight_scaler": Key(float, _weight_scaler),
    },
    _noisy,
  ),
  "global_sigma": Key(
    float,
    only_if(_central, _global_sigma, "no global privacy is enabled"),
  ),
}

# --- leakage ------------------------------------------------------------------

_METRICS = "privacy_metrics_config"


def _threshold(value: float, file: File) -> Outcome:
  """Convert for words that had the loss log(vocabulary)."""
  words = file.get("model_config.vocab_size")
  if not words:
    return refused("its scale is that of words: model_config.vocab_size")
  validate.number(f"{_METRICS}.max_allowed_leakage", value, ge=0)
  loss = math.log(validate.number("model_config.vocab_size", words, gt=1))
  threshold = loss * (1 - math.exp(-value))
  note = "h (1 - exp(-max_allowed_leakage)), h = log(vocab_size)"
  return used({"leakage.threshold": threshold}, note)


def _measured(rule: Rule) -> Rule:
  return only_if(
    lambda file: file.get(f"{_METRICS}.apply_metrics"),
    rule,
    "apply_metrics is off",
  )


def _of_leakage(rule: Rule) -> Rule:
  return only_if(
    lambda file: file.get(f"{_METRICS}.apply_leakage_metric"),
    rule,
    "apply_leakage_metric is off",
  )


def _words(value: bool, file: File) -> Outcome:
  if not value:
    return idle("off")
  return refused(
    "set leakage.statistic and leakage.embedding, the embedding's path here"
  )


def _leakage(value: bool, file: File) -> Outcome:
  return used({"leakage.statistic": "max"}) if value else idle("off")


def _weighted(value: bool, file: File) -> Outcome:
  return refused("leakage is not weighted here") if value else idle("off")


_OWN = "the client's own model is measured here"
LEAKAGE: dict[str, Any] = {
  "apply_metrics": Key(
    bool,
    lambda value, file: (
      used(note="leakage") if value else idle("off; nothing is measured")
    ),
  ),
  **gather(
    {
      "apply_indices_extraction": Key(bool, _words),
      "allowed_word_rank": Key(int, without("ranks are not told here")),
      "max_allowed_overlap": Key(
        float, without("apply_indices_extraction finds words")
      ),
      "apply_leakage_metric": Key(bool, _leakage),
      "max_leakage": Key(
        float, without("a difference of losses needs no bound")
      ),
      "max_allowed_leakage": Key(float, _of_leakage(_threshold)),
      "adaptive_leakage_threshold": Key(
        float, _of_leakage(sets("leakage.quantile"))
      ),
      "is_leakage_weighted": Key(bool, _of_leakage(_weighted)),
      "attacker_optimizer_config": dead(optimizer("", "client"), _OWN),
    },
    _measured,
  ),
}
