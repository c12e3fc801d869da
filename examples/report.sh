#!/usr/bin/env bash
# The quickstart with each of the five optimizers at three learning rates (half an hour on one core), the report of these
# 15 runs, and a picture of it as docs/report.png has it. From the checkout's root; the last step needs Chromium.
#
#   bash examples/report.sh
set -euo pipefail
lightning-namo sweep configs/sweeps/optimizers.yaml
lightning-namo report runs/optimizers --out runs/optimizers/report.html
as_root=$([ "$(id -u)" != 0 ] || echo --no-sandbox)
# shellcheck disable=SC2086  # no option at all where it is empty
chromium --headless $as_root --disable-gpu --hide-scrollbars --virtual-time-budget=60000 --window-size=1100,13100 \
  --screenshot=docs/report.png "file://$PWD/runs/optimizers/report.html"
