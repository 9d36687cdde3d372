"""The encode stage: examples to Arrow files, and the figures that say how well the text survives."""

import functools
import itertools
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from loguru import logger

from coconut.config.schema import LatentConfig
from coconut.data.encoding import (
    SPECIAL_TOKEN_COMPLAINT,
    EncodedExample,
    encode_texts,
    example_texts,
    find_special_tokens,
    find_unknown_word,
    tokenize_texts,
)
from coconut.data.examples import Example, read_examples
from coconut.data.mapped import FILE_SCHEMA
from coconut.data.tokenizer import load_tokenizer
from coconut.layout import SPLITS

BATCH_ROWS = 1000
"""Rows that are tokenised, and written, at a time. The file's bytes depend on it."""
ROWS_PER_PROCESS = 20_000
"""Fewer do not repay the start of another process."""
MIN_KEPT_SHARE = 0.1
"""A split that loses more than the rest says nothing about the data any more."""
_NAMED_ROWS = 10

# What a worker finds out about a row beside its ids.
_ROW_SCHEMA = pa.schema(
    [
        *FILE_SCHEMA,
        ("num_steps_tokens", pa.int32()),
        ("num_view_tokens", pa.int32()),
        ("decoded_differs", pa.bool_()),
        ("joined_differs", pa.bool_()),
        ("special", pa.string()),
        ("unknown", pa.string()),
    ]
)


@dataclass(frozen=True)
class Job:
    """What a worker needs to know; small, because it travels to every process."""

    checkpoint_dir: str
    prompt: str
    c_thought: int
    max_latent_stage: int
    markers: bool


def encode_splits(
    examples_dir: Path,
    checkpoint_dir: Path,
    output_dir: Path,
    *,
    prompt: str,
    latent: LatentConfig,
    num_processes: int,
) -> dict[str, dict[str, float]]:
    """Write `<split>.arrow` for train, valid and test.

    Examples whose longest view exceeds the model's positions are left out, counted and named.

    Returns:
        Metrics by split.

    Raises:
        ValueError: naming the example, if one holds a word that the tokenizer does not know; naming
            the model, if its positions are too few for the data.
    """
    job = Job(str(checkpoint_dir), prompt, latent.c_thought, latent.max_latent_stage, latent.markers)
    max_tokens = _max_positions(checkpoint_dir)
    _prepare(output_dir)
    metrics = {}
    for split in SPLITS:
        started = time.perf_counter()
        examples_path = examples_dir / f"{split}.jsonl"
        writer = _SplitWriter(examples_path, output_dir / f"{split}.arrow", max_tokens)
        with writer:
            for table in _encoded_tables(read_examples(examples_path), job, num_processes):
                writer.write(table)
        metrics[split] = writer.metrics()
        seconds = time.perf_counter() - started
        logger.info("encode: {}: {} examples in {:.1f} s", split, metrics[split]["num_examples"], seconds)
    return metrics


def _prepare(output_dir: Path) -> None:
    """Make the folder, without the old files: they may be linked into DVC's cache, which must not be written to."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        for path in output_dir.glob("*.arrow"):
            path.unlink()
    except OSError as error:
        raise OSError(
            f"{output_dir}: cannot be written ({error}); mend the permissions of {output_dir.parent}"
        ) from None


def _max_positions(checkpoint_dir: Path) -> int | None:
    """Columns the model can tell apart; None where it has no such limit."""
    path = checkpoint_dir / "config.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; run the base stage first: dvc repro base")
    config = json.loads(path.read_text(encoding="utf-8"))
    config = config.get("text_config") or config
    for name in ("n_positions", "max_position_embeddings", "max_seq_len"):
        if isinstance(config.get(name), int):
            return int(config[name])
    return None


# --- tokenising -----------------------------------------------------------------------------


def _encoded_tables(examples: Sequence[Example], job: Job, num_processes: int) -> Iterator[pa.Table]:
    """Encode in batches, in order; on several processes where that is faster."""
    num_useful = min(num_processes, len(examples) // ROWS_PER_PROCESS)
    if num_useful > 1:
        yield from _encode_in_processes(examples, job, num_useful)
        return
    for start in range(0, len(examples), BATCH_ROWS):
        batch = examples[start : start + BATCH_ROWS]
        yield pa.Table.from_pydict(_encode_rows(batch, range(start, start + len(batch)), job), schema=_ROW_SCHEMA)


def _encode_in_processes(examples: Sequence[Example], job: Job, num_processes: int) -> Iterator[pa.Table]:
    import datasets

    from coconut.logs import shows_progress

    if not shows_progress():
        datasets.disable_progress_bars()
    columns = {
        "index": range(len(examples)),
        "question": [example.question for example in examples],
        "steps": [list(example.steps) for example in examples],
        "answer": [example.answer for example in examples],
    }
    with tempfile.TemporaryDirectory(prefix="coconut-encode-") as scratch_dir:
        encoded = datasets.Dataset.from_dict(columns).map(
            _encode_columns,
            batched=True,
            batch_size=BATCH_ROWS,
            num_proc=num_processes,
            remove_columns=["question", "steps", "answer"],
            features=datasets.Features.from_arrow_schema(_ROW_SCHEMA),
            fn_kwargs={"job": job},
            cache_file_name=str(Path(scratch_dir) / "rows.arrow"),
            # Given, because working it out means hashing everything the function refers to.
            new_fingerprint="encoded",
            desc="encode",
        )
        for table in encoded.with_format("arrow").iter(BATCH_ROWS):
            yield table.select(_ROW_SCHEMA.names).cast(_ROW_SCHEMA)


def _encode_columns(columns: dict[str, list[Any]], job: Job) -> dict[str, list[Any]]:
    fields = zip(columns["question"], columns["steps"], columns["answer"], strict=True)
    return _encode_rows([Example(*values) for values in fields], columns["index"], job)


def _encode_rows(examples: Sequence[Example], indices: Sequence[int], job: Job) -> dict[str, list[Any]]:
    tokenizer = _cached_tokenizer(job.checkpoint_dir)
    texts = [example_texts(tokenizer, example, job.prompt) for example in examples]
    encoded = encode_texts(tokenizer, texts, job.prompt)
    whole_texts = ["".join(parts) for parts in texts]
    whole_ids = tokenize_texts(tokenizer, whole_texts)
    num_bos = len(encoded[0].question_ids) - len(tokenize_texts(tokenizer, [texts[0][0]])[0])
    joined_ids = [_joined(row)[num_bos:-1] for row in encoded]
    decoded = tokenizer.batch_decode(joined_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return {
        "index": list(indices),
        "question_ids": [row.question_ids for row in encoded],
        "steps_ids": [row.steps_ids for row in encoded],
        "answer_ids": [row.answer_ids for row in encoded],
        "num_steps_tokens": [sum(map(len, row.steps_ids)) for row in encoded],
        "num_view_tokens": [longest_view(row, job) for row in encoded],
        "decoded_differs": [
            _without_space(found) != _without_space(wanted) for found, wanted in zip(decoded, whole_texts, strict=True)
        ],
        "joined_differs": [joined != whole for joined, whole in zip(joined_ids, whole_ids, strict=True)],
        "special": find_special_tokens(tokenizer, examples),
        "unknown": [find_unknown_word(tokenizer, *pair) for pair in zip(joined_ids, whole_texts, strict=True)],
    }


@functools.lru_cache(maxsize=1)
def _cached_tokenizer(checkpoint_dir: str) -> Any:
    return load_tokenizer(Path(checkpoint_dir))


def _joined(row: EncodedExample) -> list[int]:
    return list(itertools.chain(row.question_ids, *row.steps_ids, row.answer_ids))


def _without_space(text: str) -> str:
    return "".join(text.split())


def longest_view(row: EncodedExample, job: Job) -> int:
    """Columns of the example's longest view, over all latent stages."""
    num_tokens = num_remaining = sum(map(len, row.steps_ids))
    for stage in range(1, job.max_latent_stage + 1):
        num_remaining -= len(row.steps_ids[stage - 1]) if stage <= len(row.steps_ids) else 0
        num_tokens = max(num_tokens, num_remaining + stage * job.c_thought)
    return len(row.question_ids) + 2 * job.markers + num_tokens + len(row.answer_ids)


# --- writing --------------------------------------------------------------------------------


class _SplitWriter:
    """Writes one split's file and adds up its metrics."""

    def __init__(self, examples_path: Path, path: Path, max_tokens: int | None) -> None:
        self.examples_path, self.max_tokens = examples_path, max_tokens
        self.sink = pa.OSFile(str(path), "wb")
        self.stream = pa.ipc.new_stream(self.sink, FILE_SCHEMA)
        self.num_rows = self.num_kept = self.num_decoded_differs = self.num_joined_differs = 0
        self.totals = dict.fromkeys(("question", "steps", "answer"), 0)
        self.maxima = dict.fromkeys(("question", "steps", "answer", "view"), 0)
        self.too_long: list[tuple[int, int]] = []

    def __enter__(self) -> "_SplitWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()
        self.sink.close()

    def write(self, table: pa.Table) -> None:
        special = table.filter(pc.is_valid(table["special"]))
        if len(special):
            row, token = special["index"][0].as_py(), special["special"][0].as_py()
            raise ValueError(f"{self.examples_path}:{row + 1}: {SPECIAL_TOKEN_COMPLAINT.format(token)}")
        unknown = table.filter(pc.is_valid(table["unknown"]))
        if len(unknown):
            row, word = unknown["index"][0].as_py(), unknown["unknown"][0].as_py()
            raise ValueError(
                f"{self.examples_path}:{row + 1}: {word[:80]!r} is unknown to the model's tokenizer;"
                " wanted words of its vocabulary; change the text, or take another tokenizer"
            )
        self.num_rows += len(table)
        if self.max_tokens is not None:
            is_kept = pc.less_equal(table["num_view_tokens"], self.max_tokens)
            dropped = table.filter(pc.invert(is_kept))
            self.too_long += zip(dropped["index"].to_pylist(), dropped["num_view_tokens"].to_pylist(), strict=True)
            table = table.filter(is_kept)
        if len(table):
            self._count(table)
            # One batch a table, so that the bytes do not depend on the number of processes.
            for batch in table.select(FILE_SCHEMA.names).combine_chunks().to_batches():
                self.stream.write_batch(batch)

    def _count(self, table: pa.Table) -> None:
        self.num_kept += len(table)
        self.num_decoded_differs += pc.sum(table["decoded_differs"]).as_py()
        self.num_joined_differs += pc.sum(table["joined_differs"]).as_py()
        lengths = {
            "question": pc.list_value_length(table["question_ids"]),
            "steps": table["num_steps_tokens"],
            "answer": pc.list_value_length(table["answer_ids"]),
            "view": table["num_view_tokens"],
        }
        for part, counts in lengths.items():
            self.maxima[part] = max(self.maxima[part], pc.max(counts).as_py())
            if part in self.totals:
                self.totals[part] += pc.sum(counts).as_py()

    def metrics(self) -> dict[str, float]:
        """What was written; also says aloud what was left out.

        Raises:
            ValueError: if (nearly) nothing is left.
        """
        if not self.num_rows:
            raise ValueError(
                f"{self.examples_path}: no example in it, wanted at least one; run the preprocess stage again"
            )
        if self.too_long:
            self._report_too_long()
        num = max(1, self.num_kept)
        metrics: dict[str, float] = {"num_examples": self.num_kept, "num_too_long": len(self.too_long)}
        metrics["decoded_differs_share"] = self.num_decoded_differs / num
        metrics["joined_differs_share"] = self.num_joined_differs / num
        for part, total in self.totals.items():
            metrics[f"{part}_tokens_mean"] = round(total / num, 2)
            metrics[f"{part}_tokens_max"] = self.maxima[part]
        metrics["view_tokens_max"] = self.maxima["view"]
        return metrics

    def _report_too_long(self) -> None:
        message = (
            f"{self.examples_path}: {len(self.too_long)} of {self.num_rows} examples have views longer than"
            f" the model's {self.max_tokens} positions"
        )
        if self.num_kept < MIN_KEPT_SHARE * self.num_rows:
            longest = max(num_tokens for _, num_tokens in self.too_long)
            raise ValueError(
                f"{message} (the longest has {longest} tokens), wanted most of them to fit;"
                " take a model with more positions or shorter examples"
            )
        named = ", ".join(f"line {row + 1} ({num_tokens})" for row, num_tokens in self.too_long[:_NAMED_ROWS])
        logger.warning("{}; left out: {}{}", message, named, ", ..." if len(self.too_long) > _NAMED_ROWS else "")
        logger.debug("{}: left out, by line: {}", self.examples_path, [row + 1 for row, _ in self.too_long])
