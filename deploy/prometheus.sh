#!/bin/sh
# For ./check and the tests: prints the folder that has `prometheus` and `promtool`. PATH's, or else those of Debian's
# (Ubuntu's) package, taken out of it into .venv: nothing is installed, and it needs no rights. Exit 1: not to be had here.
set -eu
cd -- "$(dirname -- "$0")/.."
if found=$(command -v promtool) && command -v prometheus >/dev/null; then
    dirname -- "$found"
    exit
fi
ours=$PWD/.venv/prometheus
if [ ! -d "$ours" ]; then
    if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
        echo "no promtool on PATH, and no apt-get to fetch it with; install Prometheus to have its rules checked" >&2
        exit 1
    fi
    mkdir -p .venv
    work=$(mktemp -d "$PWD/.venv/prometheus.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    cd "$work"
    mkdir -p lists/partial cache/archives/partial
    # Lists of its own: a machine's may be missing (as in a container's image) or old.
    apt="apt-get -qq -o Acquire::Retries=3 -o APT::Sandbox::User=root -o Dir::State::Lists=$PWD/lists -o Dir::Cache=$PWD/cache"
    $apt update >&2
    $apt download prometheus >&2
    dpkg-deb -x prometheus_*.deb unpacked
    # Whole at once: two may do this at the same time.
    mv -T unpacked/usr/bin "$ours" 2>/dev/null || [ -x "$ours/promtool" ]
    cd - >/dev/null
fi
echo "$ours"
