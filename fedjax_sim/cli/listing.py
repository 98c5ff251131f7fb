"""`fedjax-sim list`: list all components by name."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

from fedjax_sim import aggregators, config, transforms
from fedjax_sim.algorithms import ALGORITHMS
from fedjax_sim.config.build.privacy import MECHANISMS
from fedjax_sim.data import DATASETS, PARTITIONERS
from fedjax_sim.models import MODELS
from fedjax_sim.privacy.local.registry import RANDOMIZERS
from fedjax_sim.privacy.secure.aggregators import SECURE
from fedjax_sim.sampling import SAMPLERS
from fedjax_sim.training import schedules
from fedjax_sim.training.optimizers import OPTIMIZERS

REGISTRIES: Mapping[str, Mapping[str, Callable[..., Any]]] = {
  "algorithms (algorithm.name)": ALGORITHMS,
  "models (model.name)": MODELS,
  "data sets (data.name)": DATASETS,
  "partitions (data.partition)": PARTITIONERS,
  "aggregators (aggregator.name)": {**aggregators.AGGREGATORS, **SECURE},
  "samplers (sampler.name)": SAMPLERS,
  "transforms (transforms)": transforms.TRANSFORMS,
  "local privacy (local_privacy.mechanism)": RANDOMIZERS,
  "schedules (client.schedule, and so on)": schedules.SCHEDULES,
}


def listing() -> str:
  """All registries, one line an entry, and fields below an algorithm's."""
  lines = [
    "A config names one of these or, but for transforms and schedules, yours:"
    " path/to/file.py:name.",
    "",
  ]
  for title, registry in REGISTRIES.items():
    lines.append(f"{title}:")
    width = max(map(len, registry))
    for name, entry in registry.items():
      doc = (inspect.getdoc(entry) or "").splitlines()
      lines.append(f"  {name:<{width}}  {doc[0] if doc else ''}")
      if registry is ALGORITHMS:
        lines += _fields_of(entry, " " * (width + 4))
    lines.append("")
  lines.append("privacy (privacy.mechanism):")
  width = max(map(len, MECHANISMS))
  lines += [f"  {name:<{width}}  {text}" for name, text in MECHANISMS.items()]
  lines.append("")
  lines.append("optimizers (client.optimizer, server.optimizer), from optax:")
  lines.append("  " + ", ".join(OPTIMIZERS))
  return "\n".join(lines)


def _fields_of(algorithm: Callable[..., Any], indent: str) -> list[str]:
  """The fields of the section `algorithm` that it takes, as lines."""
  section = config.default_config().algorithm
  taken = [x for x in inspect.signature(algorithm).parameters if x in section]
  if not taken:
    return []
  text = f"takes {', '.join(taken)}"
  return textwrap.wrap(
    text, 80, initial_indent=indent, subsequent_indent=f"{indent}  "
  )
