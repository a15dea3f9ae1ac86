"""How skewed the codes of trained packs are: what an entropy coder could save of them at best.

    python benchmarks/codes.py [--workdir runs/methods]

Reads the packs that `python benchmarks/methods.py` trained. For each tensor the entropy of its
codes' frequencies is taken, and those frequencies are charged at half a logarithm of the count
each, as a coder that learns them pays. Tensors that would grow stay plain. Writes
benchmarks/results/codes.json and .md.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from machine import describe_machine

from pipeline.packs import Pack, read_pack
from pipeline.packs.codebook import MAX_CODE_BITS

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "codes.json"


def coded_bits(codes_N: np.ndarray, bits: int) -> float:
    """Bits that codes would take under an ideal coder that learns their frequencies; no more than
    plain.
    """
    counts_A = np.bincount(codes_N, minlength=2**bits)
    share_A = counts_A[counts_A > 0] / len(codes_N)
    entropy = -float((share_A * np.log2(share_A)).sum()) * len(codes_N)
    return min(entropy + (2**bits - 1) / 2 * float(np.log2(len(codes_N))), bits * len(codes_N))


def row_of(pack: Pack, size_bytes: int) -> dict[str, Any]:
    """Plain and coded bytes of a pack's codes of up to 8 bits, by width."""
    plain: dict[int, float] = defaultdict(float)
    coded: dict[int, float] = defaultdict(float)
    for part in pack.parts:
        if part.bits <= MAX_CODE_BITS:
            stops = np.cumsum([tensor.count for tensor in part.tensors])[:-1]
            for codes_N in np.split(part.codes, stops):
                plain[part.bits] += part.bits * len(codes_N) / 8
                coded[part.bits] += coded_bits(codes_N, part.bits) / 8
    return {
        "task": pack.metadata.task,
        "size_bytes": size_bytes,
        "plain": dict(plain),
        "coded": dict(coded),
    }


def markdown(result: dict[str, Any]) -> str:
    """The table of a result: means over packs."""
    machine, rows = result["machine"], result["rows"]
    lines = [
        "# Codes of trained packs",
        "",
        (
            f"`python benchmarks/codes.py` on {len(rows)} packs of benchmarks/methods.py, commit"
            f" {machine['commit']}."
        ),
        "",
        (
            "What an ideal entropy coder would save, at best: of the codes of each width, and of"
            " the whole file."
        ),
        "",
        "| bits | packs | codes, bytes | saved of the codes | saved of the file |",
        "|---|---|---|---|---|",
    ]
    for bits in sorted({bits for row in rows for bits in row["plain"]}):
        chosen = [row for row in rows if bits in row["plain"]]
        saved = [row["plain"][bits] - row["coded"][bits] for row in chosen]
        of_codes = _percent(
            [each / row["plain"][bits] for each, row in zip(saved, chosen, strict=True)]
        )
        of_file = _percent(
            [each / row["size_bytes"] for each, row in zip(saved, chosen, strict=True)]
        )
        lines.append(
            f"| {bits} | {len(chosen)} | {fmean(row['plain'][bits] for row in chosen):.0f} |"
            f" {of_codes} | {of_file} |"
        )
    return "\n".join([*lines, ""])


def _percent(shares: Sequence[float]) -> str:
    return f"{100 * fmean(shares):.1f} % (at most {100 * max(shares):.1f} %)"


def main() -> None:
    """Read, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, default=HERE.parent / "runs" / "methods")
    arguments = parser.parse_args()
    paths = sorted(arguments.workdir.glob("studies/*/fits/*/pack.safetensors"))
    rows = [row_of(read_pack(path), path.stat().st_size) for path in paths]
    result = {"machine": describe_machine(), "rows": [row for row in rows if row["plain"]]}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(markdown(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
