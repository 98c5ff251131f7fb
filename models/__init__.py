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
  resnet18,
  text_lstm,
)
from fedjax_sim.models.transformer import bert, gpt2, hugging_face, llama

MODELS: dict[str, Callable[..., Task]] = {
  "bert": bert.bert,
  "char_lstm": char_lstm.char_lstm,
  "ecg_cnn": ecg_cnn.ecg_cnn,
  "femnist_cnn": femnist_cnn.femnist_cnn,
  "gpt2": gpt2.gpt2,
  "hugging_face": hugging_face.hugging_face,
  "kmeans": kmeans.kmeans,
  "llama": llama.llama,
  "logistic_regression": logistic_regression.logistic_regression,
  "mlp": mlp.mlp,
  "resnet18": resnet18.resnet18,
  "text_lstm": text_lstm.text_lstm,
}
