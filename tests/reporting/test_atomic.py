"""Files appear whole or not at all."""

import os

import pytest

from fedjax_sim.reporting import write_atomically


def test_replaces_the_content_and_leaves_nothing_else(tmp_path):
  path = tmp_path / "a.txt"
  write_atomically(path, b"old")
  write_atomically(path, b"new")
  assert path.read_bytes() == b"new"
  assert os.listdir(tmp_path) == ["a.txt"]


def test_a_kill_before_the_rename_leaves_the_old_content(tmp_path, monkeypatch):
  path = tmp_path / "a.txt"
  write_atomically(path, b"old")

  def killed(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
      write_atomically(path, b"new")
  assert path.read_bytes() == b"old"
  write_atomically(path, b"newer")
  assert os.listdir(tmp_path) == ["a.txt"]


def test_a_missing_folder_is_named(tmp_path):
  path = tmp_path / "missing" / "a.txt"
  with pytest.raises(FileNotFoundError, match=f"cannot write {path}"):
    write_atomically(path, b"")


def test_a_file_in_the_folders_place_is_named(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(NotADirectoryError, match="cannot write"):
    write_atomically(tmp_path / "file" / "a.txt", b"")
