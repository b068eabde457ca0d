#!/bin/sh
# Grows the model in MINUTES (default 12) of one GPU. Run again after a stop: it goes on.
# Before that, once, the dense base answers 12,000 ordinary prompts.
set -eu
cd "$(dirname "$0")"
[ -e work/dialogues.npz ] || python -m nsa_serve.train dialogues --corpus work/corpus/train --out work/dialogues.npz
python -m nsa_serve.train run --corpus work/corpus/train --dialogues work/dialogues.npz \
  --out work/run --minutes "${MINUTES:-12}" "$@"
