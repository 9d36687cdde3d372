"""A million rows: encoding, the start of an epoch, resident memory, and whether the loader keeps up."""

import gc
import json
import tempfile
import time
from pathlib import Path
from typing import Any

NUM_ROWS = 1_000_000
NUM_ENCODED = 100_000
"""Rows that are really tokenised; the rest of the million is generated as ids."""
BATCH_SIZE = 128


def measure(*, device: str, repeats: int, **_: Any) -> dict[str, Any]:
    """Independent of the device: no model takes part."""
    del device, repeats
    from coconut.config.params import load_params
    from coconut.data.encoded import load_encoded
    from coconut.data.views import MarkerIds, ViewWriter
    from coconut.training.rows import epoch_order, split_updates, training_rows

    with tempfile.TemporaryDirectory() as folder:
        encoded_dir = Path(folder)
        encoding = _time_encoding(encoded_dir)
        file_mb = _write_ids(encoded_dir / "train.arrow") / 1e6
        gc.collect()
        before_mb = _resident_mb(forget_peak=True)
        entry = load_params().curriculum["latent_1"]
        writer = ViewWriter(None, MarkerIds(1, 2, 3))  # type: ignore[arg-type]  # Its layouts keep the answer's words.
        started = time.perf_counter()
        dataset = load_encoded(encoded_dir, "train")
        order = epoch_order(len(dataset), seed=0, entry_name=entry.name, epoch=0)
        updates = split_updates(order, BATCH_SIZE)
        training_rows(dataset, next(updates), entry=entry, seed=0, epoch=0, writer=writer)
        start_s = time.perf_counter() - started
        memory = []
        started = time.perf_counter()
        num_updates = 1500
        for number, rows in enumerate(updates):
            training_rows(dataset, rows, entry=entry, seed=0, epoch=0, writer=writer)
            if number % 250 == 0:
                memory.append(_resident_mb())
            if number == num_updates:
                break
        per_update_s = (time.perf_counter() - started) / num_updates
    return {
        "rows": NUM_ROWS,
        "file_mb": file_mb,
        **encoding,
        "epoch_start_s": start_s,
        "ms_per_update_of_128_rows": 1e3 * per_update_s,
        "peak_resident_mb_above": round(_resident_mb()["peak"] - before_mb["all"], 1),
        "resident_mb_above": [round(now["all"] - before_mb["all"], 1) for now in memory],
        "of_it_not_the_file's_pages_mb": [round(now["own"] - before_mb["own"], 1) for now in memory],
    }


def _time_encoding(folder: Path) -> dict[str, float]:
    from coconut.checkpoints.origin import prepare_base
    from coconut.config.params import load_params
    from coconut.data.encoder import encode_splits
    from coconut.data.examples import write_examples
    from coconut.data.generators.arithmetic import ChainedArithmetic
    from coconut.data.streams import generate

    params = load_params()
    examples = generate(ChainedArithmetic("chained_arithmetic", 4, 97), NUM_ENCODED, seed=0)
    for split, rows in (("train", examples), ("valid", examples[:1000]), ("test", examples[:1000])):
        write_examples(folder / f"{split}.jsonl", rows)
    prepare_base(params, examples[:1000], folder / "checkpoint")
    started = time.perf_counter()
    encode_splits(
        folder,
        folder / "checkpoint",
        folder / "out",
        prompt="plain",
        latent=params.curriculum["latent_1"].latent,
        num_processes=2,
    )
    seconds = time.perf_counter() - started
    return {"rows_encoded": NUM_ENCODED, "encode_s": seconds, "encode_s_per_million": seconds * NUM_ROWS / NUM_ENCODED}


def _write_ids(path: Path) -> int:
    """Write a million encoded rows of GSM8K's lengths straight as ids, in batches, and give the file's size."""
    import numpy as np
    import pyarrow as pa

    schema = pa.schema(
        [
            ("index", pa.int32()),
            ("question_ids", pa.list_(pa.int32())),
            ("steps_ids", pa.list_(pa.list_(pa.int32()))),
            ("answer_ids", pa.list_(pa.int32())),
        ]
    )
    random = np.random.default_rng(0)
    size = 10_000

    def lists(lengths: Any) -> Any:
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        return offsets, random.integers(0, 50257, offsets[-1], dtype=np.int32)

    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        for start in range(0, NUM_ROWS, size):
            questions = pa.ListArray.from_arrays(*lists(random.integers(30, 90, size)))
            num_steps = random.integers(1, 7, size)
            steps = pa.ListArray.from_arrays(*lists(random.integers(6, 14, num_steps.sum())))
            steps = pa.ListArray.from_arrays(np.concatenate([[0], np.cumsum(num_steps)]).astype(np.int32), steps)
            answers = pa.ListArray.from_arrays(*lists(random.integers(3, 6, size)))
            index = pa.array(range(start, start + size), pa.int32())
            stream.write_batch(pa.record_batch([index, questions, steps, answers], schema=schema))
    return path.stat().st_size


def _resident_mb(*, forget_peak: bool = False) -> dict[str, float]:
    """Resident memory now and at most, and the part of it that is not pages of mapped files."""
    if forget_peak:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    names = {"all": "VmRSS", "own": "RssAnon", "peak": "VmHWM"}
    return {key: int(fields[name].split()[0]) / 1e3 for key, name in names.items()}


if __name__ == "__main__":
    print(json.dumps(measure(device="cpu", repeats=1), indent=1))
