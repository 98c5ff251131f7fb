"""Models, one a file, and their registry.

A model is a function of an example's shape, the number of classes and options
of its own, which returns a `Task`.
"""

from collections.abc import Callable

from fedjax_sim.base import Task
from fedjax_sim.models import logistic_regression, mlp

MODELS: dict[str, Callable[..., Task]] = {
  "logistic_regression": logistic_regression.logistic_regression,
  "mlp": mlp.mlp,
}
