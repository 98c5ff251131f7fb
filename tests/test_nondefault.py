"""Fields that differ from their defaults, and the file that gives them."""

import json
import pathlib

import pytest

from fedjax_sim import config as configs
from fedjax_sim.config import flags
from fedjax_sim.config.completion import complete
from fedjax_sim.config.defaults import default_config
from fedjax_sim.config.nondefault import Change, changes, config_file
from tiers import slow_but

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
FILES = sorted(p.name for p in CONFIGS.glob("*.py") if p.name[0] != "_")
CHAINED = {
  "transforms.first.name": "gaussian",
  "transforms.first.stddev": "0.1",
  "transforms.clip.norm": "1.0",
  "transforms.order": "('first', 'clip')",
  "server.layer_rates": "(('dense*', 0.5),)",
  "data.unseen_clients": "('a \"b\"', 'ü')",
}


def resolved(name, fields=None):
  return configs.resolved(complete(flags.load(str(CONFIGS / name), fields)))


def test_the_default_config_changes_nothing():
  assert changes(configs.resolved(complete(default_config()))) == []


def test_changes_are_those_of_the_file():
  found = changes(resolved("digits_fedavg.py", {"client.momentum": "0.5"}))
  assert Change("client.momentum", 0.5, None) in found
  assert Change("client.epochs", 5, 1) in found
  assert Change("data.alpha", 1.0, 0.5) in found  # of the partition
  assert Change("model.name", "mlp", "logistic_regression") in found
  assert not [c for c in found if c.field in ("data.name", "algorithm.name")]


def test_trackers_are_removed_and_added(tmp_path):
  config = default_config()
  del config.trackers["tensorboard"]
  config.trackers["mine"] = {"name": "mlflow", "wait": 5.0}
  tree = configs.resolved(complete(config))
  found = changes(tree)
  assert Change("trackers.mine.wait", 5.0, 30.0) in found
  assert {c.field for c in found} == {
    "trackers.mine.name",
    "trackers.mine.wait",
  }
  path = tmp_path / "repeat.py"
  path.write_text(config_file(tree))
  assert configs.resolved(complete(flags.load(str(path)))) == tree


def test_components_of_others_have_no_defaults():
  """A user's file is not read, and a name may be of another version."""
  tree = resolved("digits_fedavg.py")
  tree["model"] |= {"name": "missing.py:mine", "depth": 3}
  tree["sampler"] = {"name": "gone", "odds": 0.5}
  fields = {change.field for change in changes(tree)}
  assert {"model.depth", "sampler.name", "sampler.odds"} <= fields


@pytest.mark.parametrize("fields", [{}, CHAINED], ids=["", "chained"])
@pytest.mark.parametrize("name", slow_but(["digits_fedavg.py"], FILES))
def test_the_file_gives_the_same_config(tmp_path, name, fields):
  own = resolved(name)["data"]  # not every data set has clients to set apart
  fields = {
    key: value
    for key, value in fields.items()
    if not key.startswith("data.") or key.removeprefix("data.") in own
  }
  tree = resolved(name, fields)
  path = tmp_path / "repeat.py"
  path.write_text(config_file(tree), encoding="utf-8")
  again = configs.resolved(complete(flags.load(str(path))))
  assert json.dumps(again, sort_keys=True) == json.dumps(tree, sort_keys=True)
