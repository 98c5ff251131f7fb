"""The numbers that make an encoder or a decoder, and their checks."""

from __future__ import annotations

import dataclasses

from fedjax_sim.core import validate

_MOST_LAYERS = 1000  # each is compiled by itself


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """What encoders and decoders have in common.

  Attributes:
    vocabulary: how many ids there are.
    width: of the vectors that pass from layer to layer.
    layers: how many blocks.
    heads: of queries; divides `width`, unless `head_size` is given.
    key_value_heads: of keys and values; divides `heads`. None: `heads`.
    head_size: entries of a head; None: `width / heads`.
    feed_forward: units of a block's inner layer.
    max_length: of a sequence.
    dropout: rate, in training.
    tied: whether the logits of ids come from the embedding's table.
    epsilon: added to variances.
    activation: of the inner layers, one of `ACTIVATIONS`.
    padding_id: the id of no token; -1: there is none.
    remat_blocks: whether the backward pass computes a block's activations
      anew.
  """

  vocabulary: int
  width: int
  layers: int
  heads: int
  key_value_heads: int | None = None
  head_size: int | None = None
  feed_forward: int
  max_length: int
  dropout: float
  tied: bool
  epsilon: float
  activation: str
  padding_id: int
  remat_blocks: bool = False

  def __post_init__(self) -> None:
    for name in ("vocabulary", "width", "heads", "feed_forward", "max_length"):
      validate.integer(name, getattr(self, name))
    validate.integer("layers", self.layers, le=_MOST_LAYERS)
    validate.number("dropout", self.dropout, ge=0, lt=1)
    validate.integer(
      "padding_id", self.padding_id, ge=-1, le=self.vocabulary - 1
    )
    for name in ("tied", "remat_blocks"):
      validate.boolean(name, getattr(self, name))
    if self.head_size is None and self.width % self.heads:
      raise ValueError(
        f"width={self.width} is not a multiple of heads={self.heads}; change"
        " one."
      )
    if self.key_value_heads is not None:
      validate.integer("key_value_heads", self.key_value_heads)
      if self.heads % self.key_value_heads:
        raise ValueError(
          f"key_value_heads={self.key_value_heads} does not divide"
          f" heads={self.heads}; change one."
        )

  @property
  def size_of_head(self) -> int:
    """Entries of a head."""
    return self.head_size or self.width // self.heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderSizes(Sizes):
  """What makes an encoder.

  Attributes:
    types: kinds of segments whose vectors are added; the first one's always
      is. 0: none.
    positions_after: positions count the tokens that are not padding, from the
      number after this one on, as RoBERTa's do; None: they count all.
  """

  types: int = 0
  positions_after: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderSizes(Sizes):
  """What makes a decoder.

  Attributes:
    rms_norm: whether norms are RMS norms, without mean and bias.
    gated: whether the feed-forward layers are.
    bias: whether linear layers have biases.
    rotary_base: see `rotate`; None: a learned vector a position.
  """

  rms_norm: bool = False
  gated: bool = False
  bias: bool = True
  rotary_base: float | None = None

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.rotary_base is not None:
      validate.number("rotary_base", self.rotary_base, gt=1)
      if self.size_of_head % 2:
        raise ValueError(
          f"width={self.width} over heads={self.heads} gives heads of"
          f" {self.size_of_head} entries, and rotary positions turn pairs; give"
          " an even number."
        )
