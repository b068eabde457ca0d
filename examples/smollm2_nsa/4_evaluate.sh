#!/bin/sh
# The adapter on words, wordings and texts that training never saw.
set -eu
cd "$(dirname "$0")"
nsa-serve eval needle work/run/adapter --output work/needle.json
nsa-serve eval ppl work/run/adapter --output work/ppl.json
nsa-serve eval tasks work/run/adapter --output work/tasks.json
nsa-serve eval chat work/run/adapter --output work/chat.json
