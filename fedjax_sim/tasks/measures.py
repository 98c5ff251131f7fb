"""Metrics that people expect, by name: AUC, F1, top-k, perplexity, R2, ...

A config names them in `model.metrics`; a script gives them to `with_metrics`.
Where a number is no mean over examples, its values go to the host, where it is
computed in float64 of all examples of a client and of all of a set, so that it
is what scikit-learn says of the same outputs. There is none (NaN) of a client
for which it is not defined.

Classes are `y`, whole numbers, and outputs are scores of classes, (batch,
classes), or one logit of the class 1, (batch,) or (batch, 1). Of sequences,
outputs (batch, time, classes), every label counts but 0, which is padding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sim.core import (
  Array,
  Examples,
  Metric,
  PyTree,
  in_float32,
  metric_names,
  validate,
)
from fedjax_sim.tasks.metrics import ExampleMetric, MetricError

F = TypeVar("F", bound=Callable[..., Any])
Values = Mapping[str, np.ndarray]

BINS = 15  # of the calibration error, as Guo et al. have them
_NO_CLASS = -2
MOST_CELLS = 64  # classes of a confusion table


def measure(**attributes: Any) -> Callable[[F], F]:
  """Return a decorator that gives a metric its direction and attributes."""

  def decorate(function: F) -> F:
    known = metric_names.known(function.__name__)
    assert known is not None
    if known.higher_is_better is not None:
      attributes["higher_is_better"] = known.higher_is_better
    for name, value in attributes.items():
      setattr(function, name, value)
    return function

  return decorate


class Classes(NamedTuple):
  """Scores and labels of classes.

  Attributes:
    scores: shape=(batch, classes) or (batch, time, classes), float.
    labels: shape=(batch,) or (batch, time), int32; -1 where none counts, and
      `_NO_CLASS` beyond the two classes that one logit tells apart.
  """

  scores: Array
  labels: Array


def _classes(metric: str, outputs: PyTree, examples: Examples) -> Classes:
  """Return scores and labels.

  Raises:
    MetricError: outputs or labels are not of classes.
  """
  y = _labels(metric, examples)
  if not jnp.issubdtype(y.dtype, jnp.integer):
    raise MetricError(
      f"model.metrics: {metric!r} is of classes, whole numbers, and labels 'y'"
      f" are {y.dtype}; take 'mae' or 'r2' for a regression."
    )
  shape = getattr(outputs, "shape", None)
  labels = y.astype(jnp.int32)
  if shape is not None and y.ndim == 1 and shape in (y.shape, (*y.shape, 1)):
    logit = in_float32(outputs).reshape(y.shape)
    labels = jnp.where(labels > 1, _NO_CLASS, labels)
    return Classes(jnp.stack([jnp.zeros_like(logit), logit], -1), labels)
  fits = shape is not None and shape[:-1] == y.shape and shape[-1] > 1
  if not fits or y.ndim not in (1, 2):
    raise MetricError(
      f"model.metrics: {metric!r} needs a score of each class for every label,"
      f" and the model's outputs are {_shape(outputs)} and labels 'y'"
      f" {y.shape}; leave it out."
    )
  if y.ndim == 2:
    labels = jnp.where(labels == 0, -1, labels)
  return Classes(in_float32(outputs), labels)


def _numbers(
  metric: str, outputs: PyTree, examples: Examples
) -> tuple[Array, Array]:
  """Return predictions and labels of a regression, shape=(batch, numbers).

  Raises:
    MetricError: outputs or labels are not such numbers.
  """
  y = _labels(metric, examples)
  shape = getattr(outputs, "shape", None)
  if shape not in (y.shape, (*y.shape, 1)):
    raise MetricError(
      f"model.metrics: {metric!r} is of a regression, whose outputs are shaped"
      f" as labels 'y', {y.shape}, and the model's are {_shape(outputs)}; take"
      " 'f1_macro' or 'auc' for classes."
    )
  size = len(y)
  flat = lambda x: in_float32(x).reshape(size, -1)
  return flat(outputs), flat(y)


def _labels(metric: str, examples: Examples) -> Array:
  if "y" not in examples:
    raise MetricError(
      f"model.metrics: {metric!r} needs labels 'y', and examples have"
      f" {', '.join(map(repr, examples))}; leave it out, or write one of your"
      " own."
    )
  return examples["y"]


def _shape(outputs: PyTree) -> Any:
  return getattr(outputs, "shape", f"a {type(outputs).__name__}")


# --- of classes ---------------------------------------------------------------


def _predicted(metric: str, outputs: PyTree, examples: Examples) -> PyTree:
  """Return the label and the likeliest class of every example."""
  scores, labels = _classes(metric, outputs, examples)
  predicted = jnp.argmax(scores, axis=-1).astype(jnp.int32)
  return {"label": labels, "predicted": predicted}


def _counted(values: Values, *names: str) -> list[np.ndarray]:
  """Return labels, and further values, of what has a label."""
  labels = values["label"]
  if np.any(labels == _NO_CLASS):
    raise MetricError(
      "model.metrics: the model has one output, which tells the classes 0 and 1"
      " apart, and there are labels 'y' above 1; take 'mae' or 'r2' for a"
      " regression."
    )
  some = labels >= 0
  found = [values[name][some] for name in names]
  return [labels[some].astype(np.int64), *found]


class _Counts(NamedTuple):
  """How often each class is right, is the label, and is predicted."""

  hits: np.ndarray
  labels: np.ndarray
  predicted: np.ndarray


def _counts(values: Values) -> _Counts:
  labels, predicted = _counted(values, "predicted")
  predicted = predicted.astype(np.int64)
  size = 1 + int(max(labels.max(initial=1), predicted.max(initial=1)))
  count = functools.partial(np.bincount, minlength=size)
  hits = count(labels[labels == predicted])
  return _Counts(hits, count(labels), count(predicted))


def _f1_of_one(values: Values) -> float | None:
  hits, labels, predicted = (int(x[1]) for x in _counts(values))
  some = labels + predicted
  return 2 * hits / some if some else None


def _macro(values: Values) -> float | None:
  counts = _counts(values)
  some = counts.labels + counts.predicted
  known = some > 0
  if not known.any():
    return None
  return float(np.mean(2 * counts.hits[known] / some[known]))


def _micro(values: Values) -> float | None:
  counts = _counts(values)
  some = int(counts.labels.sum())
  return float(counts.hits.sum() / some) if some else None


@measure(number=_f1_of_one)
def f1(outputs: PyTree, examples: Examples) -> PyTree:
  """Return F1 of the class 1, of two classes.

  The harmonic mean of precision and recall. There is none where the class 1 is
  neither a label nor predicted.
  """
  classes = _classes("f1", outputs, examples).scores.shape[-1]
  if classes != 2:
    raise MetricError(
      f"model.metrics: 'f1' is of two classes, and the model tells {classes}"
      " apart; take 'f1_macro' or 'f1_micro'."
    )
  return _predicted("f1", outputs, examples)


@measure(number=_macro)
def f1_macro(outputs: PyTree, examples: Examples) -> PyTree:
  """Return the mean F1 of the classes that are a label or predicted."""
  return _predicted("f1_macro", outputs, examples)


@measure(number=_micro)
def f1_micro(outputs: PyTree, examples: Examples) -> PyTree:
  """Return F1 of all classes' counts together, which is the accuracy."""
  return _predicted("f1_micro", outputs, examples)


def _area(values: Values) -> float | None:
  """Return the mean area under the ROC curve; ties count half.

  By ranks: the sum of the positives' is a Mann-Whitney statistic.
  """
  labels, scores = _counted(values, "score")
  if not len(labels):
    return None
  first = 1 if scores.shape[1] == 1 else 0  # two classes have one curve
  positive = labels[:, None] == first + np.arange(scores.shape[1])
  some = positive.sum(axis=0)
  known = (some > 0) & (some < len(labels))
  if not known.any():
    return None
  from scipy import stats  # as long to import as JAX: only where it is needed

  ranks = stats.rankdata(scores[:, known], axis=0)
  some, positive = some[known], positive[:, known]
  above = (ranks * positive).sum(axis=0) - some * (some + 1) / 2
  return float(np.mean(above / (some * (len(labels) - some))))


@measure(number=_area)
def auc(outputs: PyTree, examples: Examples) -> PyTree:
  """Return the area under the ROC curve, of each class against all others.

  It is exact, and ties count half. Of more than two classes the mean over those
  that are the label of some examples, and not of all; there is none without
  such a class.
  """
  scores, labels = _classes("auc", outputs, examples)
  if labels.ndim > 1:
    raise MetricError(
      "model.metrics: 'auc' is of one label an example, and 'y' has"
      f" {labels.shape[1]}; take 'f1_macro' or 'perplexity'."
    )
  if scores.shape[-1] == 2:
    return {"label": labels, "score": scores[:, 1:] - scores[:, :1]}
  return {"label": labels, "score": log_odds(scores)}


def log_odds(scores: Array) -> Array:
  """Return log(p / (1 - p)) of softmax's p, in whose order p is.

  Unlike p, which rounds to 1, it tells the surest predictions apart.

  Args:
    scores: shape=(..., classes), three or more.
  """
  largest = jnp.max(scores, axis=-1, keepdims=True)
  power = jnp.exp(scores - largest)
  first = jax.nn.one_hot(jnp.argmax(scores, -1), scores.shape[-1], dtype=bool)
  but_first = jnp.sum(jnp.where(first, 0, power), axis=-1, keepdims=True)
  others = jnp.where(first, but_first, 1 + but_first - power)
  return scores - largest - jnp.log(others)


def _cells(values: Values) -> tuple[str, ...]:
  classes = range(values["label"].shape[-1])
  return tuple(f"{true}/{said}" for true in classes for said in classes)


def _table(values: Values) -> dict[str, float]:
  size = values["label"].shape[-1]
  flat = (values[k].reshape(-1, size).astype(bool) for k in values)
  label, predicted = (x.argmax(-1)[x.any(-1)] for x in flat)
  counts = np.bincount(label * size + predicted, minlength=size**2)
  return dict(zip(_cells(values), counts.astype(float), strict=True))


@measure(number=_table, names=_cells)
def confusion(outputs: PyTree, examples: Examples) -> PyTree:
  """Count labels by what was predicted: confusion/LABEL/PREDICTED."""
  scores, labels = _classes("confusion", outputs, examples)
  classes = scores.shape[-1]
  if classes > MOST_CELLS:
    raise MetricError(
      f"model.metrics: 'confusion' of {classes:,} classes would be"
      f" {classes**2:,} numbers, and it is of {MOST_CELLS} classes at most;"
      " take 'f1_macro'."
    )
  some = (labels >= 0) & (labels < classes)
  row = lambda x: jax.nn.one_hot(jnp.where(some, x, -1), classes, dtype=bool)
  return {
    "label": row(labels),
    "predicted": row(jnp.argmax(scores, axis=-1)),
  }


def _calibration(values: Values) -> float | None:
  labels, sure, right = _counted(values, "confidence", "right")
  if not len(labels):
    return None
  sure = sure.astype(np.float64)
  edges = np.linspace(0, 1, BINS + 1)[1:-1]
  place = np.searchsorted(edges, sure)  # bins are open below, closed above
  gaps = np.bincount(place, right.astype(np.float64) - sure, BINS)
  return float(np.abs(gaps).sum() / len(labels))


@measure(number=_calibration)
def calibration_error(outputs: PyTree, examples: Examples) -> PyTree:
  """Return the expected calibration error: confidence against accuracy.

  The likeliest class's probability against how often it is right, in 15 bins
  of equal width, weighted by their examples (Guo et al. 2017, "On calibration
  of modern neural networks").
  """
  scores, labels = _classes("calibration_error", outputs, examples)
  return {
    "label": labels,
    "confidence": jnp.max(jax.nn.softmax(scores), axis=-1),
    "right": jnp.argmax(scores, axis=-1) == labels,
  }


def _perplexity(values: Values) -> float | None:
  weight = values["weight"].sum(dtype=np.float64)
  if not weight > 0:
    return None
  mean = values["total"].sum(dtype=np.float64) / weight
  with np.errstate(over="ignore"):
    return float(np.exp(mean))


@measure(number=_perplexity, needs="loss")
def perplexity(outputs: PyTree, examples: Examples, loss: Metric) -> PyTree:
  """Return exp(loss), of the metric `loss`: of tokens, or of examples."""
  shape: tuple[int, ...] = getattr(outputs, "shape", ())
  y = examples.get("y")
  whole = y is None or jnp.issubdtype(y.dtype, jnp.integer)
  if not whole or len(shape) < 2 or shape[-1] < 2:
    raise MetricError(
      "model.metrics: 'perplexity' is of classes or tokens, and the model's"
      f" outputs are {_shape(outputs)}"
      + ("" if y is None else f" and labels 'y' {y.dtype} {y.shape}")
      + "; take 'mae' or 'r2' for a regression."
    )
  return {"total": loss.total, "weight": loss.weight}


def top_k(k: int) -> ExampleMetric:
  """Return how often the label is among the K likeliest: top_5."""
  name = f"top_{k}"

  def hits(outputs: PyTree, examples: Examples) -> Metric:
    scores, labels = _classes(name, outputs, examples)
    classes = scores.shape[-1]
    if k >= classes:
      raise MetricError(
        f"model.metrics: {name!r} of {classes:,} classes is always right; take"
        f" a number below {classes:,}."
      )
    _, best = jax.lax.top_k(scores, k)
    some = labels >= 0
    right = jnp.any(best == labels[..., None], axis=-1) & some
    count = lambda x: in_float32(x).reshape(len(labels), -1).sum(-1)
    return Metric(count(right), count(some))

  hits.__name__ = name
  return measure()(hits)


# --- of regressions -----------------------------------------------------------


@measure()
def mae(outputs: PyTree, examples: Examples) -> Metric:
  """Return the mean absolute error of a regression."""
  predicted, labels = _numbers("mae", outputs, examples)
  total = jnp.sum(jnp.abs(predicted - labels), axis=-1)
  return Metric(total, jnp.full(total.shape, float(labels.shape[-1])))


def _r2(values: Values) -> float | None:
  predicted, labels = (
    values[k].astype(np.float64) for k in ("predicted", "label")
  )
  if len(labels) < 2:
    return None
  left = ((labels - predicted) ** 2).sum(axis=0)
  whole = ((labels - labels.mean(axis=0)) ** 2).sum(axis=0)
  varies = whole > 0
  known = 1 - left / np.where(varies, whole, 1)
  constant = np.where(left == 0, 1.0, 0.0)
  return float(np.mean(np.where(varies, known, constant)))


@measure(number=_r2)
def r2(outputs: PyTree, examples: Examples) -> PyTree:
  """Return R2 of a regression: the share of the variance that it explains.

  The mean over the numbers of a label. Labels that are all the same give 1 if
  they are met, else 0; there is none of one example.
  """
  predicted, labels = _numbers("r2", outputs, examples)
  return {"predicted": predicted, "label": labels}


MEASURES: dict[str, ExampleMetric] = {
  "auc": auc,
  "f1": f1,
  "f1_macro": f1_macro,
  "f1_micro": f1_micro,
  "top_K": top_k,
  "confusion": confusion,
  "perplexity": perplexity,
  "calibration_error": calibration_error,
  "mae": mae,
  "r2": r2,
}


def named_measure(field: str, name: str) -> ExampleMetric:
  """Return a metric by its name.

  Args:
    field: what messages call the name.
    name: of `MEASURES`, with a number for K: "top_5".

  Raises:
    UnknownNameError: there is none of that name.
  """
  if found := metric_names.TOP_K.fullmatch(str(name)):
    return top_k(int(found[1]))
  if name == "top_K":
    name = "top_"  # a number is missing
  function: ExampleMetric = validate.lookup(field, name, MEASURES)
  return function
