"""`fedjax-sim export`: write the model of a run to a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedjax_sim.config import flags
from fedjax_sim.core import validate
from fedjax_sim.data import workdir_on_disk


def run(arguments: Sequence[str]) -> int:
  """Write the model of a run; return the exit code.

  Args:
    arguments: what follows `fedjax-sim export`.

  Raises:
    UsageError: a flag is unknown, missing or has a wrong value.
    ValueError, OSError, ImportError: the run cannot be opened, or the file not
      written.
  """
  values = flags.parse(
    arguments,
    *("workdir", "to"),
    switches=("merged",),
    **{"round": "", "format": "", "layout": "", "data-path": ""},
  )
  path, layout = _target(values)
  from fedjax_sim.run.export import check_target, export
  from fedjax_sim.run.export_folder import check_folder, export_folder
  from fedjax_sim.run.opened import BEST, load

  text = values["round"].value
  round_: int | str | None = text or None
  if text and text.partition("/")[0] != BEST:
    round_ = flags.number("--round", text, int, f" or {BEST!r}")
  workdir = workdir_on_disk(values.workdir, "--workdir")
  if layout:
    check_folder(path, layout)
  else:
    check_target(path)
  opened = load(workdir, round_, data_path=values["data-path"].value or None)
  if layout:
    said = export_folder(opened, path, layout)
  else:
    said = export(opened, path, merge=values.merged)
  print(said)  # noqa: T201
  return 0


def _target(values: Any) -> tuple[Path, str]:
  """Return where to write, and the layout of a folder; "" for a file.

  Raises:
    UsageError: flags contradict each other.
    ValueError: the layout is unknown.
  """
  path = Path(values.to)
  wanted, layout = values.format, values.layout
  from fedjax_sim.run.export import STABLEHLO
  from fedjax_sim.run.export_folder import LAYOUTS

  if layout:
    validate.one_of("--layout", layout, LAYOUTS)
    if wanted:
      raise flags.UsageError(
        f"--layout={layout} is a folder of safetensors; leave out"
        f" --format={wanted}."
      )
  elif wanted and f".{wanted}" != path.suffix:
    raise flags.UsageError(
      f"--format={wanted} and --to={path} name two formats; leave out --format,"
      f" or let the file end in .{wanted}."
    )
  if values.merged and (layout or path.suffix == STABLEHLO):
    what = f"--layout={layout}" if layout else f"a {STABLEHLO} file"
    raise flags.UsageError(
      f"--merged is for weights files, and {what} says by itself what becomes"
      " of adapters; leave it out."
    )
  return path, layout
