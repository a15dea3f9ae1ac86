"""A mask decoder that trains as a whole, as changes added to the frozen one (GPS's recipe for SAM,
arXiv 2312.10136). Other parts then leave it alone.
"""

from __future__ import annotations

from pipeline.adaptation.part import Assembly, Part, Site, Stage, register
from pipeline.adaptation.parts.full import TunedNetwork, changes
from pipeline.adaptation.tensors import PlannedTensor
from pipeline.backbones import SegmentAnything
from pipeline.specs import Decoder


@register
class DecoderPart(Part):
    """Every parameter of the mask decoder."""

    name, pack_order, stage = "decoder", 13, Stage.NETWORK
    needs = "it needs a backbone with a mask decoder, such as sam_base_patch16"

    def plan(self, spec: Decoder, site: Site) -> list[PlannedTensor]:
        """A tensor per parameter, see `changes`; none of a backbone without a decoder."""
        if not isinstance(site.model, SegmentAnything):
            return []
        return changes(dict(site.model.decoder.named_parameters()), "decoder", spec.bits)

    def attach(self, spec: Decoder, assembly: Assembly) -> None:
        """Wrap the decoder."""
        tuned = TunedNetwork(assembly.model.get_submodule("decoder"))
        assembly.modules["decoder"] = tuned
        assembly.model.set_submodule("decoder", tuned)
