"""`fedjax-sim check`: parts that break a rule are found, by its check alone.

The parts are files in `broken/`, as a user would write them.
"""

import functools
import inspect
import pathlib
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_sim as fs
from fedjax_sim import aggregators, sampling
from fedjax_sim.algorithms import ALGORITHMS
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.cli import check_part
from fedjax_sim.cli.main import main
from fedjax_sim.contract import compare, random_checks, round_checks
from fedjax_sim.contract.blame import blamed
from fedjax_sim.contract.checks import CHECKS, examine
from fedjax_sim.contract.outcome import (
  Failed,
  Line,
  NotApplicable,
  Passed,
  shown,
  table,
)
from fedjax_sim.contract.rounds import Rounds
from fedjax_sim.contract.setting import kind_of, setting_of
from fedjax_sim.core import references
from fedjax_sim.distributed import mesh
from fedjax_sim.privacy.central import CentralDPConfig, with_central_dp

ROOT = pathlib.Path(__file__).resolve().parents[1]
BROKEN = ROOT / "tests" / "broken"
OWN = ROOT / "docs" / "own"
# Which checks find it, and words of the example.
FOUND = {
  "carry.py:counting": (
    {"dtypes and shapes"},
    ["step (carry.py, line 17)", "[1]", "float32[]", "int32[]"],
  ),
  "branch.py:shorten": (
    {"no recompilation"},
    ["branch.py, line 14, `if length >", "jnp.where"],
  ),
  "branch.py:direction": (
    {"plain round", "zero updates"},
    ["clients 1, 2, 3, 4 are not finite", "0 / 0"],
  ),
  "order.py:latest": (
    {"devices", "order of clients"},
    ["in the order 1, 4 ", "in the order 4, 1 ", "['linear']"],
  ),
  "padding.py:unmasked": (
    {"padding", "all-padding batch"},
    ["client 1 has 5 examples", "Batch.mask", "mean_loss"],
  ),
  "weights.py:by_steps": (
    {"weights under privacy"},
    ["client 1, with 5 examples", "weight 3 ", "(1: 3, 2: 1, 3: 2, 4: 3)"],
  ),
  "absent.py:hidden": ({"NaN in one client"}, ["client 4 sends NaN"]),
  "absent.py:by_cohort": (
    {"NaN in one client"},
    ["client 4 of 4, 3, 2, 1 sends NaN", "without it"],
  ),
  "absent.py:boastful": (
    {"NaN in one client", "promises"},
    ["weighted_mean=True", "leave it False"],
  ),
  "step.py:noisy": ({"no recompilation"}, ["in Python", "First `", "then `"]),
  "samplers.py:remembering": ({"resume"}, ["round 1 of seed 0"]),
  "samplers.py:twice": ({"draws"}, ["2 times", "(round 4 of seed 0)"]),
  "samplers.py:too_small": ({"no recompilation"}, ["Sampler.sizes=(5,)"]),
  "samplers.py:half": ({"promises"}, ["promises rate=0.125"]),
  "samplers.py:hiding": ({"resume"}, ["from seed, round and state alone"]),
  "samplers.py:writing": ({"dtypes and shapes"}, ["copy it first"]),
  "models.py:centered": ({"padding"}, ["whose last is masked"]),
  "models.py:rooted": (
    {"plain round", "all-padding batch"},
    ["gradient", "is nan"],
  ),
  "models.py:drawn": ({"init"}, ["with the same key again"]),
  "chance.py:constant": ({"random keys"}, ["from jax.random.key(7)"]),
  "chance.py:one_key": (
    {"random keys", "promises"},
    ["['linear']['kernel'].value get the same", "adds_noise is False"],
  ),
  "chance.py:by_round": ({"random keys"}, ["from jax.random.key(1)"]),
  "chance.py:known": ({"promises"}, ["Algorithm.draws_noise is False"]),
  "chance.py:known_mean": ({"promises"}, ["Aggregator.draws_noise is False"]),
  "zeros.py:unit": ({"zero updates"}, ["an update of zeros one that is not"]),
  "zeros.py:unit_mean": ({"zero updates"}, ["four updates of zeros one that"]),
}
TRACED = ("chance", "zeros")  # found without a compiled round, but for `known`
ROUND = ("order", "padding", "weights", "absent", "step", "branch.py:d")
COMPILED = (*ROUND, *TRACED)
GATE = (
  "order.py:latest",
  "padding.py:unmasked",
  "weights.py:by_steps",
  "absent.py:hidden",
)
WANTED = {  # what algorithms cannot do without
  "dga_rl": ["metric"],
  **{k: ["private"] for k in ("fedbn", "fedper", "fedrep", "lg_fedavg")},
}
EXPENSIVE = ("lanes", "devices", "absent clients")  # a program each
ROUNDS = (  # all others that need a compiled round, whatever the model
  "no recompilation",
  "plain round",
  "order of clients",
  "empty cohort",
  "NaN in one client",
  "resume",
)


@pytest.fixture
def prepared(monkeypatch):
  """JAX is in use already, and stays as it is after the command."""
  monkeypatch.setattr(mesh, "setup", lambda devices: None)
  before = jax.config.values["jax_disable_most_optimizations"]
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  yield
  jax.config.update("jax_disable_most_optimizations", before)


def failures(reference, without=()):
  """Check -> text, of the checks that a part fails."""
  checks = [c for c in CHECKS if c.name not in without]
  lines = list(examine(setting_of(reference), checks))
  assert [line.name for line in lines if not line.outcome.text] == []
  return {line.name: line.outcome.text for line in lines if line.failed}


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=[pytest.mark.integration] * (name in GATE))
    for name in FOUND
    if name in GATE or not name.startswith(COMPILED)
  ],
)
def test_a_part_that_breaks_a_rule_is_found_by_its_check(name):
  expected, words = FOUND[name]
  left_out = EXPENSIVE + ROUNDS * name.startswith("models")
  found = failures(f"{BROKEN}/{name}", left_out)
  assert found.keys() == expected - {*left_out}
  text = " ".join(found.values())
  assert [word for word in words if word not in text] == []


@pytest.mark.parametrize(
  "name", [n for n in FOUND if n.startswith(TRACED) and not n.endswith("known")]
)
def test_random_numbers_and_zeros_need_no_compiled_round(name):
  expected, words = FOUND[name]
  few = {"random keys", "zero updates"} | expected
  found = failures(f"{BROKEN}/{name}", {c.name for c in CHECKS} - few)
  assert found.keys() == expected
  assert [word for word in words if word not in " ".join(found.values())] == []


def test_numbers_that_accountants_count_on_stay():
  base = lambda task, client_optimizer, server_optimizer: with_central_dp(
    fedavg(task, client_optimizer, server_optimizer, weighting="uniform"),
    CentralDPConfig(clip_norm=1.0, noise_multiplier=0.5, denominator=4.0),
  )
  simulator = Rounds(setting_of(base, "algorithm")).simulator()
  numbers = round_checks.other_numbers(simulator.hparams)
  _ = simulator.states.traced(numbers)  # which refuses others
  client = [s["algorithm"]["client"] for s in (numbers, simulator.hparams)]
  assert client[0]["learning_rate"] == 0.8 * client[1]["learning_rate"]


def test_keys_are_followed_to_what_is_drawn_from_them():
  """Into loops, branches and functions; a key that draws nothing may stay."""

  def inside(x, key):
    draw = jax.jit(lambda key: jax.random.normal(key))
    add = lambda i, x: x + draw(jax.random.fold_in(key, i))
    either = lambda x: jax.lax.cond(x > 0, draw, lambda key: x, key)
    return jax.vmap(either)(jax.lax.fori_loop(0, 3, add, x))

  def drawn(make):
    program = jax.make_jaxpr(lambda x, key: inside(x, make(key)))
    draws: list[random_checks.Draw] = []
    random_checks.follow(
      program(jnp.ones(2), jax.random.key(0)).jaxpr, {}, draws
    )
    return {draw.key for draw in draws}

  assert drawn(lambda key: key) == {None}
  assert drawn(lambda key: [jax.random.key(3), key][1]) == {None}
  assert drawn(lambda key: jax.random.key(3)) == {"jax.random.key(3)"}
  old = lambda key: jax.random.fold_in(jax.random.PRNGKey(3), 4)
  assert drawn(old) == {"jax.random.key(3)"}
  outside = jax.random.key(5)
  assert drawn(lambda key: outside) == {"a key from outside of the functions"}


@pytest.mark.slow
@pytest.mark.parametrize(
  "name", [n for n in FOUND if n.startswith((*COMPILED, "models"))]
)
def test_and_by_no_other(name):
  expected, words = FOUND[name]
  found = failures(f"{BROKEN}/{name}")
  assert found.keys() == expected
  assert all(word in " ".join(found.values()) for word in words)


@pytest.mark.slow
@pytest.mark.parametrize("name", aggregators.AGGREGATORS)
def test_our_aggregators_pass(name):
  assert failures(aggregators.AGGREGATORS[name]) == {}


# Algorithms that do not train the check's tiny model.
OTHER_MODELS = (
  *("fedem", "fedex_lora", "gbdt", "gmm", "heavy_hitters", "kmeans"),
  "quantiles",
)


@pytest.mark.slow
@pytest.mark.parametrize(
  "name", [n for n in ALGORITHMS if n not in OTHER_MODELS]
)
def test_our_algorithms_pass(name):
  function = ALGORITHMS[name]
  given: dict[str, Any] = {"metric": "accuracy", "private": ("linear/bias",)}
  given = {k: v for k, v in given.items() if k in WANTED.get(name, ())}

  def algorithm(task, **options):
    if name == "moon":  # the tiny model has no representations
      task = task._replace(features=task.logits)
    return function(task, **options, **given)

  takes = inspect.signature(function)
  algorithm.__signature__ = takes  # type: ignore[attr-defined]
  assert failures(algorithm) == {}


@pytest.mark.parametrize("name", ["uniform", "importance", "stratified"])
def test_our_samplers_pass(name):
  assert failures(sampling.SAMPLERS[name]) == {}


@pytest.mark.integration
def test_the_command_prints_what_it_finds(capsys, prepared):
  # As a config's file: its own model and data, cut to a few clients.
  code = main(
    [
      "check",
      f"{OWN}/sampler.py:by_size",
      f"--config={OWN}/sampler.py:smoke",
      "--config.server.clients_per_round=7",
    ]
  )
  out = capsys.readouterr().out
  assert code == 0
  assert "192 rounds of 7 to 7 of 100 clients" in out
  assert main(["check", f"{BROKEN}/carry.py:counting"]) == 1
  out = capsys.readouterr().out
  assert "FAILED          dtypes and shapes: step (carry.py, line 17)" in out
  assert out.endswith("0 passed, 1 failed, 14 not applicable\n")


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    ([], ["no part is given; give one"]),
    (["x.py:y", "--kind=model", "z.py:y"], ["2 parts are given"]),
    (
      [f"{BROKEN}/samplers.py"],
      ["samplers.py:twice (sampler)", "samplers.py:half (sampler)"],
    ),
    ([f"{OWN}/data.py"], ["data.py:NAME --kind=", "-> Aggregator"]),
    (["--kind", "model", f"{BROKEN}/order.py:latest"], ["kind aggregator"]),
    (["nowhere.py:part"], ["there is no file"]),
    ([f"{BROKEN}/order.py:lastest"], ["'latest'"]),
    ([f"{BROKEN}/order.py:latest", "--kind=aggregater"], ["'aggregator'"]),
    ([f"{BROKEN}/order.py:jnp"], ["is no function"]),
    ([f"{OWN}/data.py:rings"], ["--kind=", "-> Aggregator"]),
    (["fedavgg"], ["'fedavg'"]),
    (
      [f"{BROKEN}/order.py:latest", "--config.aggregator.rat=1"],
      ["aggregator.rat", "rate"],
    ),
  ],
)
def test_a_wrong_call_is_refused(arguments, words, capsys, prepared):
  assert main(["check", *arguments]) == 2
  out, err = capsys.readouterr()
  assert out == ""
  assert [word for word in words if word not in err] == []


def test_a_file_with_one_part_needs_no_name(capsys, prepared, monkeypatch):
  monkeypatch.setattr(check_part, "examine", lambda setting: [])
  assert main(["check", f"{BROKEN}/order.py"]) == 0
  assert "order.py:latest: aggregator, in five" in capsys.readouterr().out


def test_a_wrong_call_is_refused_before_jax_is_there():
  code = (
    "import sys; from fedjax_sim.cli.main import main;"
    "sys.exit(main(['check', '--kinds=model', 'x.py:y']) + ('jax' in"
    " sys.modules))"
  )
  assert subprocess.run([sys.executable, "-c", code]).returncode == 2


def test_the_kind_follows_from_the_function():
  of = lambda file, name: kind_of(
    references.load("test", f"{OWN}/{file}:{name}")
  )
  assert of("aggregator.py", "short_mean") == "aggregator"
  assert of("algorithm.py", "full_length") == "algorithm"
  assert of("sampler.py", "by_size") == "sampler"
  assert of("model.py", "small_cnn") == "model"
  assert of("data.py", "rings") is None
  assert kind_of(lambda num_clients, clients_per_round: None) == "sampler"
  assert kind_of(lambda radius=1.0: aggregators.mean()) == "aggregator"


@pytest.mark.parametrize("part", [3, lambda x: x, None])
def test_what_is_no_part_is_refused(part):
  with pytest.raises((TypeError, ValueError), match="part"):
    fs.check(part)


def test_an_algorithm_has_to_be_made_for_the_task():
  made = setting_of(fedavg).algorithm
  with pytest.raises(TypeError, match="give the function of"):
    fs.check(made)


def test_floats_may_differ_as_much_as_their_sums_round():
  """Sums of one set of numbers in many orders stay within what is allowed."""
  rng = np.random.default_rng(0)
  terms = rng.normal(size=40).astype(np.float32)
  sums = [
    functools.reduce(lambda a, b: a + b, rng.permutation(terms))
    for _ in range(200)
  ]
  exact = terms.astype(np.float64).sum()
  off = max(abs(float(x) - exact) for x in sums)
  assert off > 0
  one = {"w": np.array([[0.0, exact]], np.float32)}
  for x in sums:
    other = {"w": np.array([[0.0, x]], np.float32)}
    assert compare.difference(one, other, 40) is None
  wrong = {"w": np.array([[0.0, exact * 1.0001]], np.float32)}
  apart = compare.difference(one, wrong, 40)
  assert apart is not None
  assert apart.where == "['w'][0, 1]"
  assert compare.difference(one, one, 0) is None
  bits = {"w": np.nextafter(one["w"], np.float32(9))}
  assert compare.difference(one, bits, 0) is not None


def test_whole_numbers_and_nan_are_compared_too():
  of = lambda *x: {"n": np.array(x)}
  apart = compare.difference(of(1, 2), of(1, 3), 9.0)
  assert apart is not None
  assert apart.where == "['n'][1]"
  assert compare.difference(of(1.0, np.nan), of(1.0, np.nan), 9.0) is None
  assert compare.difference(of(1.0, np.nan), of(1.0, 2.0), 9.0) is not None
  assert compare.difference(of(np.inf), of(np.inf), 9.0) is None


def test_a_table_of_lines():
  lines = [
    Line("lanes", Passed()),
    Line("order", Failed("with the clients in the order 1, 2")),
    Line("metrics", NotApplicable("there are none")),
  ]
  assert table(lines, 40).splitlines() == [
    "passed          lanes",
    "FAILED          order: with the clients",
    "                  in the order 1, 2",
    "not applicable  metrics: there are none",
    "1 passed, 1 failed, 1 not applicable",
  ]


@pytest.mark.parametrize(
  ("function", "remedy"),
  [
    (lambda x: 1 if x > 0 else 2, "jnp.where"),
    (lambda x: float(x), "keep it an array"),
    (lambda x: np.asarray(x), "take jax.numpy"),
    (lambda x: [1, 2][x.astype(int)], "jnp.take"),
    (lambda x: jnp.ones(3)[jnp.ones(3) > x], "jnp.where(mask"),
  ],
)
def test_the_remedy_for_a_value_that_is_not_there(function, remedy):
  with pytest.raises(Exception) as caught:  # noqa: PT011
    jax.eval_shape(function, jnp.float32(1))
  text = blamed(caught.value, __file__)
  assert text.startswith("test_check.py, line ")
  assert remedy in text


def test_the_page_has_every_check_and_what_it_prints():
  text = (ROOT / "docs" / "check.md").read_text()
  rows = re.findall(
    r"^\| ([\w -]+?) \| ", text.partition("## What is")[2], re.M
  )
  assert rows[2:] == [check.name for check in CHECKS]  # head, and its line
  for name in ("branch.py:shorten", "carry.py:counting"):
    lines = examine(setting_of(f"{BROKEN}/{name}"))
    (failed,) = [line for line in lines if line.failed]
    assert f"tests/broken/{name}\n{shown(failed)}\n" in text
