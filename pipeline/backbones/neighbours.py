"""Farthest points and nearest neighbours of point clouds in plain torch, on any device.

Legend: B clouds, N points, G centres, C channels, of which the first three are coordinates.
"""

from __future__ import annotations

import torch


@torch.no_grad()
def farthest_points(points_BNC: torch.Tensor, count: int) -> torch.Tensor:
    """Indices int64 [B, count] of points that are far from each other: from point 0 on, each is
    the farthest from all before it (farthest-point sampling).
    """
    planes = [points_BNC[:, :, axis].float().contiguous() for axis in range(3)]
    chosen = points_BNC.new_zeros(len(points_BNC), count, dtype=torch.int64)
    nearest_BN = torch.full_like(planes[0], torch.inf)
    square_BN, offset_BN = torch.empty_like(nearest_BN), torch.empty_like(nearest_BN)
    for number in range(1, count):
        last_B1 = chosen[:, number - 1 : number]
        for axis, plane in enumerate(planes):
            torch.sub(plane, plane.gather(1, last_B1), out=offset_BN)
            if axis == 0:
                torch.mul(offset_BN, offset_BN, out=square_BN)
            else:
                square_BN.addcmul_(offset_BN, offset_BN)
        torch.minimum(nearest_BN, square_BN, out=nearest_BN)
        chosen[:, number] = nearest_BN.argmax(dim=1)
    return chosen


@torch.no_grad()
def nearest_points(points_BNC: torch.Tensor, centres_BG3: torch.Tensor, count: int) -> torch.Tensor:
    """Indices int64 [B, G, count] of the points nearest to each centre, the nearest first.

    Points are ranked by |x|^2 - 2 <c, x>, which is |x - c|^2 but for a constant per centre.
    """
    with torch.autocast(points_BNC.device.type, enabled=False):
        points_BN3 = points_BNC[..., :3].float()
        lengths_B1N = points_BN3.square().sum(dim=-1)[:, None]
        ranks_BGN = torch.baddbmm(
            lengths_B1N, centres_BG3.float(), points_BN3.transpose(1, 2), alpha=-2
        )
        return ranks_BGN.topk(count, dim=-1, largest=False).indices


def gather_points(points_BNC: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The points [B, ..., C] with the indices [B, ...]."""
    flat = index.flatten(1)[:, :, None].expand(-1, -1, points_BNC.shape[-1])
    return points_BNC.gather(1, flat).view(*index.shape, points_BNC.shape[-1])
