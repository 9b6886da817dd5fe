"""Device memory on the host: what a GPU is to the stand-in for TensorRT."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from resq_deploy.runtime.layouts import Indices


class HostDevice:
    """Device memory on the host: blocks far apart, so that an address beyond one is an error."""

    name, sm = "host memory", "87"
    stream = 7

    def __init__(self, backend: str = "tensorrt") -> None:
        self.blocks: dict[int, NDArray[np.uint8]] = {}
        self.closed = False
        self._next = 2**40

    def allocate(self, size: int) -> int:
        address, self._next = self._next, self._next + 2**32
        self.blocks[address] = np.zeros(size, dtype=np.uint8)
        return address

    def free(self, address: int) -> None:
        del self.blocks[address]

    def upload(self, address: int, array: NDArray[Any]) -> None:
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self.at(address)[: raw.size] = raw

    def download(self, address: int, size: int) -> bytes:
        return self.at(address)[:size].tobytes()

    def flip(self, addresses: Indices, masks: NDArray[np.uint8]) -> None:
        for address, mask in zip(addresses.tolist(), masks.tolist(), strict=True):
            self.at(address)[0] ^= mask

    def peek(self, addresses: Indices) -> NDArray[np.uint8]:
        return np.array([self.at(a)[0] for a in addresses.tolist()], dtype=np.uint8)

    def synchronize(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True

    def at(self, address: int) -> NDArray[np.uint8]:
        """Memory from an address to the end of its block."""
        base = max(a for a in self.blocks if a <= address)
        return self.blocks[base][address - base :]

    def content(self) -> bytes:
        """All that is allocated, to compare."""
        return b"".join(block.tobytes() for block in self.blocks.values())
