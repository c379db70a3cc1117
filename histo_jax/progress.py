"""Progress bars, for whoever watches."""

import os
from typing import Any

from tqdm import tqdm


def bar(*args: Any, is_shown: bool = True, **kwargs: Any) -> tqdm:
    """Returns tqdm's bar, shown on a terminal only, and not under CI, where nobody watches one."""
    is_watched = is_shown and not os.environ.get("CI")
    return tqdm(*args, **kwargs, disable=None if is_watched else True)
