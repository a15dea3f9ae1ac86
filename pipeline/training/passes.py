"""Batches in as many passes as memory asks for."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from pipeline.inputs.out_of_memory import even_one_by_one, is_out_of_memory
from pipeline.utils.devices import release_memory

Result = TypeVar("Result")


@dataclass
class Passes:
    """How many samples of a batch pass the network at once on a device: `size`, halved whenever
    memory runs out.
    """

    size: int
    device: str

    def fit(self, run: Callable[[int], Result], samples: int) -> Result:
        """What `run` gives for a size of the passes of a batch of so many samples; it is called
        again with a smaller one as long as memory runs out. Raises OutOfMemory.
        """
        while True:
            try:
                return run(self.size)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            # Out of the handler: the error holds on to what the failed pass had computed.
            tried = min(self.size, samples)
            if tried == 1:
                raise even_one_by_one(self.device)
            self.size = tried // 2
            release_memory(self.device)
            logging.getLogger(__name__).warning(
                "passes of %d images take too much memory: each is now of %d", tried, self.size
            )
