"""Models, one a file, and their registry.

A model is a function of an example's shape, the number of classes and options
of its own, which returns a `Task`.
"""

from collections.abc import Callable

from fedjax_sim.core import Task
from fedjax_sim.models import (
  char_lstm,
  ecg_cnn,
  femnist_cnn,
  kmeans,
  logistic_regression,
  mlp,
  news_recommender,
  resnet18,
  text_lstm,
  word_gru,
)

MODELS: dict[str, Callable[..., Task]] = {
  "char_lstm": char_lstm.char_lstm,
  "ecg_cnn": ecg_cnn.ecg_cnn,
  "femnist_cnn": femnist_cnn.femnist_cnn,
  "kmeans": kmeans.kmeans,
  "logistic_regression": logistic_regression.logistic_regression,
  "mlp": mlp.mlp,
  "news_recommender": news_recommender.news_recommender,
  "resnet18": resnet18.resnet18,
  "text_lstm": text_lstm.text_lstm,
  "word_gru": word_gru.word_gru,
}
