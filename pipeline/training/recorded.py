"""A training step recorded as a CUDA graph and replayed.

A step of a small recipe launches hundreds of kernels of a few microseconds each, so the host takes
longer to launch them than the GPU to run them. A CUDA graph launches all of them at once.

A graph repeats the same kernels at the same addresses. So a recording serves batches of one shape,
and everything that changes from step to step must be in a tensor that is written in place (images,
targets, learning rate, trained values, moments) or in a generator that the graph knows. Batches of
another shape, such as an epoch's last, take the plain step, on the same values.

Where memory runs out, in a plain step or while one is recorded, the caller makes another
RecordedStep, of smaller passes. A step raises for want of memory only before it has changed a
value.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator

import torch

Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
PLAIN_STEPS = 3
"""Steps before the recording, in which libraries choose algorithms and buffers are made."""


class RecordedStep:
    """Calls `step` (images, targets) -> loss [], at first plainly, then from its recording.

    All steps run on a stream of their own, because autograd adds gradients up on the stream where
    they were first used, and a recording must not leave its stream.

    Args:
        generators: those that the step draws from; asked when it is recorded.
    """

    def __init__(
        self, step: Step, device: str, generators: Callable[[], Iterable[torch.Generator]] = tuple
    ) -> None:
        self._step, self._generators = step, generators
        self._stream = torch.cuda.Stream(device)
        self._shape: object = None
        self._plain_steps = 0
        self._is_recordable = True
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with self._on_own_stream():
            shape = (images.shape, images.dtype, targets.shape, targets.dtype)
            if self._graph is None and self._is_recordable:
                self._plain_steps = self._plain_steps + 1 if shape == self._shape else 1
                self._shape = shape
                if self._plain_steps == PLAIN_STEPS:
                    return self._watched(images, targets)
                if self._plain_steps > PLAIN_STEPS:
                    self._record(images, targets)
            if self._graph is None or shape != self._shape:
                return self._step(images, targets)
            # Nothing is allocated after the replay: a step that ran out of memory is tried again,
            # and this one has already changed the values.
            loss = torch.empty_like(self._loss)
            self._images.copy_(images)
            self._targets.copy_(targets)
            self._graph.replay()
            return loss.copy_(self._loss)

    @contextlib.contextmanager
    def _on_own_stream(self) -> Iterator[None]:
        outside = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(outside)
        with torch.cuda.stream(self._stream):
            yield
        outside.wait_stream(self._stream)

    def _watched(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """A plain step that finds out whether the host waits for the GPU in it. Such a step cannot
        be recorded, and memory that a failed recording has taken is lost.
        """
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                loss = self._step(images, targets)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        if any("synchronizing CUDA operation" in str(warning.message) for warning in caught):
            self._refuse("it waits for the GPU")
        return loss

    def _record(self, images: torch.Tensor, targets: torch.Tensor) -> None:
        """Record a step; nothing is computed."""
        graph = torch.cuda.CUDAGraph()
        for generator in self._generators():
            graph.register_generator_state(generator)
        self._images, self._targets = images.clone(), targets.clone()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                self._loss = self._step(self._images, self._targets).detach()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._refuse((str(error).strip().splitlines() or [type(error).__name__])[0][:200])
        else:
            self._graph = graph

    def _refuse(self, reason: str) -> None:
        self._is_recordable = False
        logging.getLogger(__name__).warning(
            "training launches every kernel by itself, which takes longer: a step cannot be"
            " recorded as a CUDA graph (%s)",
            reason,
        )
