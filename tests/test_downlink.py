"""What the server sends, compressed: recursions, bytes, and what is refused."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim import aggregators, transforms
from fedjax_sim.algorithms.centralized import centralized
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.algorithms.fedbuff import fedbuff
from fedjax_sim.algorithms.gossip import gossip
from fedjax_sim.algorithms.mime import mime
from fedjax_sim.config import build, complete, flags, resolved
from fedjax_sim.config.build.parts import program_of
from fedjax_sim.config.nondefault import changes, config_file
from fedjax_sim.core import Transform, TransformResult, Variables
from fedjax_sim.engine.batching import LocalBatching
from fedjax_sim.privacy.central import CentralDPConfig, with_central_dp
from fedjax_sim.training.optimizers import optimizer
from fedjax_sim.transforms import downlink, error_feedback, top_k
from problems import (
  MODELS,
  blobs,
  flat,
  make_simulator,
  params_of,
  quadratic,
  quadratic_data,
  sgd,
  train,
)
from tiers import slow_but

NOISE = CentralDPConfig(clip_norm=1.0, noise_multiplier=1.0, denominator=3.0)
DIGITS = str(pathlib.Path(__file__).parents[1] / "configs" / "digits_fedavg.py")


def identity():
  apply = lambda update, shared, state, hparams, key: TransformResult(
    update, state
  )
  return Transform(name="identity", hparams={}, apply=apply)


def movers(centres, chain, rate=0.5, **more):
  """A client's update is `rate` times its centre minus what it received."""
  centres = np.asarray(centres)
  task = quadratic(centres.shape[1])
  algorithm = fedavg(task, sgd(rate), sgd(1.0), weighting="uniform")
  return make_simulator(
    task,
    downlink(algorithm, chain) if chain else algorithm,
    quadratic_data(centres),
    batching=LocalBatching(batch_size=1),
    **more,
  )


def top_of(x, count):
  out = np.zeros_like(x)
  kept = np.argsort(-np.abs(x), kind="stable")[:count]
  out[kept] = x[kept]
  return out


@pytest.mark.parametrize(
  ("lanes", "devices"), slow_but([(2, 1)], [(1, 1), (2, 1), (1, 2)])
)
def test_a_run_follows_the_recursion(lanes, devices):
  centres = np.random.default_rng(0).normal(size=(4, 10))
  simulator = movers(
    centres, [top_k(0.2)], clients_per_round=2, lanes=lanes, devices=devices
  )
  state, w, known = simulator.init(), np.zeros(10), np.zeros(10)
  for round_ in range(5):
    planned = simulator.plan(round_, 1)
    out = simulator.dispatch(state, planned)
    state, (row,) = out.state, out.rows
    ids = planned.cohorts.client
    w = w + 0.5 * (centres[ids[ids >= 0]].mean(axis=0) - known)
    known = known + top_of(w - known, 2)
    np.testing.assert_allclose(params_of(simulator, state)["w"], w, atol=1e-6)
    np.testing.assert_allclose(state.server.known[0], known, atol=1e-6)
    # The first message whole; then two numbers and two indices of four bits.
    each = 40 if round_ == 0 else 2 * 4 + 1
    assert row["downlink/bytes"] == each
    assert row["bytes_down"] == 4 * each  # absent clients receive it, too
    assert row["bytes_up"] == 2 * (40 + 4)
  assert simulator.compilations == 1


def test_one_that_changes_nothing_changes_nothing():
  data = blobs([3, 9, 14, 5])
  task = MODELS["lr"](data)
  server = optimizer("sgd", learning_rate=0.7, momentum=0.9)
  plain = fedavg(task, sgd(0.3), server)
  ends = []
  for algorithm in (plain, downlink(plain, [identity()])):
    simulator = make_simulator(task, algorithm, data, clients_per_round=3)
    ends.append(flat(params_of(simulator, train(simulator, 6))))
    (row,) = simulator.dispatch(simulator.init(), simulator.plan(0, 1)).rows
    received = 3 if algorithm is plain else 4
    assert row["bytes_down"] == received * 4 * len(ends[0])
  np.testing.assert_array_equal(ends[0], ends[1])


def test_feedback_on_both_links_reaches_the_optimum():
  """Of 100 entries one is sent each way: 1 %."""
  rng = np.random.default_rng(1)
  far = 0.3 * rng.normal(size=100)
  far[0] = 20  # clients disagree there, so plain top-k sends nothing else
  centres = np.stack([rng.normal(size=100) + s * far for s in (1, -1)])
  optimum = centres.mean(axis=0)

  def end(up, rounds):
    simulator = movers(
      centres,
      [top_k(0.01)],
      rate=0.006,  # an entry waits for 100 rounds, so steps are short
      transforms=[up],
      lanes=2,
      rounds_per_dispatch=rounds,
    )
    state = train(simulator, rounds)
    return params_of(simulator, state)["w"], state.server.known[0]

  w, known = end(error_feedback(top_k(0.01)), 1000)
  start = np.linalg.norm(optimum)
  assert np.linalg.norm(w - optimum) < 0.25 * start
  assert np.linalg.norm(known - optimum) < 0.25 * start
  w, _ = end(top_k(0.01), 200)
  np.testing.assert_array_equal(w[1:], 0)


def noisy_links(lanes=1, devices=1):
  data = blobs([3, 9, 14, 5, 7])
  task = MODELS["lr"](data)
  chain = [transforms.power_sgd(1)]
  algorithm = downlink(fedavg(task, sgd(0.3), sgd(1.0)), chain)
  return make_simulator(
    task, algorithm, data, clients_per_round=3, lanes=lanes, devices=devices
  )


def test_a_run_goes_on_from_its_state():
  simulator = noisy_links()
  whole = train(simulator, 4)
  kept = simulator.states.to_host(train(simulator, 2))
  assert len(kept.server.own[0]) == 1  # the warm start of a matrix
  state = simulator.states.to_devices(kept)
  for out in simulator.run(state, 4):
    state = out.state
  for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(whole), strict=True):
    np.testing.assert_array_equal(a, b)
  # Two factors of the matrix (6, 3), and the bias.
  assert whole.server.bytes == 4 * (6 + 3 + 3)


@pytest.mark.slow
def test_the_same_on_two_devices():
  one, other = (noisy_links(*at) for at in ((1, 1), (2, 2)))
  ends = [flat(params_of(s, train(s, 2))) for s in (one, other)]
  np.testing.assert_allclose(ends[0], ends[1], atol=1e-5)


def test_runs_that_differ_in_numbers_are_one_program():
  centres = np.ones((2, 4))
  make = lambda share: movers(centres, [top_k(share)])
  one = make(0.25)
  task, data = one.task, one.data
  other, third = (
    make_simulator(task, algorithm, data, batching=one.batching)
    for algorithm in (
      downlink(fedavg(task, sgd(0.5), sgd(1.0)), [top_k(0.5)]),
      downlink(fedavg(task, sgd(0.5), sgd(1.0)), [transforms.qsgd()]),
    )
  )
  first = make_simulator(
    task,
    downlink(fedavg(task, sgd(0.5), sgd(1.0)), [top_k(0.25)]),
    data,
    batching=one.batching,
  )
  assert program_of(first) == program_of(other)
  assert program_of(first) != program_of(third)
  assert other.hparams["algorithm"]["downlink"] == {"top_k": {"share": 0.5}}


def test_what_is_compressed_of_a_message():
  buffers = {"mean": jnp.zeros(3), "count": jnp.int32(0)}
  frozen = {"kernel": jnp.zeros(1000)}
  plain = quadratic(21)
  task = plain._replace(
    init=lambda key: Variables(plain.init(key).params, buffers, frozen)
  )
  algorithm = downlink(fedavg(task, sgd(0.1), sgd(1.0)), [top_k(0.1)])
  hparams = jax.tree.map(jnp.float32, dict(algorithm.hparams))
  state = algorithm.init(jax.random.key(0), hparams)
  assert [x.shape for x in state.known] == [(21,)]
  whole = 4 * (21 + 3 + 1)
  assert float(state.bytes) == whole
  model = algorithm.variables(state)._replace(params={"w": jnp.ones(21)})
  assert algorithm.with_model is not None
  moved = algorithm.with_model(state, model)  # such as a branch begins with
  sent = algorithm.broadcast(moved)
  np.testing.assert_array_equal(sent.params["w"], 1)
  assert sent.frozen["kernel"] is model.frozen["kernel"]
  assert float(moved.bytes) == whole


@pytest.mark.slow
def test_a_private_run_counts_what_it_sends():
  data = blobs([4, 5, 6])
  task = MODELS["lr"](data)
  base = fedavg(task, sgd(0.1), sgd(1.0), weighting="uniform")
  private = with_central_dp(downlink(base, [top_k(0.1)]), NOISE)
  simulator = make_simulator(task, private, data)
  rows = [out.rows[0] for out in simulator.run(simulator.init(), 2)]
  assert [row["downlink/bytes"] for row in rows] == [84, 2 * 4 + 2]
  assert rows[1]["bytes_down"] == 3 * (10 + 4)  # with the clipping norm


@pytest.mark.slow
def test_the_answer_to_a_survey_is_sent_as_it_is():
  data = blobs([4, 5, 6])
  task = MODELS["lr"](data)
  momentum = optimizer("sgd", learning_rate=0.1, momentum=0.9)
  algorithm = mime(task, sgd(0.1), momentum)
  plain = make_simulator(task, algorithm, data, clients_per_round=2)
  packed = make_simulator(
    task, downlink(algorithm, [top_k(0.1)]), data, clients_per_round=2
  )
  rows = [out.rows[0] for out in packed.run(packed.init(), 2)]
  whole, first = plain.traffic.down, plain.traffic.message
  assert first < whole
  for row in rows:
    each = row["downlink/bytes"]
    assert row["bytes_down"] == 3 * each + 2 * (whole - first)
  assert rows[1]["downlink/bytes"] < rows[0]["downlink/bytes"] == first


def test_privacy_goes_around_it():
  data = blobs([4, 5, 6])
  task = MODELS["lr"](data)
  base = fedavg(task, sgd(0.1), sgd(1.0), weighting="uniform")
  private = with_central_dp(downlink(base, [top_k(0.1)]), NOISE)
  simulator = make_simulator(task, private, data)
  state = simulator.init()
  assert private.broadcast_bytes is not None
  sent = float(private.broadcast_bytes(state.server))
  assert sent == simulator.traffic.down == 84 + 4  # with the clipping norm
  out = simulator.states.shapes.server
  assert [x.shape for x in out.server.known] == [(3,), (6, 3)]
  with pytest.raises(ValueError, match=r"downlink\(central"):
    downlink(with_central_dp(base, NOISE), [top_k(0.1)])


def test_what_is_refused():
  task, data = quadratic(3), quadratic_data(np.ones((2, 3)))
  base = fedavg(task, sgd(0.1), sgd(1.0))
  for chain, match in (
    ([], "transforms is empty"),
    ([top_k(0.1), top_k(0.2)], "'top_k' twice"),
    ([transforms.gaussian(1.0)], "gaussian adds noise"),
  ):
    with pytest.raises(ValueError, match=match):
      downlink(base, chain)
  with pytest.raises(TypeError, match="downlink: transforms"):
    downlink(base, [top_k])  # type: ignore[list-item]
  with pytest.raises(ValueError, match="pools the data"):
    downlink(centralized(task, sgd(0.1)), [top_k(0.1)])
  several = downlink(fedbuff(task, sgd(0.1), sgd(1.0)), [top_k(0.1)])
  with pytest.raises(ValueError, match="several versions of the model"):
    make_simulator(task, several, data).init()
  neighbors = downlink(gossip(task, sgd(0.1), 2), [top_k(0.1)])
  stacked = aggregators.stack()
  with pytest.raises(ValueError, match="receive different messages"):
    make_simulator(task, neighbors, data, aggregator=stacked).init()


@pytest.mark.slow
def test_what_goes_to_neighbors_goes_to_each_of_them():
  task, data = quadratic(16), quadratic_data(np.eye(4, 16))
  simulator = make_simulator(
    task,
    gossip(task, sgd(0.1), 4, topology="ring"),
    data,
    aggregator=aggregators.stack(),
    transforms=[top_k(0.25)],
    batching=LocalBatching(batch_size=1),
  )
  out = simulator.dispatch(simulator.init(), simulator.plan(0, 1))
  sent = out.rows[0]["top_k/bytes"]
  assert sent == 4 * 4 + 2
  # Two neighbors each, and beside an update its weight.
  assert out.rows[0]["bytes_up"] == 4 * 2 * (sent + 4)


# --- configs ------------------------------------------------------------------


def test_a_config_compresses_both_links(tmp_path):
  source = flags.load(
    DIGITS,
    {
      "model.name": "logistic_regression",
      "model.hidden_sizes": "None",
      "transforms.top_k.share": "0.1",
      "transforms.top_k.ef21": "True",
      "downlink.eden.bits": "4",
      "downlink.fine.name": "qsgd",
      "downlink.fine.levels": "5",
      "downlink.order": "fine,eden",
      "runtime.devices": "1",
    },
  )
  experiment = build.build(source)
  simulator = experiment.simulator
  assert simulator.hparams["algorithm"]["downlink"] == {
    "fine": {"levels": 5.0},
    "eden": {},
  }
  _, (own,) = simulator.states.shapes.clients
  assert own._fields == ("known", "inner")
  tree = resolved(experiment.config)
  fields = [c.field for c in changes(tree)]
  assert "downlink.fine.levels" in fields
  assert "transforms.top_k.error_feedback" not in fields
  written = tmp_path / "again.py"
  written.write_text(config_file(tree))
  again = complete(flags.load(str(written), {}))
  assert again.to_dict() == experiment.config.to_dict()


@pytest.mark.parametrize(
  ("given", "match"),
  [
    (
      {
        "transforms.top_k.ef21": "True",
        "transforms.top_k.error_feedback": "True",
      },
      r"transforms\.top_k\.error_feedback=True and transforms\.top_k\.ef21",
    ),
    ({"downlink.top_k.share": "2"}, r"^downlink\.top_k\.share=2"),
    ({"downlink.top_k.shar": "0.1"}, r"downlink\.top_k.*share"),
    ({"downlink.top_k.ef21": "True"}, r"downlink\.top_k"),
    (
      {
        "downlink.top_k.share": "0.1",
        "server.revert_to_best": "True",
        "server.best_metrics": "test/loss",
      },
      r"downlink\.top_k: server\.revert_to_best=True would take back",
    ),
    (
      {"downlink.top_k.share": "0.1", "algorithm.name": "fedbuff"},
      r"several versions",
    ),
  ],
)
def test_configs_that_are_refused(given, match):
  with pytest.raises(ValueError, match=match):
    build.build(flags.load(DIGITS, given))
