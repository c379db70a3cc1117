import os
import subprocess
import sys
from pathlib import Path

import pytest

SHOW = """
import jax
from histo_jax.training.runtime import set_up
set_up()
print(jax.config.values["jax_compilation_cache_dir"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: x + 1)(1)
"""


@pytest.mark.parametrize("chosen", [None, "chosen"])
def test_programs_are_kept_in_the_users_cache_or_where_the_user_says(chosen, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment["XDG_CACHE_HOME"] = str(tmp_path)
    if chosen:
        environment["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / chosen)
    done = subprocess.run(
        [sys.executable, "-c", SHOW], env=environment, capture_output=True, text=True, check=True
    )
    folder = str(tmp_path / (chosen or "histo_jax/compiled"))
    assert done.stdout.strip() == folder
    assert any(Path(folder).iterdir())
    assert "Error" not in done.stderr
