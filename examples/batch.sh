#!/usr/bin/env bash
# Answers a file of requests without a server. Arguments are those of `nsa-serve run-batch`: a model, flags.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -r "$folder"' EXIT
for number in 1 2 3; do
  echo '{"custom_id": "'"$number"'", "method": "POST", "url": "/v1/completions",
         "body": {"prompt": "Letter '"$number"':", "max_tokens": 8}}' | tr -d '\n'
  echo
done > "$folder/requests.jsonl"
nsa-serve run-batch "$@" -i "$folder/requests.jsonl" -o "$folder/answers.jsonl"
cat "$folder/answers.jsonl"
