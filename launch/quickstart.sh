#!/usr/bin/env bash
# Installs histo_jax and runs its whole main job on synthetic slides, into runs/quickstart.
# usage: launch/quickstart.sh [OPTION ...]     options go to histo_jax.main, e.g. --config.seed=1
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case ${1:-} in --help | -h) sed -n '2,3s/^# //p' launch/quickstart.sh; exit ;; esac
launch/install.sh
.venv/bin/python -m histo_jax.main --config=configs/quickstart.py --workdir=runs/quickstart "$@"
.venv/bin/python - <<'PYTHON'
import json

scores = json.load(open("runs/quickstart/evaluation_validation.json"))
print(f"""
validation AUC {scores["auc"]:.4f} on {scores["count"]} patches of unseen slides
report         runs/quickstart/report.html
predictions    runs/quickstart/submission.csv
next           .venv/bin/python -m histo_jax.main --config=configs/kaggle.py \\
                   --config.data.raw_dir=FOLDER_OF_THE_COMPETITION --workdir=runs/kaggle""")
PYTHON
