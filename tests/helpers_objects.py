"""Another user of a cluster: fills every node's object store, says so, and checks its objects once
it is told to end.

python tests/helpers_objects.py ADDRESS BYTES_A_NODE
"""

from __future__ import annotations

import sys

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

OBJECT_BYTES = 16 << 20


@ray.remote(num_cpus=0)
def make_objects(count: int) -> list[ray.ObjectRef]:
    """Objects of the node that this runs on; the n-th is full of n."""
    return [ray.put(np.full(OBJECT_BYTES, number, np.uint8)) for number in range(count)]


def main(address: str, bytes_a_node: int) -> None:
    """Hold objects until a line comes in."""
    ray.init(address=address, log_to_driver=False)
    nodes = [
        NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        for node in ray.nodes()
        if node["Resources"].get("CPU")
    ]
    held = ray.get(
        [
            make_objects.options(scheduling_strategy=node).remote(bytes_a_node // OBJECT_BYTES)
            for node in nodes
        ]
    )
    print("held", flush=True)
    sys.stdin.readline()
    for objects in held:
        for number, each in enumerate(objects):
            assert (ray.get(each) == number).all()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
