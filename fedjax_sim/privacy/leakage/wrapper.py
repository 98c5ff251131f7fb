"""What a client's update gives away, and who is left out for it.

FLUTE's `privacy_metrics_config` (arXiv 2203.13789): clients measure (see
`measurement.py`), and those that give too much away are left out of the round
(see `limits.py`).
"""

from __future__ import annotations

from fedjax_sim.core import Algorithm, Task, validate
from fedjax_sim.privacy.leakage.limits import limited
from fedjax_sim.privacy.leakage.measurement import measured


def leakage(
  algorithm: Algorithm,
  task: Task,
  *,
  statistic: str = "max",
  threshold: float | None = None,
  quantile: float | None = None,
  embedding: str | None = None,
  word_threshold: float | None = None,
) -> Algorithm:
  """Return the algorithm whose clients measure what their updates give away.

  `measured` says what is measured. Clients beyond a threshold are left out, as
  `limited` does it; FLUTE counts them, but adds their updates all the same.

  Args:
    algorithm: as `measured` takes it.
    task: what clients train; see `log_ratio`.
    statistic: of a client's examples: `max` or `mean`.
    threshold: a client with more leakage is left out; None: nobody is.
    quantile: after each round the threshold becomes this quantile of the
      leakages of the round's clients, those left out included; 0 to 1.
    embedding: as `measured` takes it.
    word_threshold: a client with more `words_recovered` is left out, 0 to 1.

  Raises:
    TypeError, ValueError: an argument is out of range or lacks another one, or
      an algorithm that this does not fit.
  """
  real = lambda name, value, most: validate.number(
    f"{name}", value, ge=0, le=most
  )
  thresholds, quantiles = {}, {}
  if threshold is not None:
    thresholds["leakage"] = real("threshold", threshold, float("inf"))
  if quantile is not None:
    quantiles["leakage"] = real("quantile", quantile, 1)
    if threshold is None:
      raise ValueError(
        f"quantile={quantile} needs a threshold for the first round;"
        " set threshold."
      )
  if word_threshold is not None:
    thresholds["words_recovered"] = real("word_threshold", word_threshold, 1)
    if embedding is None:
      raise ValueError(
        f"word_threshold={word_threshold} needs words; set embedding."
      )
  made = measured(algorithm, task, statistic, embedding)
  return limited(made, thresholds, quantiles) if thresholds else made
