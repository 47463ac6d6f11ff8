#!/bin/sh
# For ./check and the tests: prints the folder that has `prometheus` and `promtool`. PATH's, or else those of Debian's
# package. Exit 1: not to be had here.
set -eu
if found=$(command -v promtool) && command -v prometheus >/dev/null; then
    dirname -- "$found"
    exit
fi
if ! folder=$("$(dirname -- "$0")/debian.sh" prometheus prometheus); then
    echo "no promtool on PATH; install Prometheus to have its rules checked" >&2
    exit 1
fi
echo "$folder/usr/bin"
