"""Figures for TensorBoard, written at once.

The writer of tensorboardX leaves that to a thread of its own, in which nobody catches an error of
the disk.
"""

import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class EventFile:
    """A new file of events in a folder, which is made where it is missing."""

    def __init__(self, folder: Path):
        # Imported here because it takes a second that the other processes need not wait for.
        from tensorboardX.proto.event_pb2 import Event

        folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        self._path = folder / f"events.out.tfevents.{int(now)}.{socket.gethostname()}"
        self._append(Event(wall_time=now, file_version="brain.Event:2"))

    def add(self, step: int, row: Mapping[str, Any]) -> None:
        """Appends the floats among the figures of a step, under their names."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        values = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in row.items()
            if isinstance(value, float)
        ]
        self._append(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def _append(self, event: Any) -> None:
        """Writes one record: its length, the content, and a checksum of each."""
        from tensorboardX.record_writer import masked_crc32c

        content = event.SerializeToString()
        length = struct.pack("<Q", len(content))
        checks = [struct.pack("<I", masked_crc32c(part)) for part in (length, content)]
        with self._path.open("ab") as file:
            file.write(length + checks[0] + content + checks[1])
