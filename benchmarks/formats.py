"""What packs of an earlier release become today: the same values, positions and logits, and which
bytes differ.

    python benchmarks/formats.py [--before COMMIT]

The demo of an earlier commit runs in a worktree of its own. Its packs are then opened twice, by its
code and by today's, and written again in today's format. Writes `results/formats.md` and `.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe_machine
from pages import table

from pipeline.packs import Pack, PackInput, ledger, pack_to_bytes, read_pack
from pipeline.serving.predictor import load_predictor

RESULTS = Path(__file__).parent / "results"
PROJECT = Path(__file__).parent.parent
IMAGES = 64

OPENED_BEFORE = """
import sys
import numpy as np
from pipeline.packs import read_pack
from pipeline.serving.predictor import load_predictor

path, images, out = sys.argv[1:]
arrays = {"logits": load_predictor(path).logits(list(np.load(images))).numpy()}
for part in read_pack(path).parts:
    for name, values in part.values().items():
        arrays[f"value {part.name} {name}"] = values
    for tensor, positions in zip(part.tensors, part.positions):
        arrays[f"position {part.name} {tensor.name}"] = positions
np.savez(out, **arrays)
"""
"""The arrays of a pack, as the earlier release reads them, and its logits of some images."""


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as scratch:
        before, workdir = Path(scratch) / "before", Path(scratch) / "work"
        _git("worktree", "add", "--quiet", "--detach", str(before), arguments.before)
        try:
            demo = "from pipeline.cli import main; main()"
            _python(before, demo, "demo", "--workdir", str(workdir))
            packs = sorted(workdir.glob("studies/*/fits/*/pack.safetensors"))
            rows = [_compared(path, before, Path(scratch)) for path in packs]
        finally:
            _git("worktree", "remove", "--force", str(before))
    result = {"before": arguments.before, "machine": describe_machine(), "packs": rows}
    (RESULTS / "formats.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "formats.md").write_text(_page(result))


def _compared(path: Path, before: Path, scratch: Path) -> dict[str, Any]:
    """One pack of the earlier release as it reads it and as today's code does."""
    pack = read_pack(path)
    assert isinstance(pack.metadata.input, PackInput)
    size = pack.metadata.input.size_px
    images = np.random.default_rng(0).integers(0, 256, (IMAGES, size, size, 3), dtype=np.uint8)
    np.save(scratch / "images.npy", images)
    out = scratch / "arrays.npz"
    _python(before, OPENED_BEFORE, str(path), str(scratch / "images.npy"), str(out))
    with np.load(out) as opened:
        arrays = dict(opened)
    logits = load_predictor(path).logits(list(images)).numpy()
    written = pack_to_bytes(pack)
    again = read_pack(written)
    return {
        "task": pack.metadata.task,
        "values_differ": _differing(_values(again), arrays, "value "),
        "positions_differ": _differing(_positions(again), arrays, "position "),
        "arrays": len(arrays) - 1,
        "largest_logit_difference": float(np.abs(logits - arrays["logits"]).max()),
        "version_before": _version(path.read_bytes()),
        "version_now": _version(written),
        "bytes_before": path.stat().st_size,
        "bytes_now": len(written),
        "metadata_before": path.stat().st_size - _without_metadata(again),
        "metadata_now": ledger(again)["metadata"],
    }


def _values(pack: Pack) -> dict[str, np.ndarray]:
    return {
        f"value {part.name} {name}": values
        for part in pack.parts
        for name, values in part.values().items()
    }


def _positions(pack: Pack) -> dict[str, np.ndarray]:
    return {
        f"position {part.name} {tensor.name}": positions
        for part in pack.parts
        for tensor, positions in zip(part.tensors, part.positions, strict=False)
    }


def _differing(now: dict[str, np.ndarray], before: dict[str, np.ndarray], prefix: str) -> int:
    """The number of arrays that are not equal bit for bit, or that only one side has."""
    names = {name for name in before if name.startswith(prefix)} | set(now)
    return sum(
        name not in before or name not in now or not np.array_equal(before[name], now[name])
        for name in names
    )


def _version(content: bytes) -> int:
    """The format version that a pack file states in its header."""
    found = re.search(rb'"version":\s*"(\d+)"', content)
    assert found is not None
    return int(found[1])


def _without_metadata(pack: Pack) -> int:
    return sum(size for section, size in ledger(pack).items() if section != "metadata")


def _page(result: dict[str, Any]) -> str:
    columns = (
        "task",
        "arrays",
        "values that differ",
        "positions that differ",
        "largest difference of a logit",
        "format before",
        "format now",
        "bytes before",
        "bytes now",
        "metadata before",
        "metadata now",
    )
    rows = (
        (
            row["task"],
            row["arrays"],
            row["values_differ"],
            row["positions_differ"],
            f"{row['largest_logit_difference']:.1e}",
            row["version_before"],
            row["version_now"],
            f"{row['bytes_before']:,}",
            f"{row['bytes_now']:,}",
            f"{row['metadata_before']:,}",
            f"{row['metadata_now']:,}",
        )
        for row in result["packs"]
    )
    machine = result["machine"]
    lines = [
        "# Packs of an earlier release, read and written today",
        "",
        f"The packs of the demo at commit {result['before']}, opened by that release and by commit",
        f"{machine['commit']}, and written again in today's format. Values and positions are",
        f"compared bit for bit, logits on {IMAGES} random images.",
        "",
        *table(columns, rows),
        "",
        f"Machine: {machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}.",
        "",
        "Command: `python benchmarks/formats.py`",
    ]
    return "\n".join(lines) + "\n"


def _python(before: Path, code: str, *arguments: str) -> None:
    """Run code with the package of the earlier commit, which the current folder puts first."""
    command = [sys.executable, "-c", code, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(before)}
    subprocess.run(command, env=environment, cwd=before, check=True)


def _git(*arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=PROJECT, check=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", default="8e64b2a", help="the earlier commit")
    return parser.parse_args()


if __name__ == "__main__":
    main()
