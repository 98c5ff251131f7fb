"""Train a small tokenizer on texts, for `fedjax-sim data import`.

python docs/examples/train_tokenizer.py TEXTS.jsonl.gz FIELD TOKENIZER.json SIZE
"""

import gzip
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

SPECIAL = ["[PAD]", "[MASK]", "[BEGIN]", "[END]"]  # ids 0, 1, 2, 3


def train(texts, size):
  """Return a byte-level BPE that begins and ends each text."""
  tokenizer = Tokenizer(BPE())
  tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
  trainer = BpeTrainer(
    vocab_size=size,
    special_tokens=SPECIAL,
    initial_alphabet=ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(texts, trainer)
  tokenizer.post_processor = TemplateProcessing(
    single="[BEGIN] $A [END]", special_tokens=[("[BEGIN]", 2), ("[END]", 3)]
  )
  return tokenizer


if __name__ == "__main__":
  source, field, target, size = sys.argv[1:]
  with gzip.open(source, "rt", encoding="utf-8") as lines:
    texts = [json.loads(line)[field] for line in lines]
  tokenizer = train(texts, int(size))
  Path(target).parent.mkdir(parents=True, exist_ok=True)
  tokenizer.save(target)
  count = sum(len(e.ids) for e in tokenizer.encode_batch(texts))
  print(f"{target}: {tokenizer.get_vocab_size()} tokens, {count} in the texts")
