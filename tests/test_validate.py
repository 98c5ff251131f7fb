"""Every message names the field, the value and what to give instead."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjax_sim.core import validate
from fedjax_sim.core.validate import UnknownNameError


def message(function, *arguments, **options):
  """The class and text of the error."""
  with pytest.raises((TypeError, ValueError)) as caught:
    function(*arguments, **options)
  return type(caught.value), str(caught.value)


# --- numbers ------------------------------------------------------------------


@pytest.mark.parametrize("value", [1, 3, np.int32(2), np.uint8(7), np.int64(9)])
def test_whole_returns_an_int(value):
  out = validate.integer("n", value)
  assert type(out) is int
  assert out == value


@pytest.mark.parametrize(
  ("value", "options", "error", "text"),
  [
    (1.0, {}, TypeError, "n=1.0 is a float; give a whole number."),
    ("1", {}, TypeError, "n='1' is a str; give a whole number."),
    (None, {}, TypeError, "n=None is a NoneType; give a whole number."),
    (True, {}, TypeError, "n=True is a bool; give a whole number."),
    (
      np.float32(2),
      {},
      TypeError,
      "n=np.float32(2.0) is a float32; give a whole number.",
    ),
    (0, {}, ValueError, "n=0 is out of range; give a number >= 1."),
    (np.int64(-3), {}, ValueError, "n=-3 is out of range; give a number >= 1."),
    (
      -1,
      {"ge": 0},
      ValueError,
      "n=-1 is out of range; give a number >= 0.",
    ),
    (
      9,
      {"ge": 2, "le": 8},
      ValueError,
      "n=9 is out of range; give a number from 2 to 8.",
    ),
  ],
)
def test_whole_refuses(value, options, error, text):
  assert message(validate.integer, "n", value, **options) == (error, text)


@given(
  value=st.integers(-5, 5), least=st.integers(-4, 4), most=st.integers(-4, 4)
)
def test_whole_keeps_to_its_bounds(value, least, most):
  if least <= value <= most:
    assert validate.integer("n", value, ge=least, le=most) == value
  else:
    message(validate.integer, "n", value, ge=least, le=most)


@pytest.mark.parametrize("value", [0, 1, 0.5, -2.5, np.float32(0.25), 1e300])
def test_real_returns_a_float(value):
  out = validate.number("x", value)
  assert type(out) is float
  assert out == value


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
  ("value", "options", "error", "text"),
  [
    ("1", {}, TypeError, "x='1' is a str; give a number."),
    (None, {}, TypeError, "x=None is a NoneType; give a number."),
    (True, {}, TypeError, "x=True is a bool; give a number."),
    (1j, {}, TypeError, "x=1j is a complex; give a number."),
    (NAN, {}, ValueError, "x=nan is out of range; give a finite number."),
    (INF, {}, ValueError, "x=inf is out of range; give a finite number."),
    (-INF, {}, ValueError, "x=-inf is out of range; give a finite number."),
    (
      INF,
      {"ge": 0.5},
      ValueError,
      "x=inf is out of range; give a finite number >= 0.5.",
    ),
    (
      -1,
      {"ge": 0},
      ValueError,
      "x=-1.0 is out of range; give a finite number >= 0.",
    ),
    (
      0,
      {"gt": 0},
      ValueError,
      "x=0.0 is out of range; give a finite number > 0.",
    ),
    (
      1.5,
      {"gt": 0, "le": 1},
      ValueError,
      "x=1.5 is out of range; give a finite number > 0 and <= 1.",
    ),
    (
      NAN,
      {"ge": 0, "le": 1},
      ValueError,
      "x=nan is out of range; give a finite number >= 0 and <= 1.",
    ),
    (
      3,
      {"le": 2},
      ValueError,
      "x=3.0 is out of range; give a finite number <= 2.",
    ),
  ],
)
def test_real_refuses(value, options, error, text):
  assert message(validate.number, "x", value, **options) == (error, text)


def test_a_jax_array_is_no_number():
  error, text = message(validate.number, "x", jnp.float32(1))
  assert error is TypeError
  assert text.endswith("give a number.")


# --- names --------------------------------------------------------------------


def test_known_and_lookup_give_what_there_is():
  assert validate.one_of("sort", "b", ["b", "a"]) == "b"
  assert validate.lookup("sort", "b", {"a": 1, "b": 2}) == 2


@pytest.mark.parametrize("function", [validate.one_of, validate.lookup])
def test_an_unknown_name_lists_the_known_ones(function):
  registry = {"yogi": 1, "adam": 2}
  assert message(function, "optimizer", "adm", registry) == (
    UnknownNameError,
    "optimizer='adm' is unknown. Did you mean 'adam'? Known: adam, yogi.",
  )
  assert message(function, "optimizer", "zzz", registry) == (
    UnknownNameError,
    "optimizer='zzz' is unknown. Known: adam, yogi.",
  )
  _, text = message(function, "optimizer", None, registry)
  assert text.startswith("optimizer=None is unknown.")


def takes(needed, /, other, option=1, *, named, last=2):
  """For `validate.arguments`."""


def takes_any(needed, **more):
  """For `validate.arguments`."""


def takes_many(*several, named=1):
  """For `validate.arguments`."""


def test_arguments_that_fit():
  validate.arguments("f", {"needed": 1, "other": 2, "named": 3}, takes)
  validate.arguments("f", {"needed": 1, "anything": 2}, takes_any)
  validate.arguments("f", {"named": 1}, takes_many)
  validate.arguments("f", {}, takes_many)


def test_arguments_refuses_unknown_and_missing_ones():
  given_ = {"needed": 1, "other": 2, "named": 3}
  assert message(validate.arguments, "f", {**given_, "lst": 4}, takes) == (
    UnknownNameError,
    "f does not take 'lst'. Did you mean 'last'?"
    " It takes: last, named, needed, option, other.",
  )
  error, text = message(validate.arguments, "f", {"several": 1}, takes_many)
  assert error is UnknownNameError
  assert text.endswith("It takes: named.")
  for missing in given_:
    rest = {k: v for k, v in given_.items() if k != missing}
    assert message(validate.arguments, "f", rest, takes) == (
      ValueError,
      f"f lacks the argument {missing!r}; give it.",
    )
  assert message(validate.arguments, "f", {"x": 1}, takes_any) == (
    ValueError,
    "f lacks the argument 'needed'; give it.",
  )


def test_a_field_that_is_set_but_not_taken_is_to_be_unset():
  assert validate.not_taken("f", "alpha", ["named"], "data") == (
    "f does not take 'data.alpha'. Unset it, by --config.data.alpha=None."
    " It takes: named."
  )
  text = validate.not_taken("f", "round", ["momentum"], "server", ["rounds"])
  assert "Did you mean 'server.rounds'?" in text


@pytest.mark.parametrize(
  ("value", "what"), [("mean", "a str"), (None, "a NoneType"), (takes, "takes")]
)
def test_instance(value, what):
  validate.instance("aggregator", 1, int, "one()")
  assert message(validate.instance, "aggregator", value, int, "one()") == (
    TypeError,
    f"aggregator is {what}; give for example one().",
  )


# --- cohorts ------------------------------------------------------------------


@pytest.mark.parametrize(
  "ids", [[0, 3, 1], np.array([2, 0], np.uint8), (4,), [], np.array([])]
)
def test_cohort_returns_int64(ids):
  out = validate.cohort(ids, 5)
  assert out.dtype == np.int64
  assert out.tolist() == list(ids)
  several, sizes = validate.cohorts([[1, 2], ids, [2, 1, 0]], 5)
  assert several.dtype == np.int64
  assert several.tolist() == [1, 2, *ids, 2, 1, 0]
  assert sizes.tolist() == [2, len(ids), 3]


@pytest.mark.parametrize(
  ("ids", "error", "text"),
  [
    (
      [0.0, 1.0],
      TypeError,
      "A cohort has shape (2,) and dtype float64; give a list of client ids,"
      " whole numbers in one dimension.",
    ),
    (
      [[0, 1]],
      TypeError,
      "A cohort has shape (1, 2) and dtype int64; give a list of client ids,"
      " whole numbers in one dimension.",
    ),
    (
      3,
      TypeError,
      "A cohort has shape () and dtype int64; give a list of client ids, whole"
      " numbers in one dimension.",
    ),
    (
      [True, False],
      TypeError,
      "A cohort has shape (2,) and dtype bool; give a list of client ids, whole"
      " numbers in one dimension.",
    ),
    ([0, 5], ValueError, "A cohort names client 5; ids go from 0 to 4."),
    ([2, -1], ValueError, "A cohort names client -1; ids go from 0 to 4."),
    (
      [3, 0, 0, 3, 1, 3],
      ValueError,
      "A cohort names client 0 2 times; give every id once.",
    ),
    (
      [4, 1, 4, 4],
      ValueError,
      "A cohort names client 4 3 times; give every id once.",
    ),
  ],
)
def test_cohort_refuses(ids, error, text):
  assert message(validate.cohort, ids, 5) == (error, text)
  assert message(validate.cohorts, [[1, 4], ids], 5) == (error, text)


# --- examples -----------------------------------------------------------------


def test_arrays_counts():
  fields = {"x": np.zeros((3, 2), np.float16), "y": np.zeros(3, np.uint8)}
  assert validate.arrays("train", fields) == 3
  assert validate.arrays("train", {"m": np.zeros((0, 4), bool)}) == 0


@pytest.mark.parametrize(
  ("fields", "error", "text"),
  [
    ({}, ValueError, "train: there is no field; give at least one."),
    (
      {"x": [1, 2]},
      TypeError,
      "train: field 'x' is a list; give a numpy array.",
    ),
    (
      {"x": np.array(["a"])},
      TypeError,
      "train: field 'x' has dtype <U1; give native ints, floats or bools.",
    ),
    (
      {"x": np.array([1j])},
      TypeError,
      "train: field 'x' has dtype complex128; give native ints, floats or"
      " bools.",
    ),
    (
      {"x": np.array([None])},
      TypeError,
      "train: field 'x' has dtype object, which would need unpickling; give"
      " native ints, floats or bools.",
    ),
    (
      {"x": np.array(1.0)},
      ValueError,
      "train: field 'x' is a single number; give one an example.",
    ),
    (
      {"x": np.zeros(3), "y": np.zeros(2)},
      ValueError,
      "train: field 'x' has 3 examples, field 'y' 2; give every field one entry"
      " an example.",
    ),
  ],
)
def test_arrays_refuses(fields, error, text):
  assert message(validate.arrays, "train", fields) == (error, text)


def test_arrays_refuses_another_byte_order():
  swapped = np.zeros(2, np.dtype(np.int32).newbyteorder("S"))
  error, text = message(validate.arrays, "train", {"x": swapped})
  assert error is TypeError
  assert text.endswith("give native ints, floats or bools.")


def test_alike():
  model = {"x": np.zeros((3, 2), np.float32), "y": np.zeros(3, np.int32)}
  fitting = {"y": np.zeros(9, np.int32), "x": np.ones((9, 2), np.float32)}
  validate.same_fields("test", fitting, "train", model)
  refused = lambda examples: message(
    validate.same_fields, "test", examples, "train", model
  )
  assert refused({"x": fitting["x"]}) == (
    ValueError,
    "test has fields ['x'], train ['x', 'y']; give both the same.",
  )
  assert refused({**fitting, "x": np.ones((9, 3), np.float32)}) == (
    ValueError,
    "test: one 'x' is float32 of shape (3,), in train float32 of shape (2,);"
    " give both the same.",
  )
  assert refused({**fitting, "y": np.zeros(9, np.int64)}) == (
    ValueError,
    "test: one 'y' is int64 of shape (), in train int32 of shape (); give both"
    " the same.",
  )
