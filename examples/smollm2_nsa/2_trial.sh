#!/bin/sh
# Before a long run: do gradients flow, does the loss fall, tokens/s at 8k and 64k, peak memory.
set -eu
cd "$(dirname "$0")"
python -m nsa_serve.train trial --corpus work/corpus/train --out work/trial.json "$@"
