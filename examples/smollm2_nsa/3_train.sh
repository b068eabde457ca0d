#!/bin/sh
# Grows the model in MINUTES (default 8) of one GPU. Run again after a stop: it goes on.
set -eu
cd "$(dirname "$0")"
python -m nsa_serve.train run --corpus work/corpus/train --out work/run --minutes "${MINUTES:-8}" "$@"
