"""FLUTE's experiments: which model and which data each of them is here.

A line a task; whoever adds a model of one changes it here and nowhere else.
"""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

_NONE: Mapping[str, Any] = types.MappingProxyType({})
_RESNET = re.compile(r"resnet(18|34|50|101|152)")
NETWORKS = "resnet18, 34, 50, 101, 152, vgg11, 13, 16 or 19, or vgg11_bn"
_VGG = re.compile(r"vgg(11|13|16|19)(_bn)?")


class FluteTask(NamedTuple):
  """An experiment of FLUTE.

  Attributes:
    name: of its folder in `experiments/`.
    model: fields of `model`, the name included.
    data: fields of `data` where no other data are given: a data set of ours;
      none where there is none.
    prepare: fields of `data` for a store of FLUTE's files.
    keys: key of FLUTE -> the field that it sets; "": it only describes the
      data. A field that ends with "()" holds a tuple, one entry a layer.
    flute: fields that make the model what FLUTE's code has, where that is not
      what is meant.
    meant: fields of a store that FLUTE's code lacks.
    imports: flags of `fedjax-sim data import` for its files; "=FILE" stands for
      one that the YAML file names.
    files: flag of the import -> the file or folder of FLUTE's users, where the
      YAML file names none.
    tokens: whether FLUTE counts words, tokens or characters as its samples.
    layers: of a field with "()".
    buffers: whether the model has running statistics, of batch norm.
    by_type: whether `model_config.model_type` chooses among networks.
    is_own: whether the model is the user's, so that keys of `model_config`
      which FLUTE lacks are its options, and other metrics its metrics.
  """

  name: str
  model: Mapping[str, Any]
  data: Mapping[str, Any] = _NONE
  prepare: Mapping[str, Any] = _NONE
  keys: Mapping[str, str] = _NONE
  flute: Mapping[str, Any] = _NONE
  meant: Mapping[str, Any] = _NONE
  imports: str = "--format=leaf_json"
  files: Mapping[str, str] = _NONE
  tokens: bool = False
  layers: int = 1
  buffers: bool = False
  by_type: bool = False
  is_own: bool = False


def _tff(name: str) -> Mapping[str, str]:
  """Return the names of TensorFlow Federated's two files of a data set."""
  return {split: f"{name}_{split}.h5" for split in ("train", "test")}


_CIFAR = {"data.name": "cifar10"}
_CLASSES = {"num_classes": ""}

TASKS: Mapping[str, FluteTask] = {
  task.name: task
  for task in (
    FluteTask(
      "cv_lr_mnist",
      model={"model.name": "logistic_regression"},
      data={
        "data.name": "mnist_power_law",
        "data.num_clients": 1000,
        "data.heldout_fraction": 0.1,
      },
      flute={"model.init": "uniform", "model.sigmoid": True},
      files={"train": "train", "test": "test"},
    ),
    FluteTask(
      "cv_cnn_femnist",
      model={"model.name": "femnist_cnn"},
      prepare={"data.reshape": (28, 28, 1)},
      imports="--format=tff_hdf5 --fields=x:pixels,y:label --num-classes=62",
      files=_tff("fed_emnist"),
    ),
    FluteTask(
      "cv_resnet_fedcifar100",
      model={
        "model.name": "resnet",
        "model.depth": 18,
        "model.stem": "7x7",
        "model.norm": "batch",
        "model.zero_scale": True,
      },
      meant={  # FLUTE's pixels go from 0 to 255
        "data.normalize": ((129.3, 124.1, 112.4), (68.2, 65.4, 70.4)),
      },
      imports="--format=tff_hdf5 --fields=x:image,y:label --dtypes=y:uint8"
      " --num-classes=100",
      files=_tff("fed_cifar100"),
      buffers=True,
    ),
    FluteTask(
      "nlp_rnn_fedshakespeare",
      model={"model.name": "char_lstm"},
      data={"data.name": "shakespeare", "data.heldout_fraction": 0.2},
      keys={
        "embed_dim": "model.embedding",
        "hidden_dim": "model.units()",
        "vocab_size": "",
      },
      flute={"model.recurrent_bias": True},
      imports="--format=tff_hdf5 --fields=x:snippets --text=tff_characters",
      files=_tff("shakespeare"),
      tokens=True,
      layers=2,
    ),
    FluteTask(
      "classif_cnn",
      model={"model.name": "lenet"},
      data={
        **_CIFAR,
        "data.num_clients": 1000,
        "data.partition": "stored_order",
      },
      keys=_CLASSES,
      imports="--format=flute_hdf5",
    ),
    FluteTask(
      "cv",
      model={
        "model.name": "resnet",
        "model.stem": "7x7",
        "model.norm": "batch",
      },
      data={
        **_CIFAR,
        "data.num_clients": 100,
        "data.partition": "dirichlet",
        "data.alpha": 10.0,  # 1 a class
        "data.min_examples": 10,
        "data.heldout_fraction": 0.2,  # instead of a second drawing
      },
      prepare={"data.pad": (40, 40)},
      keys=_CLASSES,
      by_type=True,
      buffers=True,
    ),
    FluteTask(
      "ecg_cnn",
      model={"model.name": "ecg_attention"},
      data={
        "data.name": "ecg_kaggle",
        "data.num_clients": 1000,
        "data.partition": "stored_order",
      },
      flute={"model.double_softmax": True},
      imports="--format=flute_hdf5",
      buffers=True,
    ),
    FluteTask(
      "nlg_gru",
      model={"model.name": "word_gru"},
      keys={
        "embed_dim": "model.embedding",
        "hidden_dim": "model.units",
        "vocab_size": "",
      },
      imports="--format=leaf_json --text=words --vocabulary=FILE --unmarked"
      " --case-backoff --min-characters=3",
      tokens=True,
    ),
    FluteTask(
      "mlm_bert",
      model={"model.name": "hugging_face", "model.objective": "masked"},
      keys={
        "model_name": "model.folder",
        "mlm_probability": "model.mask_fraction",
        "label_smoothing_factor": "model.label_smoothing",
      },
      imports="--format=leaf_json --text=tokens --tokenizer=FILE",
      tokens=True,
    ),
    FluteTask(
      "fednewsrec",
      model={
        "model.name": "news_recommender",
        "model.news": "mind_news.npz",  # of titles, which the import writes
      },
      imports="--format=mind --news=mind_news.npz",
    ),
    FluteTask(
      "semisupervision",
      model={
        "model.name": "resnet",
        "model.depth": 50,
        "model.stem": "3x3",
        "model.norm": "batch",
      },
      data={"data.name": "cifar100", "data.partition": "dirichlet"},
      keys=_CLASSES,
      imports="--format=npz",
      buffers=True,
    ),
  )
}


def own_task(reference: str) -> FluteTask:
  """Return the task of a model of the user's own.

  Args:
    reference: such as "mine.py:model"; a function as docs/extend.md has it.
  """
  options = ("embed_dim", "hidden_dim")
  return FluteTask(
    reference,
    model={"model.name": reference},
    keys={
      **{name: f"model.{name}" for name in options},
      **dict.fromkeys(("vocab_size", "num_classes"), ""),
    },
    is_own=True,
  )


def network(task: FluteTask, model_type: str) -> dict[str, Any] | None:
  """Return the fields of `model` for a name of torchvision.

  Args:
    task: of which `model_type` chooses the network.
    model_type: such as "resnet50" or "vgg11_bn".

  Returns:
    The fields; None if there is no such network.
  """
  if found := _RESNET.fullmatch(model_type):
    return {**task.model, "model.depth": int(found[1])}
  if found := _VGG.fullmatch(model_type):
    fields = {"model.name": "vgg", "model.depth": int(found[1])}
    return {**fields, **({"model.norm": "batch"} if found[2] else {})}
  return None
