"""Layers that are fast where clients train, on every backend.

`docs/performance.md` has the measurements. On a CPU tasks compute convolution
and pooling of any model in this way (`tasks/fast_layers.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from fedjax_sim.tasks.convolution import convolve
from fedjax_sim.tasks.nnx import PROMOTE_DTYPE
from fedjax_sim.tasks.pooling import maximum

Array = jax.Array
Initializer = nnx.initializers.Initializer

LECUN_NORMAL = nnx.initializers.lecun_normal()  # flax's default
ZEROS = nnx.initializers.zeros_init()
ONES = nnx.initializers.ones_init()
# He et al. 2015 (arXiv 1502.01852), by fan out, as torchvision has it.
HE_NORMAL = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


# --- convolution and pooling --------------------------------------------------


def conv(
  features_in: int,
  features_out: int,
  kernel_size: Sequence[int],
  *,
  strides: int = 1,
  padding: str | int = "SAME",
  use_bias: bool = True,
  kernel_init: Initializer = LECUN_NORMAL,
  bias_init: Initializer = ZEROS,
  rngs: nnx.Rngs,
) -> nnx.Conv:
  """Return an `nnx.Conv` that computes as `convolve` does.

  Args:
    features_in: of the input.
    features_out: of the output.
    kernel_size: one a dimension of space.
    strides: in every dimension of space.
    padding: "SAME", "VALID", or how many zeros on either side, as PyTorch pads;
      "SAME" pads the end alone where strides leave an odd number.
    use_bias: whether there is a bias.
    kernel_init: draws the kernel.
    bias_init: draws the bias.
    rngs: random streams.
  """
  return nnx.Conv(
    features_in,
    features_out,
    tuple(kernel_size),
    strides=strides,
    padding=padding,
    use_bias=use_bias,
    conv_general_dilated=convolve,
    kernel_init=kernel_init,
    bias_init=bias_init,
    promote_dtype=cast(Any, _promoted),
    rngs=rngs,
  )


def _promoted(
  arrays: tuple[Array, Array, Array | None], **options: Any
) -> tuple[Array, Array, Array | None]:
  """Promote (inputs, kernel, bias); off the CPU, with a bias an example."""
  inputs, kernel, bias = PROMOTE_DTYPE(arrays, **options)
  if bias is not None and jax.default_backend() != "cpu":
    ones = (1,) * (inputs.ndim - 2)
    bias = _for_each(bias, (len(inputs), *ones, len(bias)))
  return inputs, kernel, bias


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _for_each(bias: Array, shape: tuple[int, ...]) -> Array:
  """Return a bias for each example, whose gradient is summed over them last.

  XLA for GPUs divides the sum over all places of all examples into parts, and
  then neither the sum of the parts nor the parameters' step takes the other in.
  A sum over few examples goes along with the step.
  """
  return jnp.broadcast_to(bias, shape)


@_for_each.defjvp
def _for_each_jvp(
  shape: tuple[int, ...], given: tuple[Array], changes: tuple[Array]
) -> tuple[Array, Array]:
  """Return the biases, and their change; the gradient is the transpose."""
  (bias,), (change,) = given, changes
  wide = change.astype(jnp.promote_types(bias.dtype, jnp.float32))
  # Without a barrier XLA makes one sum of both.
  each = lax.optimization_barrier(jnp.broadcast_to(wide, shape))
  return _for_each(bias, shape), each.astype(bias.dtype)


def max_pool(
  x: Array, size: int = 2, strides: int | None = None, padding: int = 0
) -> Array:
  """Return maxima over windows of `size` in every spatial dimension.

  What does not fill a window is left out.

  Args:
    x: shape=(batch, *space, features).
    size: of the window.
    strides: of the window; None: its size.
    padding: how many places on either side that are never the maximum.
  """
  space = x.ndim - 2
  step = size if strides is None else strides
  sides = [(0, 0), *[(padding, padding)] * space, (0, 0)]
  return maximum(x, (1, *(size,) * space, 1), (1, *(step,) * space, 1), sides)


# --- as PyTorch has them ------------------------------------------------------


def uniform_within(bound: float) -> Initializer:
  """Return an initializer that draws from U(-bound, bound)."""
  return lambda key, shape, dtype=jnp.float32, **_: jax.random.uniform(
    key, tuple(shape), dtype, -bound, bound
  )


def uniform(fan_in: int) -> Initializer:
  """Return PyTorch's default for weights and biases of most of its layers.

  Uniform draws between -1 and 1, divided by the square root of `fan_in`.

  Args:
    fan_in: numbers that one output depends on; for a recurrent layer its units.
  """
  return uniform_within(fan_in**-0.5)


def linear(
  features_in: int,
  features_out: int,
  *,
  use_bias: bool = True,
  rngs: nnx.Rngs,
) -> nnx.Linear:
  """Return an `nnx.Linear` that begins as PyTorch's does; see `uniform`."""
  draw = uniform(features_in)
  return nnx.Linear(
    features_in,
    features_out,
    use_bias=use_bias,
    kernel_init=draw,
    bias_init=draw,
    rngs=rngs,
  )


def batch_norm(
  features: int, *, scale_init: Initializer = ONES, rngs: nnx.Rngs
) -> nnx.BatchNorm:
  """Return batch normalization with PyTorch's constants.

  Ioffe and Szegedy 2015 (arXiv 1502.03167). Every batch moves the running
  statistics by a tenth. The running variance is that of the batch as it is;
  PyTorch multiplies it by n / (n - 1) before.
  """
  return nnx.BatchNorm(
    features, momentum=0.9, epsilon=1e-5, scale_init=scale_init, rngs=rngs
  )


def group_norm(
  features: int, groups: int, *, scale_init: Initializer = ONES, rngs: nnx.Rngs
) -> nnx.GroupNorm:
  """Return group normalization with PyTorch's constants.

  Wu and He 2018 (arXiv 1803.08494).
  """
  return nnx.GroupNorm(
    features,
    num_groups=groups,
    epsilon=1e-5,
    scale_init=scale_init,
    rngs=rngs,
  )


# --- recurrence ---------------------------------------------------------------

# Off the CPU, steps of a sequence in one iteration of the loop over it. Each
# iteration reads and writes its slices by kernels of its own, as short as a
# step's. More take longer to compile.
UNROLL = 8


def _over_time(
  step: Callable[..., tuple[Any, Any]],
  state: Any,
  inputs: Any,
  *,
  reverse: bool = False,
) -> tuple[Any, Any]:
  """Return `lax.scan`, in the form that is fast on the backend."""
  unroll = 1 if jax.default_backend() == "cpu" else UNROLL
  return lax.scan(step, state, inputs, reverse=reverse, unroll=unroll)


def _computed_once(state: tuple[Array, ...]) -> tuple[Array, ...]:
  """Return the state; off the CPU, what follows does not compute it anew.

  Between the products of unrolled steps XLA would do so, for all steps before.
  """
  if jax.default_backend() == "cpu":
    return state
  return lax.optimization_barrier(state)


def lstm(gates: Array, kernel: Array) -> Array:
  """Run an LSTM over whole sequences; return its outputs.

  Args:
    gates: as in `lstm_and_cell`.
    kernel: as in `lstm_and_cell`.

  Returns:
    shape=(time, batch, units), in the gates' dtype.
  """
  return lstm_and_cell(gates, kernel)[0]


@jax.custom_vjp
def lstm_and_cell(gates: Array, kernel: Array) -> tuple[Array, Array]:
  """Run an LSTM over whole sequences, from a zero state.

  Hochreiter and Schmidhuber 1997, with forget gates. What depends on the input
  alone comes as an argument, one product for all steps. The gradient is
  written by hand: all that is elementwise is computed before the loop back,
  and the kernel's gradient is one product after it. So there is reverse mode
  only, `jax.grad` and `jax.vjp`, but no `jax.jvp`.

  Args:
    gates: shape=(time, batch, 4 * units); the inputs' part of the gates i, f,
      g, o, biases included.
    kernel: shape=(units, 4 * units); from the state to the gates. Computed
      in the gates' dtype; its gradient has its own.

  Returns:
    The outputs, shape=(time, batch, units), and the cell's state after the last
    step, shape=(batch, units), in the gates' dtype.
  """
  return _lstm_forward(gates, kernel)[0]


def _opened(tanhs: Array) -> tuple[Array, Array, Array, Array]:
  """Return i, f, g, o from tanh(z / 2), but tanh(z) for g."""
  i, f, g, o = jnp.split(tanhs, 4, axis=-1)
  sigmoid = lambda x: 0.5 * x + 0.5  # one tanh is faster than two functions
  return sigmoid(i), sigmoid(f), g, sigmoid(o)


def _lstm_forward(
  gates: Array, kernel: Array
) -> tuple[tuple[Array, Array], Any]:
  units = kernel.shape[0]
  halves = np.full(4 * units, 0.5)
  halves[2 * units : 3 * units] = 1
  scale = jnp.asarray(halves, gates.dtype)
  scaled = kernel.astype(gates.dtype) * scale[None]

  def step(state: tuple[Array, Array], z: Array) -> tuple[Any, Any]:
    h, c = state
    tanhs = jnp.tanh(z + h @ scaled)
    i, f, g, o = _opened(tanhs)
    new = f * c + i * g
    t = jnp.tanh(new)
    h, new = _computed_once((o * t, new))
    return (h, new), (h, tanhs, c, t)

  zero = jnp.zeros((*gates.shape[1:-1], units), gates.dtype)
  (_, end), (hs, tanhs, cs, ts) = _over_time(
    step, (zero, zero), gates * scale[None, None]
  )
  return (hs, end), (hs, tanhs, cs, ts, kernel)


def _lstm_backward(
  saved: Any, slopes: tuple[Array, Array]
) -> tuple[Array, Array]:
  hs, tanhs, cs, ts, kernel = saved
  dhs, dc_end = slopes
  i, f, g, o = _opened(tanhs)
  # What a gate's z changes in c, and in h beside it; what h takes from c.
  by_c = jnp.concatenate(
    [g * i * (1 - i), cs * f * (1 - f), i * (1 - g * g)], axis=-1
  )
  by_h = ts * o * (1 - o)
  h_by_c = o * (1 - ts * ts)
  back = kernel.astype(dhs.dtype).T

  def step(state: tuple[Array, Array], given: Any) -> tuple[Any, Array]:
    dh, dc = state
    more, by_c, by_h, h_by_c, f = given
    dh = dh + more
    dc = dc + dh * h_by_c
    dz = jnp.concatenate([jnp.tile(dc, 3) * by_c, dh * by_h], axis=-1)
    return (dz @ back, dc * f), dz

  zero = jnp.zeros_like(dc_end)
  factors = (dhs, by_c, by_h, h_by_c, f)
  _, dz = _over_time(step, (zero, dc_end), factors, reverse=True)
  flat = lambda x: x.reshape(-1, x.shape[-1])
  by_kernel = flat(hs[:-1]).T @ flat(dz[1:])
  return dz, by_kernel.astype(kernel.dtype)


lstm_and_cell.defvjp(_lstm_forward, _lstm_backward)


class LSTM(nnx.Module):
  """A layer that reads whole sequences; see `lstm`.

  Args:
    features: of an input at one time.
    units: of the state, and so of an output.
    recurrent_bias: whether there is a second bias, as in PyTorch. It is added
      to the first, so that both move with the same gradient.
    uniform_init: begin as PyTorch does, see `uniform`; else the recurrent
      kernels of the four gates are orthogonal, and biases 0.
    rngs: draws the kernels.
  """

  def __init__(
    self,
    features: int,
    units: int,
    *,
    recurrent_bias: bool = False,
    uniform_init: bool = False,
    rngs: nnx.Rngs,
  ):
    kernel_init, bias_init = LECUN_NORMAL, ZEROS
    if uniform_init:
      kernel_init = bias_init = uniform(units)
    self.inputs = nnx.Linear(
      features,
      4 * units,
      kernel_init=kernel_init,
      bias_init=bias_init,
      rngs=rngs,
    )
    draw = kernel_init if uniform_init else nnx.initializers.orthogonal()
    gates = [draw(rngs.params(), (units, units)) for _ in range(4)]
    self.recurrent = nnx.Param(jnp.concatenate(gates, axis=1))
    self.recurrent_bias: nnx.Param[Array] | None = nnx.data(None)
    if recurrent_bias:
      self.recurrent_bias = nnx.Param(bias_init(rngs.params(), (4 * units,)))

  def __call__(self, x: Array) -> Array:
    """Return outputs, (time, batch, units), of x, (time, batch, features)."""
    return self.read(x)[0]

  def read(self, x: Array) -> tuple[Array, Array]:
    """Return the outputs, and the cell's state at the end, (batch, units)."""
    return lstm_and_cell(self.gates(x), self.recurrent[...])

  @property
  def bias(self) -> Array:
    """The sum of the biases, shape=(4 * units,)."""
    assert self.inputs.bias is not None
    bias: Array = self.inputs.bias[...]
    if self.recurrent_bias is not None:
      bias += self.recurrent_bias[...]
    return bias

  def gates(self, x: Array) -> Array:
    """Return the inputs' part of the gates, (time, batch, 4 * units)."""
    gates = self.inputs(x)
    if self.recurrent_bias is not None:
      gates += self.recurrent_bias[...].astype(gates.dtype)[None, None]
    return gates


@jax.custom_vjp
def gru(gates: Array, kernel: Array, bias: Array) -> Array:
  """Run a GRU over whole sequences, from a zero state.

  Cho et al. 2014 (arXiv 1406.1078), in the form of cuDNN and PyTorch, where the
  reset gate r also scales the bias of the state's part of the candidate n:

      r, z = sigmoid(gates_rz + h kernel_rz)
      n = tanh(gates_n + r (h kernel_n + bias))
      h' = (1 - z) n + z h

  What depends on the input alone comes as an argument, one product for all
  steps, and the gradient is written by hand, as that of `lstm`: reverse mode
  only.

  Args:
    gates: shape=(time, batch, 3 * units); the inputs' part of r, z, n, all
      other biases included.
    kernel: shape=(units, 3 * units); from the state to r, z, n. Computed in
      the gates' dtype; its gradient has its own.
    bias: shape=(units,); see above.

  Returns:
    The states after each step, shape=(time, batch, units), in the gates' dtype.
  """
  return _gru_forward(gates, kernel, bias)[0]


def _gru_forward(gates: Array, kernel: Array, bias: Array) -> tuple[Array, Any]:
  units = kernel.shape[0]
  halves = np.ones(3 * units)
  halves[: 2 * units] = 0.5  # sigmoid(x) = tanh(x / 2) / 2 + 1/2
  scale = jnp.asarray(halves, gates.dtype)
  scaled = kernel.astype(gates.dtype) * scale[None]
  inner = bias.astype(gates.dtype)[None]

  def step(h: Array, given: Array) -> tuple[Array, Any]:
    by_state = h @ scaled
    opened = 0.5 * jnp.tanh(given + by_state)[..., : 2 * units] + 0.5
    r, z = jnp.split(opened, 2, axis=-1)
    q = by_state[..., 2 * units :] + inner
    n = jnp.tanh(given[..., 2 * units :] + r * q)
    new = n + z * (h - n)
    return new, (new, r, z, n, q)

  zero = jnp.zeros((*gates.shape[1:-1], units), gates.dtype)
  _, (hs, r, z, n, q) = _over_time(step, zero, gates * scale[None, None])
  return hs, (hs, r, z, n, q, kernel, bias)


def _gru_backward(saved: Any, dhs: Array) -> tuple[Array, Array, Array]:
  hs, r, z, n, q, kernel, bias = saved
  before = jnp.concatenate([jnp.zeros_like(hs[:1]), hs[:-1]])
  # What h changes in n's sum, and from there in the state's part of r, z, n.
  by_n = (1 - z) * (1 - n * n)
  factors = jnp.concatenate(
    [by_n * q * r * (1 - r), (before - n) * z * (1 - z), by_n * r], axis=-1
  )
  back = kernel.astype(dhs.dtype).T

  def step(dh: Array, given: Any) -> tuple[Array, Array]:
    more, by_state, z = given
    dh = dh + more
    return (jnp.tile(dh, 3) * by_state) @ back + dh * z, dh

  zero = jnp.zeros_like(dhs[0])
  _, dh = _over_time(step, zero, (dhs, factors, z), reverse=True)
  by_state = jnp.tile(dh, 3) * factors
  flat = lambda x: x.reshape(-1, x.shape[-1])
  by_kernel = flat(before).T @ flat(by_state)
  opened, by_q = jnp.split(by_state, [2 * kernel.shape[0]], axis=-1)
  by_bias = flat(by_q).sum(0)
  by_gates = jnp.concatenate([opened, dh * by_n], axis=-1)
  return by_gates, by_kernel.astype(kernel.dtype), by_bias.astype(bias.dtype)


gru.defvjp(_gru_forward, _gru_backward)


class GRU(nnx.Module):
  """A layer that reads whole sequences; see `gru`.

  PyTorch's cell: two biases, all of U(-1/sqrt(units), 1/sqrt(units)) at first.

  Args:
    features: of an input at one time.
    units: of the state, and so of an output.
    rngs: draws the kernels and biases.
  """

  def __init__(self, features: int, units: int, *, rngs: nnx.Rngs):
    draw = uniform(units)
    self.inputs = nnx.Linear(
      features, 3 * units, kernel_init=draw, bias_init=draw, rngs=rngs
    )
    self.recurrent = nnx.Param(draw(rngs.params(), (units, 3 * units)))
    self.recurrent_bias = nnx.Param(draw(rngs.params(), (3 * units,)))

  def __call__(self, x: Array) -> Array:
    """Return states, (time, batch, units), of x, (time, batch, features)."""
    units = self.recurrent.shape[0]
    opened, inner = jnp.split(self.recurrent_bias[...], [2 * units])
    gates = self.inputs(x) + jnp.pad(opened, (0, units))[None, None]
    return gru(gates, self.recurrent[...], inner)
