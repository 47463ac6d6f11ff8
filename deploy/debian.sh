#!/bin/sh
# Takes Debian's (Ubuntu's) packages apart into .venv/NAME, once, and prints this folder: nothing is installed, and it needs no
# rights. Exit 1: not to be had here.
#   debian.sh NAME PACKAGE...              the packages
#   debian.sh --libraries NAME PACKAGE...  and the libraries that the last of them needs and a machine need not have
set -eu
cd -- "$(dirname -- "$0")/.."
libraries=
if [ "$1" = --libraries ]; then
    libraries=yes
    shift
fi
ours=$PWD/.venv/$1
shift
if [ ! -d "$ours" ]; then
    if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
        echo "there is no apt-get here, which could fetch $*" >&2
        exit 1
    fi
    mkdir -p .venv
    work=$(mktemp -d "$ours.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    cd "$work"
    mkdir -p lists/partial cache/archives/partial
    # Lists of its own: a machine's may be missing (as in a container's image) or old.
    own="-o Dir::State::Lists=$PWD/lists -o Dir::Cache=$PWD/cache"
    apt="apt-get -qq -o Acquire::Retries=3 -o APT::Sandbox::User=root $own"
    $apt update >&2
    if [ -n "$libraries" ]; then
        for last; do :; done
        set -- "$@" $(apt-cache $own depends --important "$last" | sed -n 's/^ *Depends: \(lib[^ <]*\)$/\1/p' |
            grep -v -e '^libc6' -e '^libgcc' -e '^libstdc' -e '^libssl' -e '^libsystemd')
    fi
    $apt download "$@" >&2
    for package in *.deb; do dpkg-deb -x "$package" unpacked; done
    # Whole at once: two may do this at the same time.
    mv -T unpacked "$ours" 2>/dev/null || [ -d "$ours/usr" ]
    cd - >/dev/null
fi
echo "$ours"
