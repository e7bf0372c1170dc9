"""`python -m flexflow_engine VERB`, and the console script `flexflow-engine VERB`."""

from flexflow_engine.cli.app import main

if __name__ == "__main__":
    main()
