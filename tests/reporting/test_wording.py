"""Numbers as people read them."""

import math

import numpy as np
import pytest

from fedjax_sim.reporting import formatting


@pytest.mark.parametrize(
  ("value", "text"),
  [
    (10, "10"),
    (np.int32(12345), "12,345"),
    (0.0, "0.000"),
    (0.95, "0.9500"),
    (1.0, "1.000"),
    (np.float32(123.456), "123.5"),
    (12345.6, "12,346"),
    (0.000012, "1.200e-05"),
    (-2.5, "-2.500"),
    (-1e15, "-1.000e+15"),
    (math.nan, "nan"),
    (-math.inf, "-inf"),
  ],
)
def test_number(value, text):
  assert formatting.number(value) == text


@pytest.mark.parametrize(
  ("count", "text"),
  [
    (0, "0 B"),
    (999, "999 B"),
    (1000, "1.000 kB"),
    (999_960, "1.000 MB"),
    (31_234_567, "31.23 MB"),
    (5_500_000_000_000_000, "5,500 TB"),
  ],
)
def test_size(count, text):
  assert formatting.size(count) == text


def test_metrics_of_bytes_are_sizes():
  assert formatting.metric("bytes_down", 2000) == "2.000 kB"
  assert formatting.metric("total/bytes", 2000) == "2.000 kB"
  assert formatting.metric("bytesize", 2000) == "2,000"
