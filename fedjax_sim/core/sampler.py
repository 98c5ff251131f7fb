"""The contract of samplers, and what they promise to accountants."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fedjax_sim.core.types import PyTree


class Participation(NamedTuple):
  """What a sampler promises of how often a client takes part.

  Privacy accountants build on it, so a private run holds it against what is
  drawn (`privacy.accounting.promises`). Who takes part depends on the seed, the
  round and the number of clients alone, never on what clients hold.

  Attributes:
    rate: the probability that a client takes part in its turn, drawn anew in
      every turn; 1: it may take part in all of them, or in fewer.
    period: of so many consecutive rounds a client takes part in one at most.
      With a rate below 1, its turns are fixed: one round in so many.
    independent: whether every client takes part or not by itself, whoever else
      there is; otherwise, with a rate below 1, a cohort is drawn uniformly
      among those whose turn it is, and has a fixed size.
    population: how many clients `rate` was chosen for, in advance, however many
      there are; None: it follows from their number, which counts as public.
  """

  rate: float
  period: int = 1
  independent: bool = False
  population: int | None = None


class Sampler(NamedTuple):
  """A way to draw cohorts.

  Most samplers have no state: `sample` is a function of seed and round. One
  that learns from what clients report gives `init` and `observe`; `sample`
  then gets the state as a third argument. A sampler without a state never sees
  one, so its signature proves what accountants rely on: who takes part does
  not depend on what clients hold.

  For example:

      def loyal(num_clients, size):  # who reported keeps coming
        def sample(seed, round_, taken):
          order = np.random.default_rng((seed, round_)).permutation(num_clients)
          return order[np.argsort(~taken[order], kind="stable")][:size]

        def observe(taken, round_, ids, present, values):
          taken = taken.copy()
          taken[ids[present]] = True
          return taken

        return Sampler(
          sample, (size,), size,
          init=lambda: np.zeros(num_clients, bool), observe=observe,
        )

  Attributes:
    sample: (seed, round) -> ids; shape=(cohort,), int64, no duplicates. With a
      state: (seed, round, state) -> ids.
    sizes: increasing cohort sizes to compile for, at most three; a cohort
      never exceeds the last.
    expected: the mean cohort size.
    versions: (seed, round, ids) -> which version of the broadcast each holds,
      shape=(cohort,), int64; see `Client.version`.
    byzantine: (seed, round, ids) -> which of them attack, shape=(cohort,),
      bool; None: nobody does. See `attacks`.
    participation: what it promises; None: nothing, and no accountant can say
      what an epsilon would be. One that observes cannot promise anything.
    weights: (seed, round, ids) -> factors of the clients' weights in means,
      shape=(cohort,), float, > 0; with a state: (seed, round, ids, state). They
      undo that some clients are drawn more often than others. None: all 1.
    init: () -> the state before the first round, a pytree of numpy arrays;
      None: there is no state.
    observe: (state, round, ids, present, values) -> the state after a round,
      with the same structure, shapes and dtypes. `ids` are the round's clients
      in increasing order, shape=(cohort,), int64; `present` says which are in
      the aggregate, shape=(cohort,), bool; `values` has, by name, the mean of
      each of `Report.metrics` (such as "loss"), each of `Report.values`, and
      "update/norm", the L2 norm of its update after transforms; they are of
      shape=(cohort,), NaN of clients that are not present. It must not change
      its arguments. None: there is no state.
  """

  sample: Callable[..., np.ndarray]
  sizes: tuple[int, ...]
  expected: float
  versions: Callable[[int, int, np.ndarray], np.ndarray] = (
    lambda seed, round_, ids: np.zeros_like(ids)
  )
  participation: Participation | None = None
  weights: Callable[..., np.ndarray] | None = None
  init: Callable[[], PyTree] | None = None
  observe: Callable[..., PyTree] | None = None
  byzantine: Callable[[int, int, np.ndarray], np.ndarray] | None = None
