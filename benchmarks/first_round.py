"""From the start of a process to its first round, in parts.

`python -m benchmarks.first_round BEGAN SCALE` is a process that
`benchmarks.scaling` starts; BEGAN is when, in seconds of `time.time`.
"""

from __future__ import annotations

import json
import sys
import time


def main() -> None:
  """Print the seconds of every part, as JSON."""
  began, scale = float(sys.argv[1]), sys.argv[2]
  marks = {"python": time.time()}
  import fedjax_sim
  from benchmarks import cases

  marks["imports"] = time.time()
  fedjax_sim.setup()
  case = cases.CASES["lr"]
  if scale == "smoke":
    case = cases.smoke(case)
  data = cases.dataset(case)
  marks["data"] = time.time()
  task = case.model(case.example_shape, case.num_classes)
  simulator = cases.simulator(case, task, data, devices=None, lanes=1)
  state = simulator.init()
  state.round.block_until_ready()
  marks["init"] = time.time()
  planned = simulator.plan(0, 1)
  simulator.compiler.program(*planned.key)
  marks["compile"] = time.time()
  simulator.dispatch(state, planned)
  marks["first round"] = time.time()
  times = [began, *marks.values()]
  parts = {name: times[i + 1] - times[i] for i, name in enumerate(marks)}
  print(json.dumps(parts))


if __name__ == "__main__":
  main()
