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
  RANK,
  TIME,
  TOKENS,
  arrays_of,
  begun,
  changed,
  files_of,
  model_of,
  write_model,
)

from fedjax_sim.core.files import write_json
from fedjax_sim.core.weights import write_weights
from fedjax_sim.models.transformer.hugging_face import hugging_face
from fedjax_sim.models.transformer.peft import peft_files
from fedjax_sim.tasks.lora import adapters_of, merged, unadapted, with_lora

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


def check_same(
  torch, model, task, variables, *, case=None, classes=False, padding=0
):
  """Compare the logits of PyTorch's model and of ours."""
  ids = ids_of()
  ids = np.where(ids == 0, padding, np.where(ids == padding, 0, ids))
  real = ids != padding
  with torch.no_grad():
    found = model(
      torch.tensor(ids), attention_mask=torch.tensor(real.astype(int))
    ).logits.numpy()
  x = jnp.asarray(ids, jnp.int32)
  expected = jax.jit(task.logits)(variables, {"x": x})
  classes = classes or (case is not None and CASES[case][1] is CLASSES)
  if not classes:  # what is said at padding counts nowhere
    found, expected = found[real], expected[real]
  np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_a_whole_model(case, tmp_path):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  _, task, adapted = model_of(case)
  whole = merged(changed(adapted))
  write_model(case, whole, tmp_path)
  model = opened(transformers, case, tmp_path)
  check_same(torch, model, task, whole, case=case)


def loaded(peft, model, files, place, merging):
  """Return a model with PEFT's files, which are written to a new folder."""
  place.mkdir()
  write_weights(
    place / "adapter_model.safetensors", files.arrays, {"format": "pt"}
  )
  write_json(place / "adapter_config.json", files.config)
  with warnings.catch_warnings(action="error"):
    warnings.filterwarnings("ignore", "fan_in_fan_out is set to True")
    warnings.filterwarnings("ignore", "(?s).*tie_word_embeddings")
    warnings.filterwarnings("ignore", category=FutureWarning)  # their own
    found = peft.PeftModel.from_pretrained(model, place).eval()
    return found.merge_and_unload() if merging else found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("merging", [False, True])
def test_adapters(case, merging, tmp_path):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  peft = pytest.importorskip("peft")
  _, task, adapted = model_of(case)
  _, _, _, files = files_of(case)
  (tmp_path / "base").mkdir()
  write_model(case, unadapted(begun(adapted)), tmp_path / "base")
  model = opened(transformers, case, tmp_path / "base")
  model = loaded(peft, model, files, tmp_path / "adapters", merging)
  check_same(torch, model, task, merged(changed(adapted)), case=case)


@pytest.mark.parametrize("objective", ["masked", "classification"])
def test_adapters_of_roberta(objective, tmp_path):
  """It begins from a folder alone; its classifier is saved whole."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  peft = pytest.importorskip("peft")
  classes = objective == "classification"
  torch.manual_seed(0)
  name = "SequenceClassification" if classes else "MaskedLM"
  sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12}
  config = transformers.RobertaConfig(
    vocab_size=TOKENS,
    num_hidden_layers=2,
    max_position_embeddings=TIME + 2,
    pad_token_id=1,
    num_labels=3,
    **sizes,
  )
  model = getattr(transformers, f"RobertaFor{name}")(config).eval()
  model.save_pretrained(tmp_path / "base")
  task = hugging_face(
    (TIME,),
    3 if classes else TOKENS,
    str(tmp_path / "base"),
    objective=objective,
    mask_id=TOKENS - 1,
  )
  targets = (".*/(query|outer)/kernel",)
  adapted = with_lora(task, targets, RANK, alpha=3.0, also=("head/",))
  variables = jax.device_get(jax.jit(adapted.init)(jax.random.key(0)))
  variables = variables._replace(params=changed(adapted).params)
  adapters = adapters_of(variables)
  trained = [n for n in variables.params if n not in adapters]
  whole = merged(variables)
  files = peft_files(
    "roberta", adapters, trained, arrays_of(whole), classes=classes
  )
  model = loaded(peft, model, files, tmp_path / "adapters", merging=False)
  check_same(torch, model, task, whole, classes=classes, padding=1)
