"""An algorithm around another one: what both leave as it is.

Whoever wraps an algorithm keeps something more on the server, and sends
something more to clients. All functions of the one inside still see what is
theirs alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fedjax_sim.core import Algorithm, Client, Pass, PyTree, Variables


def inside(algorithm: Algorithm, client: Client) -> Client:
  """The client as the algorithm inside knows it.

  Args:
    algorithm: the one inside.
    client: its message has the one of the algorithm as `inner`; it may have
      further passes.
  """
  return client._replace(
    message=client.message.inner,
    num_steps=client.num_steps[: len(algorithm.passes)],
  )


def around(
  algorithm: Algorithm, message: Callable[[Any, PyTree], Any]
) -> Algorithm:
  """The algorithm in a server state and a message around its own.

  `init`, `send` and `apply` are still to be replaced.

  Args:
    algorithm: the one inside; its server state is the field `server` of the
      state around it.
    message: (state around, the algorithm's message) -> the message around it,
      a NamedTuple, with that as its field `inner`.
  """
  personal, on_eval = algorithm.personal, algorithm.on_eval
  replace = algorithm.replace

  def outside(walk: Pass) -> Pass:
    return walk._replace(
      start=lambda client, *carries: walk.start(
        inside(algorithm, client), *carries
      ),
      step=lambda client, *rest: walk.step(inside(algorithm, client), *rest),
    )

  def replaced(state: Any, variables: Variables) -> Any:
    assert replace is not None
    return state._replace(server=replace(state.server, variables))

  def evaluated(state: Any, metrics: Mapping[str, float]) -> Any:
    assert on_eval is not None
    return state._replace(server=on_eval(state.server, metrics))

  def personally(message: Any, own: PyTree) -> Variables:
    assert personal is not None
    return personal(message.inner, own)

  log_weight = algorithm.log_weight
  return algorithm._replace(
    broadcast=lambda state: message(state, algorithm.broadcast(state.server)),
    download=lambda sent, version: sent._replace(
      inner=algorithm.download(sent.inner, version)
    ),
    passes=tuple(outside(walk) for walk in algorithm.passes),
    finish=lambda client, *carries: algorithm.finish(
      inside(algorithm, client), *carries
    ),
    variables=lambda state: algorithm.variables(state.server),
    client_init=lambda state, hparams: algorithm.client_init(
      state.server, hparams
    ),
    told=lambda state, hparams: algorithm.told(state.server, hparams),
    log_weight=log_weight
    and (lambda state, hparams: log_weight(state.server, hparams)),
    personal=personal and personally,
    on_eval=on_eval and evaluated,
    replace=replace and replaced,
  )
