"""Writes one split of encoded examples, and adds up its metrics."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from loguru import logger

from coconut.data.encoded import FILE_SCHEMA
from coconut.data.encoding import SPECIAL_TOKEN_COMPLAINT

MIN_KEPT_SHARE = 0.1
"""A split that keeps a smaller share of its rows does not represent the data any more."""
_NUM_NAMED_ROWS = 10

ROW_SCHEMA = pa.schema(
    [
        *FILE_SCHEMA,
        ("num_steps_tokens", pa.int32()),
        ("num_view_tokens", pa.int32()),
        ("num_prompt_tokens", pa.int32()),
        ("decoded_differs", pa.bool_()),
        ("joined_differs", pa.bool_()),
        ("special", pa.string()),
        ("unknown", pa.string()),
    ]
)
"""The columns of the file, followed by what a worker finds out about each row."""


class SplitWriter:
    """Writes the tables of one split to its file, as a context manager; `metrics` sums up afterwards.

    A row that is trained on has to fit with its longest view. A row of another split has to fit with its
    longest prompt and the gold answer, because no evaluation reads the gold chain of thought: without it, the
    hardest questions would be missing from the accuracies of all methods.

    Args:
        examples_path: named in messages.
        path: the file that is written.
        max_tokens: positions of the model; None where it has no limit.
        is_trained_on: whether it is the training split.
        may_be_unknown: whether rows with words that a vocabulary of whole words lacks are left out and counted. Such
            a vocabulary does not grow by a further test set, because that would train everything again.
    """

    def __init__(
        self,
        examples_path: Path,
        path: Path,
        max_tokens: int | None,
        *,
        is_trained_on: bool,
        may_be_unknown: bool = False,
    ) -> None:
        self.examples_path, self.max_tokens = examples_path, max_tokens
        self.may_be_unknown = may_be_unknown
        self.unknown: list[tuple[int, str]] = []
        self.what_must_fit = "view" if is_trained_on else "prompt"
        self.num_chains_too_long = 0
        self.sink = pa.OSFile(str(path), "wb")
        self.stream = pa.ipc.new_stream(self.sink, FILE_SCHEMA)
        self.num_rows = self.num_kept = self.num_decoded_differs = self.num_joined_differs = 0
        self.totals = dict.fromkeys(("question", "steps", "answer"), 0)
        self.maxima = dict.fromkeys(("question", "steps", "answer", "view"), 0)
        self.too_long: list[tuple[int, int]] = []

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()
        self.sink.close()

    def write(self, table: pa.Table) -> None:
        """Write the rows of a table of `ROW_SCHEMA` that fit into the model's positions.

        Raises:
            ValueError: A row holds a special token's text, or a word that the tokenizer does not know.
        """
        self.num_rows += len(table)
        self._refuse_special_tokens(table)
        table = self._without_unknown_words(table)
        if self.max_tokens is not None:
            lengths = table[f"num_{self.what_must_fit}_tokens"]
            is_kept = pc.less_equal(lengths, self.max_tokens)
            dropped = [column.filter(pc.invert(is_kept)).to_pylist() for column in (table["index"], lengths)]
            self.too_long += zip(*dropped, strict=True)
            table = table.filter(is_kept)
            self.num_chains_too_long += pc.sum(pc.greater(table["num_view_tokens"], self.max_tokens)).as_py() or 0
        if len(table):
            self._count(table)
            # Each table becomes one batch, so that the bytes do not depend on the number of processes.
            for batch in table.select(FILE_SCHEMA.names).combine_chunks().to_batches():
                self.stream.write_batch(batch)

    def _refuse_special_tokens(self, table: pa.Table) -> None:
        special = table.filter(pc.is_valid(table["special"]))
        if len(special):
            row, token = special["index"][0].as_py(), special["special"][0].as_py()
            raise ValueError(f"{self.examples_path}:{row + 1}: {SPECIAL_TOKEN_COMPLAINT.format(token)}")

    def _without_unknown_words(self, table: pa.Table) -> pa.Table:
        unknown = table.filter(pc.is_valid(table["unknown"]))
        if not len(unknown):
            return table
        self.unknown += zip(unknown["index"].to_pylist(), unknown["unknown"].to_pylist(), strict=True)
        if not self.may_be_unknown:
            row, word = self.unknown[0]
            raise ValueError(
                f"{self.examples_path}:{row + 1}: {word[:80]!r} is unknown to the model's tokenizer;"
                " wanted words of its vocabulary; change the text, or use another tokenizer"
            )
        return table.filter(pc.is_null(table["unknown"]))

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
        """Sum up what was written, and log which rows were left out.

        Raises:
            ValueError: No row is left, or only a small share of them.
        """
        if not self.num_rows:
            raise ValueError(
                f"{self.examples_path}: no example in it, wanted at least one; run the preprocess stage again"
            )
        if self.too_long:
            self._report_too_long()
        if self.unknown:
            self._report_unknown()
        if self.num_chains_too_long:
            logger.info(
                "{}: {} more examples have a gold chain of thought that does not fit; they are kept for evaluation",
                *(self.examples_path, self.num_chains_too_long),
            )
        num = max(1, self.num_kept)
        metrics: dict[str, float] = {"num_examples": self.num_kept, "num_too_long": len(self.too_long)}
        metrics["num_chains_too_long"] = self.num_chains_too_long
        metrics["decoded_differs_share"] = self.num_decoded_differs / num
        metrics["joined_differs_share"] = self.num_joined_differs / num
        for part, total in self.totals.items():
            metrics[f"{part}_tokens_mean"] = round(total / num, 2)
            metrics[f"{part}_tokens_max"] = self.maxima[part]
        metrics["view_tokens_max"] = self.maxima["view"]
        return metrics | ({"num_unknown_words": len(self.unknown)} if self.may_be_unknown else {})

    def _report_unknown(self) -> None:
        row, word = self.unknown[0]
        message = (
            f"{self.examples_path}: {len(self.unknown)} of {self.num_rows} examples hold words that the model's"
            f" vocabulary lacks, such as {word[:80]!r} in line {row + 1}"
        )
        cure = "a vocabulary of whole words is made of train, valid and the first test set: put this set first"
        if self.num_kept < MIN_KEPT_SHARE * self.num_rows:
            raise ValueError(f"{message}, wanted most of them to be known; {cure}, or take another tokenizer")
        logger.warning("{}; they are left out; {} to have them scored", message, cure)

    def _report_too_long(self) -> None:
        message = (
            f"{self.examples_path}: {len(self.too_long)} of {self.num_rows} examples have {self.what_must_fit}s longer"
            f" than the model's {self.max_tokens} positions"
        )
        if self.num_kept < MIN_KEPT_SHARE * self.num_rows:
            longest = max(num_tokens for _, num_tokens in self.too_long)
            raise ValueError(
                f"{message} (the longest has {longest} tokens), wanted most of them to fit;"
                " take a model with more positions or shorter examples"
            )
        named = ", ".join(f"line {row + 1} ({num_tokens})" for row, num_tokens in self.too_long[:_NUM_NAMED_ROWS])
        logger.warning("{}; left out: {}{}", message, named, ", ..." if len(self.too_long) > _NUM_NAMED_ROWS else "")
        logger.debug("{}: left out, by line: {}", self.examples_path, [row + 1 for row, _ in self.too_long])
