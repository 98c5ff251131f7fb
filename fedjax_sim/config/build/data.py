"""Build the data set of a config."""

from __future__ import annotations

import inspect
from typing import Any

from ml_collections import ConfigDict

from fedjax_sim.config import components
from fedjax_sim.data import (
  FederatedDataset,
  preprocess,
  with_few_labels,
  with_random_labels,
  with_server_data,
)

AUGMENTATION = ("crop", "crop_fill", "flip")  # of training batches
_PREPROCESSING = (  # of all batches, on the device
  "reshape",
  "lookup",
  "label_lookup",
  "normalize",
  "pad",
  *AUGMENTATION,
)


def build_data(config: ConfigDict) -> FederatedDataset:
  """Return the federated data of a config.

  Args:
    config: complete.
  """
  section = config.data
  slots = components.slots_of("data")
  load = slots[0].factory(section.name)
  arguments: dict[str, Any] = {}
  for slot in slots:
    if slot.key in section:
      arguments |= components.given_fields(config, slot)
  if "seed" in inspect.signature(load).parameters:
    arguments["seed"] = section.seed
  try:
    data: FederatedDataset = load(**arguments)
    if section.server_clients is not None:
      data = with_server_data(data, section.server_clients, section.seed)
    if section.random_label_clients is not None:
      fraction = section.random_label_clients
      data, _ = with_random_labels(data, fraction, section.seed)
    if section.labelled_fraction is not None:
      data = with_few_labels(data, section.labelled_fraction, section.seed)
    return _preprocessed(section, data)
  except (TypeError, ValueError) as error:
    raise type(error)(naming_data(config, error)) from error


def preprocessing(config: ConfigDict) -> dict[str, Any]:
  """Return the fields of `data` that change batches and are set."""
  section = config.data
  return {
    key: section[key]
    for key in _PREPROCESSING
    if section[key] is not None and section[key] is not False
  }


def _preprocessed(
  section: ConfigDict, data: FederatedDataset
) -> FederatedDataset:
  """Return the data, preprocessed as the section's fields say."""
  if section.reshape is not None:
    data = preprocess.with_reshape(data, section.reshape)
  if section.lookup is not None:
    data = preprocess.with_lookup(data, section.lookup, "x")
  if section.label_lookup is not None:
    data = preprocess.with_lookup(data, section.label_lookup, "y")
  if section.normalize is not None:
    if len(section.normalize) != 2:
      raise ValueError(
        f"data.normalize={section.normalize!r}: give two, the mean and the"
        " standard deviation; each a number, or one a channel."
      )
    data = preprocess.with_normalization(data, *section.normalize)
  if section.pad is not None:
    data = preprocess.with_padding(data, section.pad)
  if section.crop is not None:
    fill = {"fill": section.crop_fill} if section.crop_fill is not None else {}
    data = preprocess.with_crop(data, section.crop, **fill)
  elif section.crop_fill is not None:
    raise ValueError(
      f"data.crop_fill={section.crop_fill!r}: nothing is cropped; set"
      " data.crop, or unset it by --config.data.crop_fill=None."
    )
  return preprocess.with_flip(data) if section.flip else data


def naming_data(config: ConfigDict, error: Exception) -> str:
  """Return the error's text; prefix the data set's name if it names nothing."""
  text, path = str(error), config.data.get("path")
  if text.startswith("data.") or (path and str(path) in text):
    return text
  where = f", data.path={path!r}" if path else ""
  return f"data.name={config.data.name!r}{where}: {text}"
