"""Multi-label tasks from a table or shards to a registered pack: three squares, each there or
not.
"""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers_cases import for_every
from helpers_cli import BACKBONE, taskpack
from PIL import Image
from pydantic import ValidationError

from pipeline.adaptation.packing import from_pack
from pipeline.data import check, prepare, remarks_on, split_samples, write_shards
from pipeline.data.splits import held_out_by_labels
from pipeline.errors import DataError, PackError, SpecError
from pipeline.kinds import Label, Outcomes, kind_named, metric_named, score
from pipeline.packs import read_pack
from pipeline.registry.connection import import_pyfunc
from pipeline.search.trial import run_trial
from pipeline.selection import select_locally, selection_key
from pipeline.serving.predictor import Predictor, kind_of
from pipeline.specs import Task
from pipeline.specs.task_files import load_task
from pipeline.training import Inputs, evaluate, open_inputs
from pipeline.training.fit import PACK_FILE, fit

NAMES = ("red", "green", "blue")
SIZE_PX, TRAIN, TEST = 32, 96, 40


def drawn(number: int) -> tuple[bytes, tuple[int, ...]]:
    """A PNG with a square for each label, at a random place in its third of the image."""
    rng = np.random.default_rng(number)
    label = tuple(np.flatnonzero(rng.random(3) < (0.5, 0.4, 0.3)).tolist())
    pixels = rng.integers(90, 140, (SIZE_PX, SIZE_PX, 3), np.uint8)
    for colour in label:
        top, left = int(rng.integers(0, SIZE_PX - 8)), colour * 10 + int(rng.integers(0, 3))
        pixels[top : top + 8, left : left + 8] = np.eye(3, dtype=np.uint8)[colour] * 255
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue(), label


def write_table(folder: Path, split: str, numbers: Sequence[int], separator: str = "|") -> Path:
    lines = ["path,label"]
    (folder / split).mkdir(parents=True)
    for number in numbers:
        image, label = drawn(number)
        (folder / split / f"{number}.png").write_bytes(image)
        lines.append(f"{split}/{number}.png,{separator.join(NAMES[each] for each in label)}")
    (folder / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return folder / f"{split}.csv"


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.csv and test.csv with the images that they list; some have no label."""
    folder = tmp_path_factory.mktemp("table")
    write_table(folder, "train", range(TRAIN))
    write_table(folder, "test", range(1000, 1000 + TEST))
    return folder


def of(data: dict[str, Any], /, **changes: Any) -> dict[str, Any]:
    return {
        **{"name": "squares", "kind": "multilabel", "data": data, "backbone": BACKBONE},
        "input": {"size_px": SIZE_PX, "flip": False},
        "recipe": {
            "connections": {"top_k": 1},
            "biases": {},
            "training": {
                "epochs": 12,
                "batch_size": 16,
                "learning_rate": 0.02,
                "precision": "fp32",
            },
        },
        "search": {"bits": [4, 8]},
        "selection": {"batch_size": 16},
        **changes,
    }


def csv_data(folder: Path) -> dict[str, Any]:
    return {"format": "csv", "train": str(folder / "train.csv"), "test": str(folder / "test.csv")}


@pytest.fixture(scope="module")
def inputs(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    task, folder = Task.model_validate(of(csv_data(table))), tmp_path_factory.mktemp("p") / "data"
    prepare(task, folder)
    return open_inputs(task, folder)


# --- data -----------------------------------------------------------------------------------------


def test_a_table_names_the_labels_of_an_image_also_none(inputs: Inputs, table: Path) -> None:
    index = inputs.index
    assert index.classes == sorted(NAMES)
    lines = (table / "test.csv").read_text().splitlines()[1:]
    written = sorted(tuple(sorted(line.split(",")[1].split("|"))) for line in lines)
    (shard,) = index.splits["test"]
    read = sorted(tuple(index.classes[each] for each in label) or ("",) for label in shard.labels)  # type: ignore[union-attr]
    assert read == written
    assert () in shard.labels
    assert remarks_on(index) == []


def test_a_batch_has_a_row_of_0_and_1_per_image(inputs: Inputs) -> None:
    split = inputs.splits["val"]
    _, targets = inputs.reader("val").read(split.samples)
    assert (targets.dtype, targets.shape) == (torch.float32, (len(split), 3))
    for row, label in zip(targets, split.labels, strict=True):
        assert tuple(row.nonzero()[:, 0].tolist()) == label


def test_shards_hold_the_same_as_a_table(inputs: Inputs, tmp_path: Path) -> None:
    for split, numbers in (("train", range(TRAIN)), ("test", range(1000, 1000 + TEST))):
        samples = [(f"{number:06d}", *drawn(number)) for number in numbers]
        order = sorted(NAMES)
        samples = [
            (key, image, tuple(sorted(order.index(NAMES[each]) for each in label)))
            for key, image, label in samples
        ]
        write_shards(tmp_path, split, samples)
    data = {
        "train": str(tmp_path / "train-*.tar"),
        "test": str(tmp_path / "test-*.tar"),
        "classes": sorted(NAMES),
    }
    index = prepare(Task.model_validate(of(data)), tmp_path / "p")
    (shard,), (same,) = index.splits["train"], inputs.index.splits["train"]
    assert sorted(map(str, shard.labels)) == sorted(map(str, same.labels))


@for_every(
    ("member", "expected"),
    [
        (b"0 2", (0, 2)),
        (b"2,0\n", (0, 2)),
        (b"2, 0", (0, 2)),
        (b"[2, 0]", (0, 2)),
        (b'["blue", "red"]', (0, 2)),
        (b"blue red", (0, 2)),
        (b"1", (1,)),
        (b"", ()),
        (b"[]", ()),
    ],
)
def test_labels_in_a_shard_are_written_in_several_ways(
    member: bytes, expected: tuple[int, ...], shard_of: Callable[..., bytes]
) -> None:
    from pipeline.data.shards import samples_in

    content = shard_of(cls=member)
    ((_, _, label),) = samples_in(content, "s.tar", NAMES, kind=kind_named("multilabel"))
    assert label == expected


@pytest.fixture
def shard_of() -> Callable[..., bytes]:
    """A shard of one image with members by extension."""
    import tarfile

    def make(**members: bytes) -> bytes:
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as archive:
            for extension, content in {"png": drawn(0)[0], **members}.items():
                info = tarfile.TarInfo(f"000000.{extension}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        return stream.getvalue()

    return make


@for_every(
    ("kind", "members", "said"),
    [
        ("multilabel", {"cls": b"0 3"}, "label 3 is outside the 3 classes; expected 0 to 2"),
        ("multilabel", {"cls": b"1 2 1"}, "a class is given twice"),
        (
            "multilabel",
            {"cls": b"red,purple"},
            "the label is 'purple'; expected a whole number from 0",
        ),
        ("multilabel", {"cls": b"0 red"}, "expected either numbers or names"),
        ("multilabel", {"cls": b"[0, 1"}, "not valid JSON"),
        ("multilabel", {"cls": b"[0, [1]]"}, "the label is a list or an object"),
        ("multilabel", {"json": b'{"label": {"a": 1}}'}, "the label is a list or an object"),
        ("classification", {"cls": b"0 2"}, "or `kind: multilabel` in the task file"),
        (
            "classification",
            {"json": b'{"label": [0, 2]}'},
            "or `kind: multilabel` in the task file",
        ),
        ("classification", {"cls": b""}, "expected a whole number"),
    ],
)
def test_labels_that_cannot_be_are_refused_by_sample(
    kind: str, members: dict[str, bytes], said: str, shard_of: Callable[..., bytes]
) -> None:
    from pipeline.data.shards import samples_in

    with pytest.raises(DataError) as refused:
        list(samples_in(shard_of(**members), "s.tar", NAMES, kind=kind_named(kind)))
    assert str(refused.value).startswith("s.tar: 000000")
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("field", "said"), [("red||blue", "hold an empty one"), ("red|red", "a class is given twice")]
)
def test_fields_that_cannot_be_are_refused_by_line(
    table: Path, tmp_path: Path, field: str, said: str
) -> None:
    shutil.copytree(table, tmp_path / "t")
    lines = (tmp_path / "t" / "train.csv").read_text().splitlines()
    lines[3] = f"{lines[3].split(',')[0]},{field}"
    (tmp_path / "t" / "train.csv").write_text("\n".join(lines))
    with pytest.raises(DataError, match=rf"train\.csv: line 4: .*{said}"):
        prepare(Task.model_validate(of(csv_data(tmp_path / "t"))), tmp_path / "p")


def test_lists_and_json_name_several_classes(tmp_path: Path) -> None:
    lists: dict[str, Any] = {
        "format": "lists",
        "root": str(tmp_path),
        "classes": 3,
        "train": "train.txt",
        "test": "test.txt",
        "val": None,
    }
    labels: dict[str, list[Label]] = {"train": [], "test": []}
    for split, numbers in (("train", range(40)), ("test", range(100, 120))):
        rows = []
        for number in numbers:
            image, label = drawn(number)
            (tmp_path / f"{number}.png").write_bytes(image)
            rows.append((f"{number}.png", label))
            labels[split].append(label)
        text = [f"{path} {','.join(map(str, label)) or '[]'}" for path, label in rows]
        (tmp_path / f"{split}.txt").write_text("\n".join(text))
        (tmp_path / f"{split}.json").write_text(
            json.dumps({path: list(label) for path, label in rows})
        )
    as_json = {**lists, "format": "json", "train": "train.json", "test": "test.json"}
    for number, data in enumerate((lists, as_json)):
        index = prepare(Task.model_validate(of(data)), tmp_path / f"p{number}")
        for split, expected in labels.items():
            found = [label for shard in index.splits[split] for label in shard.labels]  # type: ignore[index]
            assert sorted(map(str, found)) == sorted(map(str, expected))


def test_a_held_out_set_has_its_share_of_every_class(inputs: Inputs) -> None:
    labels = split_samples(inputs.index, 0.25, seed=1)
    for number in range(3):
        held = sum(number in label for label in labels["val"].labels)
        everyone = sum(number in label for label in labels["trainval"].labels)
        assert abs(held - 0.25 * everyone) <= 2
    without = sum(label == () for label in labels["trainval"].labels)
    assert abs(sum(label == () for label in labels["val"].labels) - 0.25 * without) <= 2
    assert abs(len(labels["val"]) - 0.25 * TRAIN) <= 2


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_rare_classes_are_in_train_and_where_there_are_two_in_validation(fraction: float) -> None:
    labels = np.empty(30, object)
    labels[:] = [(0,)] * 20 + [(0, 1)] * 7 + [(0, 2), (1, 2)] + [(0, 3)]
    held = held_out_by_labels(labels, fraction, np.random.default_rng(0).permutation(30), 4)
    assert any(2 in label for label in labels[held])
    assert any(2 in label for label in labels[~held])
    assert not held[29], "the only sample of a class is trained on"


# --- specification --------------------------------------------------------------------------------


def test_the_metric_is_the_kinds_first_unless_named(table: Path) -> None:
    assert Task.model_validate(of(csv_data(table))).metric == "mAP"
    assert Task.model_validate(of(csv_data(table), kind="classification")).metric == "accuracy"
    named = Task.model_validate(of(csv_data(table), metric="f1"))
    assert Task.model_validate_json(named.model_dump_json()).metric == "f1"


@for_every(
    ("changes", "said"),
    [
        (
            {"kind": "regression"},
            'kind: given "regression"; expected one of: classification, multilabel',
        ),
        (
            {"metric": "accuracy"},
            'metric: given "accuracy"; expected a metric of kind multilabel: ',
        ),
        (
            {"kind": "classification", "metric": "hamming"},
            "expected a metric of kind classification: accuracy",
        ),
        (
            {
                "kind": "classification",
                "data": {
                    "format": "csv",
                    "train": "t.csv",
                    "test": "u.csv",
                    "label_separator": ";",
                },
            },
            "label_separator would change nothing",
        ),
    ],
)
def test_what_does_not_fit_the_kind_is_refused(
    changes: dict[str, Any], said: str, table: Path, tmp_path: Path
) -> None:
    path = tmp_path / "task.yaml"
    path.write_text(yaml.safe_dump(of(csv_data(table), **changes)))
    with pytest.raises(SpecError) as refused:
        load_task(path)
    assert said in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1
    with pytest.raises(ValidationError):
        Task.model_validate(of(csv_data(table), **changes))


def test_classes_that_validation_lacks_are_named(inputs: Inputs) -> None:
    assert inputs.remarks() == []
    split = inputs.splits["val"]
    is_kept = np.array([0 not in label for label in split.labels])
    fewer = replace(split, samples=split.samples[is_kept], labels=split.labels[is_kept])
    remarks = replace(inputs, splits={**inputs.splits, "val": fewer}).remarks()
    assert remarks == ["validation has no sample of 1 of the classes, which mAP leaves out: blue"]


def test_a_kind_has_selections_of_its_own(inputs: Inputs) -> None:
    single = inputs.with_task(inputs.task.model_copy(update={"kind": "classification"}))
    assert selection_key(single, 1) != selection_key(inputs, 1)


# --- training, packing, predicting ----------------------------------------------------------------


@for_every("changes", [{}, {"mixup": 0.5, "cutmix": 0.5, "label_smoothing": 0.1}])
@for_every("loss", ["contrastive", "cross_entropy"])
def test_a_trial_learns_the_squares(inputs: Inputs, loss: str, changes: dict[str, float]) -> None:
    task = inputs.task.changed(selection={"batch_size": 16, "loss": loss})
    training = task.recipe.training.changed(**changes)
    chosen = inputs.with_task(task)
    recipe = chosen.task.recipe.model_copy(update={"training": training})
    scores = [found for found, _ in run_trial(chosen, recipe, select_locally(chosen, 1))]
    assert {found.metric for found in scores} == {"mAP"}
    val = np.array(
        [[number in label for number in range(3)] for label in inputs.splits["val"].labels]
    )
    assert scores[-1].value > val.mean() + 0.2, "chance is the share of labels"
    assert all(found.standard_error > 0 for found in scores)


@pytest.fixture(scope="module")
def fitted(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fit")
    fit(inputs, inputs.task.recipe, select_locally(inputs, 1), folder)
    return folder


def test_a_pack_predicts_labels_with_probabilities(inputs: Inputs, fitted: Path) -> None:
    result = json.loads((fitted / "result.json").read_text())
    pack = read_pack(fitted / PACK_FILE)
    assert (pack.metadata.kind, pack.metadata.metric, pack.metadata.modality) == (
        "multilabel",
        "mAP",
        "images",
    )
    model = from_pack(pack, inputs.backbone)
    outcomes = evaluate(model, inputs.reader("test"), inputs.splits["test"], inputs.kind)
    found = score(inputs.metric, outcomes)
    assert (result["metric"], result["test_metric"], result["test_samples"]) == (
        "mAP",
        found.value,
        TEST,
    )
    images = [drawn(number)[0] for number in range(1000, 1000 + TEST)]
    rows = Predictor(pack, inputs.backbone, "cpu").predict(images)
    classes = inputs.index.classes
    for row in rows:
        assert list(row["probabilities"]) == classes
        assert row["labels"] == [name for name in classes if row["probabilities"][name] > 0.5]
    outputs = np.array([list(row["probabilities"].values()) for row in rows])
    targets = np.array(
        [
            [NAMES.index(name) in drawn(number)[1] for name in classes]
            for number in range(1000, 1000 + TEST)
        ]
    )
    assert metric_named("mAP", "multilabel").value(Outcomes(outputs, targets)) == pytest.approx(
        found.value
    )


def test_a_pack_of_an_unknown_kind_is_refused(fitted: Path) -> None:
    metadata = read_pack(fitted / PACK_FILE).metadata.model_copy(update={"kind": "counting"})
    with pytest.raises(
        PackError, match="of kind 'counting', which this taskpack does not know; upgrade taskpack"
    ):
        kind_of(metadata)


def test_a_training_set_without_enough_classes_is_refused(inputs: Inputs) -> None:
    shard = inputs.index.splits["train"][0]
    empty = shard.model_copy(update={"labels": [()] * shard.samples})
    index = inputs.index.model_copy(update={"splits": {**inputs.index.splits, "train": [empty]}})
    with pytest.raises(DataError, match="expected at least two classes"):
        check(index, inputs.task)


# --- the command line -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_the_command_line_speaks_of_the_metric_by_name(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, workdir = tmp_path / "squares.yaml", tmp_path / "runs"
    path.write_text(yaml.safe_dump(of(csv_data(table))))

    def ask(*arguments: str | Path) -> Any:
        answer = taskpack(*arguments, "--workdir", workdir)
        assert answer.code == 0, answer.err
        return answer

    assert "squares  mAP" in ask("run", path).out
    (pack,) = ask("ls", "--metric", "mAP", "--json").json()
    assert ask("ls", "--metric", "accuracy", "--json").json() == []
    assert pack["tags"]["kind"] == "multilabel"
    assert re.search(r"test % +mAP \d", ask("show", "squares").out)
    evaluated = ask("evaluate", "squares", "--json").json()
    assert (evaluated["metric"], evaluated["samples"]) == ("mAP", TEST)
    assert (
        evaluated["test_metric"]
        == evaluated["registered_test_metric"]
        == pack["metrics"]["test_metric"]
    )
    image = table / "test" / "1000.png"
    (row,) = ask("predict", "squares", image, "--json").json()
    assert set(row) == {"image", "labels", "probabilities"}
    assert "labels" in ask("predict", "squares", image).out
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{workdir / 'mlflow.db'}")
    model = import_pyfunc().load_model("models:/squares@champion")
    predicted = model.predict({"image": [str(image)]})
    assert predicted["labels"].tolist() == [row["labels"]]
    assert predicted["probabilities"][0] == pytest.approx(row["probabilities"], abs=1e-6)
    assert model.metadata.get_output_schema().input_names() == ["labels", "probabilities"]
    kept = list(workdir.glob("studies/*/trials/*.safetensors"))
    assert len(kept) == 2
