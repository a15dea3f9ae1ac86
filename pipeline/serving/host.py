"""Many packs on one backbone: images of any of them are predicted in one pass."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from pipeline.adaptation import AdaptedModel
from pipeline.adaptation.flat import FlatPack, flatten
from pipeline.adaptation.mixed import MixedNetwork
from pipeline.adaptation.packing import PROBES, check_probe, from_pack
from pipeline.adaptation.unpacking import check_backbone, decode
from pipeline.backbones import LoadedBackbone, giving_maps, load_backbone
from pipeline.packs import Pack, PackMetadata, content_digest, read_pack
from pipeline.serving.answers import answers
from pipeline.serving.capacity import CAPACITY_BYTES
from pipeline.serving.masks import dense_logits, mask_answer
from pipeline.serving.predictor import PREDICT_BATCH, input_of, kind_of
from pipeline.serving.residency import ResidentPack, ResidentPacks
from pipeline.serving.samples import Decoded, Sample, decoded
from pipeline.utils.devices import choose_device, computing_dtype, exact_float32
from pipeline.utils.precision import Precision

_LOGITS_BYTES = 64 * 1024**2
"""How many bytes of logits of dense packs are kept at the same time."""
_MODULE_BYTES = 3072
"""What a module of a pack's own model takes beside its tensors, as measured on a ViT-B."""


class PackHost:
    """A backbone and the packs on it.

    Predictions are those of each pack alone, up to the rounding of `precision`. Packs whose parts
    cannot share a pass, such as full fine-tuning, pass one after the other, and so do those of
    dense kinds: they read feature maps, and their masks are those of `Predictor` bit for bit.

    Args:
        backbone: pooling its features or giving maps. The other form is made for the first pack
            that needs it: maps in the memory of the pooling backbone, or the pooling one from the
            checkpoint again.
        read: the content of the pack file of a name.
        device: None takes the GPU, where there is one.
        capacity_bytes: memory for packs; the least recently used are read again when asked for.
        precision: of products; `bf16` becomes float32 on devices without units for it. Packs are
            checked in float32.
    """

    def __init__(
        self,
        backbone: LoadedBackbone,
        read: Callable[[str], bytes],
        *,
        device: str | None = None,
        capacity_bytes: int = CAPACITY_BYTES,
        precision: Precision = "fp32",
    ) -> None:
        self.backbone, self.device = backbone, choose_device(device)
        self._dtype = computing_dtype(precision, self.device)
        self._read = read
        self._forms = {backbone.gives_maps: backbone}
        self._network: MixedNetwork | None = None
        self._one_form_at_a_time = threading.RLock()
        self._one_pass_at_a_time = threading.Lock()
        self._on_device: dict[tuple[int, torch.Size], torch.Tensor] = {}
        self._probed = set[str]()  # the digests of packs whose probe logits were checked
        self.packs = ResidentPacks(self._load, capacity_bytes)

    def predict(self, requests: Sequence[tuple[str, Sample]]) -> list[dict[str, Any]]:
        """What each pack says of its image, as `Predictor.predict`; requests are pairs of a pack's
        name and an image.

        Raises:
            DataError: something is no image; `request 3` is the fourth of these.
            PackError: a pack cannot be used on this backbone.
        """
        packs = {name: self.packs.get(name) for name in dict.fromkeys(name for name, _ in requests)}
        images: dict[int, Decoded] = {}  # by identity: an image for many packs is decoded once
        for number, (_, image) in enumerate(requests):
            if id(image) not in images:
                images[id(image)] = decoded(image, number, self.backbone.takes, "request")
        return self.predict_decoded(
            [packs[name] for name, _ in requests], [images[id(image)] for _, image in requests]
        )

    def predict_decoded(
        self, packs: Sequence[ResidentPack], images: Sequence[Decoded]
    ) -> list[dict[str, Any]]:
        """What each pack says of its image, as it is decoded. Of an image that is given for many
        packs, the blocks that none of them changes are computed once.
        """
        labelling = [number for number, pack in enumerate(packs) if not pack.is_dense]
        found: dict[int, dict[str, Any]] = {}
        for start in range(0, len(labelling), PREDICT_BATCH):
            numbers = labelling[start : start + PREDICT_BATCH]
            asked = [packs[number] for number in numbers]
            logits = self.logits(asked, [images[number].array for number in numbers])
            for number, pack, row in zip(numbers, asked, logits, strict=True):
                kind, classes = kind_of(pack.metadata), pack.metadata.classes
                [found[number]] = answers(kind, classes, pack.calibration, row[None])
        masking: dict[ResidentPack, list[int]] = defaultdict(list)
        for number, pack in enumerate(packs):
            if pack.is_dense:
                masking[pack].append(number)
        for pack, numbers in masking.items():
            rows = self._masks(pack, [images[number] for number in numbers])
            found |= zip(numbers, rows, strict=True)
        return [found[number] for number in range(len(packs))]

    @exact_float32()
    @torch.inference_mode()
    def logits(
        self,
        packs: Sequence[ResidentPack],
        images: Sequence[np.ndarray],
        dtype: torch.dtype | None = None,
    ) -> list[torch.Tensor]:
        """The logits [C], on the CPU, of each image by its pack, none of a dense kind, as one
        batch, with products in `dtype`, or in that of the host.
        """
        dtype = dtype or self._dtype
        distinct = {id(image): image for image in images}
        places = {key: place for place, key in enumerate(distinct)}
        sources = [places[id(image)] for image in images]
        batch = torch.from_numpy(np.stack(list(distinct.values()))).to(self.device)
        samples: dict[ResidentPack, list[int]] = defaultdict(list)
        for number, pack in enumerate(packs):
            samples[pack].append(number)
        found: dict[int, torch.Tensor] = {}
        network = self._mixed()
        with self._one_pass_at_a_time:
            mixed = [(pack, each) for pack, each in samples.items() if _is_flat(pack)]
            if mixed:
                numbers = [number for _, each in mixed for number in each]
                owners = [owner for owner, (_, each) in enumerate(mixed) for _ in each]
                forms = [pack.form for pack, _ in mixed]
                mine = [sources[number] for number in numbers]
                logits = network.logits(batch, forms, owners, mine, dtype)  # type: ignore[arg-type]
                found |= zip(numbers, logits, strict=True)
            for pack, each in samples.items():
                if isinstance(model := pack.form, AdaptedModel):
                    mine = [sources[number] for number in each]
                    with model.merged(dtype):
                        found |= zip(each, model(batch[torch.tensor(mine)]), strict=True)
        return [found[number].cpu() for number in range(len(packs))]

    def _masks(self, pack: ResidentPack, images: Sequence[Decoded]) -> list[dict[str, Any]]:
        """What a pack of a dense kind says of each image. Others may pass the network while masks
        are brought to the sizes of their images.
        """
        model, metadata = pack.form, pack.metadata
        assert isinstance(model, AdaptedModel)
        kind, classes = kind_of(metadata), metadata.classes
        image_bytes = 4 * len(classes) * self.backbone.size_px**2
        step, rows = max(1, _LOGITS_BYTES // image_bytes), []
        for start in range(0, len(images), step):
            some = images[start : start + step]
            with self._one_pass_at_a_time, torch.inference_mode(), model.merged(self._dtype):
                logits = [dense_logits(model, image) for image in some]
            rows += [
                mask_answer(kind, classes, each, image)
                for each, image in zip(logits, some, strict=True)
            ]
        return rows

    def _load(self, name: str) -> ResidentPack:
        return self.check(self._read(name))

    def check(self, content: bytes) -> ResidentPack:
        """The pack of a file's content, ready to predict, after checking its digest, its backbone
        and, once per file, the logits of a probe image. Raises PackError.
        """
        pack, digest = read_pack(content), content_digest(content)
        backbone = self._form_for(pack.metadata)
        if backbone.gives_maps:
            return self._alone(pack, digest, backbone)
        unpacked = decode(pack, backbone)
        if not self._mixed().can_mix(unpacked.recipe):
            return self._alone(pack, digest, backbone)
        flat = flatten(unpacked, self.device)
        resident = ResidentPack(pack.metadata, digest, flat, flat.size_bytes, pack.calibration)
        if digest not in self._probed:
            # of one, because the others, which are noise as well, take as long and say the same
            logits = self.logits([resident], [self.backbone.takes.probe(PROBES)[0]], torch.float32)
            check_probe(torch.stack(logits).numpy(), pack)
            self._probed.add(digest)
        return resident

    def _alone(self, pack: Pack, digest: str, backbone: LoadedBackbone) -> ResidentPack:
        """A pack as a model of its own; such models share the backbone's tensors on the device."""
        model = from_pack(pack, backbone)
        size_bytes = sum(_MODULE_BYTES for _ in model.modules())
        size_bytes += sum(each.nbytes for each in (*model.values.parameters(), *model.buffers()))
        with self._one_form_at_a_time:
            for frozen in backbone.model.parameters():
                key = frozen.data_ptr(), frozen.shape
                if key not in self._on_device:
                    self._on_device[key] = frozen.data.to(self.device)
        for tensor in model.parameters():
            tensor.data = self._on_device.get((tensor.data_ptr(), tensor.shape), tensor.data)
        model.to(self.device)
        return ResidentPack(pack.metadata, digest, model, size_bytes, pack.calibration)

    def _form_for(self, metadata: PackMetadata) -> LoadedBackbone:
        """The backbone with maps for a pack of a dense kind, and pooling for others. Raises
        PackError for a pack of another backbone.
        """
        kind = kind_of(metadata)
        check_backbone(metadata, self.backbone)
        with self._one_form_at_a_time:
            if kind.is_dense not in self._forms:
                self._forms[kind.is_dense] = (
                    giving_maps(self.backbone)
                    if kind.is_dense
                    else load_backbone(self.backbone.spec, input_of(metadata))
                )
            return self._forms[kind.is_dense]

    def _mixed(self) -> MixedNetwork:
        """The network of the packs that share passes, which has its own copy of the backbone."""
        with self._one_form_at_a_time:
            if self._network is None:
                self._network = MixedNetwork(self._forms[False], self.device)
            return self._network


def _is_flat(pack: ResidentPack) -> bool:
    return isinstance(pack.form, FlatPack)
