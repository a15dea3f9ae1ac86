"""A device beside the CPU: from training to a pack that is used, everything computes there what it
computes on the CPU.

Every test runs on the stand-in for a GPU (see `standin_device`), and with `pytest -m gpu` on a GPU.
What only the stand-in can show is in `test_standin.py`. Nothing here needs Ray or MLflow: on a
machine without them, name this file to pytest.
"""

from __future__ import annotations

import functools
import math
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

pytest.importorskip("constriction", reason="packs are coded with constriction")
pytest.importorskip("webdataset", reason="shards are written with webdataset")

from helpers_mixed import moved_pack, of_masks

from pipeline.adaptation import RankedIndices, SelectedIndex, attach
from pipeline.adaptation.packing import from_pack
from pipeline.backbones import load_backbone
from pipeline.packs import Pack, pack_to_bytes, read_pack
from pipeline.selection import select_locally, stage
from pipeline.serving.host import PackHost
from pipeline.serving.predictor import Predictor
from pipeline.specs import Level, Recipe, Task
from pipeline.training import Inputs, Ranks, evaluate, loop, open_inputs
from pipeline.training import fit as fit_module
from pipeline.training.fit import CHECKPOINT_FILE, PACK_FILE, fit, steps_kept
from pipeline.training.recorded import RecordedStep
from pipeline.training.run_checkpoint import Checkpoint

TRAINING = {"epochs": 1, "batch_size": 32, "learning_rate": 0.01}
# Without dropout, whose numbers another device draws otherwise.
BANK: dict[str, Any] = {"experts": 2, "width": 4, "dropout": 0}
HOUSE: dict[str, dict[str, Any]] = {
    "connections": {"top_k": 2},
    "biases": {},
    "norms": {},
    "smoa": BANK,
}
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "default": HOUSE,
    **{part: {part: section} for part, section in HOUSE.items()},
    "adapter": {"adapter": {"width": 4, "dropout": 0.1}},
    "lora": {"lora": {"rank": 2, "dropout": 0.1}},
    "dtl": {"dtl": {}},
    "prompts": {"prompts": {"count": 2}},
    **{part: {part: {}} for part in ("ssf", "class_token", "full")},
    "linear": {},
}
DROPOUT: dict[str, dict[str, Any]] = {
    "connections": {"bits": 4},
    "adapter": {"width": 4, "bits": 1, "dropout": 0.5},
}


@pytest.fixture(scope="session", params=["stand-in", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue("standin" if request.param == "stand-in" else "gpu"))


@pytest.fixture(scope="module")
def selected(tiny_inputs: Inputs) -> dict[str, RankedIndices]:
    return select_locally(tiny_inputs, 2)


@pytest.fixture(scope="module")
def on_cpu(
    tiny_inputs: Inputs, selected: SelectedIndex, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """A function (recipe) -> the folder of its fit in float32 on the CPU."""

    @functools.cache
    def fitted(name: str) -> Path:
        folder = tmp_path_factory.mktemp("cpu") / name
        fit(tiny_inputs, make_recipe(name), selected, folder)
        return folder

    return fitted


def make_recipe(name: str, **training: Any) -> Recipe:
    return Recipe.model_validate(
        {**RECIPES[name], "training": {**TRAINING, "precision": "fp32", **training}}
    )


def pack_in(folder: Path) -> Pack:
    return read_pack(folder / PACK_FILE)


def relative_difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max() / np.abs(other).max())


# --- fits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_a_fit_gives_the_pack_of_the_cpu(
    name: str,
    device: str,
    on_cpu: Callable[[str], Path],
    tiny_inputs: Inputs,
    selected: SelectedIndex,
    tmp_path: Path,
) -> None:
    result = fit(tiny_inputs, make_recipe(name), selected, tmp_path, device=device)
    expected = pack_in(on_cpu(name))
    assert result.size_bytes == (on_cpu(name) / PACK_FILE).stat().st_size
    assert relative_difference(
        pack_in(tmp_path).probe_logits, expected.probe_logits
    ) < 0.02 or RECIPES[name].keys() & {"adapter", "lora"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_fit_in_bfloat16_gives_a_pack_like_it(
    name: str,
    device: str,
    on_cpu: Callable[[str], Path],
    tiny_inputs: Inputs,
    selected: SelectedIndex,
    tmp_path: Path,
) -> None:
    result = fit(
        tiny_inputs, make_recipe(name, precision="bf16"), selected, tmp_path, device=device
    )
    pack = pack_in(tmp_path)
    assert relative_difference(pack.probe_logits, pack_in(on_cpu(name)).probe_logits) < 0.5
    reloaded = from_pack(pack, tiny_inputs.backbone)
    outcomes = evaluate(
        reloaded, tiny_inputs.reader("test"), tiny_inputs.splits["test"], tiny_inputs.kind
    )
    assert abs(tiny_inputs.metric.value(outcomes) - result.test_metric) <= 1.01 / len(outcomes), (
        "the pack that the CPU reads is the one that was tested on the device"
    )


def test_float32_stands_in_for_bfloat16_where_the_device_emulates_it(
    device: str,
    tiny_inputs: Inputs,
    selected: SelectedIndex,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        torch.get_device_module(device),
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation,
    )
    for precision in ("bf16", "fp32"):
        fit(
            tiny_inputs,
            make_recipe("linear", precision=precision),
            selected,
            tmp_path / precision,
            device=device,
        )
    assert (
        relative_difference(
            pack_in(tmp_path / "bf16").probe_logits, pack_in(tmp_path / "fp32").probe_logits
        )
        < 1e-4
    )


# --- going on on another device -------------------------------------------------------------------


class Killed(Exception):
    pass


@pytest.mark.parametrize("is_back", [False, True], ids=["from the CPU", "to the CPU"])
def test_a_fit_goes_on_on_another_device(
    is_back: bool,
    device: str,
    tiny_inputs: Inputs,
    selected: SelectedIndex,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        fit_module,
        "Checkpoint",
        functools.partial(Checkpoint, every_seconds=0, cost_share=math.inf),
    )
    recipe = Recipe.model_validate(
        {
            **DROPOUT,
            "training": {**TRAINING, "augment": "light", "drop_path": 0.2, "precision": "fp32"},
        }
    )
    taken, step = [0, 2], loop._step

    def counted(*arguments: Any) -> Any:
        if taken[0] == taken[1]:
            raise Killed
        taken[0] += 1
        return step(*arguments)

    monkeypatch.setattr(loop, "_step", counted)
    first, second = (device, "cpu") if is_back else ("cpu", device)
    with pytest.raises(Killed):
        fit(tiny_inputs, recipe, selected, tmp_path, device=first)
    assert steps_kept(tmp_path) == 2
    taken[:] = [0, 1 << 30]
    fit(tiny_inputs, recipe, selected, tmp_path, device=second)
    assert taken[0] == math.ceil(len(tiny_inputs.splits["trainval"]) / 32) - 2, (
        "no step is taken twice"
    )
    assert not (tmp_path / CHECKPOINT_FILE).exists()


# --- selection ------------------------------------------------------------------------------------

CRITERIA: dict[str, dict[str, Any]] = {
    "gradient": {},
    "cross-entropy": {"loss": "cross_entropy"},
    "magnitude": {"criterion": "magnitude"},
    "activation": {"criterion": "activation"},
}


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_selection_keeps_the_connections_of_the_cpu(
    criterion: str, device: str, tiny_inputs: Inputs
) -> None:
    levels: tuple[Level, ...] = ("neuron", "layer", "network")
    spec = tiny_inputs.task.selection.model_copy(update=CRITERIA[criterion])
    inputs = replace(tiny_inputs, task=tiny_inputs.task.model_copy(update={"selection": spec}))
    batches = stage._numbered_batches(inputs)
    here, there = (stage._sums(inputs, batches, where) for where in ("cpu", device))
    assert {total.device.type for total in there.values()} <= {device}
    for level in levels:
        selection = spec.model_copy(update={"level": level})
        at_level = replace(inputs, task=inputs.task.model_copy(update={"selection": selection}))
        expected, found = (stage._ranked(at_level, dict(sums), 3) for sums in (here, there))
        same = [
            np.isin(found[name].index_M.numpy(), ranked.index_M.numpy())
            for name, ranked in expected.items()
        ]
        assert np.concatenate(same).mean() > 0.99, level


# --- using a pack ---------------------------------------------------------------------------------


def test_evaluation_counts_what_the_cpu_counts(
    device: str, on_cpu: Callable[[str], Path], tiny_inputs: Inputs
) -> None:
    model = from_pack(pack_in(on_cpu("default")), tiny_inputs.backbone)
    given = tiny_inputs.reader("test"), tiny_inputs.splits["test"], tiny_inputs.kind
    expected, there = evaluate(model, *given), evaluate(model.to(device), *given)
    value, metric = tiny_inputs.metric.value(expected), tiny_inputs.metric
    assert abs(metric.value(there) - value) <= 1.01 / len(expected)
    assert (evaluate(model.to("cpu"), *given).outputs == expected.outputs).all()


@pytest.mark.parametrize("name", ["default", "lora", "full", "prompts"])
def test_a_predictor_answers_as_on_the_cpu_wherever_it_is_moved(
    name: str, device: str, on_cpu: Callable[[str], Path], tiny_inputs: Inputs
) -> None:
    pack = pack_in(on_cpu(name))
    images = list(np.random.default_rng(0).integers(0, 256, (70, 20, 24, 3), dtype=np.uint8))
    expected = Predictor(pack, tiny_inputs.backbone, "cpu").logits(images)
    predictor = Predictor(pack, tiny_inputs.backbone, device)
    assert {parameter.device.type for parameter in predictor.model.parameters()} == {device}
    torch.testing.assert_close(predictor.logits(images), expected, rtol=1e-3, atol=1e-3)
    predictor.model.to("cpu")
    predictor.device = "cpu"
    torch.testing.assert_close(predictor.logits(images), expected, rtol=1e-3, atol=1e-3)


def test_packs_of_masks_share_the_backbone_on_the_device(
    device: str, tiny_inputs: Inputs, tiny_task: Task
) -> None:
    maps = load_backbone(tiny_task.backbone, tiny_task.input, gives_maps=True)
    recipes: tuple[dict[str, Any], ...] = ({"biases": {}}, {"lora": {"rank": 2}}, {"full": {}})
    packs = [
        moved_pack(maps, of_masks(tiny_task), recipe, seed=seed)
        for seed, recipe in enumerate(recipes)
    ]
    host = PackHost(
        tiny_inputs.backbone, lambda name: pack_to_bytes(packs[int(name)]), device=device
    )
    forms: list[Any] = [host.packs.get(str(number)).form for number in range(len(packs))]
    tensors = [{each.data_ptr() for each in form.backbone.parameters()} for form in forms]
    assert {each.device.type for form in forms for each in form.parameters()} == {device}
    frozen = set.intersection(*tensors)
    assert len(frozen) >= len(list(maps.model.parameters())) - 1
    image = np.random.default_rng(0).integers(0, 256, (50, 44, 3), dtype=np.uint8)
    for number, pack in enumerate(packs):
        expected = Predictor(pack, maps, device).predict([image])
        assert host.predict([(str(number), image)]) == expected


# --- recorded steps -------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("recipe", "training"),
    [
        ({**HOUSE, "smoa": {**BANK, "dropout": 0.1}}, {"precision": "bf16"}),
        ({"biases": {}, "adapter": {"width": 4, "dropout": 0.5}}, {"drop_path": 0.2, "ema": 0.9}),
        ({"lora": {"rank": 2, "dropout": 0.1}}, {"mixup": 0.8, "augment": "light"}),
        ({"dtl": {}, "norms": {}}, {"precision": "bf16"}),
        ({"full": {}}, {"learning_rate": 1e-4}),
    ],
    ids=["bank", "adapter", "lora", "dtl", "full"],
)
def test_recorded_steps_train_what_plain_steps_train(
    gpu: str,
    recipe: dict[str, Any],
    training: dict[str, Any],
    tiny_inputs: Inputs,
    selected: SelectedIndex,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = {**TRAINING, "precision": "fp32", "batch_size": 8, "epochs": 3, **training}
    spec = Recipe.model_validate({**recipe, "training": given})

    def trained(is_recorded: bool) -> tuple[list[float], torch.Tensor]:
        monkeypatch.setattr(loop, "can_record", lambda device: is_recorded)
        classes = len(tiny_inputs.index.classes)
        model = attach(tiny_inputs.backbone, spec, classes, selected=selected).to(gpu)
        losses = []
        for loss in loop.train_epochs(
            model,
            tiny_inputs.reader("train"),
            tiny_inputs.splits["train"],
            spec.training,
            tiny_inputs.kind,
            seed=0,
            flip=True,
            device=gpu,
        ):
            losses.append(loss)
            evaluate(
                model,
                tiny_inputs.reader("val"),
                tiny_inputs.splits["val"],
                tiny_inputs.kind,
            )
        return losses, torch.cat([values.detach() for values in model.values.parameters()]).cpu()

    (plain_losses, plain), (losses, recorded) = trained(False), trained(True)
    # AdamW steps as far where a gradient is next to nothing, and rounding may turn its sign: values
    # are compared on average.
    assert losses == pytest.approx(plain_losses, rel=0.02)
    assert float((plain - recorded).abs().mean() / plain.abs().mean()) < 0.02


@pytest.mark.gpu
def test_a_step_that_waits_for_the_gpu_is_not_recorded(
    gpu: str, caplog: pytest.LogCaptureFixture
) -> None:

    def step(images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return images.sum() * float(targets.sum())

    run = RecordedStep(step, gpu)
    ones = torch.ones(3, device=gpu)
    assert [float(run(ones * number, ones)) for number in range(1, 7)] == [
        9 * number for number in range(1, 7)
    ]
    (message,) = caplog.messages
    assert "cannot be recorded as a CUDA graph (it waits for the GPU)" in message


# --- several processes on one device --------------------------------------------------------------


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def fit_on_rank(
    task_json: str, data_folder: Path, folder: Path, device: str, library: Path | None, ranks: Ranks
) -> str:
    """A fit, in a process that may know nothing of the device yet; the digest of its pack."""
    if library is not None:
        import standin_device

        standin_device.register(library)
    torch.set_num_threads(1)
    inputs = open_inputs(Task.model_validate_json(task_json), data_folder)
    if ranks.world > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}.store", rank=ranks.rank, world_size=ranks.world
        )
    try:
        result = fit(
            inputs,
            make_recipe("default", precision="bf16"),
            select_locally(inputs, 2),
            folder,
            device=device,
            ranks=ranks,
        )
        return result.pack_digest
    finally:
        if ranks.world > 1:
            dist.destroy_process_group()


def side_by_side(
    pool: ProcessPoolExecutor,
    request: pytest.FixtureRequest,
    inputs: Inputs,
    device: str,
    folders: Sequence[Path],
    world: int,
) -> list[str]:
    library = None if device == "cuda" else request.getfixturevalue("standin_library")
    given = inputs.task.model_dump_json(), inputs.data_folder
    ranks = [Ranks(rank, world) for rank in range(world)] if world > 1 else [Ranks()] * len(folders)
    running = [
        pool.submit(fit_on_rank, *given, folder, device, library, rank)
        for folder, rank in zip(folders, ranks, strict=True)
    ]
    return [each.result(timeout=300) for each in running]


def test_two_ranks_train_one_pack(
    device: str,
    pool: ProcessPoolExecutor,
    request: pytest.FixtureRequest,
    tiny_inputs: Inputs,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "fit"
    digests = side_by_side(pool, request, tiny_inputs, device, [folder, folder], 2)
    assert len(set(digests)) == 1
    assert pack_in(folder).metadata.task == "tiny"


@pytest.mark.gpu
def test_two_trials_share_a_gpu(
    gpu: str,
    pool: ProcessPoolExecutor,
    request: pytest.FixtureRequest,
    tiny_inputs: Inputs,
    tmp_path: Path,
) -> None:
    folders = [tmp_path / "one", tmp_path / "other"]
    side_by_side(pool, request, tiny_inputs, gpu, folders, 1)
    one, other = (pack_in(folder).probe_logits for folder in folders)
    assert relative_difference(one, other) < 0.05, "the same recipe from the same seed"
