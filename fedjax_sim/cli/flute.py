"""`fedjax-sim flute`: translate a YAML file of FLUTE, and run it."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedjax_sim.cli import data as stores
from fedjax_sim.cli import run as runs
from fedjax_sim.config import flags, flute
from fedjax_sim.core import files, validate
from fedjax_sim.core.references import is_reference
from fedjax_sim.data.location import is_url

_FILE, _STORE = "config.py", "store"


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
  tree, name = flute.read(Path(text["config"])), Path(text["config"]).name

  def translated(data: str | None) -> flute.Translation:
    task, compat = text["task"] or None, values.compat
    return flute.translate(tree, task=task, data=data, compat=compat)

  translation = translated(text["data"] or None)
  before = _before(target)
  if values.translate_only:
    print(flute.table(translation), flush=True)  # noqa: T201
    source = flute.config_file(translation, name)
    files.write_atomically(target, source.encode())
    print(f"\nwrote {target}")  # noqa: T201
    return 0
  imports = _imports(translation, text["data"])
  _check(translation, text["config"], text["data"], imports is not None)
  folder = Path(text["workdir"])
  if folder.is_file():
    raise FileExistsError(f"--workdir={folder} is a file; name a folder.")
  with _nothing_left(folder, target):
    if imports is not None:
      store = folder / _STORE
      if not flute.is_store(str(store)):
        code = stores.run(["import", *imports, f"--store={store}"])
        if code:
          return code
        print()  # noqa: T201
      translation = translated(str(store))
    print(flute.table(translation), flush=True)  # noqa: T201
    source = flute.config_file(translation, name)
    with _naming_keys(translation, text["config"]):
      return _run(target, source, before, text["workdir"], changes)


def _imports(translation: flute.Translation, data: str) -> Sequence[str] | None:
  """Return the flags that import FLUTE's files; None if they are not there."""
  if not data or is_url(data) or flute.is_store(data):
    return None
  flags_, complete = flute.importing(translation, data)
  return flags_ if complete else None


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


def _check(
  translation: flute.Translation, config: str, data: str, imported: bool
) -> None:
  """Refuse what cannot run.

  Args:
    translation: of the YAML file.
    config: its path.
    data: what `--data` gives.
    imported: whether the data are files that are going to be imported.

  Raises:
    ValueError: keys are refused, the model or the data are not here, or the
      data are files that `--data` does not lead to.
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
    command = flute.importing(translation, "DATA").command("STORE")
    raise ValueError(
      f"--data is missing: task {task.name} has no data set here; give the"
      f" folder of its files, or a store, made by {command}"
    )
  if data and not is_url(data):
    if not Path(data).exists():
      raise FileNotFoundError(f"--data={data}: there is no such file or folder")
    stored = translation.fields["data.name"] == "store"
    if stored and not imported and not flute.is_store(data):
      command = flute.importing(translation, data).command("STORE")
      raise ValueError(
        f"--data={data} is no client store, and does not hold the files of"
        f" task {task.name}; make a store by {command}"
      )
  from fedjax_sim.models import MODELS

  name = translation.fields["model.name"]
  if name not in MODELS and not is_reference(name):
    raise validate.UnknownNameError(
      f"task {task.name} needs the model {name!r}, which is not here; known:"
      f" {', '.join(sorted(MODELS))}."
    )


@contextlib.contextmanager
def _nothing_left(folder: Path, target: Path) -> Iterator[None]:
  """Make the workdir; remove what was made if the run does not begin.

  Args:
    folder: the workdir.
    target: the config file in it.
  """
  made = [p for p in (folder, *folder.parents) if not p.exists()]
  new = [p for p in (target, folder / _STORE) if not p.exists()]
  folder.mkdir(parents=True, exist_ok=True)
  try:
    yield
  finally:
    if not (folder / "config.json").exists():  # the run did not begin
      for path in new:
        if path.is_dir():
          shutil.rmtree(path)
        path.unlink(missing_ok=True)
      for path in made:
        with contextlib.suppress(OSError):
          path.rmdir()


@contextlib.contextmanager
def _naming_keys(translation: flute.Translation, config: str) -> Iterator[None]:
  """Add to a message about a field the keys of the YAML file that it is from.

  Args:
    translation: of the file.
    config: its path.
  """
  try:
    yield
  except (TypeError, ValueError) as error:
    found = re.match(r"(?:--config\.)?([\w.]+)", str(error))
    keys = translation.sources.get(found[1], ()) if found else ()
    if keys and len(error.args) == 1:
      named = " and ".join(keys)
      error.args = (f"{error} It comes from {named} in {config}.",)
    raise


def _before(target: Path) -> bytes | None:
  """Return the translation that is there already, if there is one.

  Raises:
    FileExistsError: there is another file.
  """
  if not target.exists():
    return None
  before = target.read_bytes()
  if not flute.is_config_file(before.decode(errors="replace")):
    raise FileExistsError(
      f"{target} is there, and no translation of a file of FLUTE; name another"
      " place, or move it away."
    )
  return before


def _run(
  target: Path,
  source: str,
  before: bytes | None,
  workdir: str,
  changes: Sequence[str],
) -> int:
  """Write the config into the workdir and run it.

  A run that is there keeps its config, if the new one is refused.

  Args:
    target: the config file.
    source: its text.
    before: what it held.
    workdir: of the run.
    changes: flags that change fields of the config.
  """
  files.write_atomically(target, source.encode())
  arguments = [f"--config={target}", f"--workdir={workdir}", *changes]
  try:
    return runs.run(arguments)
  except Exception:
    if before is not None:
      files.write_atomically(target, before)
    raise
