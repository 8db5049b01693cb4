#!/usr/bin/env bash
# Builds the images and tries the stack: two workers, a picture, a score; then a worker container is killed midway through
# a long request, whose answer must be the bytes of a quiet run. Takes everything down again.
#
# Needs docker with compose, and curl. Takes a few minutes, most of them for the first build.
#   docker/test.sh [--no-build]        TORCH_INDEX, PYTHON_IMAGE, REDIS_IMAGE as in .env.example; API_PORT (default: 18000)
#   FIRST_PICTURE_SECONDS (30) and API_BYTES (250000000) are what is allowed, for a busy machine or another base;
#   LONG_STEPS (1000) are those of the request that is disturbed
set -euo pipefail
cd "$(dirname "$0")/.."

export COMPOSE_PROJECT_NAME=drawwell-test API_PORT=${API_PORT:-18000} REDIS_PASSWORD=${REDIS_PASSWORD:-drawwell}
url=http://127.0.0.1:$API_PORT
work=$(mktemp -d)
built=${1:-}

say() { printf '%6.1f s  %s\n' "$(since "$begin")" "$*"; }
now() { date +%s.%N; }
since() { awk -v a="$1" -v b="$(now)" 'BEGIN { print b - a }'; }
below() { awk -v a="$1" -v b="$2" 'BEGIN { exit !(a < b) }'; }
fail() { say "FAILED: $*"; docker compose logs --no-color --tail 30 || true; exit 1; }
redis() { docker compose exec -T redis redis-cli --no-auth-warning "$@" | tr -d '\r'; }
down() { docker compose down --volumes --timeout 5 >"$work/down.log" 2>&1 || cat "$work/down.log"; rm -rf "$work"; }
begin=$(now)
trap down EXIT

# Each of these asks the API and fails on anything but a 2xx.
ask() { curl --silent --show-error --fail-with-body --max-time 280 -H 'Content-Type: application/json' "$@"; }
picture() { ask "$url/generate" -H 'Accept: image/png' -d "$1"; }

if [ "$built" != --no-build ]; then
    docker compose build --quiet
    say "built"
fi

# ------------------------------------------------------------------------------------------------------- the images

api=${API_IMAGE:-drawwell-api:0.1.0} worker=${WORKER_IMAGE:-drawwell-worker:0.1.0}
for name in "$api" "$worker"; do
    size=$(docker image inspect --format '{{.Size}}' "$name")
    say "$name: $((size / 1000000)) MB"
done
size=$(docker image inspect --format '{{.Size}}' "$api")
if base=$(docker image inspect --format '{{.Size}}' "${PYTHON_IMAGE:-python:3.11-slim-bookworm}" 2>/dev/null); then
    say "$api adds $(((size - base) / 1000000)) MB to its base"
fi
below "$size" "${API_BYTES:-250000000}" || fail "the API's image has $size bytes"

inside() { docker run --rm --read-only --tmpfs /tmp --cap-drop ALL --network none --entrypoint "$2" "$1" "${@:3}"; }
for name in "$api" "$worker"; do
    [ "$(inside "$name" id -u)" != 0 ] || fail "$name runs as root"
    for tool in cc gcc make; do
        if inside "$name" sh -c "command -v $tool" >/dev/null; then fail "$name has $tool"; fi
    done
    inside "$name" test -s /usr/share/drawwell/sbom.cdx.json || fail "$name has no SBOM"
done
if inside "$api" python -c 'import torch' 2>/dev/null; then fail "$api has torch"; fi
inside "$worker" python -c 'from models import _native; assert _native.library("pixelcnn")' ||
    fail "$worker does without its C"
say "no root, no compiler, no torch in the API; the workers' C is there"

# ----------------------------------------------------------------------------------------------- up, and a picture

limit=${FIRST_PICTURE_SECONDS:-30} # of a machine with nothing else to do
started=$(now)
docker compose up --detach --no-build --scale worker=2 >"$work/up.log" 2>&1 || { cat "$work/up.log"; fail "up"; }
say "up"
until picture '{"model": "fashion-mnist-vae", "seed": 7, "label": "Dress"}' >"$work/first.png" 2>/dev/null; do
    below "$(since "$started")" $((4 * limit)) || fail "no picture in $((4 * limit)) s: $(cat "$work/first.png")"
    sleep 0.2
done
took=$(since "$started")
say "the first picture, $took s after the images were there"
below "$took" "$limit" || fail "the first picture took $took s"
head -c 8 "$work/first.png" | cmp -s - <(printf '\211PNG\r\n\032\n') || fail "that is no PNG"

image_b64=$(base64 <"$work/first.png" | tr -d '\n')
ask "$url/score" -d "{\"model\": \"fashion-mnist-pixelcnn\", \"images\": [\"$image_b64\"]}" >"$work/score.json" ||
    fail "score: $(cat "$work/score.json")"
grep -q '"bits_per_dim":[0-9.]' "$work/score.json" || fail "score: $(cat "$work/score.json")"
say "scored: $(grep -o '"bits_per_dim":[0-9.]*' "$work/score.json") of a drawn dress, by the PixelCNN"

until [ "$(docker compose ps --format '{{.Service}} {{.Health}}' | grep -c '^worker healthy')" = 2 ]; do
    below "$(since "$started")" $((6 * limit)) || fail "the workers do not become healthy"
    sleep 1
done
tried=$(docker compose logs --no-color --no-log-prefix worker |
    sed -n 's/.*: read in \([0-9.]*\) s, warmed up in \([0-9.]*\) s$/\1 \2/p' |
    awk '{ n++; s += $1 + $2 } END { printf "%d models in %.1f s", n, s }')
say "both workers are healthy; together they tried $tried"

# ------------------------------------------------------------------------------------------- a worker dies midway

long='{"model": "fashion-mnist-ddpm", "n": 4, "seed": 11, "steps": '${LONG_STEPS:-1000}', "solver": "ddim"}'
quiet=$(now)
picture "$long" >"$work/quiet.png" || fail "$(cat "$work/quiet.png")"
quiet=$(since "$quiet")
say "a quiet run of the long request: $quiet s"

disturbed=$(now)
picture "$long" >"$work/disturbed.png" 2>"$work/disturbed.err" &
asked=$!
holder() { # the container that runs a job now: its host name is the beginning of its id
    redis eval "for _, key in ipairs(redis.call('KEYS', '{drawwell}:job:*')) do
        if redis.call('HGET', key, 'state') == 'running' then return redis.call('HGET', key, 'worker') end
    end" 0 | cut -d- -f1
}
victim=
while [ -z "$victim" ]; do
    below "$(since "$disturbed")" "$limit" || fail "nobody takes the long request"
    victim=$(holder)
done
sleep "$(awk -v s="$quiet" 'BEGIN { print s / 4 }')"
kill -0 $asked 2>/dev/null || fail "the long request was too short to be disturbed"
docker kill "$victim" >/dev/null
say "killed the worker $victim in the middle of it"
wait $asked || fail "the disturbed request: $(cat "$work/disturbed.err" "$work/disturbed.png")"
say "it was answered all the same, after $(since "$disturbed") s"
cmp "$work/quiet.png" "$work/disturbed.png" || fail "other bytes than those of the quiet run"
[ "$(docker inspect --format '{{.State.Running}}' "$victim")" = false ] || fail "$victim was not killed"
say "its bytes are those of the quiet run"

picture '{"model": "fashion-mnist-vae", "seed": 7, "label": "Dress"}' | cmp - "$work/first.png" || fail "another first picture"
say "passed"
