"""Compare settings by their runs: values, paired differences, targets."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedjax_sim.core import validate
from fedjax_sim.reporting.figures.series import higher_is_better as by_name
from fedjax_sim.reporting.figures.series import line_of
from fedjax_sim.reporting.formatting import number
from fedjax_sim.studies.compared_runs import (
  FINISHED,
  ComparedRun,
  CompareError,
  Setting,
  how_far,
)
from fedjax_sim.studies.statistics import (
  Difference,
  Interval,
  difference,
  holm,
  mean_interval,
  spread,
)

LAST, BEST = "last", "best"
_SELECTED = (
  "The baseline is the best of {} settings by the very values that are"
  " compared, so its lead is flattered; new seeds would say more."
)
_SHARE = 0.05  # of the best mean, which the usual target leaves


class Reached(NamedTuple):
  """When the runs of a setting first reach the target.

  A run that never does counts as later than all that do, so that the medians
  are of all runs; infinity is "not reached".

  Attributes:
    seeds: how many runs reach it.
    of: runs.
    rounds: the median of the round.
    bytes_down: the median of what clients received until then, all together.
    bytes_up: the median of what they sent.
  """

  seeds: int
  of: int
  rounds: float
  bytes_down: float
  bytes_up: float


class SettingResult(NamedTuple):
  """What came of a setting.

  Attributes:
    label: names it.
    fields: field -> value, of those in which settings differ.
    seeds: of the runs that count, in order.
    values: shape=(seeds,), float64; what is compared.
    mean: of the values; NaN without any.
    std: their sample standard deviation; NaN of less than two.
    interval: of the mean, by its t interval.
    reached: the target.
    left_out: why other runs do not count, one line each.
    runs: all of its runs.
  """

  label: str
  fields: Mapping[str, Any]
  seeds: tuple[int, ...]
  values: np.ndarray
  mean: float
  std: float
  interval: Interval
  reached: Reached
  left_out: Sequence[str]
  runs: Sequence[ComparedRun]


class Pair(NamedTuple):
  """Two settings, compared over the seeds that both have.

  Attributes:
    a: label of the one, whose mean is the better.
    b: label of the other; or the baseline.
    difference: a minus b.
    adjusted_p: its p-value, corrected by Holm for all pairs that were tested.
    wins: share of the seeds in which a is better.
    losses: share of those in which b is.
  """

  a: str
  b: str
  difference: Difference
  adjusted_p: float
  wins: float
  losses: float


class Comparison(NamedTuple):
  """How settings compare.

  Attributes:
    metric: what was compared.
    higher_is_better: its direction.
    at: "last", "best", or a round: which value of a run counts.
    confidence: of all intervals.
    target: that the rounds are counted to.
    target_rule: where it comes from.
    baseline: label of the setting that all others are compared with; None: all
      pairs.
    settings: best mean first.
    pairs: in the order of the settings; two that share no seed, or that were
      evaluated on other data, have none.
    notes: what a reader has to know, a line each.
  """

  metric: str
  higher_is_better: bool
  at: str | int
  confidence: float
  target: float
  target_rule: str
  baseline: str | None
  settings: Sequence[SettingResult]
  pairs: Sequence[Pair]
  notes: Sequence[str]

  @property
  def width_ratio(self) -> float:
    """Median over pairs: width of the paired interval over the unpaired."""
    ratios = [pair.difference.width_ratio for pair in self.pairs]
    known = [ratio for ratio in ratios if math.isfinite(ratio)]
    return float(np.median(known)) if known else math.nan

  def wins(self) -> np.ndarray:
    """Return the share of common seeds in which one setting beats another.

    Returns:
      Shape=(settings, settings), a row for the one that is better; NaN where
      two were not compared.
    """
    place = {setting.label: i for i, setting in enumerate(self.settings)}
    result = np.full((len(place), len(place)), np.nan)
    for pair in self.pairs:
      i, j = place[pair.a], place[pair.b]
      result[i, j], result[j, i] = pair.wins, pair.losses
    return result


def direction_of(metric: str, given: bool | None) -> bool:
  """Return whether higher values of a metric are better.

  Args:
    metric: its name.
    given: what the user says; None: the name has to.

  Raises:
    CompareError: neither says it.
  """
  if given is not None:
    return validate.boolean("higher_is_better", given)
  known = by_name(re.sub(r"/p\d+$", "", metric))
  if known is None:
    raise CompareError(
      f"metric={metric!r}: its name does not say which values are better; give"
      " --higher_is_better or --lower_is_better."
    )
  return known


def compare_settings(
  settings: Sequence[Setting],
  metric: str,
  at: str | int,
  target: float | None,
  higher: bool,
  baseline: str | None,
  confidence: float,
) -> Comparison:
  """Compare settings; the arguments are those of `compare`, checked.

  Raises:
    CompareError: no value counts, or no two settings can be compared.
  """
  sign = 1 if higher else -1
  counted = [_values(setting, metric, at, higher) for setting in settings]
  if not any(values for values, _ in counted):
    raise CompareError(_nothing_counts(settings, metric, at))
  means = [
    float(np.mean([*values.values()])) if values else math.nan
    for values, _ in counted
  ]
  rule = "as given"
  if target is None:
    best = sign * float(np.nanmax(sign * np.asarray(means)))
    target = best - sign * _SHARE * abs(best)
    share = 1 - sign * _SHARE
    rule = f"{100 * share:.0f} % of the best setting's mean"
  results = [
    SettingResult(
      label=setting.label,
      fields=setting.fields,
      seeds=tuple(values),
      values=np.asarray([*values.values()], np.float64),
      mean=mean,
      std=spread(np.asarray([*values.values()], np.float64)),
      interval=mean_interval(np.asarray([*values.values()]), confidence),
      reached=_reached(setting.runs, metric, target, higher),
      left_out=left_out,
      runs=setting.runs,
    )
    for setting, (values, left_out), mean in zip(
      settings, counted, means, strict=True
    )
  ]
  results = sorted(results, key=lambda r: _rank(r, metric, sign))
  chosen = baseline == BEST
  baseline = results[0].label if chosen else baseline
  pairs, notes = _pairs(results, higher, baseline, confidence)
  if not pairs:
    raise CompareError(
      "compare: no two settings can be compared:"
      f" {_standing(results, metric, at)}."
      f" {' '.join(notes)}"
    )
  return Comparison(
    metric=metric,
    higher_is_better=higher,
    at=at,
    confidence=confidence,
    target=target,
    target_rule=rule,
    baseline=baseline,
    settings=results,
    pairs=pairs,
    notes=[
      *_notes(results, pairs, target, at),
      *notes,
      *[_SELECTED.format(len(results))] * chosen,
    ],
  )


def _rank(
  result: SettingResult, metric: str, sign: int
) -> tuple[bool, float, float, str]:
  """Return what settings are sorted by: the best first.

  Those without a value that counts, as successive halving leaves them, follow
  by how far they came, and then by their last values.
  """
  if not math.isnan(result.mean):
    return False, 0.0, -sign * result.mean, result.label
  rounds, last = how_far(result.runs, metric)
  score = math.inf if math.isnan(last) else -sign * last
  return True, -rounds, score, result.label


def _values(
  setting: Setting, metric: str, at: str | int, higher: bool
) -> tuple[dict[int, float], list[str]]:
  """Return seed -> value of the runs that count, and why others do not."""
  values: dict[int, float] = {}
  left_out = []
  for run in setting.runs:
    value = value_at(run, metric, at, higher=higher)
    if isinstance(value, str):
      left_out.append(f"seed {run.seed}: {value}")
    else:
      values[run.seed] = value
  return values, left_out


def value_at(
  run: ComparedRun, metric: str, at: str | int, *, higher: bool
) -> float | str:
  """Return the value of a run that counts, or why there is none.

  Args:
    run: the run.
    metric: what is compared.
    at: see `compare`.
    higher: whether higher is better.
  """
  line = line_of(run.rows, metric)
  if not isinstance(at, int) and run.status != FINISHED:
    done = int(run.rows[-1]["round"]) if run.rows else 0
    return f"{run.status} after round {done:,}"
  if not len(line.values):
    return f"it has no {metric}"
  if at == LAST:
    value = float(line.values[-1])
  elif at == BEST:
    finite = line.values[np.isfinite(line.values)]
    best = np.max if higher else np.min
    value = float(best(finite)) if finite.size else math.nan
  else:
    (found,) = np.nonzero(line.rounds == at)
    if not found.size:
      return f"no {metric} in round {at:,}"
    value = float(line.values[found[0]])
  return value if math.isfinite(value) else f"its {metric} is not finite"


def _standing(
  results: Sequence[SettingResult], metric: str, at: str | int
) -> str:
  """Return how many runs count, and how far the runs are."""
  runs = [run for result in results for run in result.runs]
  counts = collections.Counter(run.status for run in runs)
  told = ", ".join(f"{count:,} {status}" for status, count in counts.items())
  counted = sum(len(result.seeds) for result in results)
  shared = set[int].intersection(*(_rounds_of(run, metric) for run in runs))
  hint = (
    f"; all have {metric} in round {max(shared)}, so give --at={max(shared)}"
    if shared and counted < len(runs) and not isinstance(at, int)
    else ""
  )
  return f"{counted:,} of {len(runs):,} runs count ({told}){hint}"


def _rounds_of(run: ComparedRun, metric: str) -> set[int]:
  """Return the rounds in which a run has the metric."""
  return {int(round_) for round_ in line_of(run.rows, metric).rounds}


def _nothing_counts(
  settings: Sequence[Setting], metric: str, at: str | int
) -> str:
  """Return the message where no run has a value that counts."""
  runs = [run for setting in settings for run in setting.runs]
  rounds = set[int].union(*(_rounds_of(run, metric) for run in runs))
  if isinstance(at, int):
    near = sorted(rounds, key=lambda r: (abs(r - at), r))[:3]
    told = ", ".join(map(str, sorted(near)))
    return (
      f"at={at}: no run has {metric} in that round; the nearest rounds with it"
      f" are {told}."
    )
  return (
    f"at={at}: no run is finished with a finite {metric}; wait, or compare them"
    f" at a round, such as --at={max(rounds)}."
  )


def _reached(
  runs: Sequence[ComparedRun], metric: str, target: float, higher: bool
) -> Reached:
  found = [_first_reached(run, metric, target, higher) for run in runs]
  count = sum(math.isfinite(rounds) for rounds, _, _ in found)
  rounds, down, up = (float(np.median(x)) for x in zip(*found, strict=True))
  return Reached(count, len(runs), rounds, down, up)


def _first_reached(
  run: ComparedRun, metric: str, target: float, higher: bool
) -> tuple[float, float, float]:
  """Return round, bytes down and bytes up when a run reaches the target."""
  down = up = 0.0
  for row in run.rows:
    down += row.get("bytes_down", 0.0)
    up += row.get("bytes_up", 0.0)
    value = row.get(metric, math.nan)
    if value >= target if higher else value <= target:
      return float(row["round"]), down, up
  return math.inf, math.inf, math.inf


def _pairs(
  results: Sequence[SettingResult],
  higher: bool,
  baseline: str | None,
  confidence: float,
) -> tuple[list[Pair], list[str]]:
  """Return the pairs, and lines about those that there are not."""
  chosen = [(a, b) for i, a in enumerate(results) for b in results[i + 1 :]]
  if baseline is not None:
    (base,) = [r for r in results if r.label == baseline]
    chosen = [(r, base) for r in results if r is not base]
  pairs: list[Pair] = []
  other_data: list[str] = []
  no_seed: list[str] = []
  for a, b in chosen:
    if not a.runs[0].comparable(b.runs[0]):
      other_data.append(f"{a.label} and {b.label}")
      continue
    seeds = [seed for seed in a.seeds if seed in b.seeds]
    if not seeds:
      no_seed.append(f"{a.label} and {b.label}")
      continue
    x, y = (
      np.asarray([r.values[r.seeds.index(s)] for s in seeds]) for r in (a, b)
    )
    better = x > y if higher else x < y
    worse = x < y if higher else x > y
    pairs.append(
      Pair(
        a=a.label,
        b=b.label,
        difference=difference(x, y, confidence),
        adjusted_p=math.nan,
        wins=float(better.mean()),
        losses=float(worse.mean()),
      )
    )
  adjusted = holm([pair.difference.p_value for pair in pairs])
  pairs = [
    pair._replace(adjusted_p=float(p))
    for pair, p in zip(pairs, adjusted, strict=True)
  ]
  return pairs, [
    f"{told}: {_few(names)}."
    for told, names in (
      ("Evaluated on different data, so not compared", other_data),
      ("Without a run that counts of a common seed, so not compared", no_seed),
    )
    if names
  ]


def _few(names: Sequence[str], most: int = 3) -> str:
  more = f"; and {len(names) - most:,} more" if len(names) > most else ""
  return "; ".join(names[:most]) + more


def _notes(
  results: Sequence[SettingResult],
  pairs: Sequence[Pair],
  target: float,
  at: str | int,
) -> list[str]:
  """Return what a reader has to know."""
  notes = []
  if at == BEST:
    notes.append(
      "The best value of each run is chosen by the metric itself, which"
      " flatters all settings."
    )
  for result in results:
    if result.left_out:
      total, told = len(result.runs), "; ".join(result.left_out)
      notes.append(
        f"{result.label}: {len(result.left_out)} of {total} runs do not count:"
        f" {told}."
      )
  if max(pair.difference.seeds for pair in pairs) == 1:
    notes.append(
      "One seed each: no interval and no test can be given; run every setting"
      " with more seeds."
    )
  elif any(pair.difference.seeds == 1 for pair in pairs):
    notes.append("Pairs with one common seed have no interval and no test.")
  if any(pair.difference.std == 0 for pair in pairs):
    notes.append(
      "Where a difference is the same in every seed, there is no spread to test"
      " it by."
    )
  never = [result.label for result in results if not result.reached.seeds]
  if never:
    notes.append(
      f"The target {number(target)} is never reached by: {_few(never)}."
    )
  if any(f.startswith("data.") for result in results for f in result.fields):
    notes.append(
      "Settings differ in their data or how they are spread over clients; what"
      " a seed draws besides is shared all the same."
    )
  runs = [run for result in results for run in result.runs]
  if any(_unshared_noise(run) for run in runs):
    notes.append(
      "Private runs without privacy.noise_seed draw their noise from fresh"
      " entropy: it is not shared, and pairing gains less."
    )
  return notes


def _unshared_noise(run: ComparedRun) -> bool:
  fields = run.fields
  private = (
    fields.get("privacy.mechanism"),
    fields.get("local_privacy.mechanism"),
  )
  return any(private) and fields.get("privacy.noise_seed") is None
