#!/usr/bin/env bash
# The routes from a shell. OPENAI_BASE_URL names the server, http://127.0.0.1:8000/v1 if it is not set.
set -euo pipefail
base="${OPENAI_BASE_URL:-http://127.0.0.1:8000/v1}"
json='Content-Type: application/json'

curl -sSf "$base/models"; echo
curl -sSf "$base/completions" -H "$json" -d '{"prompt": "Once upon a time", "max_tokens": 8}'; echo
curl -sSfN "$base/chat/completions" -H "$json" -d '{
  "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 8, "stream": true}'
curl -sSf "${base%/v1}/tokenize" -H "$json" -d '{"prompt": "How many tokens?"}'; echo
curl -sSf "${base%/v1}/ready"; echo
