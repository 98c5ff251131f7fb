"""Checks of a part in compiled rounds of a tiny federation.

Each is a function of `Rounds`; those that need a round that runs are called
only if it does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr

from fedjax_sim import aggregators
from fedjax_sim.contract import part_checks, task_checks, traced
from fedjax_sim.contract import rounds as plans
from fedjax_sim.contract.blame import blamed, needs_a_value
from fedjax_sim.contract.compare import difference
from fedjax_sim.contract.outcome import Failed, NotApplicable, Outcome, Passed
from fedjax_sim.contract.rounds import Rounds
from fedjax_sim.core import HParams, PyTree
from fedjax_sim.engine.hparams import changed


def shapes(rounds: Rounds) -> Outcome:
  """Check that states, carries and updates keep shapes and dtypes."""
  file = rounds.setting.file
  try:
    simulator = rounds.simulator()
    state = simulator.states.shapes
    aggregators.check(
      simulator.group_aggregator, simulator.states.variables.params
    )
    traced.trace(simulator)
  except traced.ChangedError as error:
    return Failed(f"{error}.")
  except Exception as error:
    if needs_a_value(error):
      return NotApplicable("no round to look at: see no recompilation")
    stage = f"{error}: " if isinstance(error, traced.TraceError) else ""
    return Failed(f"{stage}{blamed(error, file)}")
  leaves = len(jax.tree.leaves(state))
  return Passed(f"of carries, reports and {leaves} arrays of the state")


def recompilation(rounds: Rounds) -> Outcome:
  """Check that one program serves all rounds, cohorts and numbers."""
  file = rounds.setting.file
  simulator = rounds.simulator()
  try:
    _ = simulator.checked
    simulator.trace()
    texts = [_as_text(p) for p in (rounds.program, rounds.traced_again())]
  except Exception as error:
    return Failed(blamed(error, file))
  if texts[0] != texts[1]:
    return Failed(
      "the round is another program when it is traced again, so the part"
      " counts or draws random numbers in Python; take the state, or the key."
      f" {_first_change(*texts)}"
    )
  rounds.run(rounds.first, hparams=other_numbers(simulator.hparams))
  small = plans.kept(rounds.plan(), rounds.ids[:1].tolist())
  rounds.run(planned=small)
  if len(simulator.compiler.compiled) != 1:
    return Failed(f"it was compiled {len(simulator.compiler.compiled)} times.")
  count = len(jax.tree.leaves(simulator.hparams))
  return Passed(f"one program, {count} numbers traced")


def other_numbers(hparams: HParams) -> HParams:
  """Return other hyper-parameters, but for those of privacy.

  Accountants count on these, so a simulator refuses others.
  """
  numbers = jax.tree.map(lambda x: 0.8 * x, hparams)
  if (kept := hparams["algorithm"].get("privacy")) is not None:
    numbers = changed(numbers, "algorithm.privacy", kept)
  return numbers


def _as_text(program: ClosedJaxpr) -> str:
  """Return a round as text, with its constants."""
  constants = [
    np.asarray(x).tobytes().hex()
    for x in program.consts
    if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended)
  ]
  return re.sub(r"0x[0-9a-f]+", "", "\n".join([str(program), *constants]))


def _first_change(one: str, other: str) -> str:
  for a, b in zip(one.splitlines(), other.splitlines(), strict=False):
    if a != b:
      return f"First `{a.strip()[:80]}`, then `{b.strip()[:80]}`."
  return ""


def plain(rounds: Rounds) -> Outcome:
  """Check that a round of the tiny federation leaves nobody out.

  If it did, other checks would compare rounds in which nothing happens.
  """
  planned = rounds.plan(done=0)
  metrics = rounds.run(rounds.first, planned).metrics
  if int(metrics.clients) < len(rounds.ids):
    out = np.sort(planned.cohorts.client[0][metrics.client_rejected])
    return Failed(
      f"the reports of clients {_listed(out)} are not finite in the first"
      " round: look for 0 / 0, and for the root or the norm of zeros, whose"
      " gradient is NaN; Simulator(debug=True) with"
      " jax.config.update('jax_debug_nans', True) names the line."
    )
  if not bool(metrics.finite):
    return Failed("the model is not finite after the server's first step.")
  return Passed(f"{len(rounds.ids)} clients, and finite numbers")


def lanes(rounds: Rounds) -> Outcome:
  """Compare two lanes, all of them full, with one."""
  return _same(rounds, lanes=2, devices=1, counts=(2, 4))


def absent(rounds: Rounds) -> Outcome:
  """Compare two lanes, of which one is empty at last, with one."""
  return _same(rounds, lanes=2, devices=1, counts=(1, 3))


def devices(rounds: Rounds) -> Outcome:
  """Compare two devices with one."""
  found = jax.device_count()
  if found < 2:
    return NotApplicable(f"there is {found} device")
  return _same(rounds, lanes=1, devices=2, counts=(1, 2, 4))


def _same(
  rounds: Rounds, *, lanes: int, devices: int, counts: tuple[int, ...]
) -> Outcome:
  """Compare with one lane and device, the smallest cohorts first."""
  one, other = rounds.plan(), rounds.plan(lanes, devices)
  counts = tuple(n for n in counts if n <= len(rounds.ids))
  if not counts or (lanes > 1 and len(rounds.ids) == 1):
    return NotApplicable("one client trains on the data of all")
  for count in counts:
    ids = _together(other, count)
    a = rounds.run(planned=plans.kept(one, ids)).compared
    b = rounds.run(
      planned=plans.kept(other, ids), lanes=lanes, devices=devices
    ).compared
    apart = difference(a, b, rounds.terms)
    if apart is not None:
      what = f"{devices} devices" if devices > 1 else f"{lanes} lanes"
      less = "1 device" if devices > 1 else "1 lane"
      return Failed(
        f"clients {_listed(ids)}:"
        f" {apart.sentence(f'with {less}', f'with {what}')}."
      )
  return Passed(f"cohorts of {', '.join(map(str, counts))}")


def _together(planned: plans.PlannedRounds, count: int) -> list[int]:
  """Return the first clients of a plan, wave by wave."""
  client = planned.cohorts.client[0].ravel()
  return [int(i) for i in client[client >= 0][:count]]


def order(rounds: Rounds) -> Outcome:
  """Compare the order in which clients are added with its reverse."""
  planned = rounds.plan()
  count = len(rounds.ids)
  if count < 2:
    return NotApplicable("one client trains on the data of all")
  for n in range(2, count + 1):
    ids = _together(planned, n)
    some = plans.kept(planned, ids)
    turned = [*range(n)][::-1]
    a = rounds.run(planned=some).compared
    b = rounds.run(planned=plans.reordered(some, turned)).compared
    apart = difference(a, b, rounds.terms)
    if apart is not None:
      first, then = _listed(ids), _listed(ids[::-1])
      return Failed(
        apart.sentence(
          f"with the clients in the order {first}", f"in the order {then}"
        )
        + "."
      )
  return Passed(f"{count} clients, forwards and backwards")


def empty(rounds: Rounds) -> Outcome:
  """Check that a round without clients changes nothing."""
  if rounds.setting.algorithm.privacy is not None:
    return NotApplicable("a private server must not show that nobody came")
  before = rounds.began
  after = rounds.run(planned=plans.kept(rounds.plan(), []))
  if int(after.metrics.clients):
    return Failed(f"it counts {int(after.metrics.clients)} clients of none.")
  same = lambda state: state._replace(round=0)
  apart = difference(same(before), same(after.state), 0.0)
  if apart is not None:
    return Failed(f"{apart.sentence('before', 'after')}.")
  return Passed("a round without clients changes no bit")


def padding(rounds: Rounds) -> Outcome:
  """Check that what fills up a last batch has no effect."""
  simulator, planned = rounds.simulator(), rounds.plan()
  if task_checks.mixes(rounds.setting):
    return NotApplicable(
      "the model's loss of an example depends on the rest of its batch, as"
      " with batch statistics; batches are filled up with the client's own"
    )
  rows = []
  for data in simulator.splits:
    other = np.arange(data.num_examples)
    for begin, end in zip(data.offsets[:-1], data.offsets[1:], strict=True):
      other[begin:end] = np.roll(other[begin:end], 1)
    rows.append(other)
  for ident in _filled_up(rounds, planned):
    alone = plans.kept(planned, [ident])
    a = rounds.run(planned=alone).compared
    b = rounds.run(planned=plans.with_other_padding(alone, rows)).compared
    apart = difference(a, b, rounds.terms)
    if apart is not None:
      size = int(simulator.splits[0].sizes[ident])
      batch = simulator.batchings[0].batch_size
      return Failed(
        f"client {ident} has {size} examples, and its last batch of {batch} is"
        " filled up with one that it has used already:"
        f" {apart.sentence('with one such row', 'with another')}. Rows where"
        " Batch.mask is False must not count: core.mean_loss(task, variables,"
        " batch, key) leaves them out."
      )
  return Passed("other rows in last batches change nothing")


def _filled_up(rounds: Rounds, planned: plans.PlannedRounds) -> list[int]:
  """Return the clients of the cohort with a batch that is filled up."""
  simulator = rounds.simulator()
  partial = set()
  for batching, data in zip(simulator.batchings, simulator.splits, strict=True):
    partial |= set(np.flatnonzero(data.sizes % batching.batch_size).tolist())
  return [int(i) for i in rounds.ids if int(i) in partial]


def all_padding(rounds: Rounds) -> Outcome:
  """Check that a batch of padding alone makes no NaN, and has no weight."""
  planned, simulator = rounds.plan(), rounds.simulator()
  sizes = [b.batch_size for b in simulator.batchings]
  for ident in sorted(rounds.ids.tolist(), key=lambda i: _size(rounds, i)):
    padded = plans.with_a_batch_of_padding(planned, ident, sizes)
    if padded is None:
      continue
    alone = rounds.run(planned=plans.kept(planned, [ident]))
    more = rounds.run(planned=padded)
    what = f"client {ident}, after its {_size(rounds, ident)} examples"
    if int(more.metrics.clients) < int(alone.metrics.clients):
      return Failed(
        f"{what}, takes a step on a batch whose Batch.mask is False throughout,"
        " and its report is not finite: divide by jnp.maximum(count, 1), or"
        " take core.mean_loss."
      )
    apart = difference(
      dict(alone.metrics.metrics), dict(more.metrics.metrics), rounds.terms
    )
    if apart is not None:
      return Failed(
        f"{what}, takes a step on a batch whose Batch.mask is False throughout:"
        f" the metric {apart.sentence('without it', 'with it')}; mask it."
      )
    return Passed("no NaN, and no weight")
  return NotApplicable("no client's batches leave room for one more")


def _size(rounds: Rounds, ident: int) -> int:
  return int(rounds.simulator().splits[0].sizes[ident])


def not_finite(rounds: Rounds) -> Outcome:
  """Check that a client whose update is NaN changes nothing else."""
  simulator, planned = rounds.simulator(), rounds.plan()
  if len(rounds.ids) < 2:
    return NotApplicable("one client trains on the data of all")
  victim = int(max(rounds.ids))  # whose absence leaves the others' ranks
  others = [int(i) for i in rounds.ids if int(i) != victim]
  changed = []

  def poisoned(value: float) -> plans.PlannedRounds:
    def change(source: str, x: np.ndarray) -> np.ndarray:
      data = simulator.data.all_splits[source]
      x = x.copy()
      if np.issubdtype(x.dtype, np.floating):
        changed.append(source)
        x[data.offsets[victim] : data.offsets[victim + 1]] = value
      return x

    return plans.with_examples(planned, change)

  bad = rounds.run(planned=poisoned(np.nan))
  if not changed:
    return NotApplicable("no field of the examples holds floats")
  if not int(bad.metrics.rejected):
    return NotApplicable(
      f"the update of client {victim} is finite although its examples are NaN"
    )
  if int(bad.metrics.nan_losses):
    return NotApplicable(
      f"the update of client {victim} is finite although its examples are NaN;"
      " its loss is not, which ends a run"
    )
  if not bool(bad.metrics.finite):
    return Failed(
      f"client {victim} sends NaN, and the model of all is not finite: rows of"
      " clients that are not `present` may hold anything; write"
      " jnp.where(present, x, 0) before the sum, not 0 * x after it."
    )
  params = simulator.states.variables.params
  if part_checks.is_random(simulator.effective_aggregator, params):
    return Passed("left out; the mean is random, so nothing is compared")
  without = rounds.run(planned=plans.kept(planned, others))
  apart = difference(without.compared, bad.compared, rounds.terms)
  if apart is not None:
    return Failed(
      f"client {victim} of {_listed(rounds.ids)} sends NaN:"
      f" {apart.sentence('without it', 'with it')}. Rows of clients that are"
      " not `present` must not count, also where clients are counted."
    )
  return Passed("left out, as if it were not there")


def resume(rounds: Rounds) -> Outcome:
  """Check that a state that was stored goes on as if it had stayed."""
  simulator = rounds.simulator()
  state = simulator.init()
  straight = state
  for done in range(3):
    straight, _ = simulator.compiler.call(
      straight, rounds.plan(done=done), simulator.states.traced()
    )
  stored = simulator.states.to_host(state)
  for done in range(3):
    stored = rounds.run(_stored(stored), rounds.plan(done=done)).state
  apart = difference(simulator.states.to_host(straight), stored, 0.0)
  if apart is not None:
    return Failed(
      f"{apart.sentence('after 3 rounds', 'if it is stored in between')}."
    )
  return Passed("3 rounds, stored after each, have the same bits")


def _stored(tree: PyTree) -> PyTree:
  """Return arrays as they come back from a file: bytes, shape and dtype."""

  def again(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x)
    return np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape)

  return jax.tree.map(again, tree)


def _listed(ids: Iterable[int]) -> str:
  return ", ".join(str(int(i)) for i in ids)
