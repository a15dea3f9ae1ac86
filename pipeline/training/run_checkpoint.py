"""A fit's state on disk, from which an interrupted fit resumes, even in the middle of an epoch.

It leaves out the frozen backbone: trained values and the optimiser's moments are a few times the
size of the pack. Batches are planned from the index and the random generator is seeded per step, so
the step number determines what is read and drawn next. On the CPU, a resumed run gives the same
bytes as one that was not interrupted; it may resume on another device. Of several ranks, the first
writes and reads for all; a state can be resumed by the number of ranks that wrote it.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file

from pipeline.backbones import fingerprint
from pipeline.errors import StorageError
from pipeline.training.ranks import ALONE, Ranks

EVERY_SECONDS = 5.0
COST_SHARE = 0.01


@dataclass
class Progress:
    """Number of finished steps, the losses of those in the current epoch, and the seconds taken."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0


class Checkpoint:
    """The state of one run in the file `path`: due every `every_seconds`, but so seldom that
    writing takes at most `cost_share` of the time.
    """

    def __init__(
        self, path: Path, every_seconds: float = EVERY_SECONDS, cost_share: float = COST_SHARE
    ) -> None:
        self.path = path
        self.every_seconds = every_seconds
        self._cost_share, self._cost_seconds = cost_share, 0.0
        self._started = self._written = time.monotonic()
        self._seconds_before = 0.0

    def seconds(self) -> float:
        """Seconds of this run, those before an interruption included."""
        return self._seconds_before + time.monotonic() - self._started

    def is_due(self) -> bool:
        """Whether it is time to write the state."""
        return time.monotonic() - self._written >= max(
            self.every_seconds, self._cost_seconds / self._cost_share
        )

    def restore(self, optimiser: torch.optim.Optimizer, ranks: Ranks = ALONE) -> Progress:
        """Restore the last saved state into `optimiser` and its parameters. A missing or damaged
        file is a fresh start.
        """
        try:
            content = ranks.from_first(self._content() if ranks.is_first else b"")
            tensors, metadata = load(content), _metadata(content)
            if metadata["digest"] != fingerprint(tensors):
                raise ValueError("damaged")
            progress = Progress(
                int(metadata["step"]), tensors["losses"].tolist(), float(metadata["seconds"])
            )
            if int(metadata["ranks"]) != ranks.world:
                raise ValueError("the state is of another number of ranks")
            _put(tensors, optimiser)
        except (SafetensorError, KeyError, ValueError, TypeError):
            return Progress()
        self._seconds_before = progress.seconds
        return progress

    def _content(self) -> bytes:
        try:
            return self.path.read_bytes()
        except OSError:
            return b""

    def save(
        self, progress: Progress, optimiser: torch.optim.Optimizer, ranks: Ranks = ALONE
    ) -> None:
        """Write the state, atomically. Raises StorageError where the disk is full."""
        started = time.monotonic()
        if not ranks.is_first:
            return
        scratch = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        tensors = _state(progress, optimiser)
        metadata = {
            "step": str(progress.step),
            "seconds": str(self.seconds()),
            "ranks": str(ranks.world),
            "digest": fingerprint(tensors),
        }
        try:
            save_file(tensors, scratch, metadata)
            os.replace(scratch, self.path)
        except (OSError, SafetensorError) as error:
            raise StorageError(
                f"{self.path}: cannot be written ({error}); free space, or choose another folder"
            ) from None
        finally:
            with contextlib.suppress(OSError):
                scratch.unlink()
        self._written = time.monotonic()
        self._cost_seconds = self._written - started

    def step(self) -> int:
        """The step of the last saved state; 0 if there is none."""
        try:
            with safe_open(
                self.path, "pt"
            ) as file:  # the header alone: a driver asks, of states as large as a full model's
                return int(file.metadata()["step"])
        except (OSError, SafetensorError, KeyError, ValueError, TypeError):
            return 0

    def clear(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)


def _trained(optimiser: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimiser.param_groups for parameter in group["params"]]


def _state(progress: Progress, optimiser: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = {"losses": torch.tensor(progress.losses, dtype=torch.float64)}
    for number, parameter in enumerate(_trained(optimiser)):
        tensors[f"value.{number}"] = parameter.detach().clone()
        tensors |= {
            f"optimiser.{number}.{name}": torch.as_tensor(value).clone()
            for name, value in optimiser.state[parameter].items()
        }
    return tensors


def _metadata(content: bytes) -> dict[str, str]:
    """Of a safetensors file: a JSON header behind its length, which `load` has checked."""
    return dict(json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"])


@torch.no_grad()
def _put(tensors: Mapping[str, torch.Tensor], optimiser: torch.optim.Optimizer) -> None:
    """Restore `_state`, or nothing if a tensor is missing or has another shape.
    Raises KeyError or ValueError.
    """
    parameters = _trained(optimiser)
    values = [tensors[f"value.{number}"] for number in range(len(parameters))]
    if any(
        value.shape != parameter.shape for value, parameter in zip(values, parameters, strict=True)
    ):
        raise ValueError("the state is of another model")
    moments = {
        number: {
            name.split(".", 2)[2]: value
            for name, value in tensors.items()
            if name.startswith(f"optimiser.{number}.")
        }
        for number in range(len(parameters))
    }
    optimiser.load_state_dict({**optimiser.state_dict(), "state": moments})
    for value, parameter in zip(values, parameters, strict=True):
        parameter.copy_(value)
