"""What is exported says in PyTorch, by `transformers` and `peft`, the same.

They are imported by the tests, not here, where a module that is not installed
would count as a skip of the tests that are always run.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapted import (
  CASES,
  CLASSES,
  TIME,
  TOKENS,
  begun,
  changed,
  files_of,
  model_of,
  write_model,
)

from fedjax_sim.core.files import write_json
from fedjax_sim.core.weights import write_weights
from fedjax_sim.tasks.lora import merged, unadapted

pytestmark = pytest.mark.slow

AUTO = {"bert": "AutoModelForMaskedLM"}


def ids_of():
  """Return ids, the last of which are padding in one row."""
  ids = np.random.default_rng(0).integers(1, TOKENS, (3, TIME))
  ids[1, 4:] = 0
  return ids


def opened(transformers, case, folder):
  """Return PyTorch's model of a folder."""
  kind, fields, *_ = CASES[case]
  name = AUTO.get(kind, "AutoModelForCausalLM")
  if fields is CLASSES:
    name = "AutoModelForSequenceClassification"
  return getattr(transformers, name).from_pretrained(folder).eval()


def check_same(torch, case, model, task, variables):
  """Compare the logits of PyTorch's model and of ours."""
  ids = ids_of()
  real = ids != 0
  with torch.no_grad():
    found = model(
      torch.tensor(ids), attention_mask=torch.tensor(real.astype(int))
    ).logits.numpy()
  x = jnp.asarray(ids, jnp.int32)
  expected = jax.jit(task.logits)(variables, {"x": x})
  if CASES[case][1] is not CLASSES:  # what is said at padding counts nowhere
    found, expected = found[real], expected[real]
  np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_a_whole_model(case, tmp_path):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  _, task, adapted = model_of(case)
  whole = merged(changed(adapted))
  write_model(case, whole, tmp_path)
  check_same(torch, case, opened(transformers, case, tmp_path), task, whole)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("merging", [False, True])
def test_adapters(case, merging, tmp_path):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  peft = pytest.importorskip("peft")
  _, task, adapted = model_of(case)
  _, _, _, found = files_of(case)
  base, place = tmp_path / "base", tmp_path / "adapters"
  base.mkdir()
  place.mkdir()
  write_model(case, unadapted(begun(adapted)), base)
  write_weights(
    place / "adapter_model.safetensors", found.arrays, {"format": "pt"}
  )
  write_json(place / "adapter_config.json", found.config)
  model = opened(transformers, case, base)
  with warnings.catch_warnings(action="error"):
    warnings.filterwarnings("ignore", "fan_in_fan_out is set to True")
    warnings.filterwarnings("ignore", "(?s).*tie_word_embeddings")
    warnings.filterwarnings("ignore", category=FutureWarning)  # their own
    model = peft.PeftModel.from_pretrained(model, place).eval()
    if merging:
      model = model.merge_and_unload()
  check_same(torch, case, model, task, merged(changed(adapted)))
