"""The encode stage turns examples into Arrow files, and measures how well the text survives."""

import functools
import itertools
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from loguru import logger

from coconut.config.messages import shown
from coconut.config.positions import num_positions
from coconut.config.schema import LatentConfig
from coconut.data.documents import read_json_object
from coconut.data.encoding import (
    EncodedExample,
    encode_texts,
    find_special_tokens,
    find_unknown_word,
    tokenize_texts,
    write_texts,
)
from coconut.data.examples import Example, read_examples
from coconut.data.layouts import Layout, common_layouts
from coconut.data.tokenizer import load_tokenizer
from coconut.data.views import longest_prompt, longest_view
from coconut.data.writer import ROW_SCHEMA, SplitWriter
from coconut.files import check_free_space, cure_of, writing
from coconut.layout import FURTHER_TESTS, find_test_sets

BATCH_ROWS = 1000
"""Number of rows that are tokenised, and written, at a time. The bytes of the files depend on it."""
ROWS_PER_PROCESS = 20_000
"""With fewer rows, starting another process takes longer than it saves."""
_TEXT_SCHEMA = pa.schema(
    [("index", pa.int32()), ("question", pa.string()), ("steps", pa.list_(pa.string())), ("answer", pa.string())]
)
_BYTES_PER_CHARACTER = 4
"""Upper bound of the file's size: each byte of text becomes a token of 4 bytes."""


@dataclass(frozen=True)
class Job:
    """The values that a worker process needs. They are few, because they are sent to every process."""

    checkpoint_dir: str
    prompt: str
    layouts: Sequence[Layout]


def encode_splits(
    examples_dir: Path,
    checkpoint_dir: Path,
    output_dir: Path,
    *,
    prompt: str,
    latent: LatentConfig,
    num_processes: int,
) -> dict[str, dict[str, float]]:
    """Write `<split>.arrow` for train, valid, test, and the further test sets below `tests`.

    Examples that do not fit into the model's positions are left out, counted and named: those of train by
    their longest view, others by their longest prompt.

    Returns:
        The metrics by split.

    Raises:
        ValueError: An example holds a word that the tokenizer does not know, or the model has too few
            positions for the data.
        OSError: The outputs cannot be written.
    """
    sizes = [path.stat().st_size for path in examples_dir.rglob("*.jsonl")]
    check_free_space({output_dir: _BYTES_PER_CHARACTER * sum(sizes)})
    job = Job(str(checkpoint_dir), prompt, common_layouts(latent))
    max_tokens = _num_positions(checkpoint_dir)
    with writing(output_dir):
        _prepare(output_dir)
        return {
            split: _encode_split(examples_dir, output_dir, split, job, max_tokens, num_processes)
            for split in ("train", "valid", *find_test_sets(examples_dir))
        }


def _encode_split(
    examples_dir: Path, output_dir: Path, split: str, job: Job, max_tokens: int | None, num_processes: int
) -> dict[str, float]:
    started, examples_path, path = time.perf_counter(), examples_dir / f"{split}.jsonl", output_dir / f"{split}.arrow"
    path.parent.mkdir(exist_ok=True)
    kind = {"is_trained_on": split == "train", "may_be_unknown": split.startswith(f"{FURTHER_TESTS}/")}
    with SplitWriter(examples_path, path, max_tokens, **kind) as writer:
        examples = read_examples(examples_path)
        if split == "train":
            _warn_of_split_names(examples, job, examples_path)
        for table in _encoded_tables(examples, job, num_processes):
            writer.write(table)
    metrics = writer.metrics()
    seconds = time.perf_counter() - started
    logger.info("encode: {}: {} examples in {:.1f} s", split, metrics["num_examples"], seconds)
    return metrics


def _warn_of_split_names(examples: Sequence[Example], job: Job, path: Path) -> None:
    """Say so where every step is a name, as in a search in sentences, and some are not one token in every place."""
    names = sorted({step for example in examples for step in example.steps})
    if not names or not all(name.isalpha() for name in names):
        return
    tokenizer = _cached_tokenizer(job.checkpoint_dir)
    bare, inside, closing = (
        tokenize_texts(tokenizer, [form.format(name) for name in names]) for form in ("{}", " {}", " {}.")
    )
    rows = zip(names, bare, inside, closing, strict=True)
    split = [name for name, one, two, three in rows if (len(one), len(two)) != (1, 1) or three[:1] != two]
    if split:
        logger.warning(
            "{}: every step is a name, but {} of {} names, such as {}, are several tokens of the model's tokenizer, or"
            " another token before a full stop, wanted one; a thought then stands for a part of a name, and the probes"
            " of graphs read its first token; take a model that has these names (SmolLM2), or edges: words",
            *(path, len(split), len(names), shown(split[0])),
        )


def _prepare(output_dir: Path) -> None:
    """Make the folder and delete old files, which may be linked into DVC's cache and must not be written to."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        for path in output_dir.rglob("*.arrow"):
            path.unlink()
    except OSError as error:
        cure = cure_of(error, f"correct the permissions of {output_dir.parent}")
        raise OSError(f"{output_dir}: cannot be written ({error}); {cure}") from None


def _num_positions(checkpoint_dir: Path) -> int | None:
    path = checkpoint_dir / "config.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; run the base stage first: dvc repro base")
    return num_positions(read_json_object(path))


# --- tokenising -----------------------------------------------------------------------------


def _encoded_tables(examples: Sequence[Example], job: Job, num_processes: int) -> Iterator[pa.Table]:
    """Encode in batches, in order, and on several processes if that is faster."""
    import datasets

    from coconut.logs import shows_progress

    if not shows_progress():
        datasets.disable_progress_bars()
    num_useful = min(num_processes, len(examples) // ROWS_PER_PROCESS)
    columns = {
        "index": range(len(examples)),
        "question": [example.question for example in examples],
        "steps": [list(example.steps) for example in examples],
        "answer": [example.answer for example in examples],
    }
    with tempfile.TemporaryDirectory(prefix="coconut-encode-") as scratch_dir:
        encoded = datasets.Dataset.from_dict(columns, datasets.Features.from_arrow_schema(_TEXT_SCHEMA)).map(
            _encode_columns,
            batched=True,
            batch_size=BATCH_ROWS,
            num_proc=num_useful if num_useful > 1 else None,
            remove_columns=["question", "steps", "answer"],
            features=datasets.Features.from_arrow_schema(ROW_SCHEMA),
            fn_kwargs={"job": job},
            cache_file_name=str(Path(scratch_dir) / "rows.arrow"),
            # It is given because computing it would hash everything that the function refers to.
            new_fingerprint="encoded",
            desc="encode",
        )
        for table in encoded.with_format("arrow").iter(BATCH_ROWS):
            yield table.select(ROW_SCHEMA.names).cast(ROW_SCHEMA)


def _encode_columns(columns: dict[str, list[Any]], job: Job) -> dict[str, list[Any]]:
    fields = zip(columns["question"], columns["steps"], columns["answer"], strict=True)
    return _encode_rows([Example(*values) for values in fields], columns["index"], job)


def _encode_rows(examples: Sequence[Example], indices: Sequence[int], job: Job) -> dict[str, list[Any]]:
    tokenizer = _cached_tokenizer(job.checkpoint_dir)
    texts = write_texts(tokenizer, examples, job.prompt)
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
        "num_view_tokens": [longest_view(row, job.layouts) for row in encoded],
        "num_prompt_tokens": [longest_prompt(row, job.layouts) for row in encoded],
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
