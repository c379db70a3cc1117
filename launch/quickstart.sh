#!/usr/bin/env bash
# Installs histo_jax; trains, evaluates and predicts on synthetic slides, in runs/quickstart.
# usage: launch/quickstart.sh [--config.FIELD=VALUE ...] [--workdir=DIR]     e.g. --config.seed=1
if [ -z "${BASH_VERSION:-}" ]; then exec bash "$0" "$@"; fi
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
workdir=runs/quickstart
for option in "$@"; do
  case $option in
    --help | -h) sed -n '2,3s/^# //p' launch/quickstart.sh; exit ;;
    --workdir=*) workdir=${option#*=} ;;
    --config.*) ;;
    -*)
      echo "launch/quickstart.sh: unknown option $option: for another config or mode, use .venv/bin/python -m histo_jax.main" >&2
      exit 2
      ;;
  esac
done
# Variables that make Python import packages from outside .venv.
unset PYTHONHOME PYTHONPATH
bash launch/install.sh
.venv/bin/python -m histo_jax.main --config=configs/quickstart.py --workdir=runs/quickstart "$@"
.venv/bin/python - "$workdir" <<'PYTHON'
import json
import sys
from pathlib import Path

workdir = Path(sys.argv[1]).expanduser()
scores = json.loads((workdir / "evaluation_validation.json").read_text())
print(f"""
validation AUC {scores["auc"]:.4f} on {scores["count"]} patches of unseen slides
report         {workdir / "report.html"}
predictions    {workdir / "submission.csv"}
next           .venv/bin/python -m histo_jax.main --config=configs/kaggle.py \\
                   --config.data.raw_dir=FOLDER_OF_THE_COMPETITION --workdir=runs/kaggle""")
PYTHON
