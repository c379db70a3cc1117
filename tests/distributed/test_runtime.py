import os
import subprocess
import sys

import pytest

from histo_jax.distributed import runtime

SHOW = """
import jax
from histo_jax.distributed.runtime import set_up
set_up()
print(jax.config.values["jax_compilation_cache_dir"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: x + 1)(1)
"""


@pytest.mark.parametrize("chosen", [None, "chosen"])
def test_programs_are_kept_in_the_users_cache_or_where_the_user_says(chosen, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment["XDG_CACHE_HOME"] = str(tmp_path)
    folder = tmp_path / (chosen or "histo_jax/compiled")
    if chosen:
        environment["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    folder.mkdir(parents=True)
    for name, content in (("jit_old-1-cache", "x"), ("jit_old-2-cache", "")):
        (folder / name).write_text(content)
    done = subprocess.run(
        [sys.executable, "-c", SHOW], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(folder)
    kept = {path.name for path in folder.glob("*-cache")}
    assert any("lambda" in name for name in kept)
    # A program without an access time is whole where the user set no limit: JAX writes none there.
    assert ("jit_old-1-cache" in kept) == bool(chosen)
    assert "jit_old-2-cache" not in kept
    assert "Error" not in done.stderr


def test_what_a_killed_process_left_in_the_cache_does_not_disable_it(tmp_path):
    folder = tmp_path / "compiled"
    assert not runtime._cache_problem.__wrapped__(folder, evicts=True)
    for name in (
        "jit_a-1-cache",
        "jit_a-1-atime",
        "jit_b-2-cache",
        "jit_c-3-atime",
        "jit_d-4-cache",
    ):
        (folder / name).write_text("" if name == "jit_d-4-cache" else "x")
    (folder / "jit_d-4-atime").write_text("x")
    assert not runtime._cache_problem.__wrapped__(folder, evicts=True)
    assert {path.name for path in folder.glob("jit_[abc]*")} == {"jit_a-1-cache", "jit_a-1-atime"}
    assert not (folder / "jit_d-4-cache").exists()


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    assert runtime._cache_problem.__wrapped__(tmp_path / "file", evicts=True)
    # JAX would never find its files.
    assert runtime._cache_problem.__wrapped__(tmp_path / "a[1]", evicts=True)
    monkeypatch.setattr(runtime.files, "lock", lambda _: False)
    assert runtime._cache_problem.__wrapped__(tmp_path / "no locks", evicts=True)
    monkeypatch.setattr(runtime.files.os, "access", lambda *_: False)
    assert runtime._cache_problem.__wrapped__(tmp_path, evicts=True)
