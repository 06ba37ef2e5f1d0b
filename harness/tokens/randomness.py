"""Random streams that depend on a seed and a key, never on earlier draws.

The keys are (init seed, parameter name, shape), (dropout seed, global step, accumulation step, rank) and (order seed,
epoch). So turning one feature on or off does not change the draws of another, and resuming needs no saved generator
state.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch


def stream_seed(purpose: str, *key: int | str) -> int:
    """Return a 64-bit seed for a purpose and key: the first 8 bytes of a SHA-256 over both."""
    text = "\0".join([purpose, *(str(part) for part in key)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def initial_normal(init_seed: int, name: str, shape: tuple[int, ...], std: float) -> torch.Tensor:
    """Draw a parameter's initial values from N(0, std), float32 on the CPU.

    The values depend only on init_seed, name and shape. They come from NumPy's
    counter-based Philox generator, which uses neither vector instructions nor devices, so all machines get the same
    bits.
    """
    values = _initial_generator(init_seed, name, shape).standard_normal(shape, dtype=np.float32)
    values *= np.float32(std)
    return torch.from_numpy(values)


def initial_uniform(init_seed: int, name: str, shape: tuple[int, ...], bound: float) -> torch.Tensor:
    """Draw a parameter's initial values uniformly from [-bound, bound), as `initial_normal` does."""
    values = _initial_generator(init_seed, name, shape).random(shape, dtype=np.float32)
    values *= np.float32(2 * bound)
    values -= np.float32(bound)
    return torch.from_numpy(values)


def _initial_generator(init_seed: int, name: str, shape: tuple[int, ...]) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(stream_seed("init", init_seed, name, *shape)))


def seed_dropout(dropout_seed: int, global_step: int, accumulation_step: int, rank: int) -> None:
    """Seed torch's generators (CPU and devices) for one micro-batch's dropout masks; does not wait for a device."""
    torch.manual_seed(stream_seed("dropout", dropout_seed, global_step, accumulation_step, rank))


@dataclass(frozen=True)
class Permutation:
    """A keyed permutation of range(length) that computes each entry on demand and stores none.

    A four-round balanced Feistel network over the next even power of two, applied again until the value is in the
    range ("cycle walking", Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains"): under four times on
    average.
    """

    length: int
    key: int

    def __getitem__(self, index: int) -> int:
        """Return the image of `index`."""
        half_bits = max(1, ((self.length - 1).bit_length() + 1) // 2)
        mask = (1 << half_bits) - 1
        value = index
        while True:
            left, right = value >> half_bits, value & mask
            for round_number in range(4):
                left, right = right, left ^ (self._round(round_number, right) & mask)
            value = left << half_bits | right
            if value < self.length:
                return value

    def _round(self, round_number: int, value: int) -> int:
        text = f"{self.key} {round_number} {value}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def order_permutation(order_seed: int, epoch: int, sequences: int) -> Permutation:
    """Return the order of a split's `sequences` in one epoch."""
    return Permutation(sequences, stream_seed("order", order_seed, epoch))
