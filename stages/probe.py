"""Pipeline stage probe@ENTRY: outputs/ENTRY/checkpoint -> outputs/ENTRY/thoughts.{json,csv,jsonl}."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))  # This work tree's code, whichever is installed.

from coconut.pipeline.stage import Work, run_script


def load() -> Work:
    from coconut.config.params import load_params
    from coconut.probing.entry import probe_entry

    return lambda entry, _inputs: probe_entry(load_params(), entry)


if __name__ == "__main__":
    run_script(load, "probe", of_entry=True)
