"""The commands for packs: find, show, use, check and exchange them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline import api
from pipeline.cli.console import out, print_json
from pipeline.cli.options import (
    AsJson,
    BackboneFile,
    Device,
    MaxBytes,
    PrecisionOption,
    Reference,
    Workdir,
    size_of,
)
from pipeline.errors import SpecError
from pipeline.utils.precision import Precision

if TYPE_CHECKING:
    from pipeline.driver.evaluation import Evaluation


def list_packs(
    task: Annotated[str | None, typer.Option(help="Only this task's packs.")] = None,
    max_bytes: MaxBytes = None,
    min_metric: Annotated[
        float | None, typer.Option(help="Smallest test metric, in [0, 1].", min=0, max=1)
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="Only packs chosen by this metric, such as accuracy or mAP.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of rows.")] = 50,
    after: Annotated[
        str | None,
        typer.Option(
            help="Start after this pack, the last one of the previous page.", metavar="NAME/VERSION"
        ),
    ] = None,
    workdir: Workdir = api.WORKDIR,
    as_json: AsJson = False,
) -> None:
    """List packs of the registry by size and metric, best first."""
    from pipeline.cli.tables import packs_table

    found = api.find(
        task,
        max_bytes=None if max_bytes is None else size_of("--max-bytes", max_bytes),
        min_metric=min_metric,
        metric=metric,
        limit=limit + 1,
        after=after,
        workdir=workdir,
    )
    packs = found[:limit]
    if as_json:
        print_json([asdict(pack) for pack in packs])
    elif packs:
        out.print(packs_table(packs))
    else:
        out.print("no pack matches")
    if len(found) > limit:
        typer.echo(
            f"there are more: continue with --after {packs[-1].name}/{packs[-1].version}", err=True
        )


def show(reference: Reference, workdir: Workdir = api.WORKDIR, as_json: AsJson = False) -> None:
    """Show a registered pack: its numbers, its bytes by part, and the trials of its study."""
    from pipeline.cli.tables import ledger_table, percent_with_error, table, trials_table
    from pipeline.packs import LEDGER_KEYS
    from pipeline.registry.store import open_registry

    registry = open_registry(None, workdir.resolve())
    pack = registry.get(reference)
    trials = registry.front(pack)
    if as_json:
        print_json({**asdict(pack), "trials": trials})
        return
    facts = table("", "", numbers_from=9)
    facts.add_row("pack", f"{pack.name}/{pack.version}  {', '.join(pack.aliases)}")
    for label, text in (
        ("task", pack.tags.get("description") or pack.task),
        ("test %", f"{pack.metric} {percent_with_error(pack.metrics)}"),
        (
            "size",
            f"{pack.size_bytes:,} bytes, {pack.metrics['trained_values']:,.0f} trained values",
        ),
        ("backbone", f"{pack.tags['backbone']}  {pack.tags['backbone_fingerprint'][:16]}..."),
        (
            "made on",
            (
                f"{pack.tags['device']}: search {pack.metrics['search_seconds']:.0f} s, fit"
                f" {pack.metrics['fit_seconds']:.0f} s"
            ),
        ),
        ("digest", pack.pack_digest),
        ("recipe", "  ".join(f"{key}={value}" for key, value in sorted(pack.params.items()))),
    ):
        facts.add_row(label, text)
    facts.show_header = False
    out.print(facts)
    out.print()
    out.print(
        ledger_table({part: int(pack.metrics.get(f"bytes_{part}", 0)) for part in LEDGER_KEYS})
    )
    out.print()
    out.print(trials_table(trials, pack.tags.get("trial")))


MasksFolder = Annotated[
    Path | None,
    typer.Option(
        "--out",
        help=(
            "Folder for the masks of a segmentation pack: NAME.mask.png, NAME.overlay.png and"
            " areas.json."
        ),
    ),
]


def predict(
    reference: Reference,
    images: Annotated[
        list[Path] | None, typer.Argument(help="Image files, or point clouds.")
    ] = None,
    is_all: Annotated[
        bool, typer.Option("--all", help="Give no PACK: ask every champion on the best's backbone.")
    ] = False,
    backbone: BackboneFile = None,
    folder: MasksFolder = None,
    device: Device = None,
    precision: PrecisionOption = "fp32",
    workdir: Workdir = api.WORKDIR,
    as_json: AsJson = False,
) -> None:
    """What a pack says of images: their class, their labels, or a class per pixel."""
    from pipeline.cli.tables import predictions_table

    images = images or []
    if is_all:
        if folder is not None:
            raise SpecError("--out: writes the masks of one pack; give its name, and no --all")
        images.insert(0, Path(reference))
        return _predict_all(images, as_json, backbone, device, precision, workdir)
    if not images:
        raise SpecError(f"predict: given no image; give one or more after {reference}")
    predictor = api.load(
        reference, backbone=backbone, device=device, precision=precision, workdir=workdir
    )
    column = predictor.backbone.takes.column
    rows = [
        {column: str(image), **row}
        for image, row in zip(images, predictor.predict(images), strict=True)
    ]
    if folder is not None and not predictor.kind.is_dense:
        raise SpecError(
            f"--out: given {folder}, but a pack of kind {predictor.kind.name} predicts no masks;"
            " leave it out"
        )
    if folder is not None:
        from pipeline.cli.predicted_masks import write_masks

        write_masks(rows, predictor.metadata.classes, folder)
    elif predictor.kind.is_dense:
        for row in rows:
            del row["mask"]
    if as_json:
        print_json(rows)
        return
    out.print(predictions_table(rows))


def _predict_all(
    images: list[Path],
    as_json: bool,
    backbone: Path | None,
    device: str | None,
    precision: Precision,
    workdir: Path,
) -> None:
    """Print what every champion on one backbone says of each image."""
    from pipeline.cli.tables import all_predictions_table

    host, refused = api.load_all(
        backbone=backbone, device=device, precision=precision, workdir=workdir
    )
    for name, reason in refused.items():
        typer.echo(f"{name}: left out: {reason}", err=True)
    asked = [(image, name) for image in images for name in host.packs.names()]
    answers = host.predict([(name, image) for image, name in asked])
    column = host.backbone.takes.column
    rows = [
        {column: str(image), "task": name, **answer}
        for (image, name), answer in zip(asked, answers, strict=True)
    ]
    for row in rows:
        row.pop("mask", None)
    if as_json:
        print_json(rows)
        return
    out.print(all_predictions_table(rows))


def evaluate(
    reference: Reference,
    task: Annotated[
        Path | None,
        typer.Option(help="Task file, if the data was not prepared in this work folder."),
    ] = None,
    backbone: BackboneFile = None,
    figure: Annotated[
        Path | None,
        typer.Option(
            help="PNG to draw: masks of the best, the median and the worst image, or such clouds."
        ),
    ] = None,
    device: Device = None,
    workdir: Workdir = api.WORKDIR,
    as_json: AsJson = False,
) -> None:
    """Measure a pack on the test set of its task again."""
    from pipeline.driver.evaluation import evaluate_pack

    found = evaluate_pack(
        reference,
        workdir=workdir,
        task_file=task,
        weights=backbone,
        device=device,
        figure=figure,
    )
    score = found.score
    content = {
        "metric": score.metric,
        "test_metric": score.value,
        "test_metric_stderr": score.standard_error,
        "samples": score.samples,
        "registered_test_metric": found.registered,
        "by_class": found.by_class,
        "sets": None if found.sets is None else asdict(found.sets),
    }
    if as_json:
        print_json(content)
        return
    _print_evaluation(found)


def _print_evaluation(found: Evaluation) -> None:
    score, registered = found.score, found.registered
    out.print(
        f"test {score.metric} {score.value!r} of {score.samples} samples, standard error"
        f" {score.standard_error:.4f}"
    )
    for name, value in found.by_class.items():
        out.print(f"  {name} {value:.4f}")
    if (sets := found.sets) is not None:
        out.print(
            f"sets hold the right class in {100 * sets.found:.1f} ±"
            f" {100 * sets.standard_error:.1f} % of the samples, stated {100 * sets.stated:g} %;"
            f" {sets.mean_size:.2f} classes in a set on average"
        )
    if registered is not None:
        is_same = "the same" if registered == score.value else "NOT the same"
        out.print(f"registered {registered!r}: {is_same}")


def verify(
    reference: Reference, backbone: BackboneFile = None, workdir: Workdir = api.WORKDIR
) -> None:
    """Check that a pack is undamaged, fits its backbone, and computes the same as when written."""
    from pipeline.cli.tables import ledger_table
    from pipeline.packs import content_digest, ledger, read_pack

    path = api.fetch(reference, workdir=workdir)
    predictor = api.load(path, backbone=backbone, workdir=workdir)
    out.print(
        f"{reference}: valid. Digest, layout, backbone fingerprint and probe logits agree",
        soft_wrap=True,
    )
    out.print(
        f"task {predictor.metadata.task}, {len(predictor.metadata.classes)} classes, backbone"
        f" {predictor.metadata.backbone['model']}"
    )
    out.print(f"digest to sign {content_digest(path.read_bytes())}", soft_wrap=True)
    out.print(ledger_table(ledger(read_pack(path))))


def export(
    reference: Reference,
    to: Annotated[api.Format, typer.Option("--to", help="Format to export to.")],
    path: Annotated[
        Path,
        typer.Option(
            "--out",
            help="File (onnx, binary-adapter) or folder (timm, peft) to write; must not exist.",
        ),
    ],
    backbone: BackboneFile = None,
    workdir: Workdir = api.WORKDIR,
) -> None:
    """Write a pack in another project's format: a merged timm checkpoint, ONNX, a PEFT adapter,
    Binary Adapter's file.
    """
    difference = api.export(reference, to=to, path=path, backbone=backbone, workdir=workdir)
    size_bytes = sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))
    out.print(f"{path}: {size_bytes:,} bytes", soft_wrap=True)
    if difference is not None:
        out.print(f"checked: its logits differ from the pack's by at most {difference:.1e}")


def import_(
    source: Annotated[
        Path,
        typer.Argument(
            help="NAME.bin of Binary Adapter, with NAME.yaml next to it.", metavar="FILE"
        ),
    ],
    path: Annotated[Path, typer.Option("--out", help="Pack to write; must not exist.")],
    backbone: Annotated[
        Path | None,
        typer.Option("--backbone", help="Checkpoint of ViT-B/16 (orig_in21k). Default: timm's."),
    ] = None,
) -> None:
    """Import a file that Binary Adapter's authors published as a pack."""
    out.print(
        f"{path}: {api.import_pack(source, path=path, backbone=backbone):,} bytes", soft_wrap=True
    )
