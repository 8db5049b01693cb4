#!/bin/sh
# seed FROM TO: copies checkpoints into a folder that is served, beside those that are there already.
#
# A file appears whole or not at all, and model.json last, so that no reader meets half a checkpoint. A checkpoint that
# is there in the same version is left alone.
set -eu

if [ $# -ne 2 ]; then
    echo "usage: seed FROM TO" >&2
    exit 2
fi

put() { # FILE FOLDER
    cp "$1" "$2/.seed.tmp"
    mv "$2/.seed.tmp" "$2/$(basename "$1")"
}

for about in "$1"/*/model.json; do
    [ -e "$about" ] || { echo "seed: no checkpoint in $1" >&2; exit 1; }
    from=$(dirname "$about")
    to=$2/$(basename "$from")
    if cmp -s "$about" "$to/model.json"; then
        continue
    fi
    mkdir -p "$to"
    for file in "$from"/*.safetensors; do
        put "$file" "$to"
    done
    put "$about" "$to"
    echo "$to"
done
