"""What one of several processes has to know of the others: who writes, and that all agree.

In a run of one process there is nothing to it: that process is the first, and waits for nobody.
"""

import json
import time
import zlib
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.errors import RunError


def is_first() -> bool:
    """Whether this process is the one that shows and writes; the others only compute."""
    return jax.process_index() == 0


def wait_for_all(moment: str) -> None:
    """Returns when every process has come to the moment of this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(moment)


def common_time() -> datetime:
    """The time by the clock of the first process."""
    seconds = multihost_utils.broadcast_one_to_all(np.uint32(time.time()))
    return datetime.fromtimestamp(int(seconds))


def require_agreement(facts: Mapping[str, Any]) -> None:
    """Raises RunError in every process unless all of them give the same facts.

    Processes that differ in one would not fail but compute something that nobody asked for.
    """
    own = [zlib.crc32(json.dumps(value).encode()) for value in facts.values()]
    found = multihost_utils.process_allgather(np.asarray(own, np.uint32)).reshape(-1, len(own))
    process, fact = np.nonzero(found != found[0])
    if len(process):
        names = list(facts)
        differing = ", ".join(sorted({names[index] for index in fact}))
        raise RunError(f"process {process[0]} has not the same {differing} as process 0")


def place(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    """Puts arrays on devices, of which some may belong to other processes.

    Each process gives the part that its own devices hold, which of a replicated array is all of it.
    """
    return jax.tree.map(
        # A copy: a device may otherwise use the memory it is given, which its owner may change.
        lambda leaf: jax.make_array_from_process_local_data(sharding, np.array(leaf)),
        tree,
    )
