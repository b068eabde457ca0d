#!/bin/sh
# Goes on from an adapter (ADAPTER, default: the one of 3_train.sh) with its longest sequences, at a lower rate.
set -eu
cd "$(dirname "$0")"
[ -e work/dialogues.npz ] || python -m nsa_serve.train dialogues --corpus work/corpus/train --out work/dialogues.npz
python -m nsa_serve.train run --adapter "${ADAPTER:-work/run/adapter}" --from-progress 0.68 --rate 5e-4 --seed 1 \
  --corpus work/corpus/train --dialogues work/dialogues.npz --out work/more --minutes "${MINUTES:-16}" "$@"
