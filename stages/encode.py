"""Pipeline stage `encode`: turn the examples into token ids of the base model's tokenizer."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))  # This work tree's code, whichever is installed.

from coconut.pipeline.stage import Work, run_script


def load() -> Work:
    import json

    from coconut.config.params import load_params
    from coconut.config.schema import BASE
    from coconut.data.chat import PROMPT_DATE
    from coconut.data.encoder import encode_splits
    from coconut.devices import num_workers
    from coconut.layout import ENCODED_DIR, EXAMPLES_DIR, OUTPUTS_DIR, checkpoint_dir

    def main() -> None:
        """Write `data/encoded/{train,valid,test}.arrow` and `outputs/encode.json`."""
        params = load_params()
        options = {"latent": params.latent, "num_processes": num_workers(params.runtime.num_workers)}
        metrics = encode_splits(EXAMPLES_DIR, checkpoint_dir(BASE), ENCODED_DIR, prompt=params.encode.prompt, **options)
        # The day that chat templates were shown; `Reasoner` shows the same one.
        date = PROMPT_DATE.date().isoformat() if params.encode.prompt == "chat" else None
        content = json.dumps(metrics | {"prompt_date": date}, indent=2) + "\n"
        (OUTPUTS_DIR / "encode.json").write_text(content, encoding="utf-8")

    return main


if __name__ == "__main__":
    run_script(load, "encode")
