"""The sections of a report that are about clients: results, data, rounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fedjax_sim.core import metric_names
from fedjax_sim.core.metric_names import display as _told
from fedjax_sim.reporting import formatting
from fedjax_sim.reporting.figures.client_picture import (
  MOST_NAMES,
  draw_classes,
  draw_sizes,
)
from fedjax_sim.reporting.figures.run_figures import (
  draw_distribution,
  draw_participation,
)
from fedjax_sim.reporting.figures.series import higher_is_better
from fedjax_sim.reporting.pages.described import DescribedRun
from fedjax_sim.reporting.pages.page import Figure, Section, Table, draw
from fedjax_sim.reporting.pages.record import (
  ClientTable,
  Participation,
  quantiles,
)

_WORST = 10
_PERCENTILES = (0, 10, 25, 50, 75, 90, 100)
_HEAD = ["least", "10 %", "25 %", "median", "75 %", "90 %", "most"]


def client_sections(run: DescribedRun) -> list[Section]:
  """Return the sections about clients, in their order."""
  return [_results(run), _data(run), _rounds(run)]


def _results(run: DescribedRun) -> Section:
  """Return how the metrics of clients spread, and whose are worst."""
  title, tables = "Clients", run.record.clients
  sets = {
    name: table._replace(metrics=_no_cells(table.metrics))
    for name, table in tables.items()
    if table.metrics
  }
  if not sets:
    texts = _missing(run, "Metrics of each client")
    return Section(
      title, texts=texts or ["There are no clients to be evaluated."]
    )
  metrics = list(dict.fromkeys(m for t in sets.values() for m in t.metrics))
  chief = next((m for m in ("accuracy", "loss") if m in metrics), metrics[0])
  chosen = {n: t.metrics[chief] for n, t in sets.items() if chief in t.metrics}
  figure = draw(
    "clients",
    f"How the {chief} spreads over the clients",
    lambda ax: draw_distribution(ax, chief, chosen),
  )
  rows = [
    [
      _told(f"{name}/{metric}"),
      *map(formatting.number, quantiles(x, _PERCENTILES)),
    ]
    for name, table in sets.items()
    for metric, x in table.metrics.items()
  ]
  spread = Table("Metrics over the clients", ["metric", *_HEAD], rows)
  worst = [
    _worst(name, table, chief)
    for name, table in sets.items()
    if chief in table.metrics
  ]
  return Section(title, figures=[figure], tables=[spread, *worst])


def _worst(name: str, table: ClientTable, chief: str) -> Table:
  """Return the worst clients of a set; those that are not finite first."""
  values = table.metrics[chief]
  badness = values if higher_is_better(chief) else -values
  badness = np.where(np.isfinite(values), badness, -np.inf)
  order = np.argsort(badness, kind="stable")[:_WORST]
  rows = [
    [
      table.names[i],
      f"{int(table.sizes[i]):,}",
      *(formatting.number(float(x[i])) for x in table.metrics.values()),
    ]
    for i in order.tolist()
  ]
  word = "lowest" if higher_is_better(chief) else "highest"
  caption = f"Clients of {name} with the {word} {chief}"
  return Table(
    caption, ["client", "examples", *map(_told, table.metrics)], rows
  )


def _no_cells(metrics: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Return the metrics without the cells of tables."""
  return {k: x for k, x in metrics.items() if not metric_names.is_cell(k)}


def _data(run: DescribedRun) -> Section:
  """Return the sizes of clients, and how their labels differ."""
  profile = run.record.profile
  if profile is None:
    return Section("Data", texts=_missing(run, "Clients' sizes and labels"))
  rows = []
  for name, part in profile["sets"].items():
    told = map(formatting.number, _of_sizes(part))
    totals = [f"{part['clients']:,}", f"{part['examples']:,}"]
    rows.append([name, *totals, *told])
  facts = {"data set": str(profile["name"])}
  if profile["test"]:
    facts["central test set"] = f"{profile['test']:,} examples"
  labels = profile["labels"]
  texts = []
  if labels is not None:
    facts["classes"] = f"{profile['classes']:,}"
    facts["label skew"] = formatting.number(float(labels["skew"]))
    texts.append(
      "Label skew is the total variation distance between the labels of a"
      f" client and of all, as the mean over {labels['clients']:,} clients: 0"
      " where all have the same shares of the classes, near 1 where no two"
      " share a class."
    )
  head = ["set", "clients", "examples", *_HEAD]
  return Section(
    "Data",
    texts=texts,
    facts=facts,
    figures=_pictures(profile),
    tables=[Table("Examples of a client", head, rows)],
  )


def _of_sizes(part: dict[str, Any]) -> list[int]:
  """Return the percentiles of sizes, each that of a client."""
  sizes, counts = np.asarray(part["sizes"], int).reshape(-1, 2).T
  ends = np.cumsum(counts)
  if not len(ends):
    return []
  ranks = np.asarray(_PERCENTILES) / 100 * (ends[-1] - 1)
  places = np.searchsorted(ends, np.floor(ranks), side="right")
  return [int(x) for x in sizes[places]]


def _pictures(profile: dict[str, Any] | Any) -> list[Figure]:
  labels, part = profile["labels"], profile["sets"]["train"]
  shown = labels["shown"] if labels else []
  few = part["clients"] <= MOST_NAMES and len(shown) == part["clients"]
  names = [str(client["name"]) for client in shown] if few else None
  if few:
    sizes = np.asarray([client["size"] for client in shown], int)
  else:
    values, counts = np.asarray(part["sizes"], int).reshape(-1, 2).T
    sizes = np.repeat(values, counts)
  figures = [
    draw(
      "sizes",
      "How many examples training clients have",
      lambda ax: draw_sizes(ax, sizes, names),
    )
  ]
  if shown:
    counted = np.asarray([client["counts"] for client in shown], float)
    figures.append(
      draw(
        "classes",
        "Which classes the examples of training clients have",
        lambda ax: draw_classes(ax, part["clients"], counted, names),
      )
    )
  return figures


def _rounds(run: DescribedRun) -> Section:
  """Return how many rounds clients took part in."""
  title, record = "Participation", run.record
  if record.participation is None:
    texts = _missing(run, "Rounds of each client")
    asked = [row["clients"] for row in record.rows if "clients" in row]
    if asked:
      texts.append(
        f"On average {f'{float(np.nanmean(asked)):.4g}'} clients took"
        " part in a round."
      )
    return Section(title, texts=texts)
  counts = _counts(record.participation, record.profile)
  told = [f"{x:,g}" for x in quantiles(counts, _PERCENTILES)]
  never = int((counts == 0).sum())
  most = sorted(record.participation.counts.items(), key=lambda pair: -pair[1])
  rows = [
    [record.participation.names[i], f"{count:,}"] for i, count in most[:_WORST]
  ]
  return Section(
    title,
    texts=[f"{never:,} of {len(counts):,} clients were in no aggregate."],
    figures=[
      draw(
        "participation",
        "How many clients took part in how many rounds",
        lambda ax: draw_participation(ax, counts),
      )
    ],
    tables=[
      Table("Rounds of a client", ["", *_HEAD], [["rounds", *told]]),
      Table("Clients that took part most", ["client", "rounds"], rows),
    ],
  )


def _counts(participation: Participation, profile: Any) -> np.ndarray:
  """Return the rounds of every client, shape=(clients,), integer."""
  known = participation.counts
  total = max(known, default=-1) + 1
  if profile is not None:
    total = max(total, int(profile["sets"]["train"]["clients"]))
  counts = np.zeros(total, int)
  for client, count in known.items():
    counts[client] = count
  return counts


def _missing(run: DescribedRun, what: str) -> list[str]:
  """Return why something is not there."""
  return [text for text in run.record.missing if text.startswith(what)]
