"""Texts of the command line, read as fields."""

import pytest

from fedjax_sim.config.fields import words


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("a, b", ("a", "b")),
    ("(a, b)", ("a", "b")),
    ("(a,)", ("a",)),
    ("", ()),
    ("()", ()),
    ("layers/0/attention/(query|key)", ("layers/0/attention/(query|key)",)),
    ("(layers/0|layers/1)/.*", ("(layers/0|layers/1)/.*",)),
    ("(a|b),(c|d)", ("(a|b)", "(c|d)")),
    ("((a|b), c)", ("(a|b)", "c")),
    ("a{1,2}, [b,c]", ("a{1,2}", "[b,c]")),
    ("layers/(", ("layers/(",)),
    (")a(", (")a(",)),
  ],
)
def test_brackets_stay_together(text, expected):
  assert words(text) == expected
