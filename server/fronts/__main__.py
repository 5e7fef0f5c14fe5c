"""`python -m server.fronts`: a front process, started by the core only."""

import sys

from server.fronts.process import run

if __name__ == "__main__":
    run(*sys.argv[1:])
