import os
import subprocess
import sys

import pytest

SHOW = """
import jax
from histo_jax.training.runtime import set_up
set_up()
print(jax.config.values["jax_compilation_cache_dir"])
"""


@pytest.mark.parametrize("chosen", [None, "/chosen"])
def test_programs_are_kept_in_the_users_cache_or_where_the_user_says(chosen, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment["XDG_CACHE_HOME"] = str(tmp_path)
    if chosen:
        environment["JAX_COMPILATION_CACHE_DIR"] = chosen
    done = subprocess.run(
        [sys.executable, "-c", SHOW], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == (chosen or str(tmp_path / "histo_jax" / "compiled"))
