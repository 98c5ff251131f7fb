"""Checkpoints are whole, verified and kept in order, or said to be damaged."""

import contextlib
import errno
import os
import random
import resource
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim.core.digests import digest, tree_digest
from fedjax_sim.core.errors import one_line
from fedjax_sim.run.checkpoint import CheckpointError, Checkpoints
from fedjax_sim.run.checkpoint_files import first_line
from fedjax_sim.run.checkpoint_reader import CheckpointReader, StateChangedError


@pytest.fixture
def open_checkpoints(tmp_path):
  """Opens tmp_path/checkpoints, again and again if need be."""
  with contextlib.ExitStack() as stack:

    def opened(keep=2, snapshot_every=None):
      checkpoints = Checkpoints(
        tmp_path / "checkpoints", keep=keep, snapshot_every=snapshot_every
      )
      return stack.enter_context(contextlib.closing(checkpoints))

    yield opened


@contextlib.contextmanager
def full_disk(size):
  """No file grows beyond `size` bytes: what a full disk does, without root."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def state_of(round_):
  """A state of many dtypes and shapes, some of them empty."""
  rng = np.random.default_rng(round_)
  return {
    "round": jnp.int32(round_),
    "params": (
      jnp.asarray(rng.normal(size=(3, 4)), jnp.float32),
      jnp.asarray(rng.normal(size=(5,)), jnp.bfloat16),
    ),
    "mask": jnp.asarray(rng.random(7) < 0.5),
    "no elements": jnp.zeros((2, 0)),
    "no leaves": ((), {}, None),
  }


LIKE = jax.eval_shape(lambda: state_of(0))


def same(a, b):
  assert str(jax.tree.structure(a)) == str(jax.tree.structure(b))
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    assert x.shape == y.shape
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def flip(path, position):
  content = bytearray(path.read_bytes())
  content[position] ^= 0x10
  path.write_bytes(content)


def test_what_was_saved_comes_back(open_checkpoints):
  facts = {"seconds": 0.1 + 0.2, "lanes": [4, "as given"], "none": None}
  open_checkpoints().save(3, state_of(3), facts)
  restored = open_checkpoints().restore(LIKE, pytest.fail)
  assert restored.round == 3
  assert restored.facts == facts
  same(restored.state, state_of(3))


@pytest.mark.parametrize("state", [(), {"a": jnp.zeros((0, 3))}, {"b": None}])
def test_a_state_without_any_element(open_checkpoints, state):
  checkpoints = open_checkpoints()
  checkpoints.save(0, state, {})
  same(checkpoints.restore(state, pytest.fail).state, state)


def test_nothing_to_restore_is_no_warning(open_checkpoints):
  assert open_checkpoints().restore(LIKE, pytest.fail) is None


@pytest.mark.parametrize(("keep", "kept"), [(1, [6, 9]), (3, [4, 6, 9])])
def test_keeps_the_newest_and_two_at_least(open_checkpoints, keep, kept):
  checkpoints = open_checkpoints(keep)
  for round_ in (0, 4, 6, 9):
    checkpoints.save(round_, state_of(round_), {})
  assert checkpoints.rounds() == kept
  assert open_checkpoints(keep).rounds() == kept


@pytest.mark.parametrize(
  ("keep", "every", "kept"),
  [
    (2, 4, [0, 4, 8, 9, 10]),
    (3, 3, [0, 3, 6, 8, 9, 10]),
    (2, 1, [0, 3, 4, 6, 8, 9, 10]),
    (2, 99, [0, 9, 10]),
    (2, None, [9, 10]),
  ],
)
def test_snapshots_stay_beside_the_newest(open_checkpoints, keep, every, kept):
  checkpoints = open_checkpoints(keep, every)
  for round_ in (0, 3, 4, 6):
    checkpoints.save(round_, state_of(round_), {})
  checkpoints = open_checkpoints(keep, every)  # as a run that goes on does
  for round_ in (8, 9, 10):
    checkpoints.save(round_, state_of(round_), {})
  assert checkpoints.rounds() == kept
  same(checkpoints.restore(LIKE, pytest.fail).state, state_of(10))


def test_another_number_of_snapshots_holds_from_the_next_save_on(
  open_checkpoints,
):
  checkpoints = open_checkpoints(2, 2)
  for round_ in (0, 2, 3, 4, 6):
    checkpoints.save(round_, state_of(round_), {})
  assert checkpoints.rounds() == [0, 2, 4, 6]
  checkpoints = open_checkpoints(2, 4)
  assert checkpoints.rounds() == [0, 2, 4, 6]
  checkpoints.save(7, state_of(7), {})
  assert checkpoints.rounds() == [0, 4, 6, 7]


def test_falls_back_one_after_the_other(open_checkpoints, tmp_path):
  checkpoints = open_checkpoints(keep=4)
  for round_ in (0, 10, 20):
    checkpoints.save(round_, state_of(round_), {})
  for damaged, left in ((20, 10), (10, 0)):
    path = tmp_path / "checkpoints" / str(damaged) / "record" / "metadata"
    flip(path, 30)
    warnings: list[str] = []
    restored = checkpoints.restore(LIKE, warnings.append)
    (warning,) = warnings
    assert f"round {damaged} is damaged" in warning
    assert warning.endswith(f"falling back to that of round {left}.")
    assert restored.round == left
    same(restored.state, state_of(left))


def test_without_a_whole_one_nothing_begins_anew(open_checkpoints, tmp_path):
  checkpoints, folder = open_checkpoints(keep=4), tmp_path / "checkpoints"
  for round_ in (0, 10):
    checkpoints.save(round_, state_of(round_), {})
    flip(folder / str(round_) / "record" / "metadata", 30)
  for _ in range(2):
    with pytest.raises(CheckpointError) as caught:
      open_checkpoints().restore(LIKE, pytest.fail)
    message = str(caught.value)
    assert f"No checkpoint in {folder} is whole (round 10: the SHA-2" in message
    assert "round 0: the SHA-256 of record/metadata differs" in message
    assert "another --workdir" in message
    assert "\n" not in message
    assert sorted(os.listdir(folder)) == ["0", "10"]
  flip(folder / "0" / "record" / "metadata", 30)  # mended
  assert open_checkpoints().restore(LIKE, lambda _: None).round == 0


def test_what_was_set_aside_is_no_beginning(open_checkpoints, tmp_path):
  checkpoints, folder = open_checkpoints(), tmp_path / "checkpoints"
  checkpoints.save(10, state_of(10), {})
  os.rename(folder / "10", folder / "10.damaged")
  with pytest.raises(CheckpointError, match=r"10\.damaged was set aside"):
    checkpoints.restore(LIKE, pytest.fail)


def test_rounds_after_a_fallback_are_written_again(open_checkpoints, tmp_path):
  checkpoints = open_checkpoints(keep=2)
  for round_ in (10, 20, 30):
    checkpoints.save(round_, state_of(round_), {})
  shutil.rmtree(tmp_path / "checkpoints" / "30" / "state")
  assert checkpoints.restore(LIKE, lambda _: None).round == 20
  # Until something is saved, what is damaged stays for whoever can mend it.
  assert checkpoints.rounds() == [20]
  assert sorted(os.listdir(tmp_path / "checkpoints")) == ["20", "30.damaged"]
  checkpoints.save(25, state_of(25), {})
  assert sorted(os.listdir(tmp_path / "checkpoints")) == ["20", "25"]
  checkpoints.save(30, state_of(30), {})
  assert checkpoints.rounds() == [25, 30]
  same(checkpoints.restore(LIKE, pytest.fail).state, state_of(30))


def test_a_round_can_be_saved_twice(open_checkpoints):
  checkpoints = open_checkpoints()
  checkpoints.save(5, state_of(1), {})
  checkpoints.save(5, state_of(2), {})
  same(checkpoints.restore(LIKE, pytest.fail).state, state_of(2))


def check_damage(checkpoints, folder, what):
  """The newest checkpoint, of round 2, gives way to the one before."""
  warnings: list[str] = []
  restored = checkpoints.restore(LIKE, warnings.append)
  assert ["round 2 is damaged" in w for w in warnings] == [True], what
  assert restored.round == 1, what
  assert restored.facts == {"round": 1}, what
  same(restored.state, state_of(1))
  assert checkpoints.rounds() == [1]
  os.rename(folder / "2.damaged", folder / "2")  # for another try


@pytest.fixture
def folder(tmp_path):
  return tmp_path / "checkpoints"


@pytest.fixture
def two(open_checkpoints):
  """Checkpoints of rounds 1 and 2."""
  checkpoints = open_checkpoints()
  for round_ in (1, 2):
    checkpoints.save(round_, state_of(round_), {"round": round_})
  return checkpoints


def damage_every_file(checkpoints, folder, damages):
  """Damages every file of the newest checkpoint in every way."""
  files = sorted(p for p in (folder / "2").rglob("*") if p.is_file())
  for path in files:
    content = path.read_bytes()
    for damage in damages(path):
      damage()
      check_damage(checkpoints, folder, path)
      path.write_bytes(content)
  assert len(files) > 10
  same(checkpoints.restore(LIKE, pytest.fail).state, state_of(2))


def test_a_flipped_byte_in_any_file(two, folder):
  rng = random.Random(0)

  def damages(path):
    for _ in range(3):
      yield lambda: flip(path, rng.randrange(path.stat().st_size))

  damage_every_file(two, folder, damages)


@pytest.mark.slow
def test_every_flipped_byte(two, folder):
  def damages(path):
    for position in range(path.stat().st_size):
      yield lambda: flip(path, position)  # noqa: B023 - called at once

  damage_every_file(two, folder, damages)


def test_a_truncated_or_missing_file(two, folder):
  def damages(path):
    size = path.stat().st_size
    for left in (0, size // 2, size - 2):  # a last newline may go
      yield lambda: os.truncate(path, left)  # noqa: B023 - called at once
    yield path.unlink

  damage_every_file(two, folder, damages)


def test_a_file_too_many(two, folder):
  (folder / "2" / "state" / "d" / "more").write_bytes(b"")
  check_damage(two, folder, "more")


@pytest.mark.parametrize("what", ["state", "record", "state/d"])
def test_a_missing_folder(two, folder, what):
  shutil.rmtree(folder / "2" / what)
  check_damage(two, folder, what)


def test_a_missing_checkpoint_is_no_damage(two, tmp_path):
  shutil.rmtree(tmp_path / "checkpoints" / "2")
  same(two.restore(LIKE, pytest.fail).state, state_of(1))


def test_leaves_that_orbax_gives_back_wrong(two, folder, monkeypatch):
  """The files are whole, and yet a value is not what was saved."""
  load = CheckpointReader._load

  def wrong(self, round_, item, how):
    loaded = load(self, round_, item, how)
    if item == "state" and round_ == 2:
      key = max(loaded, key=lambda k: loaded[k].size)
      loaded[key] = np.nextafter(loaded[key], 9)
    return loaded

  monkeypatch.setattr(CheckpointReader, "_load", wrong)
  check_damage(two, folder, "a leaf")


def test_a_checkpoint_under_another_name_is_damaged(open_checkpoints, tmp_path):
  checkpoints = open_checkpoints()
  checkpoints.save(1, state_of(1), {})
  shutil.copytree(
    tmp_path / "checkpoints" / "1", tmp_path / "checkpoints" / "7"
  )
  warnings: list[str] = []
  assert checkpoints.restore(LIKE, warnings.append).round == 1
  assert "round 7 is damaged (it is of round 1)" in warnings[0]


@pytest.mark.parametrize(
  "like",
  [
    {"a": jax.ShapeDtypeStruct((3,), jnp.float32)},
    {"w": jax.ShapeDtypeStruct((4,), jnp.float32)},
    {"w": jax.ShapeDtypeStruct((3,), jnp.bfloat16)},
    [jax.ShapeDtypeStruct((3,), jnp.float32)],
  ],
)
def test_another_state_is_refused_and_nothing_lost(open_checkpoints, like):
  checkpoints = open_checkpoints()
  checkpoints.save(1, {"w": jnp.zeros(3)}, {})
  with pytest.raises(StateChangedError, match=r"round 1 .* other leaves"):
    checkpoints.restore(like, pytest.fail)
  restored = checkpoints.restore({"w": jnp.zeros(3)}, pytest.fail)
  assert restored.round == 1


def test_what_a_kill_left_is_removed(open_checkpoints, tmp_path):
  open_checkpoints().save(1, state_of(1), {})
  folder = tmp_path / "checkpoints"
  for left in ("2.unfinished", "2.unfinished.orbax-checkpoint-tmp"):
    shutil.copytree(folder / "1", folder / left)
  assert open_checkpoints().rounds() == [1]
  assert os.listdir(folder) == ["1"]


class KilledError(BaseException):
  pass


@pytest.mark.parametrize("when", ["orbax", "sums", "rename"])
def test_a_kill_while_saving(open_checkpoints, monkeypatch, when):
  def killed(*_, **__):
    raise KilledError

  checkpoints = open_checkpoints()
  checkpoints.save(1, state_of(1), {"round": 1})
  where = {
    "orbax": "orbax.checkpoint.Checkpointer.save",
    "sums": "fedjax_sim.run.checkpoint.write_json",
    "rename": "fedjax_sim.run.checkpoint.os.rename",
  }
  with monkeypatch.context() as patch:
    patch.setattr(where[when], killed)
    with pytest.raises(KilledError):
      checkpoints.save(2, state_of(2), {"round": 2})
  checkpoints = open_checkpoints()
  same(checkpoints.restore(LIKE, pytest.fail).state, state_of(1))
  checkpoints.save(2, state_of(2), {"round": 2})
  same(checkpoints.restore(LIKE, pytest.fail).state, state_of(2))


def test_a_full_disk_leaves_the_one_before(open_checkpoints, tmp_path):
  rng = np.random.default_rng(0)
  large = {name: rng.normal(size=20_000) for name in "abcdef"}
  checkpoints = open_checkpoints()
  checkpoints.save(1, jax.tree.map(np.zeros_like, large), {})
  with (
    full_disk(50_000),
    pytest.raises(
      CheckpointError,
      match=r"round 2 .*: File too large\. That of round 1 is intact\. Make",
    ),
  ):
    checkpoints.save(2, large, {})
  assert os.listdir(tmp_path / "checkpoints") == ["1"]
  assert not checkpoints.restore(large, pytest.fail).state["a"].any()
  checkpoints.save(2, large, {})
  same(checkpoints.restore(large, pytest.fail).state, large)


def test_what_is_called_intact_is(two, folder):
  flip(folder / "2" / "record" / "metadata", 30)
  assert two.restore(LIKE, lambda _: None).round == 1
  with full_disk(1), pytest.raises(CheckpointError, match="round 1 is intact"):
    two.save(3, state_of(3), {})
  assert sorted(os.listdir(folder)) == ["1", "2.damaged"]


def test_the_first_checkpoint_on_a_full_disk(open_checkpoints, tmp_path):
  checkpoints = open_checkpoints()
  with full_disk(100), pytest.raises(CheckpointError) as caught:
    checkpoints.save(0, state_of(0), {})
  assert str(tmp_path / "checkpoints") in str(caught.value)
  assert "intact" not in str(caught.value)
  assert os.listdir(tmp_path / "checkpoints") == []


def test_digests_see_values_dtypes_and_shapes():
  x: np.ndarray = np.arange(6, dtype=np.float32)
  others: list[np.ndarray] = [
    x.astype(np.float64),
    x.view(np.int32),
    x.reshape(2, 3),
    np.where(x == 5, np.nextafter(x, 9), x).astype(np.float32),
    x[:0],
  ]
  assert len({digest(a) for a in [x, *others]}) == 6
  assert digest(np.asarray(np.float32(1))) == digest(np.ones((), np.float32))
  assert digest(x.reshape(2, 3).T) == digest(np.array(x.reshape(2, 3).T))
  assert tree_digest({"a": x, "b": x[:2]}) == tree_digest([x, x[:2]])
  assert tree_digest([x, x[:2]]) != tree_digest([x[:2], x])
  assert tree_digest([jnp.ones(2, jnp.bfloat16)]) != tree_digest(
    [jnp.ones(2, jnp.float16)]
  )


# --- in a thread --------------------------------------------------------------


@pytest.fixture
def held(monkeypatch):
  """Checkpoints take their names when this event is set."""
  opened, rename = threading.Event(), os.rename

  def later(*paths):
    assert opened.wait(60)
    rename(*paths)

  monkeypatch.setattr("fedjax_sim.run.checkpoint.os.rename", later)
  return opened


def test_a_thread_writes_what_the_state_was(open_checkpoints, folder, held):
  checkpoints = open_checkpoints()
  commits = []
  checkpoints.on_commit = lambda round_: commits.append(
    (round_, checkpoints.rounds())
  )
  x: np.ndarray = np.arange(1000.0)
  checkpoints.save_later(1, {"x": x}, {})
  x[:] = 0  # as the next round does that uses the state up
  assert checkpoints.rounds() == []
  assert commits == []
  held.set()
  checkpoints.save_later(2, {"x": x}, {})
  assert checkpoints.rounds()[0] == 1  # it was waited for
  checkpoints.wait()
  assert commits == [(1, [1]), (2, [1, 2])]
  like = {"x": x}
  assert not checkpoints.restore(like, pytest.fail).state["x"].any()
  shutil.rmtree(folder / "2")
  restored = checkpoints.restore(like, pytest.fail).state["x"]
  np.testing.assert_array_equal(restored, np.arange(1000.0))


@pytest.mark.parametrize(
  "then", [Checkpoints.wait, lambda x: x.save_later(3, state_of(3), {})]
)
def test_the_next_call_raises_what_a_thread_could_not(open_checkpoints, then):
  checkpoints = open_checkpoints()
  checkpoints.save(1, state_of(1), {})
  with full_disk(1):
    checkpoints.save_later(2, state_of(2), {})
    with pytest.raises(CheckpointError, match="round 1 is intact"):
      then(checkpoints)
  checkpoints.save(3, state_of(3), {})  # it is raised once
  assert checkpoints.rounds() == [1, 3]


def test_closing_waits_for_the_commit(tmp_path, held):
  checkpoints = Checkpoints(tmp_path, keep=2)
  checkpoints.save_later(1, state_of(1), {})
  threading.Timer(0.2, held.set).start()
  checkpoints.close()
  assert checkpoints.rounds() == [1]


def test_what_an_error_says_of_itself():
  """One line of 200 characters at most, and no number alone."""
  gone = FileNotFoundError(errno.ENOENT, "No such file", "/run/4/sha256.json")
  assert first_line(gone) == "sha256.json is gone"
  assert first_line(OSError(errno.ENOSPC, "No space left")) == "No space left"
  assert one_line(gone) == "/run/4/sha256.json: No such file"
  told = 'NOT_FOUND: Error opening "zarr" driver'
  spec = f"{told} [tensorstore_spec='{{}}'] [source locations='a.cc:1\nb']"
  assert first_line(ValueError(spec)) == told
  long = first_line(ValueError("many words " * 40))
  assert 150 < len(long) <= 200
  assert long.endswith((" words...", " many..."))
  assert first_line(ValueError("x" * 300)) == "x" * 197 + "..."
  assert first_line(ValueError()) == "ValueError"
