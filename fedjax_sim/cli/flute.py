"""`fedjax-sim flute`: translate a YAML file of FLUTE, and run it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from fedjax_sim.cli import run as runs
from fedjax_sim.config import flags, flute
from fedjax_sim.core import files, validate
from fedjax_sim.core.references import is_reference
from fedjax_sim.data.location import is_url

_FILE = "config.py"


def run(arguments: Sequence[str]) -> int:
  """Translate a file of FLUTE, print what became of it, and run it.

  Args:
    arguments: what follows `fedjax-sim flute`.

  Raises:
    UsageError: a flag is unknown, missing or has a wrong value.
    TypeError, ValueError, OSError: the file cannot be read or translated, or
      the run not begin.
  """
  changes = [a for a in arguments if a.startswith("--config.")]
  values = flags.parse(
    [a for a in arguments if a not in changes],
    switches=("translate_only",),
    config="",
    task="",
    data="",
    workdir="",
    to="",
    compat=flute.MEANT,
  )
  text = {
    name: values[name].value
    for name in ("config", "task", "data", "workdir", "to")
  }
  if not text["config"]:
    raise flags.UsageError("--config=... is missing: the YAML file of FLUTE")
  target = _target(text["workdir"], text["to"], values.translate_only)
  translation = flute.translate(
    flute.read(Path(text["config"])),
    task=text["task"] or None,
    data=text["data"] or None,
    compat=values.compat,
  )
  if not values.translate_only:
    _check(translation, text["config"], text["data"])
  print(flute.table(translation), flush=True)  # noqa: T201
  source = flute.config_file(translation, Path(text["config"]).name)
  if values.translate_only:
    files.write_atomically(target, source.encode())
    print(f"\nwrote {target}")  # noqa: T201
    return 0
  return _run(target, source, text["workdir"], changes)


def _target(workdir: str, to: str, translate_only: bool) -> Path:
  """Return the file that the config is written to."""
  if to and not translate_only:
    raise flags.UsageError(
      f"--to={to} is for --translate_only; the config of a run is {_FILE} in"
      " its workdir."
    )
  if not workdir and not to:
    other = ", or --to=FILE" if translate_only else ""
    raise flags.UsageError(f"--workdir=... is missing{other}")
  if is_url(workdir):
    raise flags.UsageError(
      f"--workdir={workdir} is a bucket; translate with --translate_only"
      " --to=FILE, and give that to fedjax-sim run."
    )
  target = Path(to) if to else Path(workdir) / _FILE
  if translate_only and not target.parent.is_dir():
    raise FileNotFoundError(f"{target.parent}: there is no such folder")
  if target.is_dir():
    raise IsADirectoryError(f"{target}: Is a directory; name a file.")
  return target


def _check(translation: flute.Translation, config: str, data: str) -> None:
  """Refuse what cannot run.

  Raises:
    ValueError: keys are refused, the model or the data are not here, or the
      data are FLUTE's files.
  """
  refused = [r for r in translation.rows if r.outcome.state == "refused"]
  if refused:
    told = "; ".join(f"{r.path} ({r.outcome.note})" for r in refused)
    raise ValueError(
      f"--config={config}: refused: {told}. Remove them, or --translate_only"
      " and change the config."
    )
  task = translation.task
  if flute.without_data(translation):
    raise ValueError(
      f"--data is missing: task {task.name} has no data set here; give a"
      f" store, made by {_importing(translation, 'DATA')}"
    )
  if data and not is_url(data):
    path = Path(data)
    if not path.exists():
      raise FileNotFoundError(f"--data={data}: there is no such file or folder")
    if translation.fields["data.name"] == "store" and not flute.is_store(data):
      raise ValueError(
        f"--data={data} is no client store; make one by"
        f" {_importing(translation, data)}"
      )
  from fedjax_sim.models import MODELS

  name = translation.fields["model.name"]
  if name not in MODELS and not is_reference(name):
    raise validate.UnknownNameError(
      f"task {task.name} needs the model {name!r}, which is not here; known:"
      f" {', '.join(sorted(MODELS))}."
    )


def _importing(translation: flute.Translation, data: str) -> str:
  """Return what makes a store of FLUTE's files.

  Args:
    translation: of the file that names them.
    data: where they lie: a folder, or a file.
  """
  imports = translation.task.imports
  given = {r.path: r.value for r in translation.rows if r.outcome.note}
  clients = "client_config.data_config.train"
  parts = []
  for flag, path in (
    ("train", f"{clients}.list_of_train_data"),
    ("test", "server_config.data_config.test.test_data"),
  ):
    value = given.get(path)
    if Path(data).is_file():
      value = data if flag == "train" else None
    elif isinstance(value, str) and not value.startswith("<"):
      value = Path(data) / value
    elif flag == "train":
      value = Path(data) / "FILE"
    if value is not None:
      parts.append(f"--{flag}={value}")
  if "--text" in imports and "--sequence-length" not in imports:
    lengths = (given.get(f"{clients}.{k}") for k in flute.LENGTHS)
    parts += [f"--sequence-length={n}" for n in lengths if n]
  return f"fedjax-sim data import {imports} {' '.join(parts)} --store=STORE"


def _run(
  target: Path, source: str, workdir: str, changes: Sequence[str]
) -> int:
  """Write the config into the workdir and run it; nothing is left if it fails.

  Args:
    target: the config file.
    source: its text.
    workdir: of the run.
    changes: flags that change fields of the config.
  """
  folder = Path(workdir)
  if folder.is_file():
    raise FileExistsError(f"--workdir={folder} is a file; name a folder.")
  before = target.read_bytes() if target.exists() else None
  made = [p for p in (folder, *folder.parents) if not p.exists()]
  folder.mkdir(parents=True, exist_ok=True)
  files.write_atomically(target, source.encode())
  arguments = [f"--config={target}", f"--workdir={workdir}", *changes]
  try:
    return runs.run(arguments)
  except BaseException as error:
    if not (folder / "config.json").exists():  # the run did not begin
      target.unlink()
      for path in made:
        with contextlib.suppress(OSError):
          path.rmdir()
    elif before is not None and isinstance(error, ValueError):
      files.write_atomically(target, before)
    raise
