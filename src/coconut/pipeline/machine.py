"""What `params.yaml` asks of the machine: a GPU, optional packages."""

from importlib.util import find_spec

from coconut.config.schema import Params
from coconut.devices import check_device


def check_machine(params: Params) -> list[str]:
    """Check that this machine can do what is asked for; return a warning for what it will leave out.

    Raises:
        ValueError: naming the key, and what is missing.
    """
    check_device(params.runtime)
    for name, entry in params.curriculum.items():
        if entry.train.optimizer == "adamw_8bit" and find_spec("bitsandbytes") is None:
            raise ValueError(
                f"curriculum.{name}.optimizer: found adamw_8bit, but bitsandbytes is not installed;"
                " pip install -e '.[bitsandbytes]', or use adamw"
            )
    tracker = params.runtime.tracker
    if tracker != "none" and find_spec(tracker) is None:
        return [
            f"runtime.tracker: {tracker} is not installed, training will go on without it; run `make trackers`, or"
            " set runtime.tracker: none"
        ]
    return []
