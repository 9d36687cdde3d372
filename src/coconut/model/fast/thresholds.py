"""From which sizes on each part of the fast path gains; measured on CPUs, see `benchmarks/`.

An accelerator is bound by the number of operations where a pass is thin, and not by their size; what depends on the
device stands here.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Thresholds:
    """Sizes below which, or above which, the plain computation is at least as fast."""

    min_width: int = 256
    """Width of the hidden states from which on the key-value store pays; the library's cache needs fewer operations."""
    min_packed_work: int = 1 << 18
    """Padded columns of a pass x width squared from which on leaving padding out saves more than packing costs."""
    max_scores: int = 1024
    """Columns of a pass x columns that it sees, up to which attention is computed here; torch's kernel wins beyond."""
    min_full: float = 2 / 3
    """Share of the store that is written from which on attention from one column reads all of it; without gradients."""
    min_vectorised_softmax: int = 16
    """Below this number of columns torch's CPU softmax is not vectorised; exp, sum and div are five times faster."""
    min_weight_elements: int = 1 << 16
    """Gradients of smaller weights stay in the processor's cache, and cost less than keeping factors of them."""
    max_kept_of_head: int = 9 << 23
    """Elements of the head's gradient factors that are kept at most: those of two chunks of the loss."""
    min_multiplications: int = 1 << 22
    """Smaller products are done before oneDNN has found its kernel."""

    def on(self, device_type: str) -> "Thresholds":
        """Return those of a device. Values that were chosen by hand stay as they are."""
        if device_type == "cpu" or self != Thresholds():
            return self
        # Packing costs some four operations a layer, and attention of our own ten where torch's kernel is one.
        return replace(self, min_packed_work=1 << 30, max_scores=0)
