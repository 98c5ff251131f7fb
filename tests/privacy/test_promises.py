"""Promises of samplers: those that are kept pass, those that are not do not."""

import dataclasses

import numpy as np
import pytest

from fedjax_sim import flags, sampling
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.build import build
from fedjax_sim.privacy import promises
from fedjax_sim.privacy.central import Central, central
from fedjax_sim.privacy.guard import Budget
from fedjax_sim.sampling import Participation, Sampler, generator
from fedjax_sim.simulator import Simulator
from problems import quadratic, quadratic_data, sgd
from test_features import DIGITS


def own(sample, rate, period=1, independent=False, most=90):
  """A sampler of one's own, from (seed, round) -> ids."""
  return Sampler(
    sample,
    sizes=(most,),
    expected=rate * most / period,
    participation=Participation(rate, period, independent),
  )


def flip(seed, round_, rate, count=90):
  """Who takes part by itself."""
  return generator(seed, round_).random(count) < rate


def fixed_in_turns(seed, round_):
  """Three of the 30 clients whose turn it is, of three groups."""
  drawn = generator(seed, round_).choice(30, 3, replace=False)
  return drawn * 3 + round_ % 3


def heterogeneous(seed, round_):
  return np.flatnonzero(flip(seed, round_, np.linspace(0.01, 0.2, 90)))


@pytest.mark.parametrize(
  ("sampler", "clients"),
  [
    (sampling.poisson(90, 20), 90),
    (sampling.poisson(3, 1), 3),
    (sampling.poisson(1, 1), 1),
    (sampling.poisson(90, 90), 90),
    (sampling.poisson(91, 20, population=90), 91),
    (sampling.poisson(20_000, 3), 20_000),
    (sampling.uniform(90, 20), 90),
    (sampling.uniform(5, 4), 5),
    (sampling.uniform(20_000, 3), 20_000),
    (sampling.cyclic(90, 20), 90),
    (sampling.cyclic_poisson(90, 20, 3), 90),
    (sampling.cyclic_poisson(91, 2, 40), 91),
    (own(fixed_in_turns, 0.1, 3), 90),
    (own(heterogeneous, 0.2, 1, True), 90),  # at most as often
  ],
)
def test_promises_that_are_kept(sampler, clients):
  held(sampler, clients, rounds=(0, 1, 2, 9, 4, 5))


def clusters(seed, round_):
  first = 2 * np.flatnonzero(flip(seed, round_, 0.2, 45))
  return np.concatenate([first, first + 1])


def sticky(seed, round_):
  """Every other round is the one before."""
  return np.flatnonzero(flip(seed, round_ // 2, 0.2))


def one_always(seed, round_):
  return np.union1d(np.flatnonzero(flip(seed, round_, 0.2)), [7])


def stateful(seed, round_, rng=np.random.default_rng(0)):  # noqa: B008
  return np.flatnonzero(rng.random(90) < 0.2)


def pauses(seed, round_):
  """Whoever took part sits out once; drawn anew, so turns are not fixed."""
  before = flip(seed, round_ - 1, 0.1) if round_ else np.zeros(90, bool)
  return np.flatnonzero(flip(seed, round_, 0.1) & ~before)


def held(sampler, clients, seed=0, rounds=range(20)):
  """Tests what is a matter of chance, and some rounds for what is not."""
  promises.check_draws(sampler, clients, rounds=50)
  witness = promises.Witness(sampler, clients, seed)
  for round_ in rounds:
    witness.check(round_, sampler.sample(seed, round_))


@pytest.mark.parametrize(
  ("sampler", "words"),
  [
    (
      sampling.uniform(90, 20)._replace(
        participation=Participation(20 / 90, 1, True)
      ),
      "how many of one half of the clients",
    ),
    *(
      (
        sampling.uniform(90, few)._replace(
          participation=Participation(few / 90, 1, True)
        ),
        "how many of one half of the clients",
      )
      for few in (1, 89)
    ),
    (
      sampling.poisson(90, 20)._replace(participation=Participation(20 / 90)),
      r"clients take part and not 20, where the size should be fixed",
    ),
    (
      sampling.poisson(90, 20)._replace(
        participation=Participation(0.11, 1, True)
      ),
      r"rate=0\.11, .*, but client \d+ takes part in \d+ of 512 draws",
    ),
    (
      sampling.poisson(90, 20)._replace(
        participation=Participation(0.2, 1, True)
      ),
      r"a client takes part with probability 0\.22",
    ),
    (
      sampling.poisson(90, 20)._replace(
        participation=Participation(20 / 90, 2, True)
      ),
      r"client \d+ takes part in rounds (\d+) and \d+",
    ),
    (
      sampling.shuffled(90, 18)._replace(participation=Participation(0.2)),
      r"twice in a row less often",
    ),
    (
      sampling.shuffled(90, 18)._replace(participation=Participation(1.0, 5)),
      r"client \d+ takes part in rounds",
    ),
    (
      sampling.by_size(90, 18, np.arange(1, 91))._replace(
        participation=Participation(0.2)
      ),
      r"client 8\d takes part in",
    ),
    (own(clusters, 0.2, 1, True), "neighbouring ids take part together more"),
    (own(sticky, 0.2, 1, True), "twice in a row more often"),
    (own(one_always, 0.2, 1, True), r"client 7 takes part in 512 of 512"),
    (own(stateful, 0.2, 1, True), "another one when it is drawn again"),
    (own(pauses, 0.1, 2, True), r"where turns should be fixed|takes part in"),
  ],
)
def test_promises_that_are_not_kept(sampler, words):
  with pytest.raises(ValueError, match=words):
    held(sampler, 90)


def test_few_that_keep_their_promise_are_refused():
  """The tests' own chances, against how often they fall; none at 1e-10."""
  rng = np.random.default_rng(0)
  for trials, chance in ((20, 0.3), (2000, 0.01)):
    counts = rng.binomial(trials, chance, 20_000)
    for bound in (promises._more, promises._less):
      said = np.array([bound(int(x), trials, chance) for x in counts])
      for level in (0.3, 0.01, 1e-3):
        assert (said <= level).mean() <= level * 1.3 + 1e-9
  one, other = rng.binomial(3, 0.3, (2, 2000, 64))
  said = np.array(
    [promises._associated(*x) for x in zip(one, other, strict=True)]
  )
  for level in (0.3, 0.05, 0.01):
    assert (said <= level).mean() <= level * 1.5


# --- in a run -----------------------------------------------------------------


def test_every_round_of_a_run_is_held_against_the_promise():
  """A client that comes back too soon, in a round that no test draws."""
  honest = sampling.cyclic(4, 2)

  def sample(seed, round_):
    return honest.sample(seed, round_ - (round_ == 5))

  algorithm = fedavg(quadratic(2), sgd(1.0), sgd(1.0))
  settings = Central(clip_norm=1.0, noise_multiplier=1.0, denominator=2.0)
  made = Simulator(
    task=quadratic(2),
    algorithm=central(algorithm, settings),
    data=quadratic_data([[1.0, 0], [0, 1], [1, 1], [2, 1]]),
    sampler=honest._replace(sample=sample),
    budget=Budget(delta=1e-3),
  )
  made.plan(0, 1)
  made.plan(4, 1)
  with pytest.raises(ValueError, match=r"rounds 5 and 6; promise what"):
    made.plan(5, 1)
  again = dataclasses.replace(made)  # one that goes on from a checkpoint
  with pytest.raises(ValueError, match=r"period=2, .* rounds 5 and 6"):
    again.plan(5, 1)


PRIVATE = {
  "server.rounds": "5",
  "server.clients_per_round": "9",
  "privacy.mechanism": "gaussian",
  "privacy.clip_norm": "1.0",
  "privacy.delta": "0.001",
  "privacy.noise_multiplier": "1.0",
}

OWN = """
import numpy as np
from fedjax_sim.sampling import Participation, Sampler, poisson, uniform

def claims(num_clients, clients_per_round):
  made = uniform(num_clients, clients_per_round)
  rate = clients_per_round / num_clients
  return made._replace(participation=Participation(rate, 1, True))

def sized(num_clients, clients_per_round, sizes):
  return uniform(num_clients, clients_per_round)

def follows(num_clients, clients_per_round):
  made = poisson(num_clients, clients_per_round)
  promised = made.participation._replace(population=num_clients)
  return made._replace(participation=promised)
"""


@pytest.mark.parametrize(
  ("name", "words"),
  [
    ("claims", r"promises rate=0\.1, period=1, independent=True, but how many"),
    ("sized", r"leave its argument 'sizes' out"),
    ("follows", r"rate that was chosen in advance, for population=90; of 90"),
  ],
)
def test_samplers_of_ones_own_by_the_command_line(name, words, tmp_path):
  (tmp_path / "own.py").write_text(OWN)
  sampling_ = {"server.sampling": f"{tmp_path / 'own.py'}:{name}"}
  with pytest.raises(ValueError, match=words):
    build(flags.load(str(DIGITS), PRIVATE | sampling_))
