"""Weights in the order in which oneDNN reads them, kept for as long as they do not change.

oneDNN brings a weight into blocks for its kernel, in every product anew. That costs a product of 64 rows a fifth of
its time, one of 16 rows half of it. An evaluation reads the same weights in hundreds of products.

Legend: I inputs, O outputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class _Read:
    """A weight that was read."""

    weight_OI: Tensor
    """Held, so that nothing else can take its place in memory while it is known by that."""
    version: int
    count: int = 0
    reordered: Tensor | None = None


class ReorderedWeights:
    """Copies of a model's weights for all batches that only read them. CPU, float32.

    Products of two rows or more have the same bits with a weight in either order (oneDNN's kernels for AVX-512, AVX2
    and SSE4.1). A single row, and a weight with gaps in memory, are multiplied in another way: there the weight is
    read as it is.

    Args:
        min_reads: products of a weight before it is reordered, which takes the time that some twenty of them save.
        max_elements: of all reordered weights, which are copies; 1 GB in float32 by default.
    """

    def __init__(self, min_reads: int = 16, max_elements: int = 1 << 28) -> None:
        self.min_reads = min_reads
        self.num_left = max_elements
        self._reads: dict[tuple[int, tuple[int, ...], tuple[int, ...]], _Read] = {}

    def of(self, weight_OI: Tensor, num_rows: int) -> Tensor:
        """Return the weight as a product of so many rows is to read it.

        Args:
            weight_OI: float32, on the CPU; in any strides.
        """
        has_gaps = not (weight_OI.is_contiguous() or weight_OI.t().is_contiguous())
        if num_rows < 2 or has_gaps or weight_OI.is_inference():  # Nobody counts the changes of an inference tensor.
            return weight_OI
        place = weight_OI.data_ptr(), tuple(weight_OI.shape), weight_OI.stride()
        read = self._reads.get(place)
        if read is None or read.version != weight_OI._version:
            self._forget(read)
            read = self._reads[place] = _Read(weight_OI, weight_OI._version)
        read.count += 1
        if read.reordered is None and read.count > self.min_reads and weight_OI.numel() <= self.num_left:
            self.num_left -= weight_OI.numel()
            read.reordered = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach(), None)
        return weight_OI if read.reordered is None else read.reordered

    def _forget(self, read: _Read | None) -> None:
        if read is not None and read.reordered is not None:
            self.num_left += read.weight_OI.numel()
