"""Read a YAML file of FLUTE; every error is one line that names the place."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from fedjax_sim.core import errors

_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
  """Refuses a key that is there twice, of which YAML keeps the last."""

  def construct_mapping(
    self, node: yaml.MappingNode, deep: bool = False
  ) -> dict[Hashable, Any]:
    seen = set()
    for key_node, _ in node.value:
      if key_node.tag == _MERGE:
        continue  # its keys may be there again, and then give way
      key = self.construct_object(key_node, deep=True)
      if key in seen:
        raise yaml.constructor.ConstructorError(
          None, None, f"the key {key!r} is there twice", key_node.start_mark
        )
      seen.add(key)
    return super().construct_mapping(node, deep)


def read(path: Path) -> Mapping[str, Any]:
  """Return what a YAML file holds.

  Args:
    path: the file.

  Raises:
    OSError: it cannot be read.
    ValueError: it is no YAML, or not a mapping.
  """
  try:
    tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
  except yaml.MarkedYAMLError as error:
    mark = error.problem_mark
    where = f", line {mark.line + 1}" if mark else ""
    raise ValueError(f"--config={path}{where}: {error.problem}.") from error
  except UnicodeDecodeError as error:
    raise ValueError(
      f"--config={path} is no text in UTF-8: {error.reason} at byte"
      f" {error.start}."
    ) from error
  except RecursionError as error:
    raise ValueError(
      f"--config={path} is no file of FLUTE: it is nested too deeply."
    ) from error
  except (yaml.YAMLError, ValueError, TypeError) as error:
    raise ValueError(
      f"--config={path} is no YAML: {errors.one_line(error)}."
    ) from error
  if not isinstance(tree, dict):
    raise ValueError(
      f"--config={path} holds a {type(tree).__name__}; give a FLUTE file, with"
      " model_config, server_config and client_config."
    )
  return tree
