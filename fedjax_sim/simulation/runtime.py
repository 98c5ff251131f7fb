"""How fast a run goes: lanes, devices, where examples are, rounds a call."""

from __future__ import annotations

import dataclasses
import os
from typing import Literal

from fedjax_sim.core import validate
from fedjax_sim.engine import residency as residencies
from fedjax_sim.engine import virtual_devices
from fedjax_sim.simulation import client_residency

# Of one dispatch. Two CPU devices take some milliseconds to get up to speed, so
# a few short rounds are too few.
MOST_ROUNDS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runtime:
  """How fast a run goes; beyond the order of float sums it changes no result.

  Attributes:
    lanes: clients that a device trains at once; "auto" measures a few choices.
    devices: devices of the mesh; None: all.
    model_devices: how many devices share a model, each with a piece of every
      large array; None: each has all of it.
    deterministic_reduction: None: devices add their sums in any order.
      Otherwise so many virtual devices stand for the real ones, and their sums
      are added in a fixed order: parameters have the same bits on any number
      of CPU devices (on others it was not tried). A device holds the sums of
      all virtual ones that it stands for.
    residency: where the examples are: "device", all of them on every device;
      "host", in the host's memory, and each device is sent those of the
      clients that it trains; "disk", the same out of a store; "auto": "device"
      where one process runs alone, and of a store what it is small enough for.
    state_residency: where what clients keep from round to round is: "device",
      a table of all clients, spread over the devices; "disk", a file, of which
      a call gets the rows of the clients that it trains; "auto": "disk" if the
      table takes more than a fifth of the devices' memory.
    state_folder: where that file is to be, and stays; None for a temporary one,
      in a run of the command line for its workdir.
    rounds_per_dispatch: rounds in one call of the compiled program; None: as
      many as take about a second, up to `most_rounds`.
    most_rounds: the most rounds in one call, see `rounds_per_dispatch`.
    eval_batch_size: examples of a client that are evaluated at once.
    donate: a state passed in is used up, and its memory used again.

  Raises:
    TypeError, ValueError: a number is not whole or < 1.
  """

  lanes: int | Literal["auto"] = "auto"
  devices: int | None = None
  model_devices: int | None = None
  deterministic_reduction: int | None = None
  residency: Literal["auto", "device", "host", "disk"] = "auto"
  state_residency: Literal["auto", "device", "disk"] = "auto"
  state_folder: str | os.PathLike[str] | None = None
  rounds_per_dispatch: int | None = None
  most_rounds: int = MOST_ROUNDS
  eval_batch_size: int = 256
  donate: bool = True

  def __post_init__(self) -> None:
    if self.lanes != "auto":
      if isinstance(self.lanes, str):
        raise validate.UnknownNameError(
          f"runtime.lanes={self.lanes!r} is neither 'auto' nor a whole number."
        )
      validate.integer("runtime.lanes", self.lanes)
    if self.devices is not None:
      validate.integer("runtime.devices", self.devices)
    if self.model_devices is not None:
      validate.integer("runtime.model_devices", self.model_devices)
    virtual_devices.check(
      self.deterministic_reduction, self.lanes, self.model_devices
    )
    validate.one_of("runtime.residency", self.residency, residencies.NAMES)
    validate.one_of(
      "runtime.state_residency", self.state_residency, client_residency.NAMES
    )
    if self.state_folder is not None:
      kinds, example = (str, os.PathLike), "'/scratch/states'"
      validate.instance(
        "Runtime.state_folder", self.state_folder, kinds, example
      )
    if self.rounds_per_dispatch is not None:
      validate.integer("runtime.rounds_per_dispatch", self.rounds_per_dispatch)
    validate.integer("Runtime.most_rounds", self.most_rounds)
    validate.integer("runtime.eval_batch_size", self.eval_batch_size)
