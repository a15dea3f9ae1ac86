"""The work folder of a run: every stage's results under the hash of what they depend on.

data/<task>/                       shards and index
backbones/<fingerprint>.safetensors   what workers load
selections/<key>.safetensors      ranked connections
gpus/<key>.json                   what a trial takes of a GPU
studies/<task>-<key>/trials/      one file per trial
studies/<task>-<key>/fits/<id>/   a champion's pack and its test result
studies/<task>-<key>/front.png
logs/<task>.txt                   tracebacks
mlflow.db, artifacts/             the embedded registry
writer.json                       the name under which this folder's packs are registered
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from pipeline.packs import FORMAT_VERSION
from pipeline.search.trial_record import TrialJournal
from pipeline.selection import selection_key
from pipeline.training import Inputs
from pipeline.utils.files import read_json, write_json


@dataclass(frozen=True)
class Workspace:
    """Paths inside a work folder, absolute."""

    root: Path

    def clear_leftovers(self) -> None:
        """Remove incomplete folders of a run that was killed. Only for the holder of the work
        folder's lock.
        """
        for leftover in (
            path
            for folder in ("data", "backbones", "selections")
            for path in self.root.glob(f"{folder}/.*")
        ):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)

    def writer(self) -> str:
        """A random name that this folder keeps, so that a run finds what an earlier one, killed
        while registering, left in the registry. Only for the holder of the lock."""
        path = self.root / "writer.json"
        name = read_json(path)
        if not isinstance(name, str):
            name = secrets.token_hex(8)
            write_json(path, name)
        return name

    def data(self, task: str) -> Path:
        """The prepared data of a task."""
        return self.root / "data" / task

    def backbone(self, inputs: Inputs) -> Path:
        """The backbone's tensors, for workers."""
        return self.root / "backbones" / f"{inputs.backbone.fingerprint}.safetensors"

    def selection(self, inputs: Inputs, top_k: int) -> Path:
        """The selection of a task's connections."""
        return self.root / "selections" / f"{selection_key(inputs, top_k)}.safetensors"

    @property
    def gpu_needs(self) -> Path:
        """What trials take of a GPU."""
        return self.root / "gpus"

    def study(self, inputs: Inputs, top_k: int) -> StudyFolder:
        """The study of a task; trials with equal inputs, selection and pack format share it,
        independent of search space and budget.
        """
        seed = json.dumps(
            [FORMAT_VERSION, selection_key(inputs, top_k), inputs.task.metric, inputs.task.seed]
        )
        name = inputs.task.name
        return StudyFolder(
            self.root / "studies" / f"{name}-{hashlib.sha256(seed.encode()).hexdigest()[:12]}",
            self.log(name),
        )

    def log(self, task: str) -> Path:
        """The file for tracebacks of a task's unexpected errors."""
        return self.root / "logs" / f"{task}.txt"


@dataclass(frozen=True)
class StudyFolder:
    """Paths inside one study. `log` is the file for tracebacks of its trials."""

    root: Path
    log: Path

    @property
    def journal(self) -> TrialJournal:
        """The finished trials."""
        return TrialJournal(self.root / "trials", self.log)

    @property
    def compared(self) -> TrialJournal:
        """The finished trials of a comparison, which all run to their end: a study's own may have
        been stopped.
        """
        return TrialJournal(self.root / "compared", self.log)

    @property
    def figure(self) -> Path:
        """The figure of the front."""
        return self.root / "front.png"

    def fit(self, trial_id: str) -> Path:
        """The final fit of a trial's recipe."""
        return self.root / "fits" / trial_id
