"""Transformers against numpy: attention, positions, causality, padding."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.core import Batch, mean_loss
from fedjax_sim.data import FederatedData, make_dataset
from fedjax_sim.models import MODELS
from fedjax_sim.models.transformer.attention import Attention
from fedjax_sim.models.transformer.embeddings import counted_positions
from fedjax_sim.models.transformer.rotary import rotate
from fedjax_sim.models.transformer.settings import sizes_of
from fedjax_sim.models.transformer.sizes import EncoderSizes
from fedjax_sim.tasks import with_compute_dtype
from fedjax_sim.tasks.freezing import named_variables
from problems import make_simulator, normal, params_of, sgd, train
from tiers import slow_but

VOCABULARY, TIME = 12, 6
TINY = {"width": 8, "layers": 2, "heads": 2, "dropout": 0.0}
KEY = jax.random.key(0)
INIT = nnx.initializers.normal(0.5)


def ids_of(batch=3, seed=0) -> Any:
  """Return ids, none of which is padding."""
  rng = np.random.default_rng(seed)
  return rng.integers(1, VOCABULARY, (batch, TIME)).astype(np.int32)


def jitted(task):
  """Return a task's logits, compiled."""
  assert task.logits is not None
  return jax.jit(task.logits)


def attention_by_hand(layer, x, seen, causal):
  """Softmax of scaled products in float64, head by head."""
  linear = lambda p, y: y @ np.float64(p.kernel[...]) + np.float64(p.bias[...])
  size = layer.head_size
  query, key, value = (
    linear(p, x) for p in (layer.query, layer.key, layer.value)
  )
  heads = query.shape[-1] // size
  shared = heads // (key.shape[-1] // size)
  mixed = np.zeros_like(query)
  for b, h in itertools.product(range(len(x)), range(heads)):
    own = slice(h * size, (h + 1) * size)
    theirs = slice(h // shared * size, (h // shared + 1) * size)
    scores = query[b][:, own] @ key[b][:, theirs].T / np.sqrt(size)
    visible = np.broadcast_to(seen[b][None], scores.shape)
    if causal:
      visible = visible & np.tri(len(scores), dtype=bool)
    weights = np.where(visible, np.exp(scores), 0)
    weights /= weights.sum(1, keepdims=True)
    mixed[b][:, own] = weights @ value[b][:, theirs]
  return linear(layer.output, mixed)


@pytest.mark.parametrize(
  ("heads", "key_value_heads", "causal"),
  [(2, 2, False), (4, 2, True), (4, 1, True)],
)
def test_attention_is_a_softmax_of_products(heads, key_value_heads, causal):
  layer = Attention(
    *(8, heads, key_value_heads, 4),
    bias=True,
    causal=causal,
    rotary_base=None,
    kernel_init=INIT,
    output_init=INIT,
    rngs=nnx.Rngs(0),
  )
  for i, part in enumerate((layer.query, layer.key, layer.value, layer.output)):
    assert part.bias is not None
    part.bias[...] = normal(i, *part.bias.shape).astype(np.float32)
  x = np.asarray(normal(9, 2, TIME, 8), np.float32)
  seen = np.ones((2, TIME), bool)
  seen[1, 4:] = False
  found = jax.jit(lambda x, seen: layer(x, seen))(x, seen)
  expected = attention_by_hand(layer, np.float64(x), seen, causal)
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_rotary_positions_turn_planes():
  """As products with complex numbers of length 1, in float64."""
  size, base = 6, 100.0
  x = np.asarray(normal(1, 2, 5, 3, size), np.float32)
  plane = np.float64(x[..., :3]) + 1j * np.float64(x[..., 3:])
  angle = np.arange(5)[:, None] * base ** (-2 * np.arange(3) / size)
  turned = plane * np.exp(1j * angle)[None, :, None]
  expected = np.concatenate([turned.real, turned.imag], -1)
  np.testing.assert_allclose(rotate(jnp.asarray(x), base), expected, atol=1e-5)
  assert rotate(jnp.asarray(x, jnp.bfloat16), base).dtype == jnp.bfloat16


def test_products_of_rotated_vectors_depend_on_their_distance():
  one, other = (jnp.asarray(normal(i, 1, 1, 1, 8), jnp.float32) for i in (0, 1))
  along = lambda x: rotate(jnp.tile(x, (1, 9, 1, 1)), 50.0)[0, :, 0]
  products = np.asarray(along(one) @ along(other).T)
  for distance in range(-5, 6):
    same = np.diagonal(products, distance)
    np.testing.assert_allclose(same, same[0], atol=1e-5)


DECODERS = [
  ("gpt2", {}),
  ("llama", {"key_value_heads": 1}),
]


@pytest.mark.parametrize(("name", "options"), DECODERS)
def test_a_later_token_changes_no_earlier_logit(name, options):
  task = MODELS[name]((TIME,), VOCABULARY, **TINY, **options)
  variables = jax.jit(task.init)(KEY)
  logits = jitted(task)
  x = ids_of()
  first = logits(variables, {"x": x})
  for at in (1, 4):
    changed = x.copy()
    changed[:, at] = changed[:, at] % (VOCABULARY - 1) + 1
    second = logits(variables, {"x": changed})
    np.testing.assert_array_equal(second[:, :at], first[:, :at])
    assert np.all(np.abs(second[:, at:] - first[:, at:]).max(-1) > 0)


@pytest.mark.parametrize(
  ("name", "options"),
  slow_but(
    [
      ("bert", {"objective": "masked"}),
      ("gpt2", {"objective": "classification"}),
    ],
    [
      *(("bert", {"objective": o}) for o in ("masked", "classification")),
      *(("gpt2", {"objective": o}) for o in ("causal", "classification")),
      ("llama", {"objective": "classification"}),
    ],
  ),
)
def test_padding_does_not_matter(name, options):
  """A text of 4 tokens, by itself and filled up to 6."""
  classes = options["objective"] == "classification"
  more = {"vocabulary": VOCABULARY + 1} if classes else {}
  task = MODELS[name](
    (TIME,), 3 if classes else VOCABULARY, **TINY, **options, **more
  )
  variables = jax.jit(task.init)(KEY)
  x = ids_of()
  x[:, 4:] = 0
  padded, alone = (
    jax.jit(task.metrics)(variables, {"x": held, "y": y})
    for held, y in (
      [(x, np.arange(3)), (x[:, :4], np.arange(3))]
      if classes
      else [(x, x), (x[:, :4], x[:, :4])]
    )
  )
  jax.tree.map(
    lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5),
    padded,
    alone,
  )
  assert padded["loss"].weight.sum() > 0
  logits = jitted(task)
  full, short = (logits(variables, {"x": i}) for i in (x, x[:, :4]))
  full = full if classes else full[:, :4]
  np.testing.assert_allclose(full, short, atol=1e-6)


@pytest.mark.parametrize(("name", "last"), [("bert", False), ("gpt2", True)])
def test_a_class_is_told_by_the_first_or_the_last_token(name, last):
  """Without layers of attention, by that token alone."""
  task = MODELS[name](
    (TIME,),
    *(3,),
    **{**TINY, "layers": 1},
    objective="classification",
    vocabulary=VOCABULARY,
  )
  variables = jax.jit(task.init)(KEY)
  params = jax.tree.map_with_path(
    lambda path, x: jnp.zeros_like(x) if "output" in str(path) else x,
    variables.params,
  )
  logits = jitted(task)
  x = ids_of(1)
  x[:, 4:] = 0
  first = logits(variables._replace(params=params), {"x": x})
  moved = []
  for at in range(4):
    changed = x.copy()
    changed[:, at] = changed[:, at] % (VOCABULARY - 1) + 1
    found = logits(variables._replace(params=params), {"x": changed})
    moved.append(float(np.abs(found - first).max()) > 1e-6)
  assert moved == [not last, False, False, last]


def test_blocks_that_are_computed_anew_give_the_same_gradient():
  x = ids_of()
  batch = Batch({"x": x, "y": x}, jnp.ones(3, bool))

  def gradient(remat):
    options = {**TINY, "dropout": 0.3}
    task = MODELS["gpt2"]((TIME,), VOCABULARY, **options, remat_blocks=remat)
    variables = jax.jit(task.init)(KEY)
    of = lambda params: mean_loss(
      task, variables._replace(params=params), batch, KEY
    )[0]
    grad = jax.grad(of)
    traced = jax.jit(grad).trace(variables.params)
    kept = str(traced.jaxpr).count("remat")
    return traced.lower().compile()(variables.params), kept

  (plain, none), (anew, some) = gradient(False), gradient(True)
  assert none == 0 < some
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), plain, anew
  )


def test_dropout_differs_from_layer_to_layer_and_step_to_step():
  task = MODELS["gpt2"]((TIME,), VOCABULARY, **{**TINY, "dropout": 0.5})
  variables = jax.jit(task.init)(KEY)
  x = ids_of()
  loss = jax.jit(task.loss)
  one, again, other = (
    loss(variables, {"x": x, "y": x}, jax.random.key(i)).value
    for i in (1, 1, 2)
  )
  np.testing.assert_array_equal(one, again)
  assert np.all(one != other)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_losses_in_bfloat16_are_close_and_float32(name):
  task = MODELS[name]((TIME,), VOCABULARY, **TINY)
  low = with_compute_dtype(task, jnp.bfloat16)
  variables = jax.jit(task.init)(KEY)
  examples = {"x": ids_of(), "y": ids_of(seed=1)}
  one, other = (
    jax.jit(t.metrics)(variables, examples)["loss"] for t in (task, low)
  )
  assert other.total.dtype == other.weight.dtype == jnp.float32
  np.testing.assert_allclose(one.total, other.total, rtol=0.02)


@pytest.mark.integration
def test_rounds_compile_once_and_lanes_change_nothing():
  ids = ids_of(8)
  examples = {"x": ids, "y": np.roll(ids, -1, 1)}
  clients = FederatedData.from_assignment(examples, np.arange(8) % 4)
  data = make_dataset("ids", clients, num_classes=VOCABULARY)
  small = {**TINY, "layers": 1, "dropout": 0.2}
  task = MODELS["bert"]((TIME,), VOCABULARY, **small)
  found = []
  for lanes in (1, 2):
    simulator = make_simulator(
      task, fedavg(task, sgd(0.5), sgd(1.0)), data, lanes=lanes
    )
    found.append(params_of(simulator, train(simulator, 3)))
    assert simulator.compilations == 1
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *found)


def test_parameters_have_readable_names():
  task = MODELS["llama"]((TIME,), VOCABULARY, **TINY)
  named = named_variables(jax.eval_shape(task.init, KEY))
  assert len(named) == 3 + 2 * 9
  for name in (
    "embeddings/tokens/embedding",
    "layers/0/attention/query/kernel",
    "layers/1/feed_forward/gate/kernel",
    "norm/scale",
    "head/linear/kernel",
  ):
    assert name in named


@pytest.mark.parametrize(
  ("name", "options", "message"),
  [
    ("bert", {"objective": "causal"}, "objective='causal' is unknown"),
    ("gpt2", {"objective": "masked"}, "objective='masked' is unknown"),
    ("bert", {"width": 9}, "width=9 is not a multiple of heads=2"),
    ("bert", {"layers": 0}, "layers=0 is out of range"),
    ("gpt2", {"dropout": 1.0}, r"dropout=1\.0 is out of range"),
    ("gpt2", {"padding_id": 12}, "padding_id=12 is out of range"),
    ("gpt2", {"tied": 1}, "tied=1 is a int"),
    ("llama", {"heads": 4, "key_value_heads": 3}, "key_value_heads=3 does not"),
    ("llama", {"width": 6}, "gives heads of 3 entries"),
    ("llama", {"rotary_base": 1.0}, r"rotary_base=1\.0 is out of range"),
    ("gpt2", {"max_length": 5}, "max_length=5: examples are 6 ids long"),
    ("gpt2", {"vocabulary": 9}, "vocabulary=9 is less than the 12 ids"),
    ("bert", {"vocabulary": 12}, "vocabulary=12 leaves no id for the mask"),
    ("bert", {"mask_id": 12}, "mask_id=12 is out of range"),
    ("bert", {"special_ids": 3}, "special_ids=3; give ids"),
    ("bert", {"special_ids": (99,)}, "special_ids=99 is out of range"),
    ("bert", {"mask_fraction": 0.0}, r"mask_fraction=0\.0 is out of range"),
    ("gpt2", {"label_smoothing": 1}, r"label_smoothing=1\.0 is out of range"),
    ("gpt2", {"objective": "classification"}, "so set vocabulary"),
  ],
)
def test_what_is_refused(name, options, message):
  with pytest.raises((TypeError, ValueError), match=message):
    MODELS[name]((TIME,), VOCABULARY, **{**TINY, **options})


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_other_examples_are_refused(name):
  with pytest.raises(
    ValueError, match=rf"{name}: an example has shape \(6, 2\)"
  ):
    MODELS[name]((6, 2), VOCABULARY)


@pytest.mark.parametrize(
  ("padding", "expected"),
  [(0, [3, 4, 2, 5, 2]), (1, [2, 3, 4, 5, 6]), (-1, [3, 4, 5, 6, 7])],
)
def test_positions_of_roberta_begin_where_it_was_trained(padding, expected):
  """From `pad_token_id + 1` of its config, whatever fills the data up."""
  config = {
    "model_type": "roberta",
    "vocab_size": 9,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 12,
    "pad_token_id": 2,
  }
  options = {"padding_id": padding, "remat_blocks": False, "dropout": None}
  sizes = sizes_of(config, "config.json", **options)
  assert isinstance(sizes, EncoderSizes)
  assert sizes.max_length == 12 - 3
  ids = jnp.array([[1 if padding == 1 else 5, 6, 0, 7, 0]])
  found = np.broadcast_to(counted_positions(sizes, ids), ids.shape)
  assert found.tolist() == [expected]
