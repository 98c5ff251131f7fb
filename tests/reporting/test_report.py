"""Reports as HTML: what they say, and what is wrong with a workdir."""

import html.parser
import json
import math
import re

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from fedjax_sim import config as configs
from fedjax_sim import reporting
from fedjax_sim.config.completion import complete
from fedjax_sim.config.defaults import default_config
from fedjax_sim.reporting import formatting
from fedjax_sim.reporting.figures.style import PALETTE
from fedjax_sim.reporting.html import page_of
from fedjax_sim.reporting.pages import page as pages
from fedjax_sim.run import report
from tiers import slow_but

EVIL = "<script>alert('ü')</script>\"&$x$"
VOID = {"meta", "br", "wbr", "use", "path", "image", "rect"}
CELLS = ("th", "td", "dt", "dd", "p", "h1", "figcaption", "pre")
SUMMARY = {
  "params_digest": "ab" * 32,
  "rounds": 3,
  "seed": 0,
  "parameters": 650,
  "wall_seconds": 12.5,
  "phase_seconds": {"build": 2.5, "train": 10.0},
  "train_seconds": 10.0,
  "clients_per_second": 1234.5,
  "examples_per_second": 9876.5,
  "padding_waste": 0.25,
  "compilations": 1,
  "lanes": 4,
  "lanes_reason": "measured",
  "processes": 1,
  "devices": ["cpu:0", "cpu:1"],
  "device_kind": "cpu",
  "versions": {"python": "3.11", "jax": "0.10"},
}


class Page(html.parser.HTMLParser):
  """The parsed page: its texts and tags; refuses what is not balanced."""

  def __init__(self, text):
    super().__init__(convert_charrefs=True)
    self.open: list[str] = []
    self.tags: list[tuple[str, dict[str, str | None]]] = []
    self.cells: list[tuple[str, str]] = []
    self.feed(text)
    self.close()
    assert self.open == []

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag in CELLS:
      self.cells.append((tag, ""))
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    if tag not in VOID:
      assert self.open.pop() == tag

  def handle_data(self, data):
    if {*CELLS} & {*self.open}:
      tag, text = self.cells[-1]
      self.cells[-1] = (tag, text + data)

  def texts(self, *tags):
    return [text.strip() for tag, text in self.cells if tag in tags]

  def fact(self, name):
    """The definition of a term, or the cells of a row of a table."""
    found = self.texts("dt", "dd", "th", "td")
    return found[found.index(name) + 1]

  def row(self, name, width):
    found = self.texts("th", "td")
    place = found.index(name)
    return found[place + 1 : place + 1 + width]


def row(r, **more):
  return {
    "round": r,
    "train/loss": 3 / r,
    "clients": 10,
    "clients_rejected": 0,
    "bytes_down": 1000 * r,
    "bytes_up": 500 * r,
    "test/loss": 2 / r,
    "test/accuracy": [0.1, 0.9, 0.8][r - 1],
    **more,
  }


ROWS = [row(r) for r in (1, 2, 3)]


def workdir(folder, *, rows=ROWS, summary=SUMMARY, fields=None, **files):
  """A run's files as a run writes them; files by the name before the dot."""
  folder.mkdir(exist_ok=True)
  config = default_config()
  config.server.rounds = 3
  for name, value in (fields or {}).items():
    section, key = name.split(".")
    config[section][key] = value
  reporting.write_json(
    folder / "config.json", configs.resolved(complete(config))
  )
  with reporting.MetricsFile(folder / "metrics.jsonl", keep_through=0) as file:
    file.append(rows)
  timings = [
    {"round": 3, "train_seconds": 2.0, "plan_seconds": 1.0, "eval_seconds": 0.5}
  ]
  with reporting.MetricsFile(
    folder / "timings.jsonl", keep_through=0, complete=False
  ) as file:
    file.append(timings if rows else [])
  if summary:
    last = {k: v for k, v in rows[-1].items() if k != "round"}
    reporting.write_json(
      folder / "summary.json", {**last, **summary, "rounds": len(rows)}
    )
  for name, text in files.items():
    ending = "json" if name == "data_profile" else "csv"
    (folder / f"{name}.{ending}").write_text(text, encoding="utf-8")
  return folder


def profile(sizes, names=None, labels=True):
  """A `data_profile.json` of these training clients."""
  values, counts = np.unique(sizes, return_counts=True)
  part = {
    "clients": len(sizes),
    "examples": int(np.sum(sizes)),
    "sizes": [[int(v), int(c)] for v, c in zip(values, counts, strict=True)],
  }
  shown = [
    {"name": name, "size": int(size), "counts": [1, int(size) - 1]}
    for name, size in zip(names or map(str, sizes), sizes[:60], strict=False)
  ]
  told = {"clients": len(sizes), "skew": 0.125, "shown": shown}
  return json.dumps(
    {
      "name": "mine",
      "classes": 2 if labels else 0,
      "test": 50,
      "sets": {"train": part},
      "labels": told if labels else None,
    }
  )


def page(*folders):
  text = page_of([report.described(folder) for folder in folders])
  assert text.startswith("<!DOCTYPE html>")
  return text, Page(text)


def test_numbers_are_those_of_the_files(tmp_path):
  folder = workdir(
    tmp_path / "mine",
    clients_seen="client,examples,accuracy,loss\n"
    + "".join(f"c{i},{10 + i},{i / 20},{2 - i / 20}\n" for i in range(20)),
    data_profile=profile([3, 5, 5, 9] * 10),
    fields={"client.batch_size": 8, "runtime.lanes": "auto"},
  )
  _, parsed = page(folder)
  assert parsed.texts("h1") == ["mine"]
  assert "Finished: 3 rounds in 12.50 s." in parsed.texts("p")[0]
  cards = dict(zip(parsed.texts("dt"), parsed.texts("dd"), strict=False))
  assert cards["test/accuracy"] == "0.8000"
  assert "round 3; best 0.9000, round 2" in parsed.texts("dd")
  assert parsed.row("client.batch_size", 2) == ["8", "32"]
  metrics = parsed.row("test/loss", 4)
  loss = formatting.number(2 / 3)
  assert metrics == [f"{loss} (3)", f"{loss} (3)", "2.000 (1)", f"{loss} (3)"]
  assert parsed.row("bytes_up", 3) == [
    "1.500 kB (3)",
    "500 B (1)",
    "1.500 kB (3)",
  ]
  assert parsed.fact("down") == "6.000 kB, 2.000 kB a round"
  assert parsed.fact("clients a round") == "10"
  assert parsed.row("seen/accuracy", 7) == [
    *("0.000", "0.09500", "0.2375", "0.4750", "0.7125", "0.8550", "0.9500")
  ]
  assert parsed.row("c0", 3) == ["10", "0.000", "2.000"]
  assert "c9" in parsed.texts("th")  # of the worst ten, the last
  assert "c10" not in parsed.texts("th")
  sizes = ["3", "3", "3", "5", "5", "9", "9"]
  assert parsed.row("train", 9) == ["40", "220", *sizes]
  assert parsed.fact("label skew") == "0.1250"
  assert parsed.row("build", 2) == ["2.500", "20.0 %"]
  assert parsed.row("all", 2) == ["12.500", "100.0 %"]
  assert parsed.fact("digest of the parameters") == "ab" * 32
  assert parsed.fact("jax") == "0.10"
  (code, command) = parsed.texts("pre")
  assert "config.client.batch_size = 8" in code
  assert "--config.runtime.lanes=4" in command
  assert "--config.runtime.devices=2" in command


def test_it_stands_alone(tmp_path):
  """No scripts, no other files, a language, names for all pictures."""
  folder = workdir(tmp_path / "mine", data_profile=profile([3, 5]))
  text, parsed = page(folder)
  names = [tag for tag, _ in parsed.tags]
  assert not {"script", "link", "iframe", "img", "object"} & {*names}
  assert "http" not in text.replace("http://www.w3.org", "")
  assert "@import" not in text
  for tag, attributes in parsed.tags:
    for key in ("src", "href", "xlink:href"):
      assert (attributes.get(key) or "#").startswith(("#", "data:image/png"))
    if tag == "html":
      assert attributes["lang"] == "en"
    if tag == "svg":
      assert attributes["aria-label"]
      assert attributes["role"] == "img"
  ids = [a["id"] for _, a in parsed.tags if a.get("id")]
  assert len(ids) == len({*ids})
  for _, attributes in parsed.tags:
    for key in ("href", "xlink:href"):
      if (attributes.get(key) or "").startswith("#"):
        assert attributes[key][1:] in ids
    for used in re.findall(
      r"url\(#([^)]*)\)", attributes.get("clip-path") or ""
    ):
      assert used in ids
  assert "prefers-color-scheme: dark" in text
  assert "currentColor" in text
  metas = [attributes for tag, attributes in parsed.tags if tag == "meta"]
  (port,) = (a["content"] for a in metas if a.get("name") == "viewport")
  assert port.startswith("width=device-width")
  assert "#010203" not in text


def test_colors_have_contrast():
  """3 or more of lines with both pages, 4.5 or more of letters."""
  css = (pages._TEMPLATES / "report.css").read_text()
  light, dark = re.findall(r"--background: (#\w{6});", css)[:2]
  for color in PALETTE:
    assert contrast(color, light) >= 3
  for color in pages._DARK:
    assert contrast(color, dark) >= 3
  for name in ("ink", "faint"):
    on_light, on_dark = re.findall(rf"--{name}: (#\w{{6}});", css)[:2]
    for kind in ("background", "raised", "warning"):
      below = re.findall(rf"--{kind}: (#\w{{6}});", css)
      assert contrast(on_light, below[0]) >= 4.5
      assert contrast(on_dark, below[1]) >= 4.5


def contrast(a, b):
  """As WCAG 2 defines it."""

  def luminance(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [
      x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in parts
    ]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

  low, high = sorted((luminance(a), luminance(b)))
  return (high + 0.05) / (low + 0.05)


def test_names_are_escaped(tmp_path):
  rows = [{**ROWS[0], f"test/{EVIL}/loss": 1.0}]
  quoted = EVIL.replace('"', '""')
  folder = workdir(
    tmp_path / EVIL.replace("/", "-"),
    rows=rows,
    clients_unseen=f'client,examples,accuracy\n"{quoted}",3,0.5\nb,2,nan\n',
    data_profile=profile([3, 5], [EVIL, "_b"]),
    fields={"data.path": EVIL},
  )
  text, parsed = page(folder)
  assert "<script" not in text
  assert "script" not in [tag for tag, _ in parsed.tags]
  assert EVIL in parsed.texts("th")
  assert EVIL in parsed.texts("td")  # data.path
  assert any(EVIL in code.replace("\\", "") for code in parsed.texts("pre"))
  assert parsed.row("b", 2) == ["2", "nan"]
  assert parsed.texts("th").index("b") < parsed.texts("th").index(EVIL, 5)


def test_an_unfinished_run_says_so(tmp_path):
  folder = workdir(tmp_path / "mine", rows=ROWS[:2], summary=None)
  _, parsed = page(folder)
  said = "Not finished: 2 of 3 rounds are done."
  assert said in parsed.texts("p")
  assert parsed.row("train", 2) == ["2.000", "57.1 %"]  # of timings.jsonl
  assert "Metrics of each client: they are written at the end." in parsed.texts(
    "p"
  )
  assert "Clients' sizes and labels: data_profile.json is missing." in (
    parsed.texts("p")
  )


def test_a_run_without_a_round(tmp_path):
  folder = workdir(tmp_path / "mine", rows=[], summary=None)
  _, parsed = page(folder)
  assert parsed.texts("p").count("No round is done yet.") == 2
  assert "Not finished: 0 of 3 rounds are done." in parsed.texts("p")


def test_one_round_of_nan_without_a_test_set(tmp_path):
  rows = [{"round": 1, "train/loss": math.nan, "clients": 0}]
  folder = workdir(
    tmp_path / "mine",
    rows=rows,
    clients_seen="client,examples,loss\na,1,nan\nb,1,nan\n",
  )
  _, parsed = page(folder)
  assert "Some metrics are not a number (NaN)." in parsed.texts("p")
  assert parsed.fact("train/loss") == "nan"
  assert parsed.row("seen/loss", 2) == ["nan", "nan"]
  assert "No bytes were counted yet." in parsed.texts("p")


def test_thousands_of_clients(tmp_path):
  lines = [f"c{i},{i % 7 + 1},{i / 20000}\n" for i in range(20_000)]
  folder = workdir(
    tmp_path / "mine",
    clients_seen="client,examples,accuracy\n" + "".join(lines),
    data_profile=profile([i % 7 + 2 for i in range(20_000)]),
  )
  text, parsed = page(folder)
  assert len(text) < 1_000_000
  assert parsed.row("train", 2) == ["20,000", "99,997"]
  assert "c10" not in parsed.texts("th")


def test_a_long_config_is_cut(tmp_path):
  folder = workdir(tmp_path / "mine", fields={"model.frozen": ("a" * 9000,)})
  _, parsed = page(folder)
  (value, _) = parsed.row("model.frozen", 2)
  assert " ... " in value
  assert len(value) < 400
  assert "a" * 9000 in parsed.texts("pre")[0]


def test_privacy_over_the_rounds(tmp_path):
  rows = [row(r, **{"privacy/epsilon": r / 2}) for r in (1, 2, 3)]
  told = {
    "privacy_told": "(1.5, 0.001)-DP for <clients>",
    "privacy_not_covered": ["train/*", "report.html"],
  }
  fields = {
    "privacy.mechanism": "gaussian",
    "privacy.clip_norm": 1.0,
    "privacy.delta": 0.001,
    "privacy.noise_multiplier": 1.0,
    "sampler.name": "poisson",
  }
  folder = workdir(
    tmp_path / "mine", rows=rows, summary={**SUMMARY, **told}, fields=fields
  )
  _, parsed = page(folder)
  assert parsed.fact("guarantee") == told["privacy_told"]
  assert parsed.fact("not covered by epsilon") == "train/*, report.html"
  assert parsed.row("round", 7) == [
    *("privacy/epsilon", "1", "0.5000", "2", "1.000", "3", "1.500")
  ]
  assert any("fresh entropy" in text for text in parsed.texts("p"))


@pytest.mark.parametrize("finished", [True, False])
def test_participation(tmp_path, finished):
  """Client 0 was in two aggregates, 1 in one; 2 was asked, 3 never."""
  folder = workdir(
    tmp_path / "mine",
    fields={"server.client_log": True},
    data_profile=profile([3, 5, 5, 9]),
  )
  table = pa.table(
    {
      "round": [1, 1, 2, 2],
      "client": [0, 1, 0, 2],
      "name": ["<ann>", "bob", "<ann>", "eve"],
      "present": [True, True, True, False],
    }
  )
  if finished:
    parquet.write_table(table, folder / "client_rounds.parquet")
  else:
    (folder / "client_rounds").mkdir()
    for i in range(2):
      name = f"{i + 1:010d}-{i + 1:010d}.parquet"
      part = table.slice(2 * i, 2)
      parquet.write_table(part, folder / "client_rounds" / name)
  _, parsed = page(folder)
  assert "2 of 4 clients were in no aggregate." in parsed.texts("p")
  found = parsed.texts("th", "td")
  place = found.index("<ann>")
  assert found[place : place + 6] == ["<ann>", "2", "bob", "1", "eve", "0"]


def test_participation_that_is_missing(tmp_path):
  folder = workdir(tmp_path / "mine")
  _, parsed = page(folder)
  told = [t for t in parsed.texts("p") if t.startswith("Rounds of each client")]
  assert told == [
    "Rounds of each client: they were not logged (server.client_log)."
  ]
  folder = workdir(tmp_path / "logged", fields={"server.client_log": True})
  _, parsed = page(folder)
  assert "Rounds of each client: client_rounds.parquet is missing." in (
    parsed.texts("p")
  )
  (folder / "client_rounds.parquet").write_bytes(b"damaged")
  _, parsed = page(folder)
  assert any("they cannot be read" in text for text in parsed.texts("p"))


def test_several_runs_are_compared(tmp_path):
  one = workdir(tmp_path / "one")
  (tmp_path / "more").mkdir()
  two = workdir(
    tmp_path / "more" / "one",
    rows=ROWS[:2],
    summary=None,
    fields={"algorithm.name": "fedprox", "server.clients_per_round": 5},
  )
  _, parsed = page(one, two)
  assert parsed.texts("h1") == ["2 runs compared"]
  assert parsed.row("one", 3) == ["1.000", "0.6667", "0.8000"]
  assert parsed.row("one (2)", 3) == ["1.500", "1.000", "0.9000"]
  assert "one (2): Not finished: 2 of 3 rounds are done." in parsed.texts("p")
  assert parsed.row("algorithm.name", 2) == ["fedavg", "fedprox"]
  assert parsed.row("algorithm.mu", 2) == ["no such field", "0.01"]
  assert parsed.row("server.clients_per_round", 2) == ["10", "5"]
  found = parsed.texts("th", "td")
  place = found.index("wall time")
  assert found[place + 1 : place + 7] == [
    *("one", "6.000 kB", "3.000 kB", "650", "3 of 3", "12.50 s")
  ]
  captions = [text.strip() for text in parsed.texts("figcaption")]
  assert captions == [
    f"{key} against the round"
    for key in ("train/loss", "test/loss", "test/accuracy")
  ]


def test_many_runs(tmp_path):
  """One picture has all names, and the runs are rows of what differs."""
  folders = [
    workdir(tmp_path / f"r{i}", fields={"client.learning_rate": 0.1 + i})
    for i in range(12)
  ]
  text, parsed = page(*folders)
  assert "r0, r1, r2, r3, r4, r5, and 6 more" in parsed.texts("p")
  assert parsed.texts("figcaption")[-1] == "The runs' lines"
  found = parsed.texts("th", "td")
  place = found.index("client.learning_rate")
  assert found[place + 1 : place + 5] == ["r0", "0.1", "r1", "1.1"]
  pictures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
  named = ["r11" in picture for picture in pictures]
  assert named == [False, False, False, True]


@pytest.mark.parametrize(
  "value",
  slow_but([math.inf, -1e308], [math.inf, 1e308, -1e308, 1e38, 1e-300, 0.0]),
)
def test_extreme_numbers(tmp_path, value):
  rows = [row(1), row(2, **{"test/loss": value, "_x/loss": -value})]
  folder = workdir(
    tmp_path / "_日本",
    rows=rows,
    clients_seen=f"client,examples,loss\na,1,{value}\nb,1,{-value}\nc,1,1\n",
  )
  text, _ = page(folder)
  picture = re.findall(r"<svg.*?</svg>", text, re.DOTALL)[0]
  assert re.search(r">\s*_x: ", picture)


def test_runs_with_one_config(tmp_path):
  one, two = workdir(tmp_path / "one"), workdir(tmp_path / "two")
  _, parsed = page(one, two)
  assert "All runs have the same config." in parsed.texts("p")


def test_the_same_run_gives_the_same_bytes_and_nothing_else(tmp_path):
  folder = workdir(tmp_path / "mine", data_profile=profile([3, 5]))
  before = {p.name: p.read_bytes() for p in folder.iterdir()}
  report.write_report([folder], tmp_path / "a.html")
  report.write_report([folder], tmp_path / "b.html")
  first = (tmp_path / "a.html").read_bytes()
  assert first == (tmp_path / "b.html").read_bytes()
  assert before == {p.name: p.read_bytes() for p in folder.iterdir()}


# --- what is wrong with a workdir ---------------------------------------------


def gone(name):
  return lambda folder: (folder / name).unlink()


def holding(name, text):
  return lambda folder: (folder / name).write_text(text)


def without(name, *keys):
  def change(folder):
    path = folder / name
    tree = json.loads(path.read_text())
    part = tree
    for key in keys[:-1]:
      part = part[key]
    del part[keys[-1]]
    path.write_text(json.dumps(tree))

  return change


@pytest.mark.parametrize(
  ("change", "said"),
  [
    (gone("config.json"), "its config.json is missing; copy all of its files"),
    (gone("metrics.jsonl"), "metrics.jsonl is missing: the run has not begun"),
    (holding("config.json", "{"), "config.json is damaged"),
    (holding("config.json", "[]"), "config.json is damaged .no JSON object"),
    (holding("metrics.jsonl", "x\n{}\n"), "metrics.jsonl, line 1 is damaged"),
    (holding("timings.jsonl", "x\n{}\n"), "timings.jsonl, line 1 is damaged"),
    (holding("summary.json", "{"), "summary.json is damaged"),
    (without("summary.json", "lanes"), "summary.json is of another version"),
    (
      holding("metrics.jsonl", '{"round": 1}\n'),
      "ends with round 1, but summary.json is of round 3: the folder was",
    ),
    (without("config.json", "model"), "'model' is missing; report with"),
    (holding("data_profile.json", "{"), "data_profile.json is damaged"),
    (
      holding("data_profile.json", "{}"),
      "data_profile.json is damaged .'classes' is missing.; remove it",
    ),
    (holding("clients_seen.csv", "a,b\n1,2\n"), "its columns are not client"),
    (
      holding("clients_seen.csv", "client,examples,loss\na,1\n"),
      "clients_seen.csv is damaged",
    ),
    (
      holding("clients_seen.csv", "client,examples,loss\na,1,x\n"),
      "clients_seen.csv is damaged",
    ),
  ],
)
def test_a_damaged_workdir_is_refused_in_a_line(tmp_path, change, said):
  folder = workdir(tmp_path / "mine")
  change(folder)
  with pytest.raises(reporting.NoRunError, match=said) as error:
    report.write_report([folder], tmp_path / "report.html")
  assert "\n" not in str(error.value)
  assert not (tmp_path / "report.html").exists()


def test_what_is_no_workdir_is_refused(tmp_path):
  for path, said in (
    (tmp_path / "none", "there is no such folder"),
    (tmp_path, "it has no config.json; name the --workdir of a run"),
  ):
    with pytest.raises(reporting.NoRunError, match=said):
      report.write_report([path], tmp_path / "report.html")
  (tmp_path / "file").touch()
  with pytest.raises(reporting.NoRunError, match="is a file; name a run's"):
    report.write_report([tmp_path / "file"], tmp_path / "report.html")


def test_a_branch_names_its_origin(tmp_path):
  """And is of this version, though its config.json has one more entry."""
  folder = workdir(tmp_path / "mine")
  tree = json.loads((folder / "config.json").read_text())
  tree["origin"] = {"workdir": "/runs/a b", "round": 20}
  (folder / "config.json").write_text(json.dumps(tree))
  _, parsed = page(folder)
  assert parsed.fact("branched from") == "round 20 of /runs/a b"
  code, command = parsed.texts("pre")
  assert "'--branch-from=/runs/a b:20'" in command
  assert "origin" not in code
  assert not any("another version" in text for text in parsed.texts("p"))


def test_another_version_is_named(tmp_path):
  folder = workdir(tmp_path / "mine")
  without("config.json", "leakage")(folder)
  _, parsed = page(folder)
  said = "was begun by another version of fedjax_sim"
  assert any(said in text for text in parsed.texts("p"))
