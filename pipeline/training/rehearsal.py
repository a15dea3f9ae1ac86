"""One training step and a pack of a recipe, on two random images, so that recipes that cannot run
on a backbone fail before a study starts.

A part may find its modules and still fail on them, or give a pack that computes something else.
Otherwise that would appear in workers, trial by trial.
"""

from __future__ import annotations

import torch

from pipeline.adaptation import AdaptedModel, SelectedIndex, attach
from pipeline.adaptation.packing import PROBES, describe, from_pack, to_pack
from pipeline.adaptation.selected.ranking import first_indices
from pipeline.adaptation.sites import weight_shapes
from pipeline.backbones import LoadedBackbone
from pipeline.errors import BackboneError
from pipeline.inputs.task_inputs import Inputs
from pipeline.kinds import TaskKind, kind_named
from pipeline.specs import PARTS, Recipe, Selection, Task
from pipeline.utils.devices import autocast, computing_dtype

CLASSES = ("a", "b")
_TRUNK_TOLERANCE = 0.02
"""Of the largest logit; several images at a time round otherwise than one, above all in bfloat16.
"""
_rehearsed: set[str] = set()
"""What this process has rehearsed: tasks of a batch often differ only in their data."""


def rehearse(inputs: Inputs, recipe: Recipe) -> None:
    """Try a recipe on the CPU, once per process and backbone.

    Raises:
        BackboneError: it cannot be trained or packed; the message names the part.
    """
    task, precision = inputs.task, recipe.training.precision
    key = repr(
        (
            inputs.backbone.fingerprint,
            task.backbone.model,
            task.backbone.arguments,
            inputs.backbone.takes,
            precision,
            task.kind,
        )
    )
    key += recipe.model_dump_json(exclude={"training"})
    if key in _rehearsed:
        return
    if (error := _failure(inputs.backbone, task, recipe)) is not None:
        raise _naming_the_part(inputs.backbone, task, recipe, error) from error
    _rehearsed.add(key)


def _naming_the_part(
    backbone: LoadedBackbone, task: Task, recipe: Recipe, error: Exception
) -> BackboneError:
    """The error of the first part that fails by itself, or that of all of them together."""
    present = [part for part in PARTS if getattr(recipe, part) is not None]
    for part in present:
        alone = Recipe.model_validate(
            {part: getattr(recipe, part), "head": recipe.head, "training": recipe.training}
        )
        if (own := _failure(backbone, task, alone)) is not None:
            return _cannot_run(f"recipe.{part}", task, own)
    return _cannot_run(f"recipe: {' with '.join(present) or 'head'}", task, error)


def _cannot_run(what: str, task: Task, error: Exception) -> BackboneError:
    if isinstance(error, BackboneError):
        return error
    first_line = (str(error).strip().splitlines() or [""])[0][:200]
    return BackboneError(
        f"{what}: cannot run on {task.backbone.model} ({type(error).__name__}: {first_line}); leave"
        " it out, or choose another backbone"
    )


def _failure(backbone: LoadedBackbone, task: Task, recipe: Recipe) -> Exception | None:
    try:
        _train_and_pack(backbone, task, recipe)
    except Exception as error:
        return error
    return None


def _train_and_pack(backbone: LoadedBackbone, task: Task, recipe: Recipe) -> None:
    """Train one step and pack, as a fit does. Packing the whole network is not worth the time."""
    model = attach(
        backbone,
        recipe,
        len(CLASSES),
        selected=_first_indices(backbone, recipe),
        keeps_trunk=recipe.training.repeats_images,
    )
    images = torch.from_numpy(backbone.takes.probe(PROBES))
    if model.keeps_trunk:
        _check_trunk(model.eval(), images)
    dtype = computing_dtype(recipe.training.precision, "cpu")
    model.compute_in(dtype)
    model.train()
    with autocast("cpu", dtype):
        logits = model(images)
    kind = kind_named(task.kind)
    targets = _targets(kind, backbone)
    loss = kind.loss(logits.float(), targets, name=recipe.training.loss)
    (loss + model.auxiliary_loss()).backward()
    if recipe.full is None:
        selected_anyhow = task.model_copy(
            update={"selection": Selection()}
        )  # the pack stores the indices, whichever criterion the task selects by
        from_pack(to_pack(model, describe(selected_anyhow, recipe, backbone, CLASSES)), backbone)


def _targets(kind: TaskKind, backbone: LoadedBackbone) -> torch.Tensor:
    """Targets of the images: one class after another."""
    numbers = torch.arange(PROBES) % len(CLASSES)
    if kind.is_dense:
        masks = numbers.to(torch.uint8).view(-1, 1, 1).repeat(1, *backbone.takes.shape[1:])
        return kind.targets(masks, len(CLASSES))
    return kind.targets([kind.label([number]) for number in numbers.tolist()], len(CLASSES))


@torch.no_grad()
def _check_trunk(model: AdaptedModel, images: torch.Tensor) -> None:
    """Raise BackboneError if a pass that goes on from the trunk's outputs differs from a whole one:
    then something else reaches the later blocks, too.
    """
    whole, resumed = model(images), model.logits_of(model.inputs_of(images))
    if not torch.allclose(whole, resumed, rtol=0, atol=_TRUNK_TOLERANCE * float(whole.abs().max())):
        raise BackboneError(
            "recipe.from_block: later blocks read more of the earlier ones than the output of the"
            " one before them; choose another block, or leave it out"
        )


def _first_indices(backbone: LoadedBackbone, recipe: Recipe) -> SelectedIndex | None:
    """As many connections of each neuron as the recipe trains: its first."""
    if recipe.connections is None:
        return None
    return first_indices(weight_shapes(backbone.model), recipe.connections.top_k)
