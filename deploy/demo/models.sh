#!/bin/sh
# Fills an empty models folder with the demo's tiny weights: models.sh [FOLDER]. One that has a models.toml is left alone.
set -eu
folder=${1:-/models}
if [ -e "$folder/models.toml" ]; then
    echo "$folder has a models.toml"
    exit
fi
python -m overpaint_worker.engine.tiny_weights "$folder/models/tiny"
# Last, and whole: who finds it finds the weights too.
python -c 'from overpaint_producer.local import TINY_REGISTRY; print(TINY_REGISTRY, end="")' >"$folder/models.toml.partial"
mv "$folder/models.toml.partial" "$folder/models.toml"
echo "$folder now has the model tiny"
