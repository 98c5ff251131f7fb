"""A factor for the weight of every client, as a number of the run."""

from __future__ import annotations

from collections.abc import Callable

from fedjax_sim.core import Algorithm, Client, Report
from fedjax_sim.training.wrappers import wrap_algorithm

NAME = "client_weights"  # in the section of the algorithm's numbers


def with_client_weights(algorithm: Algorithm) -> Algorithm:
  """Return the algorithm with a factor for each client's weight.

  The factors are `hparams["algorithm"]["client_weights"]`, an array of
  shape=(num_clients,), float, which whoever calls the round adds to its
  numbers. With ones the round is the algorithm's own.

  Args:
    algorithm: one whose clients report an absolute weight.

  Raises:
    ValueError: it has a number of this name.
  """
  if NAME in algorithm.hparams:
    raise ValueError(
      f"Algorithm.hparams has a {NAME!r} already, which the clients' factors"
      " would replace; rename it."
    )

  def postprocess_report(
    client: Client, report: Report, inner: Callable[[Report], Report]
  ) -> Report:
    report = inner(report)
    factor = client.hparams[NAME][client.id]
    return report._replace(weight=report.weight * factor)

  return wrap_algorithm(algorithm, postprocess_report=postprocess_report)
