"""Models of Hugging Face folders say what PyTorch's `transformers` says."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim.models.transformer.hugging_face import hugging_face

torch = pytest.importorskip(
  "torch", reason="needs PyTorch: pip install 'fedjax_sim[benchmarks]'"
)
transformers = pytest.importorskip(
  "transformers", reason="needs transformers: pip install transformers"
)

pytestmark = pytest.mark.integration

VOCABULARY, TIME, PADDING = 50, 9, 1
ENCODER: dict[str, Any] = {
  "vocab_size": VOCABULARY,
  "hidden_size": 16,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "intermediate_size": 24,
  "max_position_embeddings": 20,
  "pad_token_id": PADDING,
}
GPT2: dict[str, Any] = {
  "vocab_size": VOCABULARY,
  "n_embd": 16,
  "n_layer": 2,
  "n_head": 4,
  "n_positions": 20,
  "pad_token_id": PADDING,
}
LLAMA = {**ENCODER, "num_key_value_heads": 2}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
  "bert": ("BertForMaskedLM", "BertConfig", ENCODER),
  "bert, untied": (
    *("BertForMaskedLM", "BertConfig"),
    {**ENCODER, "tie_word_embeddings": False, "hidden_act": "relu"},
  ),
  "bert, classes": (
    *("BertForSequenceClassification", "BertConfig"),
    {**ENCODER, "num_labels": 3},
  ),
  "roberta": ("RobertaForMaskedLM", "RobertaConfig", ENCODER),
  "roberta, classes": (
    *("RobertaForSequenceClassification", "RobertaConfig"),
    {**ENCODER, "num_labels": 3},
  ),
  "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
  "gpt2, classes": (
    *("GPT2ForSequenceClassification", "GPT2Config"),
    {**GPT2, "num_labels": 3},
  ),
  "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
  "llama, tied, wide heads": (
    *("LlamaForCausalLM", "LlamaConfig"),
    {
      **LLAMA,
      "tie_word_embeddings": True,
      "head_dim": 6,
      "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
  ),
  "llama, classes": (
    *("LlamaForSequenceClassification", "LlamaConfig"),
    {**LLAMA, "num_labels": 3},
  ),
}


def made(case):
  """Return a PyTorch model whose weights and biases are all random."""
  model, config, options = CASES[case]
  torch.manual_seed(0)
  found = getattr(transformers, model)(
    getattr(transformers, config)(**options)
  ).eval()
  with torch.no_grad():
    for parameter in found.parameters():  # norms and biases, too
      parameter.add_(0.1 * torch.randn_like(parameter))
  return found


def ids_of():
  """Return ids, two of whose rows end with padding."""
  ids = np.random.default_rng(0).integers(2, VOCABULARY, (3, TIME))
  ids[1, 6:] = PADDING
  ids[2, 3:] = PADDING
  return ids


@pytest.mark.parametrize(
  ("case", "sharded"), [*((case, False) for case in CASES), ("llama", True)]
)
def test_logits_are_those_of_pytorch(case, sharded, tmp_path):
  model, ids = made(case), ids_of()
  size = {"max_shard_size": "8KB"} if sharded else {}
  model.save_pretrained(tmp_path, **size)
  assert len(list(tmp_path.glob("*.safetensors"))) > 1 or not sharded
  real = ids != PADDING
  with torch.no_grad():
    expected = model(
      torch.tensor(ids), attention_mask=torch.tensor(real.astype(int))
    ).logits.numpy()
  classes = "classes" in case
  with warnings.catch_warnings(action="error"):
    task = hugging_face(
      (TIME,),
      3 if classes else VOCABULARY,
      str(tmp_path),
      objective="classification" if classes else None,
      mask_id=3,
    )
  variables = jax.jit(task.init)(jax.random.key(0))
  assert task.logits is not None
  found = jax.jit(task.logits)(variables, {"x": jnp.asarray(ids, jnp.int32)})
  assert found.shape == expected.shape
  if not classes:  # what is said at padding differs, and counts nowhere
    found, expected = found[real], expected[real]
  np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("padding", [-1, 0])
def test_roberta_on_data_that_another_id_fills_up(padding, tmp_path):
  """Its positions stay as it was trained, and its mask is the data's."""
  made("roberta").save_pretrained(tmp_path)
  model, ids = made("roberta"), ids_of()
  ids[ids == PADDING] = 0
  real = ids != padding
  with torch.no_grad():  # positions by hand, as its own hang on its padding
    expected = model(
      torch.tensor(ids),
      attention_mask=torch.tensor(real.astype(int)),
      position_ids=torch.tensor(np.cumsum(real, 1) * real + PADDING),
    ).logits.numpy()
  task = hugging_face(
    (TIME,), VOCABULARY, str(tmp_path), mask_id=3, padding_id=padding
  )
  variables = jax.jit(task.init)(jax.random.key(0))
  assert task.logits is not None
  found = jax.jit(task.logits)(variables, {"x": jnp.asarray(ids, jnp.int32)})
  np.testing.assert_allclose(found[real], expected[real], atol=1e-4)
