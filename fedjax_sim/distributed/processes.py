"""Several processes as one run: how they meet, and how they agree.

All processes run the same program on the same config and make every decision
in the same way. What only one of them can know (a file in the workdir, a
signal, a measured time) goes through the functions here. With one process all
of them are trivial.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from fedjax_sim.core import PyTree, validate
from fedjax_sim.core.errors import FedjaxSimError
from fedjax_sim.distributed.jax_internals import (
  KeyValueClient,
  is_timeout,
  key_value_client,
  may_be_loss,
)

T = TypeVar("T")

MOST_PORT = 2**16 - 1
WAITING_SECONDS = 10  # at the start, before that is said

# All processes come here in the same order, so a number names an occasion.
_occasions = itertools.count()


class Address(NamedTuple):
  """Where processes meet.

  Attributes:
    coordinator: host:port of process 0.
    process: which one this is, from 0.
    num_processes: how many there are.
  """

  coordinator: str
  process: int
  num_processes: int


class PeerError(FedjaxSimError, ValueError):
  """Another process refuses, or takes part in another run."""


def parse(text: str) -> Address | None:
  """Parse the value of `--distributed`.

  Args:
    text: "coordinator:port,process,count", or "auto".

  Returns:
    The address; None for "auto".

  Raises:
    ValueError: `text` is neither.
  """
  if text == "auto":
    return None
  match = re.fullmatch(r"(\S+:\d+),(\d+),(\d+)", text)
  if match is None:
    raise ValueError(
      f"--distributed={text!r} is neither 'auto', 'off' nor"
      " coordinator:port,process,count, such as 10.0.0.1:1234,0,4."
    )
  coordinator, process, count = match[1], int(match[2]), int(match[3])
  port = int(coordinator.rpartition(":")[2])
  if not 1 <= port <= MOST_PORT:
    raise ValueError(
      f"--distributed={text!r}: port {port} is out of range; give 1 to"
      f" {MOST_PORT}."
    )
  if process >= count:
    raise ValueError(
      f"--distributed={text!r}: process {process} of {count}; give a count of 1"
      " or more, and number the processes from 0 on."
    )
  return Address(coordinator, process, count)


def join(text: str, peer_timeout: float, start_timeout: float) -> None:
  """Connect to the other processes; must come before JAX's first use.

  Args:
    text: "off", or as in `parse`. "auto" asks the cluster: SLURM, Open MPI,
      Kubernetes, Cloud TPU, as JAX knows them.
    peer_timeout: seconds after which a silent process counts as lost.
    start_timeout: seconds that processes wait for each other here.

  Raises:
    ValueError: the address is none, there is no cluster, or the processes do
      not meet.
  """
  if text == "off":
    return
  address = parse(text)
  timeout = validate.number("runtime.peer_timeout", peer_timeout, ge=5)
  patience = validate.number("runtime.start_timeout", start_timeout, gt=0)
  options: dict[str, Any] = {
    # The rest of the time is for what follows: the abort, and the message.
    "heartbeat_timeout_seconds": max(2, int(0.7 * timeout)),
    "initialization_timeout": max(1, int(patience)),
    "shutdown_timeout_seconds": max(2, int(timeout)),
  }
  if address is not None:
    options |= {
      "coordinator_address": address.coordinator,
      "process_id": address.process,
      "num_processes": address.num_processes,
      "cluster_detection_method": "deactivate",
    }
    if address.process == 0:
      _check_port(text, address)
  else:
    options["local_device_ids"] = _all_local_gpus()
  waiting = threading.Timer(
    WAITING_SECONDS, _say_waiting, (text, address, patience)
  )
  waiting.daemon = True
  waiting.start()
  try:
    jax.distributed.initialize(**options)
  except (RuntimeError, ValueError) as error:
    raise ValueError(
      f"--distributed={text}: the processes did not meet"
      f" ({' '.join(str(error).split())[:300]}). 'auto' needs a cluster that"
      " JAX knows; otherwise give coordinator:port,process,count, the same"
      " coordinator and count everywhere."
    ) from error
  finally:
    waiting.cancel()
  if address is not None and jax.process_count() != address.num_processes:
    raise ValueError(
      f"--distributed={text}: the others say that there are"
      f" {jax.process_count()} processes; give the same count everywhere."
    )


def _check_port(text: str, address: Address) -> None:
  """Refuse a port that another program listens on; JAX would crash on it.

  Raises:
    ValueError: the port is in use.
  """
  port = int(address.coordinator.rpartition(":")[2])
  with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
    # As JAX's server: who keeps the port for it sets this, too.
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
      probe.bind(("", port))
    except OSError as error:
      raise ValueError(
        f"--distributed={text}: port {port} of this host cannot be used"
        f" ({error.strerror}); give a free one to all processes."
      ) from error


def _say_waiting(text: str, address: Address | None, seconds: float) -> None:
  where = "" if address is None else f" at {address.coordinator}"
  _say(
    f"--distributed={text}: waiting for the other processes{where},"
    f" {seconds:g} s at most."
  )


def _say(message: str) -> None:
  print(f"fedjax-sim: {message}", file=sys.stderr, flush=True)  # noqa: T201


def _all_local_gpus() -> list[int] | None:
  """Return every GPU of this host if a process has it to itself, else None.

  Under SLURM and Open MPI JAX takes one GPU for each process otherwise.
  """
  # "1(x4)": one on each of four; "1(x3),2": two on the last, maybe this one.
  slurm = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1")
  alone = (
    re.fullmatch(r"1(\(x\d+\))?", slurm) is not None
    and os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1") == "1"
  )
  visible = os.environ.get("CUDA_VISIBLE_DEVICES")
  if visible is not None:
    count = len([x for x in visible.split(",") if x.strip()])
  else:
    count = len(glob.glob("/dev/nvidia[0-9]*"))
  return list(range(count)) if alone and count else None


def is_loss(error: BaseException) -> bool:
  """Return whether an error comes from the loss of another process."""
  if jax.process_count() == 1 or isinstance(error, PeerError):
    return False
  return may_be_loss(error)


def leave(last_word: Callable[[], None], seconds: float = 20.0) -> None:
  """Call `last_word` once all processes are about to leave.

  Process 0 holds what the others still read, so it calls its own, and leaves,
  after them. When it is gone JAX may abort the others, who must have called
  theirs by then. If a process is not leaving, `last_word` is called after
  `seconds`.

  Args:
    last_word: called at least once; the first call counts.
    seconds: how long to wait for the others.
  """
  if jax.process_count() > 1:
    client, wait = key_value_client(), int(1000 * seconds)
    with contextlib.suppress(Exception):
      client.wait_at_barrier("fedjax_sim/leaving", wait)
      if not is_first():
        last_word()
      client.wait_at_barrier("fedjax_sim/left", wait)
  last_word()


def is_first() -> bool:
  """Return whether this is process 0, which alone writes."""
  return jax.process_index() == 0


def occasion() -> str:
  """Return a new name, the same on all processes, which all have to call it.

  It begins the keys of one occasion in the key-value store.
  """
  return f"fedjax_sim/{next(_occasions)}"


def check_same(
  make: Callable[[], tuple[T, dict[str, Any]]], timeout: float
) -> tuple[T, Any]:
  """Refuse to start unless all processes report the same facts.

  Args:
    make: returns what a process starts with, and its facts, as JSON can hold
      them; an error that it raises reaches the others.
    timeout: seconds to wait for the others, which may load their data for
      longer than this process; `runtime.start_timeout`.

  Raises:
    PeerError: another process reports other facts, cannot start, or is not
      ready in time.
    Exception: what `make` raises.
  """
  if jax.process_count() == 1:
    return make()
  client, key = key_value_client(), occasion()
  say = lambda words: client.key_value_set(
    f"{key}/{jax.process_index()}", json.dumps(words)
  )
  try:
    made, said = make()
  except Exception as error:
    say({"error": str(error)})
    # If this is process 0, it holds what the others have still to read.
    with contextlib.suppress(PeerError, jax.errors.JaxRuntimeError):
      _words_of_all(client, key, timeout)
    raise
  say({"said": said})
  every = _words_of_all(client, key, timeout)
  for process, other in sorted(every.items()):
    if "error" in other:
      raise PeerError(f"Process {process} cannot start: {other['error']}")
  for process, other in sorted(every.items()):
    odd = validate.differences(every[0]["said"], other["said"])
    if odd:
      raise PeerError(
        f"Process {process} differs from process 0: {'; '.join(odd[:5])}. Start"
        " all with the same command, software and data."
      )
  return made, said


def _words_of_all(
  client: KeyValueClient, key: str, timeout: float
) -> dict[int, Any]:
  """Wait for the facts that every process reports at the start.

  A process that is lost meanwhile is found out by JAX's heartbeats; one that
  is only slow is waited for, and named.

  Args:
    client: the client of the key-value store.
    key: each process stores its facts under "key/process".
    timeout: seconds to wait.

  Returns:
    Process -> its facts.

  Raises:
    PeerError: the time is over; names the processes that are not ready.
  """
  end, announced = time.monotonic() + timeout, False
  every: dict[int, Any] = {}
  while len(every) < jax.process_count():
    process = len(every)
    left = max(end - time.monotonic(), 0.0)
    step = left if announced else min(left, WAITING_SECONDS)
    try:
      text = client.blocking_key_value_get(
        f"{key}/{process}", max(1, int(1000 * step))
      )
    except jax.errors.JaxRuntimeError as error:
      if not is_timeout(error):
        raise
      missing = _silent(client, key)
      if missing and time.monotonic() >= end:
        raise PeerError(
          f"{missing.capitalize()} not ready {timeout:g} s after this process,"
          " for example as it still loads its data; raise"
          " runtime.start_timeout, or see why that host is slow."
        ) from error
      if missing and not announced:
        announced = True
        _say(f"waiting: {missing} not ready, {timeout:g} s at most.")
    else:
      every[process] = json.loads(text)
  return every


def _silent(client: KeyValueClient, key: str) -> str:
  """Return the processes without facts, such as "process 1 is", or ""."""
  spoken = {
    int(name.rpartition("/")[2]) for name, _ in client.key_value_dir_get(key)
  }
  silent = [i for i in range(jax.process_count()) if i not in spoken]
  if not silent:
    return ""
  numbers = ", ".join(map(str, silent))
  return (
    f"process {numbers} is"
    if len(silent) == 1
    else (f"processes {numbers} are")
  )


def from_first(make: Callable[[], T]) -> T:
  """Return what process 0 makes, on all processes; for small values.

  Args:
    make: called by process 0 alone; returns what JSON can hold.

  Raises:
    Exception: in process 0, what `make` raises.
    PeerError: in the others, if `make` raised.
  """
  if jax.process_count() == 1:
    return make()
  key = occasion()
  if is_first():
    try:
      value = make()
    except Exception as error:
      key_value_client().key_value_set(key, json.dumps({"error": str(error)}))
      raise
    key_value_client().key_value_set(key, json.dumps({"value": value}))
    return value
  # However long it takes: whether process 0 lives, JAX's heartbeats tell.
  told = json.loads(
    key_value_client().blocking_key_value_get(key, 24 * 3600 * 1000)
  )
  if "error" in told:
    raise PeerError(f"Process 0: {told['error']}")
  found: T = told["value"]
  return found


def arrays_from_first(tree: PyTree) -> PyTree:
  """Return process 0's arrays, bit by bit, on all processes.

  Args:
    tree: numpy arrays; on the other processes only shapes and dtypes count.
  """
  if jax.process_count() == 1:
    return tree
  from jax.experimental import multihost_utils

  # As bytes: a sum of floats, which is how they travel, loses the sign of -0.
  as_bytes = lambda x: np.ascontiguousarray(x).reshape(-1).view(np.uint8)
  told = multihost_utils.broadcast_one_to_all(jax.tree.map(as_bytes, tree))
  return jax.tree.map(
    lambda x, like: np.asarray(x).view(like.dtype).reshape(like.shape),
    told,
    tree,
  )


def greatest(*values: float) -> list[float]:
  """Return the largest of each value over all processes, in float32."""
  if jax.process_count() == 1:
    return list(values)
  from jax.experimental import multihost_utils

  every = multihost_utils.process_allgather(np.array(values, np.float32))
  return [float(x) for x in np.max(every, axis=0)]


class Meeting:
  """What threads of all processes say to each other, once under each name.

  Unlike the functions here, threads may come in any order.

  Args:
    name: another one for each meeting; begins with an `occasion`.
  """

  def __init__(self, name: str):
    self._name = name

  def say(self, name: str, text: str) -> None:
    """Say something under a name under which nothing was said."""
    key_value_client().key_value_set(f"{self._name}/{name}", f"={text}")

  def hear(self, name: str) -> str:
    """Return what a process says, as soon as it does."""
    # However long it takes: whether it lives, JAX's heartbeats tell.
    told = key_value_client().blocking_key_value_get(
      f"{self._name}/{name}", 24 * 3600 * 1000
    )
    return told.removeprefix("=")
