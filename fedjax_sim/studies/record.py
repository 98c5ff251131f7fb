"""What `study.json` says of a study, and where its checkpoints are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedjax_sim.run.workdir import STUDY_FILE as STUDY_FILE
from fedjax_sim.run.workdir import WorkdirError

FORMAT = 1


def checkpoints_of(folder: Path, program: int) -> Path:
  """Return where the checkpoints of a program are."""
  return folder / "programs" / str(program) / "checkpoints"


def read_study(path: Path) -> dict[str, Any] | None:
  """Return the content of `study.json`; None if there is none.

  Raises:
    WorkdirError: it is damaged, or of a newer version.
  """
  file = path / STUDY_FILE
  if not file.exists():
    return None
  try:
    found: dict[str, Any] = json.loads(file.read_bytes())
    newer = found["format"] != FORMAT
    _ = found["study"], found["runs"], found["fields"]
    _ = found["metric"], found["higher_is_better"]
  except (ValueError, KeyError, TypeError) as error:
    raise WorkdirError(
      f"{file} is damaged ({error}); restore it, or name another --studydir."
    ) from error
  if newer:
    raise WorkdirError(
      f"{file} has the format {found['format']}, and this version reads"
      f" {FORMAT}; use the version that wrote it."
    )
  return found
