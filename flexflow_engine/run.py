"""`python -m flexflow_engine.run RECIPE`: the same as `python -m flexflow_engine run RECIPE`."""

import sys

from flexflow_engine.cli.app import main

if __name__ == "__main__":
    main(["run", *sys.argv[1:]])
