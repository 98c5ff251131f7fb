"""Bytes that devices send, from text as XLA prints it."""

import pytest

from fedjax_sim.engine.hlo_traffic import sent_bytes

IN_LOOP = "%body (x: f32[4]) -> f32[4] {{\n  {}\n}}\n\nENTRY %main (x) {{\n}}\n"
IN_ENTRY = (
  "%body (x: f32[4]) -> f32[4] {{\n}}\n\nENTRY %main (x) {{\n  {}\n}}\n"
)


@pytest.mark.parametrize(
  ("line", "expected"),
  [  # four devices send
    ("%a = f32[10,2]{1,0} all-reduce(%b), channel_id=1", 2 * 3 / 4 * 80),
    ("%a = (f32[10]{0}, bf16[6]{0}) all-reduce(%b, %c)", 2 * 3 / 4 * 52),
    ("%a = f32[] all-reduce-start(%b)", 2 * 3 / 4 * 4),
    ("%a = pred[8]{0} all-gather(%b), dimensions={0}", 3 / 4 * 8),
    ("%a = (f32[2]{0}, f32[8]{0}) all-gather-start(%b)", 3 / 4 * 32),
    ("%a = (s8[3,1]{1,0}, s8[3,1]{1,0}) all-to-all(%b, %c)", 3 / 4 * 6),
    ("%a = f32[5]{0} reduce-scatter(%b)", 3 * 20),
    ("%a = f32[5]{0} collective-permute(%b)", 20),
    ("%a = f32[10]{0} all-reduce-done(%b)", 0),
    ("%a = f32[10]{0} add(%b, %all-reduce.1)", 0),
    ("%a = f32[5]{0} ragged-all-to-all(%b)", None),
    ("%a = f32[5]{0} reduce-scatter-start(%b)", None),
  ],
)
def test_of_each_collective(line, expected):
  assert sent_bytes(IN_LOOP.format(line), 4, 10) == expected
  shared = None if expected is None else expected / 10
  assert sent_bytes(IN_ENTRY.format(line), 4, 10) == pytest.approx(shared)


def test_one_device_sends_nothing():
  line = "%a = f32[10]{0} all-reduce(%b)"
  assert sent_bytes(IN_LOOP.format(line), 1, 1) == 0
