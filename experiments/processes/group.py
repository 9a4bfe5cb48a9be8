"""What one of several processes has to know of the others: who writes, and that all agree.

In a run of one process there is nothing to it: that process is the first, and waits for nobody.
"""

import json
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.output.errors import RunError


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


def sharing(devices: Sequence[jax.Device], evenly: Callable[[int], bool]) -> Sequence[jax.Device]:
    """As many of the devices as can share the work, equally many of each process; none if none can.

    Args:
      devices: those there are.
      evenly: whether so many can share the work.
    """
    by_process: dict[int, list[jax.Device]] = {}
    for device in devices:
        by_process.setdefault(device.process_index, []).append(device)
    for each in range(min(map(len, by_process.values())), 0, -1):
        if evenly(each * len(by_process)):
            return [device for own in by_process.values() for device in own[:each]]
    return []


def described(devices: Sequence[jax.Device]) -> str:
    """Number and kind of devices, and of how many processes where these are several."""
    count = len({device.process_index for device in devices})
    where = f" of {count} processes" if count > 1 else ""
    return f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}){where}"


def place(array: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """Puts an array, which every process has, on devices, some of which may be other processes'.

    Each process feeds its own devices with their share of it.
    """
    # A copy: a device may otherwise use the memory it is given, which its owner may change.
    whole = np.array(array)
    return jax.make_array_from_callback(whole.shape, sharding, lambda share: whole[share])
