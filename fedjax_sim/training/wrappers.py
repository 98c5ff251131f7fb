"""Wrap an algorithm: change a few of its functions and keep the others.

A wrapper may keep a state of its own on the server, send a message of its own
to clients, let them make further passes over their data, and change what they
report. All other functions of the wrapped algorithm still see only what is
theirs: its server state, its message, its passes and its hyper-parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fedjax_sim.core import (
  Aggregate,
  Algorithm,
  Array,
  Client,
  Context,
  HParams,
  Key,
  Pass,
  PyTree,
  Report,
  Requirements,
  Survey,
  Variables,
)
from fedjax_sim.core.tree import nbytes
from fedjax_sim.core.types import EMPTY

Postprocess = Callable[[Client, Report, Callable[[Report], Report]], Report]


def unwrap_client(
  algorithm: Algorithm, client: Client, *, message: bool = False
) -> Client:
  """Return the client as the wrapped algorithm sees it.

  Args:
    algorithm: the wrapped algorithm, whose passes come first.
    client: as the wrapper sees it.
    message: whether the wrapper has a message of its own, whose field `inner`
      is the algorithm's.
  """
  return client._replace(
    message=client.message.inner if message else client.message,
    num_steps=client.num_steps[: len(algorithm.passes)],
  )


def wrap_algorithm(
  algorithm: Algorithm,
  *,
  init: Callable[[PyTree, Key, HParams], Any] | None = None,
  message: Callable[[Any, PyTree], Any] | None = None,
  check: Callable[[PyTree, HParams], None] | None = None,
  passes: tuple[Pass, ...] = (),
  finish: Callable[..., Report] | None = None,
  postprocess_report: Postprocess | None = None,
  apply: Callable[[Any, Aggregate, Context], Any] | None = None,
  state_metrics: Callable[[Any, HParams], Mapping[str, Array]] | None = None,
  hparams: HParams = EMPTY,
  requirements: Requirements | None = None,
) -> Algorithm:
  """Return the algorithm with some of its functions wrapped.

  Example:
    A server that counts its rounds::

      class Counted(NamedTuple):
        server: PyTree  # the wrapped algorithm's state
        rounds: Array


      def apply(state, aggregate, context):
        server = algorithm.apply(state.server, aggregate, context)
        return Counted(server, state.rounds + 1)


      wrap_algorithm(
        algorithm,
        init=lambda server, key, hparams: Counted(server, jnp.int32(0)),
        apply=apply,
        state_metrics=lambda state, hparams: {"rounds": state.rounds},
      )

  Args:
    algorithm: the algorithm to wrap.
    init: (its server state, key, hparams) -> the wrapper's server state, a
      NamedTuple with the algorithm's as its field `server`. None if the wrapper
      keeps no state.
    message: (wrapper's server state, the algorithm's message) -> the wrapper's
      message, a NamedTuple with the algorithm's as its field `inner`. None if
      the wrapper sends nothing of its own.
    check: (the algorithm's server state, hparams) -> None; called by `init`,
      with shapes at least, to refuse an algorithm that does not fit.
    passes: further passes, after those of the algorithm. They receive the
      client as the wrapper sees it.
    finish: (client, *carries of all passes) -> `Report`; None: as before.
    postprocess_report: (client, report, inner) -> report, where inner(report)
      applies the algorithm's own `postprocess_report`; None for that alone.
    apply: (wrapper's server state, `Aggregate`, `Context`) -> its new server
      state; None for the algorithm's.
    state_metrics: (wrapper's server state, hparams) -> further metrics.
    hparams: further hyper-parameters.
    requirements: what the result needs of other parts; None for what the
      algorithm needs.

  Raises:
    ValueError: the algorithm already has a hyper-parameter of such a name.
  """
  for name in hparams:
    if name in algorithm.hparams:
      raise ValueError(
        f"Algorithm.hparams has a {name!r} already, which a wrapper would"
        " replace; rename it, or wrap the algorithm only once."
      )
  inner_state = (lambda state: state.server) if init else (lambda state: state)

  def unwrap(client: Client) -> Client:
    return unwrap_client(algorithm, client, message=message is not None)

  def wrapped_init(key: Key, hparams: HParams) -> Any:
    server = algorithm.init(key, hparams)
    if check is not None:
      check(server, hparams)
    return server if init is None else init(server, key, hparams)

  def wrapped_finish(client: Client, *carries: PyTree) -> Report:
    own = carries[: len(algorithm.passes)]
    return algorithm.finish(unwrap(client), *own)

  def wrapped_postprocess(client: Client, report: Report) -> Report:
    inner = lambda report: algorithm.postprocess_report(unwrap(client), report)
    if postprocess_report is None:
      return inner(report)
    return postprocess_report(client, report, inner)

  def wrapped_metrics(state: Any, hparams: HParams) -> Mapping[str, Array]:
    shown = algorithm.state_metrics(inner_state(state), hparams)
    more = state_metrics(state, hparams) if state_metrics else EMPTY
    return {**shown, **more}

  result = algorithm._replace(
    init=wrapped_init,
    finish=finish or algorithm.finish,
    apply=apply or algorithm.apply,
    state_metrics=wrapped_metrics,
    hparams={**algorithm.hparams, **hparams},
    requirements=requirements or algorithm.requirements,
  )
  if postprocess_report is not None:
    result = result._replace(postprocess_report=wrapped_postprocess)
  if message is not None or passes:
    result = result._replace(
      passes=(*(_unwrapped(p, unwrap) for p in algorithm.passes), *passes),
      finish=finish or wrapped_finish,
      postprocess_report=wrapped_postprocess,
    )
  if message is not None:
    result = _with_message(result, algorithm)
  if init is not None:
    result = _with_state(result, algorithm)
  if message is not None:
    result = result._replace(
      broadcast=lambda state: message(
        state, algorithm.broadcast(inner_state(state))
      ),
    )
    if algorithm.broadcast_bytes is not None:
      result = result._replace(
        broadcast_bytes=_with_own_bytes(
          algorithm.broadcast_bytes, inner_state, result.broadcast
        )
      )
  return result


def _with_own_bytes(
  inner_bytes: Callable[[PyTree], Array],
  inner_state: Callable[[Any], PyTree],
  broadcast: Callable[[Any], Any],
) -> Callable[[Any], Array]:
  """Return `Algorithm.broadcast_bytes` with what a wrapper's message adds."""

  def broadcast_bytes(state: Any) -> Array:
    message = broadcast(state)
    added = nbytes(message) - nbytes(message.inner)
    return inner_bytes(inner_state(state)) + added

  return broadcast_bytes


def _unwrapped(walk: Pass, unwrap: Callable[[Client], Client]) -> Pass:
  """Return a pass of the wrapped algorithm that takes the wrapper's client."""
  return walk._replace(
    start=lambda client, *carries: walk.start(unwrap(client), *carries),
    step=lambda client, *rest: walk.step(unwrap(client), *rest),
  )


def _with_message(result: Algorithm, algorithm: Algorithm) -> Algorithm:
  """Return `result` whose messages have the algorithm's as field `inner`."""
  personal = algorithm.personal

  def wrapped_personal(message: Any, own: PyTree) -> Variables:
    assert personal is not None
    return personal(message.inner, own)

  return result._replace(
    download=lambda message, version, ident: message._replace(
      inner=algorithm.download(message.inner, version, ident)
    ),
    personal=personal and wrapped_personal,
    survey=algorithm.survey and _wrapped_survey(algorithm.survey),
  )


def _wrapped_survey(survey: Survey) -> Survey:
  """Return a survey whose messages have the algorithm's as field `inner`."""
  unwrap = lambda client: client._replace(message=client.message.inner)

  def message(first: Any, mean: PyTree) -> Any:
    return first._replace(inner=survey.message(first.inner, mean))

  return Survey(
    passes=tuple(_unwrapped(p, unwrap) for p in survey.passes),
    finish=lambda client, *carries: survey.finish(unwrap(client), *carries),
    message=message,
  )


def _with_state(result: Algorithm, algorithm: Algorithm) -> Algorithm:
  """Return `result` whose states have the algorithm's as field `server`."""
  apply, on_eval = algorithm.apply, algorithm.on_eval
  with_model, log_weight = algorithm.with_model, algorithm.log_weight
  broadcast_bytes = algorithm.broadcast_bytes

  def wrapped_apply(state: Any, aggregate: Aggregate, context: Context) -> Any:
    return state._replace(server=apply(state.server, aggregate, context))

  def wrapped_model(state: Any, variables: Variables) -> Any:
    assert with_model is not None
    return state._replace(server=with_model(state.server, variables))

  def wrapped_eval(state: Any, metrics: Mapping[str, float]) -> Any:
    assert on_eval is not None
    return state._replace(server=on_eval(state.server, metrics))

  return result._replace(
    apply=wrapped_apply if result.apply is apply else result.apply,
    broadcast=lambda state: algorithm.broadcast(state.server),
    broadcast_bytes=broadcast_bytes
    and (lambda state: broadcast_bytes(state.server)),
    variables=lambda state: algorithm.variables(state.server),
    other_models=lambda state: algorithm.other_models(state.server),
    client_init=lambda state, hparams: algorithm.client_init(
      state.server, hparams
    ),
    log_weight=log_weight
    and (lambda state, hparams: log_weight(state.server, hparams)),
    on_eval=on_eval and wrapped_eval,
    with_model=with_model and wrapped_model,
  )
