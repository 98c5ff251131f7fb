"""Federated heavy hitters: the most frequent values, digit by digit.

Values are whole numbers, written with a few digits. As TrieHH does (Zhu et al.
2020, "Federated heavy hitters discovery with differential privacy", arXiv
1902.08534), the server grows a tree of prefixes: a round shows clients the
frequent prefixes so far, clients vote for their continuations by one more
digit, and those with most votes are kept. After as many levels as there are
digits the prefixes are the values, and further rounds count those again.

TrieHH draws a few clients, lets each vote with one word, and keeps prefixes
with many votes; that it draws them is its privacy. Here a client votes with the
shares of all its values, so that an update is a vector, whose sum any mechanism
of this package makes private. A client's votes are at most 1 long, in L1 and in
L2: a clipping norm of 1 changes nothing. Of noise on n clients' mean with
standard deviation s, the greatest of m cells is about s sqrt(2 ln m), and
`min_share` should be above; m is `hitters` times `branching`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fedjax_sim.core import (
  Aggregate,
  Algorithm,
  Array,
  Batch,
  Client,
  Context,
  HParams,
  Key,
  Report,
  Task,
  Variables,
  compensated,
  validate,
)
from fedjax_sim.training.local import WEIGHTINGS, metric
from fedjax_sim.training.statistics import Sums, check_model, sum_pass


class Message(NamedTuple):
  """What the server sends.

  Attributes:
    variables: of the task; the values found so far.
    prefixes: shape=(hitters,), int32; what votes continue; -1 is none.
    level: shape=(), int32; how many digits these have.
  """

  variables: Variables
  prefixes: Array
  level: Array


class TrieState(NamedTuple):
  """The search.

  Attributes:
    message: what clients get.
    votes: shape=(hitters, branching), float32; of this level, the sum over
      rounds of the clients' mean shares times their weight.
    weight: shape=(), float32; of these rounds.
    rounds: shape=(), int32; how many rounds these are.
  """

  message: Message
  votes: Array
  weight: Array
  rounds: Array


def heavy_hitters(
  task: Task,
  *,
  branching: int = 256,
  rounds_per_level: int = 1,
  min_share: float = 0.0,
  weighting: str = "examples",
) -> Algorithm:
  """Return the search for the values with the greatest shares.

  With all clients in every round, without noise, and if there are at least
  1 / `min_share` places, all values with a greater share are found, with their
  exact shares. The metric `hitters/level` is the number of digits that are
  known, `hitters/found` how many values, and `hitters/covered` their sum of
  shares, before the round.

  Args:
    task: places for values, as `models.heavy_hitters` makes.
    branching: base of the digits; as large as the domain, one level is enough.
    rounds_per_level: rounds whose votes are added up before the next digit.
    min_share: prefixes and values are kept if their share is greater; in
      [0, 1).
    weighting: as in `fedavg`; with `examples` and one value an example, shares
      are those of the pooled data, with `tokens` also for many values, and with
      `uniform` all clients count the same.

  Raises:
    TypeError, ValueError: names the field.
  """
  values = check_model(
    task,
    {"values", "shares"},
    {"domain"},
    function="features",
    model="heavy_hitters",
    message="algorithm.name='heavy_hitters' finds values, and the model has no"
    " place for them",
  )
  base = validate.integer("branching", branching, ge=2, le=2**20)
  patience = validate.integer("rounds_per_level", rounds_per_level)
  least = validate.number("min_share", min_share, ge=0, lt=1)
  weigh = validate.lookup("weighting", weighting, WEIGHTINGS)
  shapes = jax.eval_shape(task.init, jax.random.key(0)).params
  places = shapes["values"].shape[0]
  domain = int(task.init(jax.random.key(0)).frozen["domain"])
  powers = _powers(domain, base)

  def init(key: Key, hparams: HParams) -> TrieState:
    nothing = jnp.full((places,), -1, jnp.int32)
    root = nothing.at[0].set(0)
    return TrieState(
      message=Message(task.init(key), root, jnp.int32(0)),
      votes=jnp.zeros((places, base)),
      weight=jnp.zeros(()),
      rounds=jnp.int32(0),
    )

  def zero(client: Client) -> tuple[Array, Array]:
    return jnp.zeros((places, base)), jnp.zeros(())

  def term(client: Client, batch: Batch) -> tuple[Array, Array]:
    variables, prefixes, level = client.message
    value = values(variables, batch.examples)
    value = value.reshape(value.shape[0], -1)
    counted = (value >= 0) & batch.mask[:, None]
    known = value // jnp.asarray(powers, jnp.int32)[level]
    same = (known // base)[..., None] == prefixes[None, None]
    same &= counted[..., None]
    cell = jnp.argmax(same, axis=-1) * base + known % base
    cell = jnp.where(jnp.any(same, axis=-1), cell, places * base)
    votes = jnp.zeros(places * base).at[cell].add(1.0, mode="drop")
    total = jnp.sum(counted, dtype=jnp.float32)
    return votes.reshape(places, base), total

  def finish(client: Client, carry: Sums) -> Report:
    votes, total = compensated.rounded(carry.terms)
    return Report(
      update=votes / jnp.maximum(total, 1),
      weight=weigh(client, metric(carry.loss)),
      metrics={"loss": metric(carry.loss)},
    )

  def apply(
    server: TrieState, aggregate: Aggregate, context: Context
  ) -> TrieState:
    variables, prefixes, level = server.message
    votes = server.votes + aggregate.weight * aggregate.update
    weight = server.weight + aggregate.weight
    shares = votes / jnp.where(weight > 0, weight, 1)

    digits = jnp.arange(base, dtype=jnp.int32)
    longer = prefixes[:, None] * base + digits[None]
    last = jnp.asarray([(domain - 1) // p for p in powers], jnp.int32)[level]
    possible = (prefixes >= 0)[:, None] & (longer <= last)
    possible &= shares > context.hparams["min_share"].astype(shares.dtype)
    scores = jnp.where(possible, shares, -1).reshape(-1)
    best, where = lax.top_k(scores, places)
    found = jnp.where(best >= 0, longer.reshape(-1)[where], -1)

    rounds = server.rounds + 1
    ended = level == len(powers) - 1
    deeper = ~ended & (rounds >= patience)
    params = {"values": found, "shares": jnp.maximum(best, 0)}
    params = jax.tree.map(
      lambda new, old: jnp.where(ended, new.astype(old.dtype), old),
      params,
      variables.params,
    )
    return TrieState(
      message=Message(
        variables._replace(params=params),
        jnp.where(deeper, found, prefixes),
        level + deeper.astype(jnp.int32),
      ),
      votes=jnp.where(deeper, 0, votes).astype(jnp.float32),
      weight=jnp.where(deeper, 0, weight).astype(jnp.float32),
      rounds=jnp.where(deeper, 0, rounds),
    )

  def state_metrics(server: TrieState, hparams: HParams) -> dict[str, Array]:
    params = server.message.variables.params
    found = params["values"] >= 0
    return {
      "hitters/level": server.message.level.astype(jnp.float32),
      "hitters/found": jnp.sum(found, dtype=jnp.float32),
      "hitters/covered": jnp.sum(params["shares"], dtype=jnp.float32),
    }

  return Algorithm(
    init=init,
    broadcast=lambda server: server.message,
    passes=(sum_pass(task, zero, term, lambda c: c.message.variables),),
    finish=finish,
    apply=apply,
    variables=lambda server: server.message.variables,
    with_model=lambda server, variables: server._replace(
      message=server.message._replace(variables=variables)
    ),
    state_metrics=state_metrics,
    hparams={"min_share": least},
  )


def _powers(domain: int, base: int) -> list[int]:
  """Return, level by level, what one of the level's last digit stands for.

  Example:
    >>> _powers(1000, 10)
    [100, 10, 1]
  """
  powers = [1]
  while powers[0] * base < domain:
    powers.insert(0, powers[0] * base)
  return powers
