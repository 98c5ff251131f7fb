"""The noise of a round is there once, however many processes share it.

pytest -m slow tests/privacy/test_noise_of_processes.py
"""

import contextlib

import jax
import numpy as np
import pytest
import scipy.stats

from fedjax_sim.config import build, flags
from fedjax_sim.privacy.central.factorization import banded, blt
from fedjax_sim.run.checkpoint import Checkpoints
from test_processes import CONFIG, FIELDS, ROOT, begin, command, finish, launch

pytestmark = pytest.mark.integration

QUIET = FIELDS | {  # nobody moves, so what the model moves by is noise
  "server.rounds": "1",
  "client.learning_rate": "0.0",
  "sampler.name": "cyclic",
  "model.hidden_sizes": "(128,)",
  "privacy.clip_norm": "2.0",
  "privacy.noise_multiplier": "1.5",
  "privacy.delta": "0.001",
  "runtime.peer_timeout": "60",
}
MECHANISMS = {
  "gaussian": ({}, scipy.stats.norm(scale=3.0)),
  "discrete_gaussian": ({}, scipy.stats.norm(scale=3.0)),
  "laplace": ({}, scipy.stats.laplace(scale=3.0)),
  "banded": (
    {"privacy.bands": "1"},
    scipy.stats.norm(scale=3.0 / banded(1, 1).coefficients[0]),
  ),
  "blt": (
    {"privacy.buffers": "1"},
    scipy.stats.norm(scale=3.0 / blt(1, 4, 1).coefficients[0]),
  ),
}


def released(folder, fields):
  """What the server added to its parameters, times the denominator."""
  simulator = build.build(flags.load(str(ROOT / CONFIG), fields)).simulator
  with contextlib.closing(Checkpoints(folder / "checkpoints", keep=3)) as saved:
    restored = saved.restore(simulator.states.host_shapes, pytest.fail)
  assert restored is not None
  assert restored.round == 1
  after, before = (
    np.concatenate(
      [
        np.ravel(x)
        for x in jax.tree.leaves(simulator.algorithm.variables(s.server).params)
      ]
    )
    for s in (restored.state, jax.device_get(simulator.init()))
  )
  numbers = simulator.hparams["algorithm"]["privacy"]
  return (after - before) * numbers["denominator"]


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("name", MECHANISMS)
def test_processes_add_the_noise_once(tmp_path, name, count):
  more, law = MECHANISMS[name]
  fields = QUIET | {"privacy.mechanism": name} | more
  run = (
    begin(command(tmp_path, **fields))
    if count == 1
    else launch(count, tmp_path, **fields)
  )
  code, told = finish(run)
  assert code == 0, told
  noise = released(tmp_path, fields)
  size = len(noise)
  assert size > 9000
  assert abs(noise.mean()) < 4 * law.std() / np.sqrt(size)
  kurtosis = float(law.stats(moments="k"))
  spread = law.var() * np.sqrt((kurtosis + 2) / size)
  assert abs(noise.var() - law.var()) < 4 * spread
  assert scipy.stats.kstest(noise, law.cdf).pvalue > 1e-3
