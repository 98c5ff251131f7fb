"""synthetic(alpha, beta): linear models and inputs that differ by client.

Li et al. (2020, "Federated optimization in heterogeneous networks", arXiv
1812.06127), section 5.1 and appendix C.1. No files.
"""

from __future__ import annotations

import os

import numpy as np

from fedjax_sim.core import validate
from fedjax_sim.data.dataset import FederatedDataset
from fedjax_sim.data.federated import FederatedData, offsets_of
from fedjax_sim.data.seeding import Stream, generator
from fedjax_sim.data.splits import Clients, make_dataset

FEATURES = 60
CLASSES = 10
LEAST_EXAMPLES = 50


def load_synthetic(
  *,
  path: str | os.PathLike[str] | None = None,
  num_clients: int = 30,
  alpha: float | None = None,
  beta: float | None = None,
  iid: bool = False,
  heldout_fraction: float = 0.2,
  unseen_clients: Clients = 0,
  min_examples: int = 1,
  seed: int = 0,
) -> FederatedDataset:
  """Draw examples whose labels a linear model of the client's own gives.

  Client k has a model W_k (60 x 10), b_k (10) with elements from N(u_k, 1),
  u_k from N(0, alpha); and inputs from N(v_k, diag(j**-1.2)), where elements
  of v_k come from N(B_k, 1), B_k from N(0, beta). A label is the argmax of
  x W_k + b_k. `alpha` and `beta` are standard deviations, as in the authors'
  script; at 0 and 1 they are variances just as well. With `iid` all clients
  share one model, of elements from N(0, 1), and inputs of mean 0.

  Models differ whatever `alpha` is: u_k shifts all logits of an example alike,
  which moves no argmax, so that this definition makes labels (up to rounding)
  the same for every `alpha`. It is here because papers name it.

  Sizes are 50 and lognormal(4, 2), rounded down: 453 on average, with a heavy
  tail; an example takes 244 bytes.

  Fields: x, (60,), float32; y, (), int32.

  Args:
    path: not used; the data is made.
    num_clients: how many clients, unseen ones included.
    alpha: >= 0; None is 1.
    beta: >= 0; None is 1.
    iid: one model and one distribution of inputs for all clients.
    heldout_fraction: the fraction of each training client's examples that is
      held out, for the metrics `seen/...`.
    unseen_clients: clients that never train, for the metrics `unseen/...`: a
      number, a fraction below 1, or names.
    min_examples: clients with fewer are left out.
    seed: of data and splits.

  Raises:
    TypeError, ValueError: an option is out of range, or `alpha` or `beta` is
      given with `iid`.
  """
  del path
  num_clients = validate.integer("data.num_clients", num_clients)
  validate.instance("data.iid", iid, bool, "True")
  for field, value in {"data.alpha": alpha, "data.beta": beta}.items():
    if iid and value is not None:
      raise ValueError(
        f"{field}={value} makes clients differ, data.iid=True alike; unset one"
        " of them."
      )
  alpha = validate.number("data.alpha", 1 if alpha is None else alpha, ge=0)
  beta = validate.number("data.beta", 1 if beta is None else beta, ge=0)
  # Nothing is partitioned: the stream of partitions is free for the data.
  rng = generator(seed, Stream.PARTITION)
  sizes = LEAST_EXAMPLES + rng.lognormal(4, 2, num_clients).astype(np.int64)
  if iid:
    weights, biases = _models(rng, np.zeros(1))
    owner = np.zeros(num_clients, np.int64)
    centres = np.zeros((num_clients, FEATURES))
  else:
    weights, biases = _models(rng, rng.normal(0, alpha, num_clients))
    owner = np.arange(num_clients)
    means = rng.normal(0, beta, num_clients)
    centres = rng.normal(means[:, np.newaxis], 1, (num_clients, FEATURES))
  stddev = np.arange(1, FEATURES + 1) ** -0.6  # variance j**-1.2
  xs, ys = [], []
  for k, size in enumerate(sizes):
    x = rng.normal(centres[k], stddev, (size, FEATURES))
    logits = x @ weights[owner[k]] + biases[owner[k]]
    xs.append(x.astype(np.float32))
    ys.append(logits.argmax(axis=1).astype(np.int32))
  examples = {"x": np.concatenate(xs), "y": np.concatenate(ys)}
  return make_dataset(
    "synthetic",
    FederatedData(examples=examples, offsets=offsets_of(sizes)),
    num_classes=CLASSES,
    heldout_fraction=heldout_fraction,
    unseen_clients=unseen_clients,
    min_examples=min_examples,
    seed=seed,
  )


def _models(
  rng: np.random.Generator, means: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Draw weights (models, 60, 10) and biases (models, 10) around `means`."""
  around = means[:, np.newaxis, np.newaxis]
  weights = rng.normal(around, 1, (len(means), FEATURES, CLASSES))
  biases = rng.normal(means[:, np.newaxis], 1, (len(means), CLASSES))
  return weights, biases
