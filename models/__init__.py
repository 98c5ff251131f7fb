"""Models, one a file, and their registry.

A model is a function of an example's shape, the number of classes and options
of its own, which returns a `Task`.
"""

from collections.abc import Callable

from fedjax_sim.core import Task
from fedjax_sim.models import (
  char_lstm,
  ecg_attention,
  ecg_cnn,
  femnist_cnn,
  gbdt,
  gmm,
  heavy_hitters,
  kmeans,
  lenet,
  logistic_regression,
  mlp,
  news_recommender,
  quantiles,
  resnet,
  text_lstm,
  vgg,
  word_gru,
)
from fedjax_sim.models.transformer import bert, gpt2, hugging_face, llama

MODELS: dict[str, Callable[..., Task]] = {
  "bert": bert.bert,
  "char_lstm": char_lstm.char_lstm,
  "ecg_attention": ecg_attention.ecg_attention,
  "ecg_cnn": ecg_cnn.ecg_cnn,
  "femnist_cnn": femnist_cnn.femnist_cnn,
  "gbdt": gbdt.gbdt,
  "gmm": gmm.gmm,
  "gpt2": gpt2.gpt2,
  "heavy_hitters": heavy_hitters.heavy_hitters,
  "hugging_face": hugging_face.hugging_face,
  "kmeans": kmeans.kmeans,
  "lenet": lenet.lenet,
  "llama": llama.llama,
  "logistic_regression": logistic_regression.logistic_regression,
  "mlp": mlp.mlp,
  "news_recommender": news_recommender.news_recommender,
  "quantiles": quantiles.quantiles,
  "resnet": resnet.resnet,
  "text_lstm": text_lstm.text_lstm,
  "vgg": vgg.vgg,
  "word_gru": word_gru.word_gru,
}
