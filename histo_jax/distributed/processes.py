"""Several processes as one run, on one machine or many, by `jax.distributed`.

Every process runs the same program on its own devices. The primary process, number 0, writes the
files of the run.
"""

import contextlib
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from histo_jax.distributed import mesh
from histo_jax.errors import UserError
from histo_jax.run.signals import EXIT_STATUS

# A process without a heartbeat for this long counts as lost, and the others end.
_HEARTBEAT_SECONDS = 20
# Time limit for joining: a node may have to boot first. After the shorter time a line is printed.
_JOIN_SECONDS, _NOTICE_SECONDS = 300.0, 10.0
# In errors of gRPC, gloo and NCCL when the peer is lost.
_LOSS = re.compile(
    "UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|gloo|nccl|connection|heartbeat|barrier", re.I
)


def initialize(
    kind: str,
    coordinator: str | None = None,
    count: int | None = None,
    index: int | None = None,
    on_timeout: tuple[str, int] = ("histo_jax:", EXIT_STATUS),
) -> None:
    """Joins the other processes; must be called before anything that uses a device.

    Args:
        kind: 'auto' and 'tpu' find the others by the environment of the cluster, 'slurm' by the
            variables of SLURM, 'manual' by the other arguments.
        coordinator: 'host:port' of process 0.
        count: number of processes.
        index: of this process, from 0.
        on_timeout: first word of the message, and exit status, if the others do not join in time.

    Raises:
        UserError: an argument is missing or wrong, or the others cannot be reached. If they do not
            join within five minutes, the process exits as `on_timeout` says.
    """
    _check_arguments(kind, coordinator, count, index)
    # Its handler of SIGTERM would replace ours.
    jax.config.update("jax_enable_preemption_service", False)
    # On CPU, for tests; accelerators have their own.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    address = f" at {coordinator}" if coordinator else ""
    try:
        with _join_timeout(address, *on_timeout):
            jax.distributed.initialize(
                coordinator,
                count,
                index,
                local_device_ids=_local_device_ids(kind),
                cluster_detection_method={"slurm": "slurm", "manual": "deactivate"}.get(kind),
                initialization_timeout=2 * int(_JOIN_SECONDS),
                heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            )
        _warm_up_collectives()
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"--multihost={kind}: cannot join the other processes: {reason}") from None
    assign_roles()


def _check_arguments(
    kind: str, coordinator: str | None, count: int | None, index: int | None
) -> None:
    if kind == "manual" and (coordinator is None or count is None or index is None):
        raise UserError(
            "--multihost=manual needs --coordinator=HOST:PORT, --process_count and --process_index"
        )
    if kind == "manual" and not 0 <= (index or 0) < (count or 0):
        raise UserError(
            f"--process_index={index} must be from 0 to --process_count={count} minus 1"
        )
    if kind != "manual" and (coordinator, count, index) != (None, None, None):
        raise UserError(
            f"--multihost={kind} finds the other processes itself: leave out --coordinator, "
            "--process_count and --process_index, or use --multihost=manual"
        )
    if kind == "slurm" and "SLURM_JOB_ID" not in os.environ:
        raise UserError("--multihost=slurm: this is not a SLURM job: start it by srun")


@contextlib.contextmanager
def _join_timeout(address: str, prefix: str, status: int) -> Iterator[None]:
    """Exits with a message if the others do not join in time: JAX itself would abort without one.

    Args:
        address: of the coordinator, for messages.
        prefix: first word of the message.
        status: to exit with.
    """

    def print_line(text: str, prefix: str = "histo_jax:") -> None:
        print(prefix, text, file=sys.stderr, flush=True)

    def exit_process() -> None:
        print_line(
            f"the other processes did not join{address} within {_JOIN_SECONDS:.0f} s: start all of "
            "them with the same coordinator and count, and check that no firewall blocks them",
            prefix,
        )
        os._exit(status)

    timers = [
        threading.Timer(
            _NOTICE_SECONDS, print_line, (f"waiting for the other processes{address}",)
        ),
        threading.Timer(_JOIN_SECONDS, exit_process),
    ]
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()


def _local_device_ids(kind: str) -> list[int] | None:
    """Returns the `local_device_ids` of JAX: [] = all of the node, None = as JAX decides.

    JAX gives each task of SLURM one device, also where a node runs a single task.
    """
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    is_slurm = kind == "slurm" or (kind == "auto" and "OMPI_COMM_WORLD_SIZE" not in os.environ)
    is_single_task = is_slurm and bool(re.fullmatch(r"1(\(x\d+\))?", tasks))
    return [] if is_single_task and "JAX_LOCAL_DEVICE_IDS" not in os.environ else None


def _warm_up_collectives() -> None:
    """Runs one collective on each set of devices that will communicate.

    XLA gives up the first one after half a minute on CPU; later ones wait for as long as a process
    prepares records or reads pixels.
    """
    multihost_utils.process_allgather(np.zeros(1))
    batch_sharding = mesh.batch_sharding()
    values = np.zeros(jax.device_count())[mesh.local_slice(jax.device_count())]
    jax.jit(jnp.sum, out_shardings=mesh.replicated(batch_sharding))(
        mesh.make_global_array(values, batch_sharding)
    )


def is_primary() -> bool:
    """Returns whether this process writes the files of the run.

    Does not initialise the devices if this is the only process.
    """
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def assign_roles() -> None:
    """Limits the log of all processes but the primary one to warnings."""
    if not is_primary():
        logging.getLogger("histo_jax").setLevel(logging.WARNING)


def is_process_loss(error: Exception) -> bool:
    """Returns whether an error looks as if another process was lost.

    JAX reports a loss in one of two ways: a collective fails with such an error, or JAX notices
    missing heartbeats and ends the process itself. An error of the program can look the same:
    `restarts` limits how often a run is restarted for it.
    """
    return (
        isinstance(error, jax.errors.JaxRuntimeError)
        and jax.process_count() > 1
        and bool(_LOSS.search(str(error)))
        and "RESOURCE_EXHAUSTED" not in str(error)
    )
