"""A federation whose clients send whatever they like: a config, data, a model.

Client k's update is its own vector, times the learning rate. Three in four send
the opposite of what the others do, as far as clipping lets them.
"""

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from fedjax_sim.config import default_config
from fedjax_sim.data import FederatedData, FederatedDataset
from fedjax_sim.sampling import (
  Participation,
  Sampler,
  generator,
  poisson,
  uniform,
)
from fedjax_sim.tasks import function_task

CLIENTS, PARTS = 40, (40, 24)
MAGNITUDES = (1.0, 1e-3, 1e-38, 1e38, 1e4, 1e19, 1e30, 0.3, 8e37, 100.0)
TARGETS = tuple(range(0, CLIENTS, 4))


def clients(seed: int = 0) -> FederatedDataset:
  """Vectors of all magnitudes; from 1 to 12 equal examples."""
  rng = np.random.default_rng(seed)
  sizes = 1 + np.arange(CLIENTS) % 12
  one = rng.normal(size=sum(PARTS))
  one[rng.random(len(one)) < 0.5] = 0
  centres = np.where(np.arange(CLIENTS) % 4 == 0, 1.0, -1.0)[:, None] * one
  centres *= np.repeat(MAGNITUDES, 4)[:CLIENTS, None]
  return FederatedDataset(
    name="adversaries",
    train=FederatedData(
      examples={"x": np.repeat(centres, sizes, axis=0).astype(np.float32)},
      offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
    ),
    num_classes=0,
    example_shape=(sum(PARTS),),
  )


def mover(example_shape, num_classes):
  """The negative gradient of an example is its vector."""

  def loss(params, examples):
    whole = jnp.concatenate([params["one"], params["other"]])
    return -jnp.sum(examples["x"] * whole[None], axis=-1)

  return function_task(
    lambda key: {"one": jnp.zeros(PARTS[0]), "other": jnp.zeros(PARTS[1])},
    loss,
  )


def in_turns(num_clients: int, clients_per_round: int) -> Sampler:
  """Two groups of half of the clients; of whose turn it is, a fixed size."""
  half = num_clients // 2

  def sample(seed, round_):
    drawn = generator(seed, round_).choice(
      half, clients_per_round, replace=False
    )
    return np.sort(2 * drawn + round_ % 2)

  return Sampler(
    sample,
    sizes=(clients_per_round,),
    expected=float(clients_per_round),
    participation=Participation(clients_per_round / half, 2),
  )


def too_often(num_clients: int, clients_per_round: int) -> Sampler:
  """Promises half of the rate that it draws with."""
  made = poisson(num_clients, clients_per_round)
  rate = clients_per_round / num_clients / 2
  return made._replace(participation=Participation(rate, 1, True))


def not_by_itself(num_clients: int, clients_per_round: int) -> Sampler:
  """Promises that a cohort of a fixed size was drawn by itself."""
  made = uniform(num_clients, clients_per_round)
  rate = clients_per_round / num_clients
  return made._replace(participation=Participation(rate, 1, True))


def get_config() -> ConfigDict:
  """A private run of a round or more."""
  config = default_config()
  config.data.name = f"{__file__}:clients"
  config.model.name = f"{__file__}:mover"
  config.client.batch_size = 12
  config.client.learning_rate = 1.0
  config.server.learning_rate = 1.0
  config.runtime.lanes = 2
  return config
