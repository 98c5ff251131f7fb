"""What clients do to a metric: leave-one-out influence and Shapley values.

The influence of a client, or of a group, is the metric of the run with all
clients minus that of the run without it, within each seed: exact where others
are estimates, as the runs are trained. Koh and Liang 2017, "Understanding
black-box predictions via influence functions" (arXiv 1703.04730), approximate
it, and so do methods of unlearning, whose gold standard is the run without.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fedjax_sim.core.files import write_atomically
from fedjax_sim.reporting.figures.player_bars import Panel, draw_players
from fedjax_sim.studies.comparison import BEST
from fedjax_sim.studies.influence_page import INFLUENCE, SHAPLEY, Kind
from fedjax_sim.studies.leave_out import FIELD, NOBODY, LeaveOut
from fedjax_sim.studies.results import Study, aligned, write_comparison
from fedjax_sim.studies.shapley import Coalition, coalitions, estimate

_MOST_LINES = 20  # of a table on the screen
Worth = Mapping[Coalition, float]  # of the coalitions of a seed
Other = tuple[tuple[str, str], ...]  # fields besides, with their values


class Effect(NamedTuple):
  """What one player does to the metric.

  Attributes:
    player: its number.
    value: mean over the seeds.
    errors: standard errors of its kind; NaN where there is a single value.
    seeds: how many count: those whose runs are finished.
  """

  player: int
  value: float
  errors: tuple[float, ...]
  seeds: int


def sum_up(study: Study, left: LeaveOut) -> None:
  """Write tables and pictures of influences and Shapley values; print them.

  `influence.csv` and `influence.png`; with sampled permutations also
  `shapley.csv` and `shapley.png`; and the comparison of all settings, whose
  page has them, too.

  Args:
    study: whose runs left players out.
    left: the players.
  """
  games = {other: [*g.values()] for other, g in worths(study, left).items()}
  everyone = frozenset(range(len(left.players)))
  lost = {o: influences(g, len(left.players)) for o, g in games.items()}
  ended = {o: _known(g, [everyone]) for o, g in games.items()}
  notes = {
    o: f"with all clients {_mean(g, everyone)}; lost without:"
    for o, g in ended.items()
  }
  _show(study, left, INFLUENCE, lost, notes)
  if left.orders is not None:
    _show_shapley(study, left, games)
  # With one table all settings are held against that with all clients.
  nobody = f"{FIELD.rpartition('.')[2]}={NOBODY}"
  write_comparison(study, nobody if [*study.fields] == [FIELD] else BEST)


def _show_shapley(
  study: Study, left: LeaveOut, games: Mapping[Other, Sequence[Worth]]
) -> None:
  """Write and print the Shapley values.

  Args:
    study: whose runs left players out.
    left: the players, and the sampled orders.
    games: of each seed the worth of each coalition, by the other fields.
  """
  assert left.orders is not None
  everyone = frozenset(range(len(left.players)))
  values = {o: shapley_values(g, left.orders) for o, g in games.items()}
  needed = coalitions(left.orders)
  counted = {o: _known(g, needed) for o, g in games.items()}
  notes = {
    o: (
      f"{len(left.orders)} permutations; the values sum to"
      f" {sum(e.value for e in values[o]):.4f}, which is"
      f" {_mean(g, everyone)} with all, less {_mean(g, frozenset())} with none:"
    )
    for o, g in counted.items()
  }
  _show(study, left, SHAPLEY, values, notes)


def worths(study: Study, left: LeaveOut) -> dict[Other, dict[int, Worth]]:
  """Return the metric of each coalition, by the other fields and by the seed.

  Runs that are not finished have NaN. The worth of no clients at all is the
  metric of the first model, where it was evaluated.
  """
  by_text = {left.point(c): c for c in left.coalitions}
  games: dict[Other, dict[int, dict[Coalition, float]]] = {}
  for run in study.runs:
    point = dict(run["point"])
    coalition = by_text[point.pop(FIELD)]
    game = games.setdefault(tuple(point.items()), {})
    worth = game.setdefault(run["seed"], {})
    ended = run["status"] == "finished"
    last = study.last(run["name"]) if ended else {}
    worth[coalition] = last.get(study.metric, math.nan)
    everyone = len(coalition) == len(left.players)
    if everyone and left.orders is not None and left.empty_is_untrained:
      first = study.metrics(run["name"])[:1]
      known = first[0] if first and first[0]["round"] == 0 else {}
      worth[frozenset()] = known.get(study.metric, math.nan)
  return {other: dict(game) for other, game in games.items()}


def influences(games: Sequence[Worth], players: int) -> list[Effect]:
  """Return what is lost without each player, paired within each seed.

  Args:
    games: of each seed the worth of all players, and of all but each one.
    players: how many.

  Example:
    two = frozenset({0, 1})
    game = {two: 0.9, frozenset({1}): 0.8, frozenset({0}): 0.7}
    [effect.value for effect in influences([game], 2)]  # about 0.1 and 0.2
  """
  everyone = frozenset(range(players))
  nan = math.nan
  found = []
  for player in range(players):
    lost = np.array(
      [g.get(everyone, nan) - g.get(everyone - {player}, nan) for g in games]
    )
    lost = lost[np.isfinite(lost)]
    mean = float(lost.mean()) if len(lost) else nan
    found.append(Effect(player, mean, (_error(lost),), len(lost)))
  return found


def shapley_values(games: Sequence[Worth], orders: np.ndarray) -> list[Effect]:
  """Return the Shapley value of each player, the mean over the seeds.

  Args:
    games: of each seed the worth of all coalitions of the orders; seeds that
      lack one do not count.
    orders: shape=(orders, players).
  """
  players = orders.shape[1]
  whole = _known(games, coalitions(orders))
  if not whole:
    unknown = math.nan, math.nan
    return [Effect(i, math.nan, unknown, 0) for i in range(players)]
  joint = estimate(orders, whole)
  each = np.stack([estimate(orders, [game]).values for game in whole])
  return [
    Effect(
      i,
      float(joint.values[i]),
      (float(joint.errors[i]), _error(each[:, i])),
      len(whole),
    )
    for i in range(players)
  ]


def _known(games: Sequence[Worth], needed: Sequence[Coalition]) -> list[Worth]:
  """Return the games in which the worth of all these coalitions is known."""
  worth = lambda game: [game.get(coalition, math.nan) for coalition in needed]
  return [game for game in games if np.isfinite(worth(game)).all()]


def _error(values: np.ndarray) -> float:
  """Return the standard error of a mean; NaN of less than two values."""
  if len(values) < 2:
    return math.nan
  return float(values.std(ddof=1) / math.sqrt(len(values)))


def _sorted(effects: Sequence[Effect], *, higher: bool) -> list[Effect]:
  """Return effects, those who help most first, and the unknown ones last."""
  sign = -1.0 if higher else 1.0
  key = lambda e: (math.isnan(e.value), sign * e.value, e.player)
  return sorted(effects, key=key)


def _show(
  study: Study,
  left: LeaveOut,
  kind: Kind,
  found: Mapping[Other, Sequence[Effect]],
  notes: Mapping[Other, str],
) -> None:
  """Write the CSV and the picture of effects, and print them.

  Args:
    study: whose they are.
    left: the players.
    kind: of the effects.
    found: the effects, by the other fields.
    notes: to be printed with them.
  """
  higher = study.higher_is_better
  ranked = {o: _sorted(effects, higher=higher) for o, effects in found.items()}
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  fields = [field for field in study.fields if field != FIELD]
  errors = [f"{what}_standard_error" for what in kind.errors]
  writer.writerow([*fields, "clients", "name", kind.name, *errors, "seeds"])
  for other, effects in ranked.items():
    for e in effects:
      numbers = " ".join(map(str, left.players[e.player]))
      row = [numbers, left.names[e.player], e.value, *e.errors, e.seeds]
      writer.writerow([*(value for _, value in other), *row])
  write_atomically(study.folder / f"{kind.name}.csv", text.getvalue().encode())
  draw_players(
    [
      Panel(
        _worded(other),
        [left.names[e.player] for e in effects],
        np.array([e.value for e in effects]),
        np.array([e.errors[0] for e in effects]),
      )
      for other, effects in ranked.items()
    ],
    f"{kind.title}, {study.metric}",
    study.folder / f"{kind.name}.png",
    higher_is_better=higher,
  )
  for other, effects in ranked.items():
    where = f" ({_worded(other)})" if other else ""
    print(  # noqa: T201
      f"{kind.title} on {study.metric}{where}, those who help most first;\n"
      f"{notes[other]}\n{_table(kind, effects, left.names)}"
    )


def _table(kind: Kind, effects: Sequence[Effect], names: Sequence[str]) -> str:
  """Return effects as a table; of many the first and the last ones."""
  number = lambda x, form: "-" if math.isnan(x) else format(x, form)
  errors = [f"error ({what})" for what in kind.errors]
  heads = ["client", kind.title.lower(), *errors, "seeds"]
  rows = [
    [
      names[e.player],
      number(e.value, "+.5f"),
      *(number(x, ".5f") for x in e.errors),
      str(e.seeds),
    ]
    for e in effects
  ]
  if len(rows) > _MOST_LINES:
    half = _MOST_LINES // 2
    rows = [*rows[:half], ["..."] * len(heads), *rows[-half:]]
  return aligned([heads, *rows])


def _mean(games: Sequence[Worth], coalition: Coalition) -> str:
  """Return the mean worth of a coalition over the seeds; "-" without any."""
  return f"{np.mean([g[coalition] for g in games]):.4f}" if games else "-"


def _worded(other: Other) -> str:
  return ", ".join(f"{field}={value}" for field, value in other)
