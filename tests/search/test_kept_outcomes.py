"""The validation outputs that a trial keeps: small, whole or not there, and never needed."""

import os
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import StorageError
from pipeline.kinds import Outcomes
from pipeline.search.kept_outcomes import read_outcomes, write_outcomes
from pipeline.search.trial_record import TrialJournal, TrialRecord

RNG = np.random.default_rng(0)
LOGITS = Outcomes(RNG.normal(size=(7, 5)).astype(np.float32), RNG.integers(0, 5, 7))


def test_outputs_come_back_as_half_floats_and_targets_as_they_were(tmp_path: Path) -> None:
    write_outcomes(tmp_path / "t.safetensors", LOGITS)
    found = read_outcomes(tmp_path / "t.safetensors")
    assert found is not None
    assert found.outputs.dtype == np.float32
    np.testing.assert_array_equal(found.outputs, LOGITS.outputs.astype(np.float16))
    np.testing.assert_array_equal(found.targets, LOGITS.targets)
    assert [path.name for path in tmp_path.iterdir()] == ["t.safetensors"]


@pytest.mark.parametrize("samples", [1, 1000])
def test_a_sample_takes_two_bytes_a_class_and_one_for_its_label(
    samples: int, tmp_path: Path
) -> None:
    outcomes = Outcomes(np.zeros((samples, 10), np.float32), np.full(samples, 9))
    write_outcomes(tmp_path / "t", outcomes)
    assert 21 * samples <= (tmp_path / "t").stat().st_size <= 21 * samples + 320


def test_many_classes_counts_and_large_logits_survive(tmp_path: Path) -> None:
    outputs = np.array([[1e9, -1e9], [2.0, -0.0]], np.float32)
    write_outcomes(tmp_path / "t", Outcomes(outputs, np.array([60_000, 3])))
    found = read_outcomes(tmp_path / "t")
    assert found is not None
    assert found.outputs.tolist() == [[65504, -65504], [2, 0]]
    assert found.targets.tolist() == [60_000, 3]
    counts = np.array([[[10**6, 3], [0, -1]]])
    write_outcomes(tmp_path / "c", Outcomes(counts, np.zeros((1, 0), np.uint8)))
    kept = read_outcomes(tmp_path / "c")
    assert kept is not None
    assert kept.outputs.tolist() == counts.tolist()


def test_damage_is_noticed_wherever_it_is(tmp_path: Path) -> None:
    path = tmp_path / "t"
    write_outcomes(path, LOGITS)
    content = path.read_bytes()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        assert read_outcomes(path) is None, size
    for byte in range(len(content)):
        flipped = content[byte] ^ 1 << byte % 8
        path.write_bytes(content[:byte] + bytes([flipped]) + content[byte + 1 :])
        found = read_outcomes(path)
        if found is not None:  # a bit of the header that changes nothing
            np.testing.assert_array_equal(found.outputs, LOGITS.outputs.astype(np.float16))
            np.testing.assert_array_equal(found.targets, LOGITS.targets)


def test_a_record_counts_without_its_outputs(tmp_path: Path) -> None:
    journal = TrialJournal(tmp_path / "trials")
    record = TrialRecord(
        id="a",
        point={},
        size_bytes=1,
        state="complete",
        val_metric=0.5,
        curve=(0.5,),
        errors=(0.1,),
    )
    journal.write(record)
    assert journal.read() == {"a": record}
    assert journal.outcomes("a") is None
    write_outcomes(journal.outcomes_path("a"), LOGITS)
    assert journal.outcomes("a") is not None
    journal.outcomes_path("a").write_bytes(b"damaged")
    assert journal.read() == {"a": record}
    assert journal.outcomes("a") is None


def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(StorageError, match="cannot be written"):
        write_outcomes(tmp_path / "t", LOGITS)
    assert list(tmp_path.iterdir()) == []
