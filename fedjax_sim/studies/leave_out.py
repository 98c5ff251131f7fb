"""What a study leaves out: clients, groups of them, or coalitions.

The field `server.leave_out` takes `clients()`, each client by itself, or
`groups(0:8,8:16)`, each group by itself, besides which nobody is left out once.
These clients and groups are the players of a game, whose worth is a metric; for
Shapley values the coalitions of sampled permutations are trained.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from fedjax_sim.config.build.parts import Parts
from fedjax_sim.config.completion import complete
from fedjax_sim.config.fields import words
from fedjax_sim.config.flags import UsageError
from fedjax_sim.data import FederatedData, client_numbers
from fedjax_sim.studies import shapley
from fedjax_sim.studies.points import text_of
from fedjax_sim.studies.shapley import Coalition

FIELD = "server.leave_out"
NOBODY = "None"  # the text of the point that leaves nobody out
_SHORT = "leave_out"
_CALL = re.compile(r"(clients|groups)\((.*)\)", re.DOTALL)
_MISSPELT = re.compile(r"(\w+)\(")  # another call, or one that does not end
_RANGE = re.compile(r"(\d+):(\d+)")
_QUOTED = re.compile(r"'([^']*)'|\"([^\"]*)\"")


class LeaveOut(NamedTuple):
  """Whom a study leaves out, of `num_clients` clients.

  Attributes:
    players: numbers of the clients of each player, increasing.
    names: what tables and pictures call each.
    num_clients: how many clients there are.
    orders: shape=(permutations, players), int64; None: each player alone is
      left out.
  """

  players: Sequence[tuple[int, ...]]
  names: Sequence[str]
  num_clients: int
  orders: np.ndarray | None

  @property
  def coalitions(self) -> list[Coalition]:
    """The players who take part, run by run; all of them first."""
    everyone = frozenset(range(len(self.players)))
    alone = [everyone - {i} for i in range(len(self.players))]
    if self.orders is None:
      return [everyone, *alone]
    found = dict.fromkeys([everyone, *alone, *shapley.coalitions(self.orders)])
    return [c for c in found if c or not self.empty_is_untrained]

  @property
  def empty_is_untrained(self) -> bool:
    """Whether no client is left where no player takes part."""
    return sum(map(len, self.players)) == self.num_clients

  def point(self, coalition: Coalition) -> str:
    """Return the field's text where the other players are left out."""
    absent = set(range(len(self.players))) - coalition
    numbers = sorted(n for i in absent for n in self.players[i])
    if not numbers:
      return NOBODY
    text = ",".join(map(str, numbers))
    return f"({text})" if numbers[1:] else text

  @property
  def facts(self) -> dict[str, Any] | None:
    """What sets the study apart besides its points, as JSON holds it."""
    if self.orders is None:
      return None
    players = [list(clients) for clients in self.players]
    return {"players": players, "orders": self.orders.tolist()}


def read(
  config: ConfigDict,
  vary: Mapping[str, Any],
  parts: Parts,
  permutations: int | None,
  seed: int,
) -> tuple[ConfigDict, dict[str, Any], LeaveOut | None]:
  """Return config and what to vary, with clients written out.

  Args:
    config: what all runs have in common.
    vary: field -> values, as `study` gets them.
    parts: makes the data set, whose clients they are.
    permutations: sampled for Shapley values; None: none are.
    seed: of those draws.

  Returns:
    The config, which for Shapley values also evaluates the first model, whose
    metric is the worth of no clients; what to vary; and whom the study leaves
    out, None if nobody.

  Raises:
    UsageError: the values are no clients, overlap, or are all clients; or there
      are none for `permutations`.
    TypeError, ValueError: there is no such client, or the config is wrong.
  """
  named = {FIELD if field == _SHORT else field: v for field, v in vary.items()}
  if len(named) < len(vary):
    raise UsageError(f"--vary {FIELD} comes twice; give all values once.")
  if FIELD not in named:
    if permutations is not None:
      raise UsageError(
        "--shapley needs players; give --vary leave_out=clients(), or groups."
      )
    return config, named, None
  values = named[FIELD]
  text = values if isinstance(values, str) else _listed(values)
  train = parts.data(complete(config)).train
  players = _players(text, train)
  orders = None
  if permutations is not None:
    if len(players) < 2:
      raise UsageError(f"--shapley={permutations}: {FIELD} has one player.")
    orders = shapley.permutations(len(players), permutations, seed)
  found = LeaveOut(
    players=players,
    names=[_name(clients, train) for clients in players],
    num_clients=train.num_clients,
    orders=orders,
  )
  named[FIELD] = ",".join(map(found.point, found.coalitions))
  if orders is not None and found.empty_is_untrained:
    config = copy.deepcopy(config)
    config.server.initial_eval = True
  return config, named, found


def _listed(values: Sequence[Any]) -> str:
  """Return a sequence of clients and groups as `groups` has it."""
  texts = [_quoted(v) for v in values if v is not None and v != ()]
  return f"groups({','.join(texts)})"


def _quoted(value: Any) -> str:
  """Return a client or a group as text; names are in quotes."""
  if isinstance(value, list | tuple):
    return f"({','.join(map(_quoted, value))})"
  return repr(value) if isinstance(value, str) else text_of(value)


def _players(text: str, data: FederatedData) -> list[tuple[int, ...]]:
  """Return the clients of each player.

  Args:
    text: "clients(0:48)", "groups(0:8,8:16)", or as between its brackets.
    data: the clients.
  """
  call = _CALL.fullmatch(text.strip())
  kind, inner = call.groups() if call else ("groups", text)
  told = f"--vary {FIELD}={text}"
  if not call and (near := _MISSPELT.match(text.strip())):
    raise UsageError(
      f"{told}: {near[1]}( is nothing to leave out; give clients(), such as"
      " clients(0:3,ann), or groups(), such as groups(0:3,(4,ann)). A name with"
      " brackets is in quotes."
    )
  players: list[tuple[int, ...]]
  if kind == "clients":
    numbers = _numbers(told, inner, data) if inner.strip() else None
    every = range(data.num_clients) if numbers is None else numbers
    players = [(n,) for n in every]
  else:
    items = [word for word in words(inner) if word not in (NOBODY, "()")]
    players = [tuple(sorted(_numbers(told, word, data))) for word in items]
  if not players:
    raise UsageError(f"{told} names no client; give some, such as clients().")
  seen: dict[int, int] = {}
  for i, clients in enumerate(players):
    for n in clients:
      if n in seen:
        groups = kind == "groups" and seen[n] != i
        where = "groups overlap" if groups else "a client comes twice"
        raise UsageError(
          f"{told}: {where}, at {data.client_name(n)!r}; name each client once."
        )
      seen[n] = i
  if data.num_clients == 1:
    raise UsageError(
      f"{told}: there is one client alone, and none would be left to train; a"
      " study of influence needs two."
    )
  if any(len(clients) == data.num_clients for clients in players):
    raise UsageError(
      f"{told} leaves out all {data.num_clients} clients at once, and none is"
      " left to train; give clients(), or smaller groups."
    )
  return players


def _numbers(told: str, text: str, data: FederatedData) -> list[int]:
  """Return the clients of "3", "0:8", "ann" or "(3,7,0:8,ann)"."""
  found: list[int] = []
  for word in words(text):
    if span := _RANGE.fullmatch(word):
      first, end = map(int, span.groups())
      if not first < end <= data.num_clients:
        raise UsageError(
          f"{told}: the range {word} is empty or has no such clients; their"
          f" numbers go from 0 to {data.num_clients - 1}, and a range a:b ends"
          " before b."
        )
      found += range(first, end)
    elif word.isdigit():
      found += client_numbers(f"--vary {FIELD}", data, [int(word)])
    else:
      quoted = _QUOTED.fullmatch(word)
      name = (quoted[1] or quoted[2] or "") if quoted else word
      found += client_numbers(f"--vary {FIELD}", data, name)
  return found


def _name(clients: Sequence[int], data: FederatedData) -> str:
  """Return what a player is called."""
  first, last = clients[0], clients[-1]
  if last == first:
    return data.client_name(first)
  if len(clients) > 3 and last - first + 1 == len(clients):
    return f"{data.client_name(first)} to {data.client_name(last)}"
  return ", ".join(map(data.client_name, clients))
