"""Tasks that begin from given values instead of random ones."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sim.core import Key, Task, Variables
from fedjax_sim.tasks.freezing import BUFFERS, FROZEN, matching, named_variables
from fedjax_sim.tasks.lora import A, B

_MOST_NAMED = 5  # names in a message


def with_initial(
  task: Task,
  arrays: Mapping[str, np.ndarray],
  only: Sequence[str] | None = None,
  *,
  source: str = "initial",
) -> Task:
  """Return the task whose variables begin with given values.

  Args:
    task: what is trained.
    arrays: name -> value; names are those of `named_variables`.
    only: patterns, as `with_frozen` takes them, of the names that are looked up
      in `arrays`; all others begin as usual. None looks up all, and buffers
      and what the model itself keeps frozen may be missing.
    source: what messages call the arrays.

  Raises:
    TypeError: `arrays` are something else, such as a file or a tree; or `only`
      is one text.
    ValueError: a pattern is none or matches nothing, or there is none; or an
      array is missing, is not finite, or has another shape or dtype than the
      variable; or there are adapters that the task does not have.

  Warns:
    UserWarning: arrays that nothing looks up, and variables that begin as
      usual since no array has their names.
  """
  _check_arrays(source, arrays)
  if only is not None and ("" in tuple(only) or not only):
    raise ValueError(
      f"model.initial_only={only!r} names nothing; give patterns, such as"
      " ('layers/0/',), or leave it out to take all."
    )
  shapes = jax.eval_shape(task.init, jax.random.key(0))
  like = named_variables(shapes)
  names = list(like)
  wanted = set(names)
  needed = {n for n in names if not n.startswith((BUFFERS, FROZEN))}
  if only is not None:
    hits = matching("model.initial_only", only, like)
    wanted = {n for n, hit in zip(sorted(like), hits, strict=True) if hit}
    needed = wanted
  missing = [n for n in names if n in needed and n not in arrays]
  if missing:
    _refuse_missing(source, missing, [n for n in arrays if n not in like])
  used = [n for n in names if n in wanted and n in arrays]
  for name in used:
    _refuse_other(source, name, arrays[name], like[name])
  missing = [n for n in names if n in wanted and n not in arrays]
  if missing:
    warnings.warn(
      f"{source} lacks {_listed(missing)}; they begin as usual.", stacklevel=2
    )
  unused = [n for n in arrays if n not in used]
  if only is None:
    _refuse_adapters(source, used, unused)
  if unused:
    warnings.warn(
      f"{source} also holds {_listed(unused)}, which nothing takes.",
      stacklevel=2,
    )
  given = {name: np.array(arrays[name]) for name in used}

  def init(key: Key) -> Variables:
    variables = task.init(key)
    leaves, structure = jax.tree.flatten(variables)
    leaves = [
      jnp.asarray(given[name]) if name in given else leaf
      for name, leaf in zip(names, leaves, strict=True)
    ]
    begun: Variables = jax.tree.unflatten(structure, leaves)
    return begun

  return task._replace(init=init)


def _check_arrays(source: str, arrays: Mapping[str, np.ndarray]) -> None:
  """Refuse what is no mapping from names to arrays.

  Raises:
    TypeError: says what to give instead.
  """
  if not isinstance(arrays, Mapping):
    hint = "name -> array, such as read_weights(path).arrays"
    if isinstance(arrays, Variables):
      hint = "named_variables(variables)"
    raise TypeError(f"{source} is a {type(arrays).__name__}; give {hint}.")
  for name, value in arrays.items():
    if isinstance(value, Mapping):
      raise TypeError(
        f"{source}: {name!r} is a {type(value).__name__} of more, as in a tree;"
        " give names joined by slashes, such as 'layers/0/kernel', as"
        " named_variables(variables) has them."
      )
    if not isinstance(value, (np.ndarray, np.generic, jax.Array)):
      raise TypeError(
        f"{source}: {name!r} is a {type(value).__name__}; give an array of the"
        " variable's dtype, such as np.asarray(value, np.float32)."
      )


def _refuse_adapters(
  source: str, used: Sequence[str], unused: Sequence[str]
) -> None:
  """Refuse adapters that nothing takes, where what they change is taken."""
  for name in unused:
    kernel, _, last = name.rpartition("/")
    if last in (A, B) and kernel in used:
      raise ValueError(
        f"{source} holds {name!r}, an adapter of {kernel!r}, which would begin"
        " without it; export the run with --merged, or set adapter.name='lora'"
        " and adapter.targets as it has them."
      )


def _refuse_missing(
  source: str, missing: Sequence[str], others: Sequence[str]
) -> None:
  """Raise the error about missing arrays.

  Args:
    source: what messages call the arrays.
    missing: names that are needed.
    others: names in the source that no variable has.
  """
  near = difflib.get_close_matches(missing[0], others, n=3, cutoff=0.5)
  hint = "its nearest names are" if near else "of other names it holds"
  raise ValueError(
    f"{source} lacks {_listed(missing)}; {hint}"
    f" {_listed(near or others) or 'none'}. Rename its arrays, or name those to"
    " take by model.initial_only."
  )


def _refuse_other(
  source: str, name: str, array: np.ndarray, like: jax.ShapeDtypeStruct
) -> None:
  if array.shape != like.shape:
    raise ValueError(
      f"{source}: {name!r} has shape {array.shape}, and the model's has shape"
      f" {like.shape}; convert it, or leave it out by model.initial_only."
    )
  if array.dtype != like.dtype:
    raise ValueError(
      f"{source}: {name!r} is {array.dtype.name}, and the model's is"
      f" {np.dtype(like.dtype).name}; convert it."
    )
  if jnp.issubdtype(array.dtype, jnp.inexact):
    odd = int(np.size(array) - np.isfinite(array).sum())
    if odd:
      raise ValueError(
        f"{source}: {name!r} holds {odd} numbers that are NaN or infinite; take"
        " the weights of an earlier round, or leave it out by"
        " model.initial_only."
      )


def _listed(names: Sequence[str]) -> str:
  more = len(names) - _MOST_NAMED
  listed = ", ".join(map(repr, names[:_MOST_NAMED]))
  return f"{listed} and {more} more" if more > 0 else listed
