"""Product quantization: short pieces of an update, each one of a few.

Jegou, Douze & Schmid 2011, "Product quantization for nearest neighbor search"
(IEEE TPAMI 33), as FedLite (Wang et al. 2022, arXiv 2201.11865) codes what
clients send: a vector is cut into pieces, and each is replaced by the nearest
of K centroids, which k-means finds for this very vector, and which are sent
too.

The last step of k-means makes every centroid the mean of its pieces, so that

    ||C(x) - x||^2 = ||x||^2 - sum_k n_k ||centroid_k||^2 <= ||x||^2
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from fedjax_sim.core import Array, HParams, Key, Transform, validate
from fedjax_sim.transforms.flattened import compressor, whole_bytes


def product_quantization(
  centroids: int = 16, piece: int = 4, iterations: int = 5
) -> Transform:
  """Replace pieces of an update by the centroids that k-means finds for them.

  Biased; its error is what k-means leaves. The whole update is one vector,
  filled up with zeros to whole pieces, and has one codebook. k-means begins
  with pieces that are drawn at random.

  `product_quantization/bytes` is the length of a code that decodes: the
  centroids in float32, and for every piece the index of its own in the fewest
  bits that hold one.

  Args:
    centroids: K, 2 to 4096; no hyper-parameter, as it is compiled in.
    piece: entries of a piece; no hyper-parameter either.
    iterations: of Lloyd's algorithm, >= 1.

  Raises:
    TypeError, ValueError: an argument of another kind or out of range.
  """
  centroids = validate.integer("centroids", centroids, ge=2, le=4096)
  piece = validate.integer("piece", piece)
  iterations = validate.integer("iterations", iterations)

  def compress(x: Array, hparams: HParams, key: Key) -> tuple[Array, Array]:
    del hparams
    pieces = jnp.pad(x, (0, -x.size % piece)).reshape(-1, piece)
    first = jax.random.choice(
      key, len(pieces), (centroids,), replace=len(pieces) < centroids
    )

    def step(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
      del i
      means, _ = carry
      # Less |piece|^2, which is the same for all centroids.
      square = jnp.sum(means * means, axis=1)
      own = jnp.argmin(square[None] - 2 * pieces @ means.T, axis=1)
      own = own.astype(jnp.int32)
      sums = jnp.zeros_like(means).at[own].add(pieces)
      count = jnp.zeros(centroids, x.dtype).at[own].add(1)
      new = sums / jnp.maximum(count, 1)[:, None]
      return jnp.where(count[:, None] > 0, new, means), own

    none = jnp.zeros(len(pieces), jnp.int32)
    means, own = lax.fori_loop(0, iterations, step, (pieces[first], none))
    width = (centroids - 1).bit_length()
    count = 4 * means.size + whole_bytes(len(pieces) * width)
    return means[own].ravel()[: x.size], count

  return compressor("product_quantization", {}, compress)
