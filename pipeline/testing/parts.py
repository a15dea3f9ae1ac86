"""What every part of a recipe promises on a backbone that it fits, and how one that does not fit is
refused. Each function raises AssertionError where a promise is broken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from pipeline.adaptation import AdaptedModel, SelectedIndex, attach, plan
from pipeline.adaptation.flat import flatten
from pipeline.adaptation.mixed import MixedNetwork
from pipeline.adaptation.packing import SizePlanner, describe, from_pack, to_pack
from pipeline.adaptation.unpacking import decode
from pipeline.adaptation.values import FlatValues
from pipeline.backbones import LoadedBackbone
from pipeline.errors import BackboneError
from pipeline.packs import ledger, pack_to_bytes, read_pack
from pipeline.specs import DrawnData, Recipe, Task

_CLASSES = ("one", "two", "three")
_IMAGES, _STEPS = 6, 2
_ALL_WIDTHS_BITS = (1, 3, 16, 32)


def check_part(
    recipe: Recipe,
    backbone: LoadedBackbone,
    *,
    selected: SelectedIndex | None = None,
    starts_silent: bool = False,
    widths_bits: Sequence[int] = _ALL_WIDTHS_BITS,
) -> None:
    """Check a part, alone or with others, on a backbone: plan, training, pack, checkpoint, seed.

    What is planned is what trains, and every value of it matters. Training leaves the backbone
    untouched, is repeated by its seed and works in bfloat16. The pack has the announced bytes and
    gives the same logits at every width of its values, alone and, if the part can be mixed, in one
    batch with another pack. Backbones of a few layers and 32 px images
    are enough, and keep a check below a second.

    Args:
        recipe: what trains; settings that draw random numbers, such as dropout, may be on.
        selected: the selection; required if the recipe trains connections.
        starts_silent: whether the untrained part must leave the backbone's features unchanged.
        widths_bits: the widths of its values to write packs at, besides the recipe's own. How a
            value is stored does not depend on the backbone, so one backbone at all of them is
            enough.
    """
    case = _Case(recipe, backbone, selected)
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    if starts_silent:
        _check_silent_start(case)
    model = _trained(case)
    _check_planned(case, model)
    _check_every_value_matters(case)
    _check_pack(case, model)
    for bits in widths_bits:
        wider = _Case(_at_width(recipe, bits), backbone, selected)
        _check_pack(wider, _moved(wider))
    _check_merged(case, model)
    _check_mixed(case, [model, _moved(case)])
    _check_checkpoint(case, model)
    _check_seed(case, model)
    _check_bfloat16(case)
    state = backbone.model.state_dict()
    changed = [name for name, tensor in state.items() if not torch.equal(tensor, before[name])]
    assert not changed, f"training changed the backbone's {changed}"
    assert all(parameter.grad is None for parameter in backbone.model.parameters()), (
        "the frozen backbone received gradients"
    )


def check_refused(recipe: Recipe, backbone: LoadedBackbone) -> str:
    """Check that a recipe is refused on a backbone, when planned and when attached, by the same
    error message of one line, and return the message."""
    messages = []
    for call in (plan, attach):
        try:
            call(backbone, recipe, len(_CLASSES))
        except BackboneError as error:
            messages.append(str(error))
        else:
            raise AssertionError(f"{call.__name__} accepts a recipe that does not fit")
    assert messages[0] == messages[1], f"two messages for one fault: {messages}"
    assert "\n" not in messages[0], f"expected one line: {messages[0]}"
    return messages[0]


@dataclass(frozen=True)
class _Case:
    """A recipe on a backbone."""

    recipe: Recipe
    backbone: LoadedBackbone
    selected: SelectedIndex | None

    def start(self, seed: int = 0) -> AdaptedModel:
        """The model before training."""
        classes = len(_CLASSES)
        return attach(self.backbone, self.recipe, classes, selected=self.selected, seed=seed)

    @property
    def task(self) -> Task:
        """A task that the recipe could be of."""
        return Task(
            name="part",
            data=DrawnData(format="drawn", kind="orientation"),
            backbone=self.backbone.spec,
            recipe=self.recipe,
        )


def _at_width(recipe: Recipe, bits: int) -> Recipe:
    """The recipe with all its values stored at `bits`; 16 and more need no codebook."""
    sections = recipe.model_dump(exclude_none=True)
    if bits >= 16:
        sections.pop("quantiser", None)
    for section in sections.values():
        if isinstance(section, dict) and "bits" in section:
            section["bits"] = bits
    return Recipe.model_validate(sections)


def _images(backbone: LoadedBackbone) -> torch.Tensor:
    """Noise in place of images or other samples."""
    return torch.from_numpy(backbone.takes.probe(_IMAGES))


def _logits(model: AdaptedModel, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(images)


def _latent(model: AdaptedModel) -> list[torch.Tensor]:
    """Copies of the trained values, before they are quantised."""
    return [parameter.detach().clone() for parameter in model.values.parameters()]


def _are_equal(model: AdaptedModel, other: AdaptedModel) -> bool:
    pairs = zip(_latent(model), _latent(other), strict=True)
    return all(torch.equal(one, same) for one, same in pairs)


def _loss(model: AdaptedModel, outputs: torch.Tensor) -> torch.Tensor:
    labels = torch.arange(_IMAGES) % len(_CLASSES)
    if outputs.ndim > 2:  # a class for every pixel
        labels = labels.view(-1, 1, 1).expand(outputs[:, 0].shape)
    return F.cross_entropy(outputs.float(), labels) + model.auxiliary_loss()


def _trained(case: _Case, seed: int = 0) -> AdaptedModel:
    """The model after a few steps of training."""
    model = case.start(seed).train()
    optimiser = torch.optim.AdamW(model.values.parameters(), lr=0.02, weight_decay=0.0)
    for _ in range(_STEPS):
        optimiser.zero_grad()
        _loss(model, model(_images(case.backbone))).backward()
        optimiser.step()
    return model.eval()


def _moved(case: _Case) -> AdaptedModel:
    """The model with every value somewhere else than at its start."""
    model = case.start()
    generator = torch.Generator().manual_seed(3)
    for parameter in model.values.parameters():
        parameter.data += torch.empty_like(parameter).normal_(0, 0.05, generator=generator)
    return model


def _check_silent_start(case: _Case) -> None:
    images = _images(case.backbone)
    for bits in (16, 32):
        model = _Case(_at_width(case.recipe, bits), case.backbone, case.selected).start()
        _logits(model, images)  # hands the values to the modules
        with torch.inference_mode():
            pixels = model.normalise(images)
            features, expected = model.backbone(pixels), case.backbone.model(pixels)
        torch.testing.assert_close(
            features,
            expected,
            rtol=1e-5,
            atol=1e-5,
            msg=_say("it changes an untrained model"),
        )


def _check_planned(case: _Case, model: AdaptedModel) -> None:
    planned = plan(case.backbone, case.recipe, len(_CLASSES))
    assert model.values.tensors == planned, "what trains is not what was planned"
    count = sum(tensor.values for tensor in planned)
    assert model.trained_values() == count, "another number of trained values than planned"
    assert sum(len(values) for values in _latent(model)) == count, "values of another number"
    training = {id(each) for each in model.parameters() if each.requires_grad}
    assert training == {id(each) for each in model.values.parameters()}, (
        "parameters train that are not among the trained values"
    )


def _check_every_value_matters(case: _Case) -> None:
    """No tensor is stored without being used: away from the start, its gradient is not zero."""
    model = _moved(case)
    model(_images(case.backbone)).square().mean().backward()
    idle = [
        tensor.name
        for group in model.values.groups()
        for tensor, gradient in zip(group.tensors, _gradients(group), strict=True)
        if not float(gradient.abs().max())
    ]
    assert not idle, f"these tensors are stored and never used: {idle}"


def _gradients(group: FlatValues) -> list[torch.Tensor]:
    """The gradient of each tensor of a group; zero where it has none."""
    gradient_N = group.latent_N.grad
    return group.pieces(torch.zeros_like(group.latent_N) if gradient_N is None else gradient_N)


def _check_pack(case: _Case, model: AdaptedModel) -> None:
    backbone, recipe, task = case.backbone, case.recipe, case.task
    pack = to_pack(model, describe(task, recipe, backbone, _CLASSES))
    content = pack_to_bytes(pack)
    planner = SizePlanner(task, backbone, _CLASSES, case.selected)
    announced = planner.size_bytes(recipe)
    assert announced == len(content), f"{announced} bytes announced, {len(content)} written"
    assert planner.ledger(recipe) == ledger(pack), "the planned ledger is not the pack's"
    assert Recipe.model_validate(pack.metadata.recipe) == recipe, "the pack has another recipe"
    images = _images(backbone)
    expected = _logits(model, images)
    found = _logits(from_pack(read_pack(content), backbone), images)
    _assert_close(found, expected, 1e-5, "the pack gives other logits")


def _check_merged(case: _Case, model: AdaptedModel) -> None:
    images = _images(case.backbone)
    expected = _logits(model, images)
    with torch.inference_mode(), model.merged():
        merged = model(images)
    _assert_close(merged, expected, 1e-4, "merged for inference, the model gives other logits")
    assert torch.equal(_logits(model, images), expected), "merging cannot be undone"


def _check_mixed(case: _Case, models: Sequence[AdaptedModel]) -> None:
    """Samples of two packs in one pass get the logits of their own packs."""
    network = MixedNetwork(case.backbone)
    if not network.can_mix(case.recipe):
        return
    described = describe(case.task, case.recipe, case.backbone, _CLASSES)
    packs = [to_pack(model, described) for model in models]
    flat = [flatten(decode(pack, case.backbone)) for pack in packs]
    images, owners = _images(case.backbone), [number % len(models) for number in range(_IMAGES)]
    found = network.logits(images, flat, owners)
    alone = [_logits(model, images) for model in models]
    expected = torch.stack([alone[owner][sample] for sample, owner in enumerate(owners)])
    fault = "mixed with samples of another pack, a sample gets other logits"
    _assert_close(torch.stack(found), expected, 1e-4, fault)


def _check_checkpoint(case: _Case, model: AdaptedModel) -> None:
    images, again = _images(case.backbone), case.start(seed=5)
    again.load_state_dict(model.state_dict())
    same = torch.equal(_logits(again, images), _logits(model, images))
    assert same, "the state dict does not restore the model"


def _check_seed(case: _Case, model: AdaptedModel) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed() + 1)  # the process's own state must not matter
        again = _trained(case)
    assert _are_equal(again, model), "the same seed trains another model"
    assert not _are_equal(_trained(case, seed=1), model), "another seed trains the same model"


def _check_bfloat16(case: _Case) -> None:
    model = case.start()
    model.compute_in(torch.bfloat16)
    model.train()
    before = _latent(model)
    optimiser = torch.optim.AdamW(model.values.parameters(), lr=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(_images(case.backbone))
    _loss(model, outputs).backward()
    for parameter in model.values.parameters():
        assert parameter.grad is not None, "in bfloat16, values have no gradient"
        assert parameter.grad.dtype == torch.float32, "in bfloat16, gradients are not float32"
        assert bool(parameter.grad.isfinite().all()), "in bfloat16, gradients are not finite"
    optimiser.step()
    pairs = zip(before, _latent(model), strict=True)
    assert not any(torch.equal(one, moved) for one, moved in pairs), "in bfloat16, values stay"


def _assert_close(
    found: torch.Tensor, expected: torch.Tensor, tolerance: float, fault: str
) -> None:
    """Within `tolerance` of each logit, or 1e-5 of the largest."""
    largest = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(
        found, expected, rtol=tolerance, atol=1e-5 * largest, msg=_say(fault)
    )


def _say(fault: str) -> Callable[[str], str]:
    """The message of a failed comparison: the fault, then what differs."""
    return lambda details: f"{fault}\n{details}"
