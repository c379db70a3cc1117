"""Checks whether the splits share patients, slides or patches."""

import os
from typing import Any

from histo_jax import command, environment
from histo_jax.config import Config
from histo_jax.data import leakage
from histo_jax.data.records import prepare
from histo_jax.data.splits import make_subsets
from histo_jax.run import progress, signals


@environment.defaults()
@progress.working("audit")
def audit(config: Config, workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """Searches for patches, slides and patients that several splits share; writes `audit.json`.

    Prepares the data if needed. `data.leakage.has_leak` tells whether there is a leak, and
    `data.leakage.table` formats the result as text.

    Args:
        config: settings of the run; `data` and `seed` matter.
        workdir: folder of the run; made if missing.

    Returns:
        See `data.leakage.audit`: counts of each split (`subsets`); what each pair of them shares
        (`pairs`: `identical` patches, `shared_slides`, `near_duplicates`, and `shared_patients`
        where patients are named); what colour histograms alone reach
        (`colour_histogram_baseline`); `slide_disjoint` and `note`.

    Raises:
        UserError: a setting, the data or the folder is wrong; the message names the fix.
        OSError: a file cannot be written.
    """
    run = command.open_workdir(config, workdir)
    with signals.watch():
        prepared = prepare(config.data, config.data_seed, run.path, raw_may_be_gone=True)
        subsets = make_subsets(prepared.tables, config.data, config.data_seed)
        report = leakage.audit(prepared, subsets, config.seed)
        run.path.mkdir(parents=True, exist_ok=True)
        run.write_json("audit.json", report)
    return report
