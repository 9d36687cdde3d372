"""Draws that are a function of a key and of what they are for, so that they depend on no order and no batch.

A hash of 64 bits (splitmix64) takes the place of a generator's stream: the draw of a key for step 5 is the same whether
or not the steps before it were drawn, on every device.

Legend: R rows, E elements of a row.
"""

import math

import torch
from torch import Tensor

GOLDEN, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685
"""The constants of splitmix64, as signed numbers."""
_UNIT = 2.0**-53


def hash_numbers(numbers: Tensor) -> Tensor:
    """Mix the bits of int64 numbers in place, as splitmix64 does."""
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        numbers = numbers.bitwise_xor_(_shift(numbers, shift)).mul_(factor)
    return numbers.bitwise_xor_(_shift(numbers, 31))


def _shift(numbers: Tensor, num_bits: int) -> Tensor:
    # torch shifts the sign in, which would lose information.
    return (numbers >> num_bits).bitwise_and_((1 << 64 - num_bits) - 1)


def hash_number(number: int) -> int:
    """Mix the bits of one number."""
    return int(hash_numbers(torch.tensor(number * 2 + 1)))


def uniforms(keys_R: Tensor, purpose: int, num_elements: int) -> Tensor:
    """Draw numbers from [0, 1), R x E in float64.

    Args:
        keys_R: int64.
        purpose: what the draw is for; another number gives draws of their own.
        num_elements: drawn for each key.
    """
    mixed_R1 = hash_numbers(keys_R[:, None] + hash_number(purpose))
    hashes_RE = hash_numbers(mixed_R1 + torch.arange(1, num_elements + 1, device=keys_R.device) * GOLDEN)
    return _shift(hashes_RE, 11).double() * _UNIT


def normals(keys_R: Tensor, purpose: int, num_elements: int) -> Tensor:
    """Draw from the standard normal distribution, R x E in float64; see `uniforms`.

    Source: Box and Muller 1958.
    """
    first_RE, second_RE = uniforms(keys_R, purpose, 2 * num_elements).chunk(2, dim=1)
    return (-2 * torch.log1p(-first_RE)).sqrt() * (2 * math.pi * second_RE).cos()
