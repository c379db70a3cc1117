"""Several processes, of one machine or many, as one run: `jax.distributed`, and nothing of our own.

Every process runs the same program on its own devices. What all compute alike, all know; files are
written by the first.
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

# A process that is silent for so long is taken for dead, and the others end.
_HEARTBEAT_SECONDS = 20
# A node may have to be started first; after the shorter time it is said what is waited for.
_JOIN_SECONDS, _PATIENT_SECONDS = 300.0, 10.0
# What gRPC, gloo and NCCL say when the other end is gone.
_LOSS = re.compile(
    "UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|gloo|nccl|connection|heartbeat|barrier", re.I
)


def initialize(
    kind: str,
    coordinator: str | None = None,
    count: int | None = None,
    index: int | None = None,
    alone: tuple[str, int] = ("histo_jax:", EXIT_STATUS),
) -> None:
    """Joins the other processes; to be called before anything that looks at a device.

    Args:
        kind: 'auto' and 'tpu' find the others by what the cluster tells, 'slurm' by SLURM's
            variables, 'manual' by the other arguments.
        coordinator: 'host:port' of the first process.
        count: of processes.
        index: of this one.
        alone: first word of what is said where the others do not come, and the status to end with.

    Raises:
        UserError: an argument is missing or wrong, or the others cannot be reached. Where they
            do not come within five minutes, the process ends as `alone` says instead.
    """
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
            f"--multihost={kind} finds the others itself: leave out --coordinator, "
            "--process_count and --process_index, or use --multihost=manual"
        )
    if kind == "slurm" and "SLURM_JOB_ID" not in os.environ:
        raise UserError("--multihost=slurm: this is no SLURM job, start it by srun")
    # Its handler of SIGTERM would take the place of ours.
    jax.config.update("jax_enable_preemption_service", False)
    # On CPU, where it takes part in tests and trials; accelerators have their own.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    where = f" at {coordinator}" if coordinator else ""
    try:
        with _join_timeout(where, *alone):
            jax.distributed.initialize(
                coordinator, count, index,
                local_device_ids=_all_of_a_lone_task(kind),
                cluster_detection_method={"slurm": "slurm", "manual": "deactivate"}.get(kind),
                initialization_timeout=2 * int(_JOIN_SECONDS),
                heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            )  # fmt: skip
        _warm_up_collectives()
    except (RuntimeError, ValueError) as error:
        said = " ".join(str(error).split())[:300]
        raise UserError(f"--multihost={kind}: cannot join the other processes: {said}") from None
    assign_roles()


@contextlib.contextmanager
def _join_timeout(where: str, word: str, status: int) -> Iterator[None]:
    """Ends the process where the others do not come: JAX's own way is an abort, without a word."""

    def say(text: str, word: str = "histo_jax:") -> None:
        print(word, text, file=sys.stderr, flush=True)

    def give_up() -> None:
        say(
            f"the other processes did not come{where} within {_JOIN_SECONDS:.0f} s: start all of "
            "them, with the same coordinator and count, and let no firewall stand between",
            word,
        )
        os._exit(status)

    timers = [
        threading.Timer(_PATIENT_SECONDS, say, (f"waiting for the other processes{where}",)),
        threading.Timer(_JOIN_SECONDS, give_up),
    ]
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()


def _all_of_a_lone_task(kind: str) -> list[int] | None:
    """None leaves it to JAX, which gives each of SLURM's tasks one device; none named means all."""
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    is_slurm = kind == "slurm" or (kind == "auto" and "OMPI_COMM_WORLD_SIZE" not in os.environ)
    is_lone = is_slurm and bool(re.fullmatch(r"1(\(x\d+\))?", tasks))
    return [] if is_lone and "JAX_LOCAL_DEVICE_IDS" not in os.environ else None


def _warm_up_collectives() -> None:
    """Lets each set of devices that will work together do so once.

    The first time, XLA waits half a minute on CPU and then gives up; from then on it waits for as
    long as a process prepares records or reads pixels.
    """
    multihost_utils.process_allgather(np.zeros(1))
    batch_sharding = mesh.batch_sharding()
    own = np.zeros(jax.device_count())[mesh.local_slice(jax.device_count())]
    jax.jit(jnp.sum, out_shardings=mesh.replicated(batch_sharding))(
        mesh.make_global_array(own, batch_sharding)
    )


def is_primary() -> bool:
    """Returns whether this process writes the run's files; of several the first does.

    Starts no device where this process is the only one.
    """
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def assign_roles() -> None:
    """Lets only the primary process log what is not a warning."""
    if not is_primary():
        logging.getLogger("histo_jax").setLevel(logging.WARNING)


def is_process_loss(error: Exception) -> bool:
    """Whether the error says that another process cannot be reached any more.

    JAX notices in one of two ways: a collective fails, with an error like this, or the heartbeats
    stay out, and JAX itself ends the process saying that another task died.
    """
    return (
        isinstance(error, jax.errors.JaxRuntimeError)
        and jax.process_count() > 1
        and bool(_LOSS.search(str(error)))
        and "RESOURCE_EXHAUSTED" not in str(error)
    )
