"""Models that clients keep: of their own, beside the global one."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from fedjax_sim.core import Array, PyTree, Variables
from fedjax_sim.core.tree import tree_where


class OwnModel(NamedTuple):
  """The model that a client keeps.

  Attributes:
    params: its parameters.
    buffers: its non-trained variables.
    trained: shape=(), bool; whether the client ever took part.
  """

  params: PyTree
  buffers: PyTree
  trained: Array


def first(variables: Variables) -> OwnModel:
  """Return what a client keeps before it takes part: the global model."""
  params, buffers, _ = variables
  return OwnModel(params, buffers, jnp.zeros((), bool))


def kept(params: PyTree, buffers: PyTree) -> OwnModel:
  """Return what a client keeps after it took part."""
  return OwnModel(params, buffers, jnp.ones((), bool))


def in_place(variables: Variables, own: OwnModel) -> Variables:
  """Return the client's model, with what is frozen of the global one."""
  return variables._replace(params=own.params, buffers=own.buffers)


def personal(message: Variables, own: OwnModel) -> Variables:
  """Return the client's model; the global one if it never took part."""
  mine = in_place(message, own)
  return Variables(*tree_where(own.trained, mine, message))
