"""Random streams keyed by purpose, never by history.

Every draw in the harness starts from a key that says what it is for: (init seed, parameter name), (dropout seed,
global step, accumulation step, rank), (order seed, epoch). Turning one thing on or off therefore cannot disturb
another, and a resumed run needs no random state to be exact.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch


def stream_seed(purpose: str, *key: int | str) -> int:
    """Give a 64-bit seed for one purpose and key: the first 8 bytes of a SHA-256 over both."""
    text = "\0".join([purpose, *(str(part) for part in key)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def initial_normal(init_seed: int, name: str, shape: tuple[int, ...], std: float) -> torch.Tensor:
    """Draw a parameter's initial values from N(0, std), float32 on the CPU.

    The values depend on (init_seed, name, shape) alone. They come from NumPy's counter-based Philox generator,
    whose normals do not depend on vector instructions or devices, so that two machines agree to the bit.
    """
    generator = np.random.Generator(np.random.Philox(stream_seed("init", init_seed, name, *shape)))
    values = generator.standard_normal(shape, dtype=np.float32)
    values *= np.float32(std)
    return torch.from_numpy(values)


def seed_dropout(dropout_seed: int, global_step: int, accumulation_step: int, rank: int) -> None:
    """Seed torch's generators (CPU and devices) for the dropout masks of one micro-batch; no device sync."""
    torch.manual_seed(stream_seed("dropout", dropout_seed, global_step, accumulation_step, rank))


@dataclass(frozen=True)
class Permutation:
    """A keyed permutation of range(length) that is computed entry by entry and stores nothing.

    A balanced Feistel network over the next even power of two, walked until it lands inside the range (Black and
    Rogaway 2002, "Ciphers with Arbitrary Finite Domains"): four rounds, under four walks on average.
    """

    length: int
    key: int

    def __getitem__(self, index: int) -> int:
        """Give the image of `index`."""
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
    """Give the order of a split's `sequences` in one epoch."""
    return Permutation(sequences, stream_seed("order", order_seed, epoch))
