"""Tiny Shakespeare by speaking role: which character comes next?

40,000 lines of Shakespeare's plays (A. Karpathy, 2015), in LEAF's JSON; roles
as clients follow McMahan et al. (2017, arXiv 1602.05629).
"""

from __future__ import annotations

import os

from fedjax_sim.core import validate
from fedjax_sim.data.batch_steps import prepare_ids
from fedjax_sim.data.dataset import FederatedDataset
from fedjax_sim.data.federated import FederatedData
from fedjax_sim.data.leaf_format import read_users
from fedjax_sim.data.location import find, locate
from fedjax_sim.data.splits import Clients, make_dataset
from fedjax_sim.data.text import encode, next_characters


def load_shakespeare(
  *,
  path: str | os.PathLike[str] | None = None,
  sequence_length: int = 80,
  vocabulary: str | None = None,
  min_characters: int = 500,
  heldout_fraction: float = 0.2,
  unseen_clients: Clients = 0,
  min_examples: int = 1,
  seed: int = 0,
) -> FederatedDataset:
  """Load speaking roles; a role's speeches, joined by line breaks, are a text.

  A text is cut into sequences that do not overlap; the last is padded with 0.
  A held-out sequence lies between sequences that its role trains on.

  Fields: x, (sequence_length,), uint8, ids of characters, from 1; y, the same
  shape and dtype, the id of the character after each of x, 0 where there is
  none, which is no label to learn. Classes are the characters and 0.

  Args:
    path: the folder that holds `tinyshakespeare/`; relative to
      the working folder, or else to the folder that FEDJAX_SIM_DATA names.
    sequence_length: characters of an example.
    vocabulary: all characters; the first has id 1. None: those of all roles
      that are kept, sorted.
    min_characters: roles with fewer are left out, and those with fewer than
      two in any case, as the next one is predicted.
    heldout_fraction: see `make_dataset`; of each role's sequences.
    unseen_clients: clients that never train, for the metrics `unseen/...`: a
      number, a fraction below 1, or names.
    min_examples: roles with fewer sequences are left out.
    seed: of the splits.

  Raises:
    FileNotFoundError: the file is missing.
    TypeError, ValueError: it is damaged, no role is left, a character is not
      in `vocabulary`, or an option is refused.
  """
  length = validate.integer("data.sequence_length", sequence_length)
  fewest = validate.integer("data.min_characters", min_characters, ge=0)
  file = find(locate(path) / "tinyshakespeare", "roles_leaf.json.gz")
  texts, where = {}, {}
  for role, user in read_users(file).items():
    for speech in user.x:
      if not isinstance(speech, str):
        raise ValueError(
          f"{user.where}: x holds {speech!r}; expected text, a speech."
        )
    text = "\n".join(user.x)
    if len(text) >= max(fewest, 2):
      texts[role], where[role] = text, user.where
  if not texts:
    raise ValueError(
      f"data.min_characters={fewest} leaves no role of {file}, where it needs 2"
      " characters in any case; lower it."
    )
  ids, vocabulary = encode(texts, vocabulary, where)
  clients = {role: next_characters(ids[role], length) for role in ids}
  return make_dataset(
    "shakespeare",
    FederatedData.from_clients(clients),
    num_classes=len(vocabulary) + 1,
    heldout_fraction=heldout_fraction,
    unseen_clients=unseen_clients,
    min_examples=min_examples,
    seed=seed,
    prepare=prepare_ids,
  )
