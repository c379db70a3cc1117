"""Looks a machine over: `python -m histo_jax.doctor [--multihost=...]`, one line a finding.

PASS, WARN or FAIL, and the remedy. Status 1 if anything failed.
"""

import argparse
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from histo_jax import environment, streams
from histo_jax.errors import UserError
from histo_jax.run import files

Finding = tuple[str, str]

_DEV = Path("/dev")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets")


def _python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info < (3, 14):
        yield "PASS", f"Python {version}"
    else:
        yield (
            "FAIL",
            f"Python {version}: use 3.11 to 3.13, PYTHON=/path/to/python launch/install.sh",
        )


def _packages() -> Iterator[Finding]:
    found = []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            yield "FAIL", f"{name} is not installed: run launch/install.sh"
    yield "PASS", ", ".join(found)


def _tpu() -> Path | None:
    """Returns a chip's file, on a TPU VM; /dev/vfio/vfio alone is on other machines, too."""
    chips = [*_DEV.glob("accel[0-9]*"), *_DEV.glob("vfio/[0-9]*")]
    return min(chips) if chips else None


def _driver() -> Iterator[Finding]:
    program = shutil.which("nvidia-smi")
    if program is None:
        tpu = _tpu()
        yield "PASS", f"TPU: {tpu}" if tpu else "no NVIDIA driver, so no GPU is expected"
        return
    query = [program, "--query-gpu=name,driver_version,memory.free", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    if done.returncode:
        yield (
            "FAIL",
            f"nvidia-smi says {done.stderr.strip() or done.stdout.strip()}: mend the driver",
        )
    for line in done.stdout.strip().splitlines():
        yield "PASS", f"GPU: {line}"


def _devices() -> Iterator[Finding]:
    import jax

    from histo_jax.distributed import memory

    local = jax.local_devices()
    kind = f"{local[0].platform} ({local[0].device_kind})"
    there = (
        f"{len(local)} of {jax.device_count()} devices, {kind}, process {jax.process_index()} of "
        f"{jax.process_count()}"
    )
    hidden = environment.variables("JAX_PLATFORM", "CUDA_VISIBLE")
    if local[0].platform == "cpu" and "=" in hidden and (shutil.which("nvidia-smi") or _tpu()):
        yield "WARN", f"{there}, as {hidden} may have it: unset that to use the accelerator"
    elif local[0].platform == "cpu" and shutil.which("nvidia-smi"):
        yield "FAIL", f"{there}, but there is an NVIDIA driver: run launch/install.sh cuda"
    elif local[0].platform == "cpu" and _tpu():
        yield "FAIL", f"{there}, but there is a TPU ({_tpu()}): run launch/install.sh tpu"
    elif local[0].platform == "cpu":
        yield (
            "WARN",
            f"{there}: training at full size wants a GPU or TPU; on a machine that has one, run "
            "launch/install.sh cuda or tpu",
        )
    else:
        yield "PASS", there
    free = memory.free_on_devices(local)
    smaller = "lower --config.fit.batch_size and set --config.data.placement=host"
    if free is None:
        yield "WARN", f"the devices do not tell how much memory is free: if it gets full, {smaller}"
    elif free > 2e9:
        yield "PASS", f"{free / 1e9:.1f} GB free on each device"
    else:
        yield "WARN", f"{free / 1e9:.1f} GB free on each device: end other programs, or {smaller}"


def _memory() -> Iterator[Finding]:
    from histo_jax.distributed import memory

    free = memory.free_on_host()
    enough = free > 4e9
    remedy = "" if enough else ": set --config.data.placement=disk, and end other programs"
    yield "PASS" if enough else "WARN", f"{free / 1e9:.1f} GB of memory free{remedy}"


def _home(name: str) -> Path | None:
    try:
        return Path.home() / name
    except RuntimeError:
        return None


def _current_folder() -> Path:
    try:
        return Path.cwd()
    except OSError:  # it was removed
        return Path(os.curdir)


def _folders() -> Iterator[Finding]:
    for folder, setting in (
        (_home("tensorflow_datasets"), "--config.data.tfds_dir"),
        (files.user_caches(), "XDG_CACHE_HOME"),
        (_current_folder(), "--workdir"),
    ):
        if folder is None:
            yield "WARN", f"this user has no home folder: set {setting} to another one"
            continue
        elsewhere = f"choose another folder by {setting}"
        existing = files.nearest(folder)
        try:
            with tempfile.TemporaryFile(dir=existing):
                pass
        except OSError as error:
            yield "FAIL", f"{folder} cannot be written ({error.strerror}): {elsewhere}"
            continue
        free = shutil.disk_usage(existing).free
        # PatchCamelyon's records take 9 GB.
        enough = free > 12e9
        remedy = "" if enough else f": make room, or {elsewhere}"
        yield (
            "PASS" if enough else "WARN",
            f"{folder} can be written, {free / 1e9:.0f} GB free{remedy}",
        )


def _matrix_product() -> Iterator[Finding]:
    import jax
    import jax.numpy as jnp

    size = 2048
    for device in jax.local_devices():
        matrix = jax.device_put(jnp.eye(size), device)
        product = jax.jit(jnp.dot)
        if not (product(matrix, matrix) == matrix).all():
            yield "FAIL", f"{device} multiplies wrongly: have it replaced"
            continue
        count, began = 0, time.monotonic()
        while time.monotonic() - began < 1:
            product(matrix, matrix).block_until_ready()
            count += 1
        rate = 2 * size**3 * count / (time.monotonic() - began)
        yield "PASS", f"{device} multiplies matrices at {rate / 1e12:.2f} TFLOP/s, float32"


def _collective() -> Iterator[Finding]:
    import jax
    import numpy as np

    from histo_jax.distributed import mesh

    batch_sharding = mesh.batch_sharding()
    own = np.arange(jax.device_count(), dtype=np.float32)[mesh.local_slice(jax.device_count())]
    total = jax.jit(lambda x: x.sum(), out_shardings=mesh.replicated(batch_sharding))
    began = time.monotonic()
    found, count = float(total(mesh.make_global_array(own, batch_sharding))), jax.device_count()
    seconds = time.monotonic() - began
    if found == count * (count - 1) / 2:
        yield "PASS", f"a sum over all {count} devices in {seconds:.1f} s, with compilation"
    else:
        yield "FAIL", f"a sum over all {count} devices is {found}: check the network between them"


_Checks = tuple[Callable[[], Iterator[Finding]], ...]
_ALONE: _Checks = (_python, _packages, _driver, _memory, _folders)
_TOGETHER: _Checks = (_devices, _matrix_product, _collective)


def _failed(checks: _Checks) -> bool:
    """Prints every finding and tells whether one is a failure."""
    failed = False
    for check in checks:
        try:
            for verdict, finding in check():
                print(f"{verdict}  {finding}", flush=True)
                failed |= verdict == "FAIL"
        except Exception as error:  # of a broken installation or device: that is what is looked for
            _print_broken(check.__name__.strip("_"), error)
            failed = True
    return failed


def _print_broken(what: str, error: Exception) -> None:
    said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    print(f"FAIL  {what}: {said}: run launch/install.sh", flush=True)


def main() -> int:
    """Prints every finding and returns the exit status."""
    parser = argparse.ArgumentParser(prog="histo_jax.doctor", description=__doc__)
    parser.add_argument(
        "--multihost",
        choices=("auto", "slurm", "tpu", "manual"),
        help="as histo_jax.main takes it, also the next three",
    )
    parser.add_argument("--coordinator")
    parser.add_argument("--process_count", type=int)
    parser.add_argument("--process_index", type=int)
    options = parser.parse_args()
    failed = _failed(_ALONE)
    if options.multihost:
        from histo_jax.distributed import processes

        try:
            processes.initialize(
                options.multihost,
                options.coordinator,
                options.process_count,
                options.process_index,
                alone=("FAIL ", 1),
            )
        except UserError as error:
            print(f"FAIL  {error}")
            return 1
    try:
        runtime = environment.load("histo_jax.distributed.runtime")
        with environment.defaults(), runtime.jax_defaults():
            runtime.check_devices()
            return int(_failed(_TOGETHER) or failed)
    except UserError as error:  # variables of the environment keep JAX from starting
        print(f"FAIL  {error}")
        return 1
    except Exception as error:  # of a broken installation
        _print_broken("jax", error)
        return 1


if __name__ == "__main__":
    streams.make_robust()
    environment.reset_warnings()
    status = main()
    lost = streams.flush_stdout()
    if lost:
        print(f"histo_jax: stdout was lost: {lost.strerror}", file=sys.stderr)
    sys.exit(status or (2 if lost else 0))
