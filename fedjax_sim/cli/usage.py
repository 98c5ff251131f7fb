"""Usage of the command line; needs no JAX."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

USAGE = """\
fedjax-sim: federated learning, simulated.

  fedjax-sim run --config=FILE --workdir=DIR [--config.SECTION.FIELD=VALUE ...]
      trains; on the workdir of a run, goes on with it: until its end, or, with
      more --config.server.rounds, beyond
      --branch-from=DIR[:ROUND]: begins at a checkpoint of another run
      --workdir=URL: in a bucket, such as s3://bucket/run
      --sync-to=URL: copies DIR to a bucket after each checkpoint
      --profile: where its time went, FLOP/s, and a trace in DIR/profile
      --distributed=auto|HOST:PORT,PROCESS,COUNT: as one process of several
  fedjax-sim launch --processes=N -- run --config=FILE --workdir=DIR ...
      trains in several processes on this machine
  fedjax-sim verify --workdir=DIR
      executes a run's rounds again and compares with what it left: 0 if every
      bit equals, else 1
      --rounds=checkpoints: those between two checkpoints; all; or FROM-TO
      --data-path=PATH: where the data lie now
  fedjax-sim describe --config=FILE [--config.SECTION.FIELD=VALUE ...]
      what would run: config, sizes, predicted memory
  fedjax-sim plan --config=FILE --devices=N --link-gbps=G --flops=F|measure
      time, network and memory of a round on N devices, predicted: each
      sustains F FLOP/s and sends G gigabits a second to the others
      --host-gbps=H: it gets H from its host, if that is not G
      --memory-gbps=M: it reads and writes M of its memory, if that counts
  fedjax-sim check FILE.py:NAME [--config.SECTION.FIELD=VALUE ...]
      puts an algorithm, aggregator, transform, sampler or model of your own
      through the contract tests, in a tiny federation: lanes, devices, order
      and absence of clients, padding, NaN, resume, dtypes, weights under
      privacy: 0 if none fails, else 1
      FILE.py alone: its only part, or which ones it has
      --kind=aggregator: what it is, if it does not show
      --config=FILE: with the data and the model of a config
  fedjax-sim report --workdir=DIR [--workdir=DIR ...] [--to=FILE.html]
      writes DIR/report.html of a run, finished or not, or compares several
      --style=paper: curves a column wide, as PDF, SVG or PNG; of
      --metrics=test/accuracy,... alone
  fedjax-sim study --config=FILE --studydir=DIR --vary FIELD=VALUES ...
      trains many runs as rows of a few compiled programs: all combinations;
      on the folder of a study, goes on with it
      VALUES: a,b,c, linear(0,1,5) or log(0.01,1,5); --seeds=N, or --seeds=3,7
      --random=N [--search-seed=S]: N points drawn instead, also from
      uniform(0,1) or loguniform(0.01,1); --points=FILE: those of a JSON or CSV
      --halving=N: after more and more rounds one of N settings goes on
      --vary "leave_out=clients()": all clients, and without each of them, or
      groups(0:8,8:16): their influence; --shapley=M: also Shapley values
      --metric=test/accuracy: by which settings are compared
      --plan: only says what it would take
  fedjax-sim compare DIR DIR ... [--metric=test/accuracy] [--to=FOLDER]
      how the settings of runs, or of a study, differ, paired over the seeds
      that they share: intervals, tests, seeds needed; tables, curves, a page
      --at=last|best|ROUND: the value of a run that counts
      --target=VALUE: to count rounds and bytes to
      --baseline=SETTING: to compare all others with
      --lower_is_better, --higher_is_better: of a metric of your own
      --confidence=0.95: of all intervals
  fedjax-sim privacy epsilon|calibrate|curve --population=N --delta=D ...
      what --clients-per-round=C, --rounds=T and --noise-multiplier=Z cost;
      with --epsilon=E calibrate finds the one of them that is left out;
      curve draws both into --out=DIR
      --sampling=poisson, --noise=gaussian, --accountant=pld: or others
  fedjax-sim privacy compose DIR DIR ... --delta=D
      what the private runs in these workdirs, on the same data, cost together
  fedjax-sim data import --format=FORMAT --train=PATH --store=DIR
      writes the clients of LEAF's, FLUTE's, TFF's, FedJAX's files, or of
      tables, as a client store; docs/importing.md tells more of the flags
      FORMAT: csv, datasets, fedjax_sqlite, flute_hdf5, json_lines, leaf_json,
      mind, npz, parquet or tff_hdf5
      --client=COLUMN of a table; --fields=x:FROM,y:FROM, --dtypes=x:uint8
      --delimiter=";", --decimal=, of csv
      --news=NPZ, --clicked=N, --candidates=N, --negatives=N, --seed=N of mind
      --text=characters|words|tff_characters|tokens|token_texts: what x becomes;
      --vocabulary=STORE|JSON|TXT, --vocabulary-size=N, --sequence-length=N; of
      words --unmarked, --case-backoff, --min-characters=N;
      of tokens --tokenizer=FILE, --padding-token=TOKEN
      --map=FILE.py:FUNCTION, --prepare=bytes, --num-classes=N, --name=NAME
      --seen, --unseen, --labelled, --unlabelled, --test, --server: paths of
      more splits
  fedjax-sim data import --config=FILE --store=DIR
      writes the config's data set as a client store
  fedjax-sim data info --store=DIR
      clients, examples, classes; --out=PNG draws them
      --verify reads all of it and compares checksums
  fedjax-sim data partition --store=DIR --to=DIR
      writes a store with other clients (--partition=dirichlet, ...,
      --num-clients=N) or splits (--heldout-fraction, --unseen-clients)
      --alpha, --exponent, --shards-per-client, --min-examples, --seed;
      docs/config.md has the partitions
  fedjax-sim data copy --store=URL --to=DIR
      fetches a store from a bucket; --store=DIR --to=URL sends one
  fedjax-sim data export --store=DIR --format=FORMAT --to=FILE
      writes a split of a store (--split=train) as a file: fedjax_sqlite,
      flute_hdf5, leaf_json, npz, parquet or tff_hdf5
  fedjax-sim export --workdir=DIR --to=FILE
      writes the model of a run, and its config as JSON beside it: weights as
      .safetensors, .npz or .msgpack, or predictions as a program, .stablehlo
      --merged: weights with the adapters multiplied in
      --layout=hugging_face|peft: a folder instead, which PyTorch's libraries
      load: a transformer, its adapters multiplied in, or the adapters alone
      --round=best|best/METRIC|N: of the best evaluation, or of a checkpoint
      --data-path=PATH: where the data lie now; it takes them
  fedjax-sim flute --config=FILE.yaml --workdir=DIR
      translates a config of FLUTE, shows what becomes of every key, and runs
      it; DIR/config.py is the translation
      --task=NAME: FLUTE's experiment, if model_folder does not name it
      --data=STORE: its data, as data import writes them
      --compat=flute: with FLUTE's arithmetic where it is not the papers'
      --translate_only [--to=FILE.py]: without the run
  fedjax-sim list [KIND [NAME]]
      algorithms, aggregators, transforms, models, data sets, ..., or those
      of a kind, or the fields of one, with defaults and meanings

--version names the version.
--debug shows a traceback with every error.
"""
_NO_CACHE = """\
--no-compilation-cache: neither keeps compiled programs in ~/.cache/fedjax_sim
nor looks for them there.
"""
USAGE += _NO_CACHE
# Commands that keep compiled programs, or start one that does.
_COMPILES = ("run", "launch", "describe", "plan", "study", "flute")


def usage_of(arguments: Sequence[str]) -> str:
  """Return the usage of the command before --help, or of all commands."""
  words = list(itertools.takewhile(str.isalpha, arguments))
  entries = re.split(r"^(?=  fedjax-sim )", USAGE, flags=re.MULTILINE)
  for count in range(len(words), 0, -1):
    name = " ".join(["  fedjax-sim", *words[:count]])
    found = [e for e in entries if re.match(rf"{name}\b", e)]
    if found:
      usage = "".join(found).partition("\n\n")[0].rstrip()
      compiles = words[0] in _COMPILES
      return f"{usage}\n\n{_NO_CACHE}".rstrip() if compiles else usage
  return USAGE
