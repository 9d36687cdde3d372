"""The processes that share the work of one stage: which rows are whose, and what they tell each other.

Importing this module is cheap (no torch). What processes send each other is numbers and JSON, never pickle.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed import ProcessGroup

PATIENCE = timedelta(hours=2)
"""How long processes wait for each other, while the first one writes a checkpoint say, before they count as stuck."""
_BUCKET_ELEMENTS = 16_000_000
"""Of the sums that are sent at once: one large message takes a third of the time of many small ones."""


class RankLostError(Exception):
    """Another process of this stage has ended, so that what it should have sent will not come."""


def is_lost_rank(error: BaseException | None) -> bool:
    """Say whether an error arose since another process has ended, whatever it was wrapped into since.

    Sharded layers send and receive within the model, where `Ranks` has no part in it.
    """
    while error is not None:
        # NCCL's errors have a type of their own; gloo's have the place in its sources that found the connection closed.
        is_of_backend = type(error).__name__.startswith("Dist") and isinstance(error, RuntimeError)
        if isinstance(error, RankLostError) or is_of_backend or "gloo/transport" in str(error):
            return True
        error = error.__cause__
    return False


class BatchTooLargeError(Exception):
    """Memory ran out in this process while others wait for what it was to send: all of them must begin again.

    Args:
        batch: the setting below `runtime` that limits such a batch.
        num_rows: at least two, which were too many.
    """

    def __init__(self, batch: Literal["micro_batch", "eval_batch"], num_rows: int) -> None:
        self.batch, self.fits = batch, num_rows // 2
        super().__init__(f"out of memory with {num_rows} rows at once; {self.fits} are tried next")


@dataclass(frozen=True)
class Ranks:
    """The processes of a stage, as one of them sees them. By default there is one, and nothing is ever sent."""

    rank: int = 0
    count: int = 1
    device: "torch.device | str" = "cpu"
    """Where the tensors are that it sums."""

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes files and speaks to the terminal."""
        return self.rank == 0

    def own(self, num_rows: int) -> range:
        """Return the rows that are this process's part of so many."""
        return self.part_of(self.rank, num_rows)

    def part_of(self, rank: int, num_rows: int) -> range:
        """Return the rows that are a process's part of so many."""
        return range(num_rows)[rank :: self.count]

    def wait(self) -> None:
        """Return when every process has come here.

        Raises:
            RankLostError: one of them has ended.
        """
        self.gather(None)

    def sum_(self, tensors: Iterable["Tensor"]) -> None:
        """Replace each tensor by its sum over the processes, in a few large messages.

        Tensors of less than 32 bits are added up in 32. Every process must give tensors of the same shapes in the
        same order, and gets the same bits.

        Raises:
            RankLostError: a process has ended.
        """
        if self.count == 1:
            return
        import torch
        from torch import distributed

        for bucket in _buckets(tensors):
            wide = [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in bucket]
            flat = torch.cat([tensor.flatten() for tensor in wide])
            with _noticing_loss():
                distributed.all_reduce(flat)
            for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def sum_on_host(self, numbers: Sequence[float]) -> list[float]:
        """Add up numbers of the CPU over the processes. No accelerator is waited for.

        Raises:
            RankLostError: a process has ended.
        """
        if self.count == 1:
            return list(numbers)
        import torch
        from torch import distributed

        sums = torch.tensor(numbers, dtype=torch.float64)
        with _noticing_loss():
            distributed.all_reduce(sums, group=host_group())
        found: list[float] = sums.tolist()
        return found

    def gather(self, value: Any) -> list[Any]:
        """Give what each process holds to all of them, by rank.

        Args:
            value: what JSON can hold.

        Raises:
            RankLostError: a process has ended.
        """
        if self.count == 1:
            return [value]
        import torch
        from torch import distributed

        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = torch.zeros(self.count, dtype=torch.int64)
        lengths[self.rank] = len(text)
        with _noticing_loss():
            distributed.all_reduce(lengths, group=host_group())
            padded = torch.zeros(int(lengths.max()), dtype=torch.uint8)
            padded[: len(text)] = text
            parts = [torch.empty_like(padded) for _ in range(self.count)]
            distributed.all_gather(parts, padded, group=host_group())
        return [
            json.loads(bytes(part[:length].tolist()).decode())
            for part, length in zip(parts, lengths.tolist(), strict=True)
        ]

    def collect(self, compute: Callable[[], Any], agreed: type[BaseException]) -> list[Any]:
        """Gather what each process computes; where one of them gives up, all of them do.

        Args:
            compute: this process's part; its result is what JSON can hold.
            agreed: the exception by which a process gives up.

        Raises:
            RankLostError: a process has ended.
        """
        if self.count == 1:
            return [compute()]
        try:
            part = {"value": compute()}
        except agreed:
            part = {}
        parts = self.gather(part)
        if not all(parts):
            raise agreed
        return [found["value"] for found in parts]


@cache
def host_group() -> "ProcessGroup":
    """Return the connections of the processes' CPUs; all processes must call it first at the same place.

    What the CPU knows goes through them whatever the device: accelerators' own connections take only what is in
    their memory, and to read it there is to wait for all their work.
    """
    from torch import distributed

    group: ProcessGroup = distributed.new_group(backend="gloo", timeout=PATIENCE)
    return group


def _buckets(tensors: Iterable["Tensor"]) -> Iterator[Sequence["Tensor"]]:
    """Cut tensors into runs of one type that hold about as many elements as a message should."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        is_full = sum(held.numel() for held in bucket) >= _BUCKET_ELEMENTS
        if bucket and (is_full or bucket[0].dtype != tensor.dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


@contextmanager
def _noticing_loss() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # Each backend has texts of its own for it.
        raise RankLostError(" ".join(str(error).split())[:300]) from error
