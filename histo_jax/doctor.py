"""Checks this machine: `python -m histo_jax.doctor [--multihost=...]`.

Prints one line per result: PASS, WARN or FAIL, and the fix. Exit status 1 if a check failed.
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

Result = tuple[str, str]  # PASS, WARN or FAIL; the text

_DEV = Path("/dev")
_SMALLER = "lower --config.fit.batch_size and set --config.data.placement=host"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets")


def _python() -> Iterator[Result]:
    version = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info < (3, 14):
        yield "PASS", f"Python {version}"
    else:
        yield (
            "FAIL",
            f"Python {version}: 3.11 to 3.13 is required; PYTHON=/path/to/python launch/install.sh",
        )


def _packages() -> Iterator[Result]:
    installed = []
    for name in _PACKAGES:
        try:
            installed.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            yield "FAIL", f"{name} is not installed: run launch/install.sh"
    yield "PASS", ", ".join(installed)


def _tpu() -> Path | None:
    """Returns the device file of a TPU chip; /dev/vfio/vfio also exists on other machines."""
    chips = [*_DEV.glob("accel[0-9]*"), *_DEV.glob("vfio/[0-9]*")]
    return min(chips) if chips else None


def _driver() -> Iterator[Result]:
    program = shutil.which("nvidia-smi")
    if program is None:
        tpu = _tpu()
        yield "PASS", f"TPU: {tpu}" if tpu else "no NVIDIA driver, no GPU expected"
        return
    query = [program, "--query-gpu=name,driver_version,memory.free", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    if done.returncode:
        yield (
            "FAIL",
            f"nvidia-smi fails: {done.stderr.strip() or done.stdout.strip()}: repair the driver",
        )
    for line in done.stdout.strip().splitlines():
        yield "PASS", f"GPU: {line}"


def _devices() -> Iterator[Result]:
    import jax

    from histo_jax.distributed import memory

    local = jax.local_devices()
    kind = f"{local[0].platform} ({local[0].device_kind})"
    devices = (
        f"{len(local)} of {jax.device_count()} devices, {kind}, process {jax.process_index()} of "
        f"{jax.process_count()}"
    )
    yield ("PASS", devices) if local[0].platform != "cpu" else _cpu_only(devices)
    free = memory.free_on_devices(local)
    if free is None:
        yield "WARN", f"free device memory is not known: if it runs out, {_SMALLER}"
    elif free > 2e9:
        yield "PASS", f"{free / 1e9:.1f} GB free on each device"
    else:
        yield "WARN", f"{free / 1e9:.1f} GB free on each device: end other programs, or {_SMALLER}"


def _cpu_only(devices: str) -> Result:
    """Returns the result where JAX sees CPUs only, with the fix if there is an accelerator."""
    has_gpu, tpu = shutil.which("nvidia-smi") is not None, _tpu()
    variables = environment.variables("JAX_PLATFORM", "CUDA_VISIBLE")
    if "=" in variables and (has_gpu or tpu):
        return "WARN", f"{devices}: unset {variables} to use the accelerator"
    if has_gpu:
        return "FAIL", f"{devices}, but there is an NVIDIA driver: run launch/install.sh cuda"
    if tpu:
        return "FAIL", f"{devices}, but there is a TPU ({tpu}): run launch/install.sh tpu"
    return (
        "WARN",
        f"{devices}: training at full size needs a GPU or TPU; on a machine that has one, run "
        "launch/install.sh cuda or tpu",
    )


def _memory() -> Iterator[Result]:
    from histo_jax.distributed import memory

    free = memory.free_on_host()
    is_enough = free > 4e9
    fix = "" if is_enough else ": set --config.data.placement=disk, or end other programs"
    yield "PASS" if is_enough else "WARN", f"{free / 1e9:.1f} GB of memory free{fix}"


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


def _folders() -> Iterator[Result]:
    for folder, setting in (
        (_home("tensorflow_datasets"), "--config.data.tfds_dir"),
        (files.user_caches(), "XDG_CACHE_HOME"),
        (_current_folder(), "--workdir"),
    ):
        if folder is None:
            yield "WARN", f"this user has no home folder: choose a folder with {setting}"
            continue
        elsewhere = f"choose another folder with {setting}"
        existing = files.nearest(folder)
        try:
            with tempfile.TemporaryFile(dir=existing):
                pass
        except OSError as error:
            yield "FAIL", f"{folder} cannot be written ({error.strerror}): {elsewhere}"
            continue
        free = shutil.disk_usage(existing).free
        # PatchCamelyon's records take 9 GB.
        is_enough = free > 12e9
        fix = "" if is_enough else f": free some space, or {elsewhere}"
        yield (
            "PASS" if is_enough else "WARN",
            f"{folder} can be written, {free / 1e9:.0f} GB free{fix}",
        )


def _matrix_product() -> Iterator[Result]:
    import jax
    import jax.numpy as jnp

    size = 2048
    for device in jax.local_devices():
        matrix = jax.device_put(jnp.eye(size), device)
        product = jax.jit(jnp.dot)
        if not (product(matrix, matrix) == matrix).all():
            yield "FAIL", f"{device} computes wrong matrix products: replace the device"
            continue
        count, start = 0, time.monotonic()
        while time.monotonic() - start < 0.5:
            product(matrix, matrix).block_until_ready()
            count += 1
        rate = 2 * size**3 * count / (time.monotonic() - start)
        yield "PASS", f"{device}: matrix products at {rate / 1e12:.2f} TFLOP/s, float32"


def _collective() -> Iterator[Result]:
    import jax
    import numpy as np

    from histo_jax.distributed import mesh

    batch_sharding = mesh.batch_sharding()
    count = jax.device_count()
    local = np.arange(count, dtype=np.float32)[mesh.local_slice(count)]
    add = jax.jit(lambda x: x.sum(), out_shardings=mesh.replicated(batch_sharding))
    start = time.monotonic()
    total = float(add(mesh.make_global_array(local, batch_sharding)))
    seconds = time.monotonic() - start
    if total == count * (count - 1) / 2:
        yield "PASS", f"sum over all {count} devices in {seconds:.1f} s, including compilation"
    else:
        yield "FAIL", f"wrong sum over all {count} devices: check the network between them"


_Checks = tuple[Callable[[], Iterator[Result]], ...]
_LOCAL: _Checks = (_python, _packages, _driver, _memory, _folders)
_DISTRIBUTED: _Checks = (_devices, _matrix_product, _collective)


def _run(checks: _Checks) -> bool:
    """Prints the results and returns whether all checks have passed."""
    passed = True
    for check in checks:
        try:
            for verdict, text in check():
                print(f"{verdict}  {text}", flush=True)
                passed &= verdict != "FAIL"
        except Exception as error:  # any error of a broken installation or device is a result
            _print_exception(check.__name__.strip("_"), error)
            passed = False
    return passed


def _print_exception(check: str, error: Exception) -> None:
    text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    print(f"FAIL  {check}: {text}: run launch/install.sh", flush=True)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="histo_jax.doctor", description=__doc__)
    parser.add_argument(
        "--multihost",
        choices=("auto", "slurm", "tpu", "manual"),
        help="as in histo_jax.main, like the next three",
    )
    parser.add_argument("--coordinator")
    parser.add_argument("--process_count", type=int)
    parser.add_argument("--process_index", type=int)
    return parser.parse_args()


def main() -> int:
    """Prints the results of all checks; returns the exit status."""
    options = _parse_arguments()
    passed = _run(_LOCAL)
    if options.multihost:
        from histo_jax.distributed import processes

        try:
            processes.initialize(
                options.multihost,
                options.coordinator,
                options.process_count,
                options.process_index,
                on_timeout=("FAIL ", 1),
            )
        except UserError as error:
            print(f"FAIL  {error}")
            return 1
    try:
        runtime = environment.load("histo_jax.distributed.runtime")
        with environment.defaults(), runtime.jax_defaults():
            runtime.check_devices()
            return int(not (_run(_DISTRIBUTED) and passed))
    except UserError as error:  # such as environment variables that keep JAX from starting
        print(f"FAIL  {error}")
        return 1
    except Exception as error:  # any error of a broken installation is a result
        _print_exception("jax", error)
        return 1


if __name__ == "__main__":
    streams.make_robust()
    environment.reset_warnings()
    status = main()
    lost = streams.flush_stdout()
    if lost:
        print(f"histo_jax: cannot write to stdout: {lost.strerror}", file=sys.stderr)
    sys.exit(status or (2 if lost else 0))
