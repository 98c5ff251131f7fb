"""`python -m fedjax_sim`: the command line, see `fedjax_sim.cli.main`."""

import sys

from fedjax_sim.cli.main import main

if __name__ == "__main__":
  sys.exit(main())
