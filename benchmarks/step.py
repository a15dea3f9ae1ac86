"""Time and memory of one training step: connections and SMoA against full fine-tuning, LoRA, SHiRA and the dense masks of GPS's own code.

    python benchmarks/step.py [--model vit_small_patch16_224 --size 224 --batch 8] [--repeats 9] [--precision bf16]
    python benchmarks/step.py --embedded --batch 64

Variants run in turn, round by round, in one process, so that all meet the same machine; each time is the median of `repeats`. Memory is what lives
beside the one copy of the weights that a variant multiplies with (trained values, gradients, optimiser states, masks), and what is kept for the
backward pass, both counted tensor by tensor. Needs `pip install peft` for LoRA and SHiRA. Writes benchmarks/results/step-<name>.json and .md.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import describe_machine
from torch import nn

from pipeline.adaptation import attach
from pipeline.adaptation.sites import tunable_layers
from pipeline.backbones import LoadedBackbone, load_backbone
from pipeline.data import two_views
from pipeline.selection import supervised_contrastive_loss, top_connections
from pipeline.spec import Backbone, Biases, Connections, Head, Input, Recipe, Smoa
from pipeline.task_files import catalogue_folder, load_task

RESULTS = Path(__file__).parent / "results"
CLASSES = 100


@dataclass
class Variant:
    """A model, what trains it, and its step."""

    name: str
    step: Callable[[], None]
    persistent: Callable[[], int]


def main() -> None:
    """Measure every variant and write the results."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backbone = _backbone(arguments)
    torch.manual_seed(0)
    images = torch.randint(0, 256, (arguments.batch, 3, backbone.size_px, backbone.size_px), dtype=torch.uint8, device=device)
    labels = torch.randint(0, CLASSES, (arguments.batch,), device=device)
    bench = _Bench(backbone, images, labels, arguments.precision, device)
    rows = bench.measure(arguments.repeats)
    name = arguments.name or ("embedded" if arguments.embedded else arguments.model)
    result = {"machine": describe_machine(), "arguments": {key: str(value) for key, value in vars(arguments).items()}, "rows": rows}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"step-{name}-{arguments.precision}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(_markdown(result))
    print(path.with_suffix(".md").read_text())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embedded", action="store_true", help="the embedded ViT at 64 px instead of --model")
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--name", default="")
    return parser.parse_args()


def _backbone(arguments: argparse.Namespace) -> LoadedBackbone:
    if arguments.embedded:
        return load_backbone(load_task(catalogue_folder() / "demo" / "digits.yaml").backbone, Input(size_px=64))
    return load_backbone(Backbone(model=arguments.model, weights="random"), Input(size_px=arguments.size))


class _Bench:
    def __init__(self, backbone: LoadedBackbone, images: torch.Tensor, labels: torch.Tensor, precision: str, device: str) -> None:
        self.backbone, self.images, self.labels, self.precision, self.device = backbone, images, labels, precision, device
        self.selected = self._select(3)

    def _select(self, top_k: int) -> dict[str, torch.Tensor]:
        """A real selection, from the gradients of this batch."""
        model = copy.deepcopy(self.backbone.model).to(self.device)
        for layer in tunable_layers(model).values():
            layer.weight.requires_grad_(True)
        views = two_views(self.images.cpu(), torch.Generator().manual_seed(0), flip=True).to(self.device)
        supervised_contrastive_loss(model(views), self.labels.repeat(2), 0.07).backward()
        gradients = {name: layer.weight.grad.reshape(layer.weight.shape[0], -1) for name, layer in tunable_layers(model).items()}  # type: ignore[union-attr]
        return {name: top_connections(gradient, top_k).cpu() for name, gradient in gradients.items()}

    def variants(self) -> list[Callable[[], Variant]]:
        """Builders, so that only one variant is in memory while it is measured for memory."""
        head = Head(bits=32)
        recipes = {
            "connections K=1": Recipe(connections=Connections(top_k=1, bits=32), biases=Biases(bits=32), head=head),
            "connections K=3": Recipe(connections=Connections(top_k=3, bits=32), biases=Biases(bits=32), head=head),
            "connections K=1, 1 bit": Recipe(connections=Connections(top_k=1, bits=1), biases=Biases(bits=8), head=head),
            "SMoA E=1": Recipe(smoa=Smoa(experts=1, bits=32), head=head),
            "SMoA E=8": Recipe(smoa=Smoa(experts=8, bits=32), head=head),
            "SMoA E=8, 1 bit": Recipe(smoa=Smoa(experts=8, bits=1), head=head),
            "connections K=1 + SMoA E=8, 1 bit": Recipe(
                connections=Connections(top_k=1, bits=1), biases=Biases(bits=8), smoa=Smoa(experts=8, bits=1), head=head
            ),
        }
        ours = [lambda name=name, recipe=recipe: self._ours(name, recipe) for name, recipe in recipes.items()]
        return [self._full, self._dense_mask, self._lora, self._shira, *ours]

    def measure(self, repeats: int) -> list[dict[str, Any]]:
        """One row a variant: median step time, its ratio to full fine-tuning, bytes."""
        built = [build() for build in self.variants()]
        for variant in built:
            variant.step()
        times: dict[str, list[float]] = {variant.name: [] for variant in built}
        for _ in range(repeats):
            for variant in built:
                self._synchronise()
                started = time.perf_counter()
                variant.step()
                self._synchronise()
                times[variant.name].append(time.perf_counter() - started)
        full = statistics.median(times["full fine-tuning"])
        return [
            {
                "variant": variant.name,
                "median_ms": 1000 * statistics.median(times[variant.name]),
                "ratio_to_full": statistics.median(times[variant.name]) / full,
                "persistent_bytes": variant.persistent(),
                "activation_bytes": _activation_bytes(variant),
            }
            for variant in built
        ]

    def _synchronise(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _variant(
        self, name: str, model: nn.Module, forward: Callable[[torch.Tensor], torch.Tensor], after: Callable[[], None] | None = None, extra: int = 0
    ) -> Variant:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimiser = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)

        def step() -> None:
            with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16"):
                logits = forward(self.images)
            F.cross_entropy(logits.float(), self.labels).backward()
            if after is not None:
                after()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

        def persistent() -> int:
            states = sum(value.nbytes for state in optimiser.state.values() for value in state.values() if torch.is_tensor(value))
            gradients = sum(parameter.nbytes for parameter in parameters)  # all gradients live together at the end of a backward pass
            own = sum(parameter.nbytes for parameter in parameters) if name != "full fine-tuning" and extra == 0 else 0
            return states + gradients + own + extra

        return Variant(name, step, persistent)

    def _plain(self) -> nn.Sequential:
        head = nn.Linear(self.backbone.width, CLASSES)
        return nn.Sequential(copy.deepcopy(self.backbone.model), head).to(self.device)

    def _normalised(self, images: torch.Tensor) -> torch.Tensor:
        mean, std = (torch.tensor(values, device=self.device).view(1, 3, 1, 1) for values in (self.backbone.mean, self.backbone.std))
        return (images.float() / 255 - mean) / std

    def _full(self) -> Variant:
        model = self._plain().requires_grad_(True)
        return self._variant("full fine-tuning", model, lambda images: model(self._normalised(images)))

    def _dense_mask(self) -> Variant:
        """As GPS's released code trains: every gradient dense, multiplied by a dense mask."""
        model = self._plain().requires_grad_(True)
        masks: dict[nn.Parameter, torch.Tensor] = {}
        for name, layer in tunable_layers(model[0]).items():
            flat = torch.zeros(layer.weight.shape[0], layer.weight[0].numel(), device=self.device)
            masks[layer.weight] = flat.scatter_(1, self.selected[name][:, :1].long().to(self.device), 1.0).view(layer.weight.shape)

        def mask() -> None:
            for parameter, kept in masks.items():
                assert parameter.grad is not None
                parameter.grad.mul_(kept)

        extra = sum(kept.nbytes for kept in masks.values())
        return self._variant("dense masks (GPS code)", model, lambda images: model(self._normalised(images)), mask, extra)

    def _lora(self) -> Variant:
        from peft import LoraConfig

        return self._peft("LoRA r=8 (peft)", lambda names: LoraConfig(r=8, target_modules=names))

    def _shira(self) -> Variant:
        from peft import ShiraConfig

        return self._peft("SHiRA r=1 (peft)", lambda names: ShiraConfig(r=1, target_modules=names))

    def _peft(self, name: str, config: Callable[[list[str]], Any]) -> Variant:
        """A method of the peft library on every Linear of the backbone, with a head of our own."""
        from peft import get_peft_model

        plain = self._plain()
        names = [name for name, module in plain[0].named_modules() if isinstance(module, nn.Linear)]
        plain[0] = get_peft_model(plain[0], config(names))  # type: ignore[arg-type]
        model = plain.to(self.device)
        return self._variant(name, model, lambda images: model(self._normalised(images)))

    def _ours(self, name: str, recipe: Recipe) -> Variant:
        model = attach(self.backbone, recipe, CLASSES, selected=self.selected).to(self.device)
        model.compute_in(torch.bfloat16 if self.precision == "bf16" else torch.float32)
        model.train()
        return self._variant(name, model, model)


def _activation_bytes(variant: Variant) -> int:
    """Bytes of distinct storages kept for the backward pass of one step, parameters' own storages included once."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_sparse:
            kept[id(tensor)] = tensor._values().nbytes + tensor._indices().nbytes
        else:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        variant.step()
    return sum(kept.values())


def _markdown(result: dict[str, Any]) -> str:
    machine, arguments = result["machine"], result["arguments"]
    device = machine["gpu"] or f"{machine['cpu']}, {arguments['threads']} of {machine['cores']} cores"
    what = "embedded ViT at 64 px" if arguments["embedded"] == "True" else f"{arguments['model']} at {arguments['size']} px, random weights"
    lines = [
        f"# One training step: {what}, batch {arguments['batch']}, {arguments['precision']}",
        "",
        f"{device}, torch {machine['torch']}, commit {machine['commit']}; medians of {arguments['repeats']}, one run.",
        "",
        "| variant | step ms | ratio to full | beyond the weights MiB | kept for backward MiB |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['variant']} | {row['median_ms']:.1f} | {row['ratio_to_full']:.2f} "
            f"| {row['persistent_bytes'] / 2**20:.2f} | {row['activation_bytes'] / 2**20:.1f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
