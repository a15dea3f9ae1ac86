"""The command that serves packs over HTTP."""

from __future__ import annotations

import os
import secrets
import threading
from typing import Annotated

import typer

from pipeline import api
from pipeline.cli.console import out
from pipeline.cli.options import Address, BackboneFile, Device, PrecisionOption, Workdir, size_of

Tasks = Annotated[
    list[str] | None,
    typer.Argument(
        help=(
            "Tasks to load at the start, the first of which says the backbone. Default: the best"
            " pack of the registry."
        ),
        metavar="[NAME...]",
    ),
]
Registry = Annotated[
    str | None,
    typer.Option(
        "--registry",
        help=(
            "MLflow's tracking URI. Default: MLFLOW_TRACKING_URI, or the registry of the work"
            " folder."
        ),
        metavar="URI",
    ),
]
ImagesFrom = Annotated[
    list[str] | None,
    typer.Option(
        help=(
            "Folder such as https://images.example/cats/ below which requests may name images by"
            " URL; repeatable. Default: no URL is read."
        ),
        metavar="URL",
    ),
]


def serve(
    tasks: Tasks = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; others than this machine's need a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8000,
    replicas: Annotated[int, typer.Option(min=1, help="Copies of the server.")] = 1,
    cpus: Annotated[float, typer.Option("--cpus", min=0, help="CPUs per copy.")] = 1,
    gpus: Annotated[float, typer.Option("--gpus", min=0, help="GPUs per copy.")] = 0,
    memory: Annotated[
        str, typer.Option(help="Memory for packs per copy; the least recently used go first.")
    ] = "512MiB",
    images_from: ImagesFrom = None,
    backbone: BackboneFile = None,
    device: Device = None,
    precision: PrecisionOption = "fp32",
    address: Address = None,
    registry: Registry = None,
    workdir: Workdir = api.WORKDIR,
) -> None:
    """Serve the registry's packs over HTTP, with images of all tasks in mixed batches.

    Requests need the token in TASKPACK_TOKEN, if it is set.
    """
    from pipeline.cluster.session import ray_session
    from pipeline.registry.connection import resolve_tracking_uri
    from pipeline.server.deployment import TOKEN_VARIABLE, running
    from pipeline.server.engine import open_catalogue
    from pipeline.server.front import DRAIN_KEY, SETTING
    from pipeline.server.image_urls import check_place
    from pipeline.server.settings import Settings

    settings = Settings(
        workdir.resolve(),
        tuple(tasks or ()),
        registry=resolve_tracking_uri(registry, workdir),
        weights=None if backbone is None else str(backbone.resolve()),
        device=device,
        precision=precision,
        token=os.environ.get(TOKEN_VARIABLE) or None,
        images_from=tuple(check_place(place) for place in images_from or ()),
        capacity_bytes=size_of("--memory", memory),
    )
    open_catalogue(settings)  # what is wrong with it is said before Ray starts
    with (
        ray_session(address, SETTING | {DRAIN_KEY: (key := secrets.token_hex())}),
        running(settings, host=host, port=port, replicas=replicas, cpus=cpus, gpus=gpus, key=key),
    ):
        out.print(f"serving at http://{host}:{port}; Ctrl-C ends it", soft_wrap=True)
        threading.Event().wait()
