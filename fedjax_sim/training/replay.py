"""Server replay: after each round the server trains on examples of its own.

FLUTE's `server_replay_config`: rehearsal, so that the model does not forget
what the server's examples teach, or learns it in the first place.
"""

from __future__ import annotations

import jax
from jax import lax

from fedjax_sim import core
from fedjax_sim.core import (
  Aggregate,
  Algorithm,
  Array,
  Context,
  Metric,
  PyTree,
  Task,
  validate,
)
from fedjax_sim.engine.client_loop import random_batch
from fedjax_sim.training import optimizers
from fedjax_sim.training.optimizers import Optimizer, descend
from fedjax_sim.training.seal import check_open
from fedjax_sim.training.wrappers import wrap_algorithm


def replay(
  algorithm: Algorithm,
  task: Task,
  optimizer: Optimizer,
  *,
  steps: int = 1,
  batch_size: int = 32,
) -> Algorithm:
  """Return the algorithm with steps on the server's examples after each round.

  Needs `Context.server_data`.

  Args:
    algorithm: whose global model goes on training.
    task: what is trained.
    optimizer: of the server's steps; begins anew in every round.
    steps: how many in a round.
    batch_size: examples of a step, drawn without replacement; if there are no
      more, all of them.

  Raises:
    TypeError, ValueError: a number is not whole or < 1, or an algorithm whose
      model cannot be replaced, that has several, or is private already.
  """
  validate.integer("replay.steps", steps)
  validate.integer("replay.batch_size", batch_size)
  optimizers.check("optimizer", optimizer)
  check_open(algorithm, "replay")
  with_model = algorithm.with_model
  if with_model is None:
    raise ValueError(
      f"replay.steps={steps}: algorithm.name has no global model that can be"
      " replaced; leave replay out, or give the algorithm a `with_model`."
    )

  if algorithm.requirements.groups > 1 or algorithm.links != 1:
    raise ValueError(
      f"replay.steps={steps}: the server trains the one global model, and with"
      " algorithm.name clients have several, which that would replace; leave"
      " replay out, or take another algorithm."
    )

  def apply(server: PyTree, aggregate: Aggregate, context: Context) -> PyTree:
    server = algorithm.apply(server, aggregate, context)
    examples = context.server_data
    assert examples is not None
    build = optimizer.build(context.hparams["replay"])
    params, buffers, frozen = algorithm.variables(server)
    replay_key = jax.random.fold_in(context.key, 0x7265706C)

    def step(
      i: Array, carry: tuple[PyTree, PyTree, PyTree]
    ) -> tuple[PyTree, PyTree, PyTree]:
      params, buffers, state = carry
      chosen, own = jax.random.split(jax.random.fold_in(replay_key, i))
      batch = random_batch(examples, batch_size, chosen)

      def loss(params: PyTree) -> tuple[Array, tuple[PyTree, Metric]]:
        variables = core.Variables(params, buffers, frozen)
        return core.mean_loss(task, variables, batch, own)

      gradient, (buffers, _) = jax.grad(loss, has_aux=True)(params)
      params, state = descend(build, gradient, state, params)
      return params, buffers, state

    params, buffers, _ = lax.fori_loop(
      0, steps, step, (params, buffers, build.init(params))
    )
    return with_model(server, core.Variables(params, buffers, frozen))

  return wrap_algorithm(
    algorithm,
    apply=apply,
    hparams={"replay": optimizer.hparams},
    requirements=algorithm.requirements._replace(server_data=True),
  )
