"""Dropout whose draws belong to a row and a position, so that they do not depend on how a batch is cut or padded.

torch draws dropout's masks from one stream, in the order of the elements. So the same row gets other masks in another
micro-batch, on a retry with fewer rows, or in another process. Here every element's draw is a hash of

    (the row's key, the column's position, the place in the model that draws, the element's number)

and in attention also of the position that is attended to. A place in the model is reached once per column, whichever
pass reads the column. So the masks are those of a row that is read alone and at once.

Legend: B rows, T columns, S columns of one pass, N real columns of one pass over all rows, H heads, K columns that a
pass attends to, E elements of a column, W hashes, L draws of a hash.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from coconut.model.draws import GOLDEN, hash_number, hash_numbers

_NUM_LANES, _NUM_VALUES = 4, 1 << 16
"""Draws of a hash of 64 bits, and values that each of them can take."""


def has_dropout(model: nn.Module) -> bool:
    """Say whether a model drops anything while it is trained."""
    return any(_probability(module) > 0 for module in model.modules())


def _probability(module: nn.Module) -> float:
    named = [value for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]
    return max([0.0, *named, module.p if isinstance(module, nn.Dropout) else 0.0])


def draw_keys(num_rows: int) -> Tensor:
    """Draw a key for each row from torch's generator on the CPU."""
    return torch.randint(-(1 << 63), (1 << 63) - 1, (num_rows,))


class RowDropout:
    """The draws of one batch.

    Args:
        keys_B: int64, one per row.
        position_ids_BT: of the batch's columns; on padding they may be anything.
    """

    def __init__(self, model: nn.Module, keys_B: Tensor, position_ids_BT: Tensor) -> None:
        self.places = {module: number for number, module in enumerate(model.modules())}
        keys_B1 = keys_B.to(position_ids_BT.device, non_blocking=True)[:, None]
        self.keys_BT = hash_numbers(hash_numbers(keys_B1) + position_ids_BT * GOLDEN)

    @contextmanager
    def active(self, columns: slice, places_N: Tensor | None = None) -> Iterator[None]:
        """Let the model draw so while it reads these columns.

        Args:
            places_N: of the real columns among B x S, where the model reads only those, as one row.
        """
        keys_BS = self.keys_BT[:, columns]
        read = keys_BS if places_N is None else keys_BS.flatten()[places_N][None]
        mode = _Draws(self.places, read, keys_BS, self.keys_BT[:, : columns.stop])
        hook = register_module_forward_pre_hook(mode.enter_place)
        try:
            with mode:
                yield
        finally:
            hook.remove()


class _Draws(TorchFunctionMode):
    """Takes the place of torch's dropout during one pass.

    Args:
        read: the keys of the columns that the model reads, B x S or 1 x N.
        keys_BS: the keys of all columns of the pass.
        keys_BK: the keys of all columns so far.
    """

    def __init__(self, places: Mapping[nn.Module, int], read: Tensor, keys_BS: Tensor, keys_BK: Tensor) -> None:
        super().__init__()
        self.places, self.place = places, -1
        self.num_drawn: Counter[int] = Counter()
        self.read, self.keys_BS, self.keys_BK = read, keys_BS, keys_BK

    def enter_place(self, module: nn.Module, _inputs: Any) -> None:
        """Take note of the module that runs."""
        self.place = self.places.get(module, self.place)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.dropout:
            return self._dropout(*args, **kwargs)
        if func is functional.scaled_dot_product_attention and kwargs.get("dropout_p", 0.0) > 0:
            return self._attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0:
            return input
        num_dropped = round(p * _NUM_VALUES)
        is_kept = self._is_kept(input.shape, num_dropped)
        if is_kept is None:
            return functional.dropout(input, p, training, inplace)
        return torch.where(is_kept, input / (1 - num_dropped / _NUM_VALUES), 0.0)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Compute attention so that its probabilities can be dropped; torch's kernels do not return them."""
        if enable_gqa:
            num_groups = query.shape[1] // key.shape[1]
            key, value = (part.repeat_interleave(num_groups, dim=1) for part in (key, value))
        scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
        lowest = torch.finfo(scores.dtype).min
        if is_causal:
            attn_mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None:
            is_hidden = attn_mask.dtype == torch.bool
            # Finite: a padded column that sees nothing must not become NaN.
            scores = scores.masked_fill(~attn_mask, lowest) if is_hidden else (scores + attn_mask).clamp(min=lowest)
        return self._dropout(scores.softmax(dim=-1), dropout_p) @ value

    def _is_kept(self, shape: torch.Size, num_dropped: int) -> Tensor | None:
        """Draw for a tensor of columns (B, S, ...) or (B S, ...), or for attention's probabilities (B, H, S, K).

        Returns:
            None if the tensor has another shape.
        """
        place = hash_number(self.place << 16 | self.num_drawn[self.place])
        self.num_drawn[self.place] += 1
        num_rows, num_columns = self.keys_BS.shape
        # For one column the library counts query heads that share a key as columns.
        num_heads = shape[1:-1].numel() // num_columns
        if (
            len(shape) == 4
            and num_rows == shape[0]
            and num_columns in (1, shape[2])
            and shape[3] <= self.keys_BK.shape[1]
        ):
            keys_BSK = (self.keys_BS + place)[:, :, None] ^ self.keys_BK[:, None, -shape[3] :]
            is_kept_BSKH = _is_at_least(_draw(keys_BSK, num_heads), num_dropped)
            return is_kept_BSKH.movedim(-1, 1).contiguous().view(shape)
        for leading in (self.read.shape, (self.read.numel(),)):
            if shape[: len(leading)] == leading:
                bits = _draw((self.read + place).reshape(leading), shape[len(leading) :].numel())
                return _is_at_least(bits, num_dropped).view(shape)
        return None


def _draw(keys: Tensor, num_elements: int) -> Tensor:
    """Draw 16 bits for each element of each key, ... -> ... x E."""
    num_hashes = -(-num_elements // _NUM_LANES)
    numbers_W = torch.arange(num_hashes, device=keys.device) * GOLDEN
    return hash_numbers(keys[..., None] + numbers_W).view(torch.int16)[..., :num_elements]


def _is_at_least(bits: Tensor, num_dropped: int) -> Tensor:
    return bits >= num_dropped - _NUM_VALUES // 2
