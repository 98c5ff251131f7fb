"""Promises of samplers: those that are kept pass, those that are not do not."""

import dataclasses

import numpy as np
import pytest
from scipy import stats

from fedjax_sim import sampling
from fedjax_sim.algorithms.fedavg import fedavg
from fedjax_sim.config import flags
from fedjax_sim.config.build import build
from fedjax_sim.privacy.accounting import overlaps, promises
from fedjax_sim.privacy.central import CentralDPConfig, with_central_dp
from fedjax_sim.privacy.central.guard import Budget
from fedjax_sim.privacy.local import with_local_dp
from fedjax_sim.privacy.local.additive import gaussian
from fedjax_sim.privacy.secure.aggregators import secure_mean
from fedjax_sim.sampling import Participation, Sampler, generator
from fedjax_sim.simulation.simulator import Simulator
from problems import quadratic, quadratic_data, sgd
from test_features import DIGITS
from tiers import slow_but


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
  """Every other round, a tenth of the clients do as in the one before."""
  drawn = flip(seed, round_, 0.2)
  drawn[:9] = flip(seed, round_ // 2, 0.2)[:9]
  return np.flatnonzero(drawn)


def one_often(seed, round_):
  return np.flatnonzero(
    flip(seed, round_, np.where(np.arange(90) == 7, 0.34, 0.2))
  )


def stateful(seed, round_, rng=np.random.default_rng(0)):  # noqa: B008
  return np.flatnonzero(rng.random(90) < 0.2)


def pauses(seed, round_):
  """Whoever took part sits out once; drawn anew, so turns are not fixed."""
  before = flip(seed, round_ - 1, 0.1) if round_ else np.zeros(90, bool)
  return np.flatnonzero(flip(seed, round_, 0.1) & ~before)


def held(sampler, clients, seed=0, rounds=range(20)):
  """Tests what is a matter of chance, and some rounds for what is not."""
  promises.check_draws(sampler, clients, rounds=50, seed=seed)
  run(sampler, clients, seed, rounds)


def run(sampler, clients, seed, rounds):
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
      r"rate=0\.11, .*, but by round \d+ clients take part again",
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
      r"in rounds of several seeds clients take part again",
    ),
    (own(clusters, 0.2, 1, True), "with ids 1 apart take part together more"),
    (own(sticky, 0.2, 1, True), "twice in a row more often"),
    (own(one_often, 0.2, 1, True), r"but client 7 takes part in \d+ of 512"),
    (own(stateful, 0.2, 1, True), "another one when it is drawn again"),
    (own(pauses, 0.1, 2, True), r"where turns should be fixed|takes part in"),
  ],
)
def test_promises_that_are_not_kept(sampler, words):
  with pytest.raises(ValueError, match=words):
    held(sampler, 90)


def of_rounds(sampler, change):
  """A sampler that draws as another one in other rounds, or for other seeds."""
  return sampler._replace(sample=lambda *at: sampler.sample(*change(*at)))


def always(sampler, begin=0):
  """Client 7 takes part in three rounds whatever is drawn."""

  def sample(seed, round_):
    ids = sampler.sample(seed, round_)
    if begin <= round_ < begin + 3 and 7 not in ids:
      fixed = not sampler.participation.independent
      ids = np.sort(np.append(ids[1:] if fixed else ids, 7))
    return ids

  return sampler._replace(sample=sample)


def blocks(seed, round_):
  """A hundred clients, every tenth from a first one on."""
  return np.arange(100) * 10 + generator(seed, round_, 5).integers(10)


def shuffled_blocks(seed, round_):
  """A hundred of a thousand clients, who never take part without each other."""
  order = generator(seed, 0, stream=1).permutation(1000).reshape(10, 100)
  return np.sort(order[generator(seed, round_, 5).integers(10)])


def pairs(seed, round_):
  """Fifty of the first half, and who is their number in the other one."""
  half = generator(seed, round_).choice(500, 50, replace=False)
  return np.sort(np.append(half, half + 500))


RARELY = {
  name: getattr(sampling, name)(1000, 10) for name in ("poisson", "uniform")
}
TENTH = sampling.uniform(1000, 100)


@pytest.mark.parametrize("name", RARELY)
@pytest.mark.parametrize(
  ("change", "words"),
  [
    (lambda seed, round_: (seed, round_ % 2), "again 2 cohorts later"),
    (lambda seed, round_: (seed, round_ % 3), "again 3 cohorts later"),
    (lambda seed, round_: (seed, round_ % 64), "again 64 cohorts later"),
    (lambda seed, round_: (seed, round_ // 10), "again in the next cohort"),
    (
      lambda seed, round_: (seed % 2, round_),
      "turn 1 of several seeds .* 2 co",
    ),
    (
      lambda seed, round_: (seed % 20, round_),
      "of several seeds .* 20 cohorts",
    ),
  ],
)
def test_cohorts_that_come_again(name, change, words):
  with pytest.raises(ValueError, match=words):
    promises.check_draws(of_rounds(RARELY[name], change), 1000, 1000)


@pytest.mark.parametrize(
  ("sampler", "words"),
  [
    *(
      (always(sampler, begin), f"turn {begin + 1} of several seeds client 7 ")
      for sampler in RARELY.values()
      for begin in (0, 2)
    ),
    (TENTH._replace(sample=blocks), "take part again"),
    (TENTH._replace(sample=shuffled_blocks), "take part again"),
    (TENTH._replace(sample=pairs), "with ids 500 apart take part together"),
  ],
)
def test_clients_that_are_not_drawn_by_themselves(sampler, words):
  with pytest.raises(ValueError, match=words):
    promises.check_draws(sampler, 1000, 100)


def test_turns_that_are_drawn_once():
  """Fixed turns of three rounds, in which the same clients take part again."""
  honest = sampling.cyclic_poisson(90, 9, 3)
  again = of_rounds(honest, lambda seed, round_: (seed, round_ % 6))
  with pytest.raises(ValueError, match="take part again 6 cohorts later"):
    promises.check_draws(again, 90, 100)


def test_a_run_finds_what_begins_later():
  """In rounds after those that are looked at before."""
  honest = RARELY["poisson"]
  late = of_rounds(honest, lambda seed, r: (seed, r if r < 500 else r % 2))
  promises.check_draws(late, 1000, 500)
  for first in (450, 520):  # that goes on, too
    with pytest.raises(ValueError, match="again 2 cohorts later"):
      run(late, 1000, 0, range(first, 530))


def test_a_run_that_goes_on_draws_few_rounds_again():
  honest, drawn = sampling.cyclic_poisson(90, 9, 3), []

  def sample(seed, round_):
    drawn.append(round_)
    return honest.sample(seed, round_)

  witness = promises.Witness(honest._replace(sample=sample), 90, 0)
  witness.check(100_000, honest.sample(0, 100_000))
  assert drawn == list(range(100_000 - 3 * overlaps.LAGS, 100_000))
  others = np.setdiff1d(honest.sample(0, 99_996), honest.sample(0, 99_999))
  with pytest.raises(ValueError, match="where turns should be fixed"):
    witness.check(100_001, others)


@pytest.mark.parametrize(
  ("sampler", "clients"),
  [
    (sampling.uniform(90, 20), 90),
    (sampling.poisson(90, 60), 90),
    (sampling.poisson(91, 20, population=100), 91),
    (sampling.cyclic(90, 20), 90),
    (sampling.cyclic_poisson(90, 9, 3), 90),
  ],
)
def test_our_own_are_never_refused(sampler, clients):
  for seed in (0, 1, 2, 3, 2**32 - 1):
    held(sampler, clients, seed, range(200))


@pytest.mark.parametrize("seed", [0, 2**32 - 20, 2**40, 3758767034])
def test_no_cohort_is_drawn_twice(seed):
  """Neither of a seed nor of two; 32 follow the run's, and four turns of it."""
  for most, period in ((256, 1), (32, 7)):
    trials = promises._trials(np.random.default_rng(0), most, 1, period, seed)
    assert len(set(trials)) == most
    first = trials[: most // 4]
    assert first == [
      ((seed + i // 2) % 2**32, 2 * period * (i % 2)) for i in range(most // 4)
    ]


@pytest.mark.parametrize("period", [1, 3])
@pytest.mark.parametrize("clients", [90, 60_000])
def test_overlaps_against_a_plain_loop(period, clients):
  rate = 0.2 if clients == 90 else 0.6 / period
  sampler = sampling.cyclic_poisson(clients, rate / period * clients, period)
  seen = overlaps.Overlaps(clients, rate, period)
  cohorts = [sampler.sample(0, r) for r in range(70 if clients == 90 else 7)]
  for ids in cohorts:
    assert seen.see(ids) is None
  step = int(clients * rate / period / 8192) + 1
  some = [ids[ids % step == 0] for ids in cohorts]
  for lag in (1, 2, 5, 64):
    both = list(zip(some, some[lag * period :], strict=False))
    assert seen._before[lag - 1] == sum(len(one) for one, _ in both)
    assert seen._common[lag - 1] == sum(
      len(np.intersect1d(*pair)) for pair in both
    )
  counts = np.bincount(np.concatenate(cohorts), minlength=clients)
  np.testing.assert_array_equal(seen._times, counts)


def test_chances_of_a_false_alarm():
  """Bets gain nothing on average; overlaps' bound is one; in all below 1e-9."""
  for rate, trials in ((0.01, 300), (0.3, 40), (0.9, 40)):
    seen = overlaps.Overlaps(10, rate)
    count = np.arange(trials + 1)
    chance = stats.binom.logpmf(count, trials, rate)
    assert np.exp(chance + seen._gain(count, trials)).sum() <= 1
    tail = stats.binom.sf(count - 1, trials, rate)
    surprise = seen._surprise(count, np.full_like(count, trials))
    assert (surprise <= count * -np.log(rate) + 1e-9).all()  # `see` skips by it
    bound = np.exp(-surprise)
    assert (tail <= bound * (1 + 1e-9)).all()
    if rate * 1000 >= 1:  # one cohort of a fixed size, and another one
      drawn = stats.hypergeom.sf(count - 1, 1000, trials, int(1000 * rate))
      assert (drawn <= bound * (1 + 1e-9)).all()
  sequences = promises._FIRST + 2  # several seeds', and the run's own
  resumed = 50
  alarm = 8 * promises._ALARM + (sequences + resumed) * 3 * overlaps.ALARM
  assert alarm < 1e-9


@pytest.mark.parametrize("name", slow_but(["poisson"], ["poisson", "uniform"]))
def test_false_alarms_are_as_few_as_is_said(name, monkeypatch):
  """With an alarm of 0.1 each of three tests, of 300 runs 0.3 at the most."""
  monkeypatch.setattr(overlaps, "ALARM", 0.1)
  sampler = getattr(sampling, name)(30, 6)

  def refused(seed):
    seen = overlaps.Overlaps(30, 0.2)
    return any(seen.see(sampler.sample(seed, r)) for r in range(80))

  times = sum(refused(seed) for seed in range(300))
  assert 0 < times <= stats.binom.ppf(1 - 1e-6, 300, 0.3)


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
  settings = CentralDPConfig(
    clip_norm=1.0, noise_multiplier=1.0, denominator=2.0
  )
  made = Simulator(
    task=quadratic(2),
    algorithm=with_central_dp(algorithm, settings),
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
  plain = dataclasses.replace(made, algorithm=algorithm, budget=None)
  plain.plan(4, 2)  # no epsilon counts on it
  # What a client reports in all, and how much noise a cohort adds, do.
  by_clients = with_local_dp(algorithm, gaussian(1.0, delta=1e-3, stddev=5.0))
  together = secure_mean(2, clip=1.0, noise_multiplier=1.0)
  for parts in ({"algorithm": by_clients}, {"aggregator": together}):
    noisy = dataclasses.replace(plain, **parts)
    noisy.plan(4, 1)
    with pytest.raises(ValueError, match=r"period=2, .* rounds 5 and 6"):
      noisy.plan(5, 1)


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
  sampling_ = {"sampler.name": f"{tmp_path / 'own.py'}:{name}"}
  with pytest.raises(ValueError, match=words):
    build(flags.load(str(DIGITS), PRIVATE | sampling_))
