"""Trains with several processes, by `jax.distributed`, and ends all of them when one dies.

    python -m experiments.launch --processes 2 mnist --epochs 3

starts two on this machine. On a cluster the command runs on every machine, each time for one
process; HOST is the machine of process 0, and PORT free there:

    python -m experiments.launch --coordinator HOST:PORT --processes 2 --process-id 0 mnist
    python -m experiments.launch --coordinator HOST:PORT --processes 2 --process-id 1 mnist

or, under Slurm, Open MPI or on TPUs, where JAX finds these by itself:

    srun python -m experiments.launch --coordinator auto mnist
"""

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import typer

from experiments.output.errors import fail
from experiments.processes import supervise

AUTO = "auto"

# Seconds. JAX waits for minutes by default, in which a job that lost a process does nothing.
START_TIMEOUT = 60
HEARTBEAT_TIMEOUT = 20
SHUTDOWN_TIMEOUT = 20

# What wrong options end with, which no other run of the same command would mend.
_USAGE_ERROR = 2

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


# Whatever follows the experiment is its own.
@app.command(context_settings={"allow_interspersed_args": False})
def main(
    experiment: Annotated[
        Literal["mnist", "language_model"], typer.Argument(help="The experiment to run.")
    ],
    arguments: Annotated[
        list[str] | None, typer.Argument(help="The options of the experiment.")
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of processes, on all machines together.", show_default=False
        ),
    ] = None,
    coordinator: Annotated[
        str | None,
        typer.Option(
            metavar=f"HOST:PORT|{AUTO}",
            help="Start one process of a cluster. All of them meet at this address, which is that "
            f"of process 0. {AUTO}: JAX finds the address, the number of processes and the id by "
            "itself, as it can under Slurm, Open MPI and on TPUs.",
            show_default="all processes run on this machine",
        ),
    ] = None,
    process_id: Annotated[
        int | None,
        typer.Option(
            min=0, help="Number of this process, from 0. Needed with HOST:PORT.", show_default=False
        ),
    ] = None,
    cpu_devices: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of CPU devices that each process gets.",
            show_default="on this machine one GPU for each process, on a cluster all of its "
            "machine; one CPU device where there is no GPU",
        ),
    ] = None,
    start_timeout: Annotated[
        int, typer.Option(min=1, help="Seconds that a process waits for the others to start.")
    ] = START_TIMEOUT,
) -> None:
    """Train with several processes, on this machine or a cluster. When one dies, all of them end.

    Exit status: 0 where all are done, 2 for wrong options, otherwise that of the process that
    failed first. A process that was killed counts as 128 plus the number of the signal.
    """
    timeouts = {
        "initialization_timeout": start_timeout,
        "heartbeat_timeout_seconds": HEARTBEAT_TIMEOUT,
        "shutdown_timeout_seconds": SHUTDOWN_TIMEOUT,
    }
    if coordinator is None:
        jobs = on_this_machine(processes, process_id)
    else:
        jobs = on_a_cluster(coordinator, processes, process_id)
    jobs = {name: {**joining, **timeouts} for name, joining in jobs.items()}
    # On CPUs an exchange of data blocks one of XLA's threads, of which there are as many as cores,
    # or as this says. With no thread left for another device, all would wait for each other.
    threads = max(os.cpu_count() or 1, 4 * (cpu_devices or 1))
    environment = {"NPROC": str(threads)}
    if cpu_devices is not None:
        environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(cpu_devices)}
    command = [experiment, *(arguments or [])]
    received: list[int] = []
    ending = [signal.SIGINT, signal.SIGTERM]
    if sys.platform != "win32":
        ending.append(signal.SIGHUP)
        # Where nobody reads the output any more, this process is killed, and the workers with it.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    for number in ending:
        if signal.getsignal(number) != signal.SIG_IGN:  # as after `nohup`
            signal.signal(number, lambda number, _: received.append(number))
    try:
        failure = supervise.run(jobs, command, environment, until=lambda: bool(received))
    except OSError as error:
        fail(
            "what the processes print cannot be written, so all of them were ended: "
            f"{error.strerror or error}. {advice(command)}"
        )
    if received:
        name = signal.Signals(received[0]).name
        fail(f"{name}: all processes were ended. {advice(command)}", 128 + received[0])
    if failure is None:
        return
    message = f"{'; '.join(failure.fates)}."
    if not failure.joined and failure.status == -signal.SIGABRT:
        address = next(iter(jobs.values())).get("coordinator_address", "the address JAX found")
        message += (
            f" It had not met the others at {address} within {start_timeout} s: process 0 has to "
            "run there, the port to be free and to be reached from here, and all processes to "
            "start within that time, each with an id of its own."
        )
    elif failure.joined and failure.status != _USAGE_ERROR:
        message += f" {advice(command)}"
    fail(message, failure.status if failure.status > 0 else 128 - failure.status)


def on_this_machine(processes: int | None, process_id: int | None) -> dict[str, dict[str, Any]]:
    """How the processes join that all run here, by the names of these."""
    if processes is None:
        raise typer.BadParameter("--processes has to say how many to start on this machine")
    if process_id is not None:
        raise typer.BadParameter("--process-id belongs to --coordinator")
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    return {
        f"process {number} of {processes}": {
            "coordinator_address": address,
            # Not on all of the machine's networks, as is the default.
            "coordinator_bind_address": address,
            "num_processes": processes,
            "process_id": number,
            "local_device_ids": number,
        }
        for number in range(processes)
    }


def on_a_cluster(
    coordinator: str, processes: int | None, process_id: int | None
) -> dict[str, dict[str, Any]]:
    """How the one process joins that runs here, by its name."""
    if coordinator == AUTO:
        if processes is not None or process_id is not None:
            raise typer.BadParameter(
                f"--coordinator {AUTO} finds --processes and --process-id by itself"
            )
        return {"the process on this machine": {}}
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 1 << 16):
        raise typer.BadParameter(f"--coordinator has to be HOST:PORT or {AUTO}, not {coordinator}")
    if processes is None or process_id is None:
        raise typer.BadParameter(f"--coordinator {coordinator} needs --processes and --process-id")
    if process_id >= processes:
        raise typer.BadParameter(
            f"--process-id has to be below {processes}, the number of processes, not {process_id}"
        )
    joining = {
        "coordinator_address": coordinator,
        "num_processes": processes,
        "process_id": process_id,
    }
    return {f"process {process_id} of {processes}": joining}


def advice(command: Sequence[str]) -> str:
    """What to do about a job that was broken off."""
    missing = [
        option
        for option in ("--out FOLDER", "--resume")
        if not any(word.split("=")[0] == option.split()[0] for word in command)
    ]
    added = f" with {' '.join(missing)}" if missing else ""
    return f"The same command{added} goes on from the last checkpoint, if there is one already."


if __name__ == "__main__":
    app()
