"""A federated-learning simulator in JAX.

    for state, metrics in simulate(task=..., algorithm=..., data=..., ...):
      print(metrics["round"], metrics["test/accuracy"])
"""

from fedjax_sim.base import Task, Variables
from fedjax_sim.cohort import LocalWork
from fedjax_sim.data import FederatedData, FederatedDataset
from fedjax_sim.distributed import setup
from fedjax_sim.optimizers import optimizer
from fedjax_sim.simulate import Runtime, Simulator
from fedjax_sim.simulate import simulate as simulate_rounds
from fedjax_sim.tasks import function_task, linen_task, nnx_task
