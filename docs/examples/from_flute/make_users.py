"""Make users who draw gestures in the air, as JSON files that FLUTE reads.

python docs/examples/from_flute/make_users.py runs/gestures

An example is what a phone's three accelerometers say in 24 steps, its label one
of six gestures. Each user holds the phone at an angle of their own.
"""

import json
import pathlib
import sys

import numpy as np

STEPS = 24
GESTURES = (
  (1, 0),
  (2, 0),
  (3, 0),
  (0, 1),
  (0, 2),
  (0, 3),
)  # cycles along two of the axes


def user(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
  """Return a user's examples, (n, STEPS, 3), and labels, (n,)."""
  n = int(rng.integers(12, 40))
  labels = rng.integers(0, len(GESTURES), n)
  time = np.linspace(0, 2 * np.pi, STEPS)
  angle = rng.normal(scale=0.3)
  turn = np.array(
    [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
  )
  cycles = np.array(GESTURES)[labels][:, None]  # (n, 1, 2)
  phase = rng.uniform(0, 2 * np.pi, (n, 1, 1))
  moved = np.where(cycles > 0, np.sin(cycles * time[:, None] + phase), 0) @ turn
  still = np.full((n, STEPS, 1), 1.0)  # what pulls downwards
  x = np.concatenate([moved, still], axis=2)
  return x + rng.normal(scale=0.3, size=x.shape), labels


def write(path: pathlib.Path, count: int, seed: int) -> None:
  """Write a file of FLUTE: users, how much each has, examples and labels."""
  rng = np.random.default_rng(seed)
  users = {f"{path.stem} {i}": user(rng) for i in range(count)}
  blob = {
    "users": list(users),
    "num_samples": [len(labels) for _, labels in users.values()],
    "user_data": {u: {"x": x.round(3).tolist()} for u, (x, _) in users.items()},
    "user_data_label": {u: y.tolist() for u, (_, y) in users.items()},
  }
  path.write_text(json.dumps(blob))


def main(folder: pathlib.Path) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  for seed, (name, count) in enumerate(
    (("train", 40), ("val", 8), ("test", 8))
  ):
    write(folder / f"{name}.json", count, seed)


if __name__ == "__main__":
  main(pathlib.Path(*sys.argv[1:]))
