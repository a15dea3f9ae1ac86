"""The file: round trips, sizes known beforehand, the ledger, atomic writes, and other readers."""

import errno
import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_cases import for_every
from helpers_packs import (
    LAYERS,
    SHAPES,
    assert_same,
    example_metadata,
    example_pack,
    random_part,
    zero_example,
)
from helpers_paths import TESTS
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.numpy import load

from pipeline.errors import PackDamaged, PackError, StorageError
from pipeline.packs import (
    LEDGER_KEYS,
    PART_BITS,
    Pack,
    content_digest,
    ledger,
    pack_to_bytes,
    read_pack,
    write_pack,
    zero_part,
)
from pipeline.packs.dictionary import dictionary

EXAMPLES = TESTS / "packs" / "examples"
"""Packs that earlier releases wrote."""


# --- round trips ----------------------------------------------------------------------------------


@for_every("bits", PART_BITS)
def test_every_part_survives_at_every_width(bits: int) -> None:
    pack = example_pack(dict.fromkeys(SHAPES, bits))
    assert_same(read_pack(pack_to_bytes(pack)), pack)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(
    bits=st.dictionaries(st.sampled_from(sorted(SHAPES)), st.sampled_from(PART_BITS), min_size=1),
    seed=st.integers(0, 999),
)
def test_any_mix_survives_and_its_size_and_ledger_are_known(
    bits: dict[str, Any], seed: int
) -> None:
    pack = example_pack(bits, seed)
    data = pack_to_bytes(pack)
    assert_same(read_pack(data), pack)
    zeros = [
        zero_part(part.name, part.bits, part.tensors, part.positions, part.layers)
        for part in pack.parts
    ]
    assert ledger(Pack(pack.metadata, tuple(zeros), np.zeros((3, 5), np.float32))) == ledger(pack)
    assert sum(ledger(pack).values()) == len(data)


def test_recomputed_positions_take_no_bytes() -> None:
    layers = tuple(layer for _, layer in LAYERS)
    pack = Pack(
        example_metadata(),
        (zero_part("connections", 4, SHAPES["connections"], (), layers, recomputed=True),),
        np.zeros((0, 5), np.float32),
    )
    assert_same(read_pack(pack_to_bytes(pack)), pack)
    assert ledger(pack)["positions"] == 0


def test_a_pack_may_hold_no_part_and_no_probe() -> None:
    pack = Pack(example_metadata(), (), np.zeros((0, 5), np.float32))
    assert_same(read_pack(pack_to_bytes(pack)), pack)
    assert set(read_pack(pack_to_bytes(pack)).metadata.classes) == {'"Vögel"', *"bcde"}


def test_arrays_of_a_read_pack_can_be_written_to() -> None:
    for part in read_pack(pack_to_bytes(example_pack())).parts:
        arrays = [
            part.codes,
            *part.positions,
            *part.values().values(),
            *([] if part.scales is None else [part.scales]),
        ]
        assert all(array.flags.writeable for array in arrays)


def test_probe_logits_are_those_of_the_file_from_the_start() -> None:
    pack = Pack(example_metadata(), (), np.full((1, 5), 0.1, np.float32))
    np.testing.assert_array_equal(pack.probe_logits, np.full((1, 5), np.float16(0.1), np.float32))


def test_deeply_nested_but_sane_metadata_survives() -> None:
    nested: Any = 1.5
    for _ in range(50):
        nested = [nested]
    pack = Pack(example_metadata(recipe={"nested": nested}), (), np.zeros((0, 5), np.float32))
    assert read_pack(pack_to_bytes(pack)).metadata == pack.metadata


# --- determinism ----------------------------------------------------------------------------------


def test_the_same_pack_is_the_same_bytes_in_another_process() -> None:
    code = (
        "import hashlib; from helpers_packs import *; from pipeline.packs import pack_to_bytes;"
        " print(hashlib.sha256(pack_to_bytes(example_pack())).hexdigest())"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=TESTS,
            capture_output=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(runs) == 1
    assert len(next(iter(runs)).strip()) == 64


def test_the_order_in_which_metadata_is_given_does_not_matter() -> None:
    one = example_metadata(recipe={"a": 1, "b": {"c": 2, "d": 3}})
    other = example_metadata(recipe={"b": {"d": 3, "c": 2}, "a": 1})
    assert one.to_json() == other.to_json()


# --- other readers and writers --------------------------------------------------------------------


def test_the_safetensors_library_reads_the_file_and_writes_the_same_tensor() -> None:
    data = pack_to_bytes(example_pack())
    tensors = load(data)
    assert list(tensors) == ["pack"]
    assert tensors["pack"].tobytes() == data[-tensors["pack"].nbytes :]
    assert tensors["pack"][-32:].tobytes() == hashlib.sha256(data[:-32]).digest()
    assert content_digest(data) == hashlib.sha256(data[:-32]).hexdigest()


def test_the_reader_needs_neither_torch_nor_the_safetensors_library(tmp_path: Path) -> None:
    write_pack(tmp_path / "pack", example_pack())
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'timm', 'ray', 'mlflow',"
        " 'safetensors']))\nfrom pipeline.packs import read_pack; pack ="
        f" read_pack({str(tmp_path / 'pack')!r})\nprint(sum(part.count for part in pack.parts))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == sum(part.count for part in example_pack().parts)


# --- the ledger -----------------------------------------------------------------------------------


def test_the_ledger_charges_each_part_what_it_takes() -> None:
    pack = example_pack()
    spent = ledger(pack)
    assert tuple(spent) == LEDGER_KEYS
    assert spent["positions"] == len(pack.parts[0].encoded_positions)
    assert spent["values"] == (9 * 2 + 7 * 3 + 1) // 2 + 2 * 4
    assert spent["adapters"] == 192 // 8 + 4 * 4
    assert spent["biases"] == 16 + 2 * 4
    assert spent["norms"] == 16 * 4
    assert spent["head"] == (5 * 16 // 4 + 4) + 5 * 2
    assert spent["probe"] == 3 * 5 * 2
    assert sum(spent.values()) == len(pack_to_bytes(pack))


# --- versions -------------------------------------------------------------------------------------


def test_a_pack_of_version_2_is_read_and_written_anew_with_the_scales_it_had() -> None:
    old = read_pack(EXAMPLES / "example.version2.taskpack")
    for part, same in zip(old.parts, example_pack().parts, strict=True):
        np.testing.assert_array_equal(part.codes, same.codes)
        if part.scales is not None and same.scales is not None:
            assert part.scale_bits == 32
            np.testing.assert_array_equal(part.scales.astype(np.float16), same.scales)
            assert (part.scales != same.scales).any()
    again = pack_to_bytes(old)
    assert b'"version":"5"' in again
    assert_same(read_pack(again), old)


def test_a_pack_of_version_3_is_read_as_it_was() -> None:
    old = read_pack(EXAMPLES / "example.version3.taskpack")
    assert_same(old, example_pack())


def test_a_pack_of_version_4_is_read_as_it_was_and_is_of_a_classification_of_images() -> None:
    old = read_pack(EXAMPLES / "example.version4.taskpack")
    assert_same(old, example_pack())
    meta = old.metadata
    assert (meta.kind, meta.metric, meta.modality) == ("classification", "accuracy", "images")


@for_every("version", [2, 3, 4, 5])
def test_the_dictionary_of_a_version_never_changes(version: int) -> None:
    digest = hashlib.sha256(dictionary(version)).hexdigest()
    assert digest == {5: "ef59d9751dad2905acb9c0dab7765c83e99ef705202d5e9fbd6dfb98f0700cd9"}.get(
        version, "7799533bc11db9664d11986f37cd06ea5ec2e5aaa7244c050611e24e9dea3fe0"
    )


def test_a_pack_says_its_kind_metric_and_modality() -> None:
    metadata = example_metadata(kind="multilabel", metric="mAP", modality="points")
    again = read_pack(pack_to_bytes(Pack(metadata, (), np.zeros((0, 5), np.float32)))).metadata
    assert (again.kind, again.metric, again.modality) == ("multilabel", "mAP", "points")
    assert (
        '"kind":"classification","metric":"accuracy","modality":"images"'
        in example_metadata().to_json()
    )


def test_a_part_without_means_takes_two_bytes_less_a_matrix() -> None:
    part = random_part("connections", 1, np.random.default_rng(0))
    assert part.scales is not None
    scales = np.where([False, True], part.scales, np.float32(0))
    centred, plain = (
        Pack(
            example_metadata(),
            (replace(part, scales=scales, has_mean=has_mean),),
            np.zeros((2, 5), np.float32),
        )
        for has_mean in (True, False)
    )
    assert_same(read_pack(pack_to_bytes(plain)), plain)
    assert ledger(centred)["values"] - ledger(plain)["values"] == 2 * part.groups
    with pytest.raises(PackDamaged, match="mean that is not 0"):
        replace(part, has_mean=False)


# --- the file system ------------------------------------------------------------------------------


def test_a_written_pack_is_read_back_and_its_size_returned(tmp_path: Path) -> None:
    path = tmp_path / "birds.safetensors"
    path.write_bytes(b"an older file")
    size_bytes = write_pack(path, example_pack())
    assert size_bytes == path.stat().st_size
    assert_same(read_pack(str(path)), example_pack())
    assert os.listdir(tmp_path) == [path.name]


def test_a_full_disk_is_a_storage_error_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "birds.safetensors"
    path.write_bytes(b"an older file")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        write_pack(path, example_pack())
    assert path.read_bytes() == b"an older file"
    assert os.listdir(tmp_path) == [path.name]


def test_folders_that_cannot_be_written_are_storage_errors(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "none" / "pack", tmp_path / "file" / "pack"):
        with pytest.raises(StorageError, match="cannot write"):
            write_pack(path, example_pack())


def test_missing_and_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(PackError, match="birds: no such file"):
        read_pack(tmp_path / "birds")
    with pytest.raises(PackError, match="cannot be read"):
        read_pack(tmp_path)
    (tmp_path / "short").write_bytes(pack_to_bytes(example_pack())[:-1])
    with pytest.raises(PackError, match="short: the pack takes"):
        read_pack(tmp_path / "short")


# --- contradictions -------------------------------------------------------------------------------


def test_a_tensor_may_be_stored_once_only() -> None:
    head = zero_example("head", 4)
    with pytest.raises(PackDamaged, match=r"stored twice: head: head\.weight"):
        Pack(
            example_metadata(),
            (head, zero_example("biases", 4), head),
            np.zeros((1, 5), np.float32),
        )


@for_every("logits", [np.zeros((2, 4)), np.zeros(5), np.full((1, 5), 7e4), np.full((1, 5), np.nan)])
def test_probe_logits_must_fit_the_classes_and_float16(logits: np.ndarray) -> None:
    with pytest.raises(PackDamaged, match="probe logits"):
        Pack(example_metadata(), (), logits.astype(np.float32))


@for_every(
    "changes",
    [
        {"created": "today"},
        {"classes": []},
        {"backbone": {"model": "vit_tiny", "arguments": {}, "fingerprint": "short", "trail": ""}},
        {
            "backbone": {
                "model": "vit_tiny",
                "arguments": {},
                "fingerprint": "0f" * 32,
                "trail": "",
                "path": "/tmp",
            }
        },
        {"input": {"size_px": 64, "mean": (0, 0, 0), "std": (1, 0, 1), "interpolation": "bicubic"}},
        {"recipe": {"callback": print}},
        {"seed": -1},
    ],
)
def test_metadata_is_checked_when_built(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        example_metadata(**changes)


def test_metadata_that_json_cannot_hold_is_refused() -> None:
    with pytest.raises((PackError, ValidationError)):
        example_metadata(recipe={"learning_rate": float("nan")}).to_json()


def test_metadata_that_no_reader_would_accept_is_not_written() -> None:
    with pytest.raises(PackError, match="shorten the class names"):
        pack_to_bytes(
            Pack(
                example_metadata(classes=["x" * 1_000_000, *"bcde"]),
                (),
                np.zeros((0, 5), np.float32),
            )
        )
