"""From a config to a simulator: every section becomes what it describes.

Behind `build` nothing sees a ConfigDict. All of the config is checked here,
before anything is compiled, placed on a device or written.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from fedjax_sim import sampling
from fedjax_sim.config import components
from fedjax_sim.config.build.algorithm import (
  build_algorithm,
  build_finetuning,
)
from fedjax_sim.config.build.attack import (
  attacked_aggregator,
  attacked_sampler,
  build_attack,
  effective_attack,
)
from fedjax_sim.config.build.data import naming_data
from fedjax_sim.config.build.parts import Parts
from fedjax_sim.config.build.privacy import (
  build_privacy,
  check_promise,
  check_weighting,
  is_locally_private,
  local_guarantee,
  secure_noise,
)
from fedjax_sim.config.build.server import (
  build_aggregator,
  build_sampler,
  build_schedules,
  build_transforms,
  label_counts,
  leave_out,
)
from fedjax_sim.config.build.timetable import Timetable
from fedjax_sim.config.build.trackers import ConfiguredTracker, build_trackers
from fedjax_sim.config.completion import complete, reference_fields
from fedjax_sim.config.fields import fields_of
from fedjax_sim.core import references, validate
from fedjax_sim.core.weights import file_digest
from fedjax_sim.engine import residency as residencies
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.engine.client_metrics import ClientMetrics
from fedjax_sim.engine.state import RunState
from fedjax_sim.models.options import weights_of
from fedjax_sim.simulation.account import check_unwatched, uncovered
from fedjax_sim.simulation.finetuning import Finetuning
from fedjax_sim.simulation.preflight import DataError, ModelError
from fedjax_sim.simulation.runtime import MOST_ROUNDS, Runtime
from fedjax_sim.simulation.simulator import Simulator
from fedjax_sim.training.optimizers import Optimizer

INITIAL = "model.initial"  # the field in `Experiment.sources`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
  """What a config describes.

  Attributes:
    simulator: what runs.
    timetable: when it does what.
    trackers: where its metrics are sent to.
    config: complete.
    sources: `references.sources` of the config, and the weights file that the
      run begins from.
    local_guarantee: what local privacy guarantees; "" without any.
    secure_noise: what the noise of secure aggregation does; "" without any.
    uncovered: what a private run reveals of its clients that no epsilon
      covers; empty for other runs.
    finetuning: how clients fine-tune their models before they are evaluated;
      None if they do not.
  """

  simulator: Simulator
  timetable: Timetable
  trackers: Sequence[ConfiguredTracker]
  config: ConfigDict
  sources: Mapping[str, str]
  local_guarantee: str
  secure_noise: str
  uncovered: Sequence[str]
  finetuning: tuple[Optimizer, LocalBatching] | None = None

  @functools.cached_property
  def finetuned(self) -> Finetuning | None:
    """The evaluation after fine-tuning, if there is one."""
    if self.finetuning is None:
      return None
    optimizer, batching = self.finetuning
    return Finetuning(
      simulator=self.simulator, optimizer=optimizer, batching=batching
    )

  def measure(
    self, state: RunState, sets: Sequence[str]
  ) -> dict[str, ClientMetrics]:
    """Return the metrics of every client of several sets.

    Args:
      state: the state.
      sets: which to evaluate. With `seen` there is `finetuned`, too, if clients
        fine-tune their models.
    """
    measured = self.simulator.evaluate.measure(state, sets)
    if self.finetuned is not None and "seen" in sets:
      measured["finetuned"] = self.finetuned(state)
    return measured

  @property
  def budget_end(self) -> str:
    """How a privacy budget ends the run early, in words; "" if none does."""
    rounds, wanted = self.timetable.rounds, self.timetable.wanted
    return f"ends the run after round {rounds} of {wanted}" * (rounds < wanted)


def build(config: ConfigDict, parts: Parts | None = None) -> Experiment:
  """Return the experiment that a config describes; check all of it.

  Args:
    config: what a config file returns.
    parts: data sets and tasks of other experiments, of which this one takes
      those of equal sections; None for its own.

  Raises:
    TypeError, ValueError, OSError, ImportError: what the message says, with
      the field.
  """
  config = complete(config)
  client, server, runtime = config.client, config.server, config.runtime
  if runtime.residency == "disk" and config.data.name == "store":
    residencies.check_on_disk(config.data)
  timetable = Timetable(
    rounds=server.rounds,
    wanted=server.rounds,
    eval_every=server.eval_every,
    test_every=server.eval_every
    if server.test_every is None
    else server.test_every,
    initial_eval=server.initial_eval,
    checkpoint_every=runtime.checkpoint_every,
    keep_checkpoints=runtime.keep_checkpoints,
    snapshot_every=server.snapshot_every,
  )
  validate.integer("server.clients_per_round", server.clients_per_round)
  if server.client_log:
    try:
      importlib.import_module("pyarrow.parquet")
    except ImportError as error:
      raise ImportError(
        "server.client_log=True writes Parquet with pyarrow, which cannot be"
        f" imported ({error}); pip install pyarrow, or set it to False."
      ) from error
  trackers = build_trackers(config)
  validate.number("runtime.peer_timeout", runtime.peer_timeout, ge=5)
  validate.number("runtime.start_timeout", runtime.start_timeout, gt=0)
  batching = LocalBatching(
    **{
      field.name: client[field.name]
      for field in dataclasses.fields(LocalBatching)
    }
  )
  at_once = runtime.rounds_per_dispatch
  speed = Runtime(
    lanes=runtime.lanes,
    devices=runtime.devices,
    model_devices=runtime.model_devices,
    deterministic_reduction=runtime.deterministic_reduction,
    residency=runtime.residency,
    state_residency=runtime.state_residency,
    rounds_per_dispatch=at_once and min(at_once, timetable.longest_stretch),
    most_rounds=min(MOST_ROUNDS, timetable.longest_stretch),
    eval_batch_size=runtime.eval_batch_size,
  )
  shared = Parts() if parts is None else parts
  data = shared.data(config)
  attack = effective_attack(config, build_attack(config, data))
  task = shared.measured(shared.task(config, data), attack.measure)
  algorithm = build_algorithm(config, task, data.train.sizes, attack)
  finetuning = build_finetuning(config, task)
  clients = data.train.num_clients, server.clients_per_round
  sampler = build_sampler(config, data.train.sizes, lambda: label_counts(data))
  fields = reference_fields(config)
  size = (1, 1) if algorithm.requirements.pools_data else clients
  draw = sampling.uniform if algorithm.requirements.pools_data else sampler
  try:
    with references.named(fields, dict(fields_of(config))):
      check_weighting(config)
      drawn = draw(*size)
      check_promise(config, draw, drawn, size)
      drawn = leave_out(config, drawn, data.train, algorithm)
      drawn = attacked_sampler(config, drawn, size[0])
      algorithm, budget = build_privacy(config, algorithm, drawn, size[0])
      aggregator = build_aggregator(config, drawn, data)
      simulator = Simulator(
        task=task,
        algorithm=algorithm,
        data=data,
        sampler=drawn,
        batching=batching,
        aggregator=attacked_aggregator(aggregator, algorithm, attack),
        transforms=build_transforms(config),
        seed=config.seed,
        noise_seed=config.privacy.noise_seed,
        runtime=speed,
        schedules=build_schedules(config, algorithm, task),
        best_metrics=server.best_metrics or (),
        revert_to_best=server.revert_to_best,
        log_clients=server.client_log,
        budget=budget,
      )
      shared.check(simulator)
      allowed = simulator.account.rounds_within_budget(timetable.rounds)
  except DataError as error:
    raise ValueError(naming_data(config, error)) from error
  except ModelError as error:
    text = naming_data(config, error)
    if not references.names_one(str(error), dict(fields_of(config))):
      model = [f"model.{k}={v!r}" for k, v in config.model.items() if v]
      text = f"{', '.join(model)}: {text}"
    raise ValueError(text) from error
  if not allowed:
    raise ValueError(
      f"privacy.target_epsilon={config.privacy.target_epsilon}: the first round"
      " would exceed it with"
      f" privacy.noise_multiplier={config.privacy.noise_multiplier}; raise one"
      " of them."
    )
  private = simulator.algorithm.privacy is not None
  if is_locally_private(config, simulator.num_clients):
    check_unwatched(simulator.best_metrics, simulator.react.schedules)
    private = True
  timetable = dataclasses.replace(timetable, rounds=allowed)
  numbers = lambda: simulator.states.num_sent
  sources = references.sources(fields)
  if weights := _initial(config):
    sources[INITIAL] = "; ".join(_contents(*pair) for pair in weights.items())
  experiment = Experiment(
    simulator=simulator,
    timetable=timetable,
    trackers=trackers,
    config=config,
    sources=sources,
    local_guarantee=local_guarantee(config, drawn, numbers),
    secure_noise=secure_noise(config, drawn, numbers),
    uncovered=_uncovered(config, simulator) if private else [],
    finetuning=finetuning,
  )
  _ = experiment.finetuned  # what does not fit shows now
  return experiment


def _uncovered(config: ConfigDict, simulator: Simulator) -> list[str]:
  """List what a run reveals of its clients that no epsilon would cover."""
  weights = _initial(config)
  return uncovered(
    simulator.data,
    simulator.transforms,
    simulator.runtime,
    simulator.states.shapes.clients,
    log_clients=simulator.log_clients,
    finetuned=config.client.finetune_epochs is not None
    or config.client.finetune_steps is not None,
    initial=", ".join(path.name for path in weights) or None,
  )


def _initial(config: ConfigDict) -> dict[Path, list[Path]]:
  """Return the files or folders of the weights that a run begins from.

  The weights file, and what the model reads by itself.

  Returns:
    Path -> the files that count; a file is its own.
  """
  section = config.model
  (slot,) = components.slots_of("model")
  found = {}
  if section.initial is not None:
    place = Path(section.initial).expanduser()
    found[place] = [place]
  for field, files in weights_of(slot.factory(section.name)).items():
    if section[field] is not None:
      place = Path(section[field]).expanduser()
      found[place] = list(files(place))
  return found


def _contents(place: Path, files: Sequence[Path]) -> str:
  """Return a path's name and the digest of its files, wherever they lie."""
  if place in files:
    return f"{place.name} (SHA-256 {file_digest(place)[:16]})"
  parts = [f"{file.name} {file_digest(file)}" for file in files]
  digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
  return f"{place.name} (SHA-256 {digest[:16]})"
