"""Mode `run`: training, evaluation, prediction and report as one command."""

import os

from histo_jax import command, fitting
from histo_jax.config import Config
from histo_jax.evaluation import evaluate_in
from histo_jax.prediction import NoTestPatchesError, predict_in
from histo_jax.report.reporting import report_in


def run(config: Config, workdir: str | os.PathLike[str]) -> None:
    """Trains, evaluates, predicts and reports in one session; resumes what was interrupted.

    Args:
        config: all settings.
        workdir: folder of the run; made if missing.

    Raises:
        UserError: a setting, the data or the folder is wrong; the message names the fix.
        OSError: a file cannot be written.
    """
    if command.open_workdir(config, workdir).is_finished(config, "run"):
        print(f"{workdir} is already complete; for another run choose another --workdir")
        return
    with command.start(config, workdir, "run", lambda _: fitting.check(config)) as opened:
        fitting.fit_in(opened, config, followed_by=("evaluate", "predict", "report"))
        evaluate_in(opened, config)
        try:
            predict_in(opened, config)
        except NoTestPatchesError as error:
            print(f"nothing is predicted: {error}")
        report_in(opened, config)
        # Settings of evaluation and prediction may differ from those that `fit` has saved.
        opened.save_config(config)
