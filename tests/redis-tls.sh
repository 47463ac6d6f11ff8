#!/bin/sh
# For tests: prints the folder of a `redis-server` that speaks TLS, which the wheel's Valkey does not. PATH's, or else that
# of Debian's (Ubuntu's) package, taken out of it into .venv: nothing is installed, and it needs no rights. Exit 1: not to
# be had here. Its libraries are in `lib` beside it.
set -eu
cd -- "$(dirname -- "$0")/.."
ours=$PWD/.venv/redis-tls
if [ ! -d "$ours" ]; then
    if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
        echo "no apt-get to fetch a redis-server with TLS with" >&2
        exit 1
    fi
    mkdir -p .venv
    work=$(mktemp -d "$PWD/.venv/redis-tls.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    cd "$work"
    mkdir -p lists/partial cache/archives/partial
    # Lists of its own: a machine's may be missing (as in a container's image) or old.
    apt="apt-get -qq -o Acquire::Retries=3 -o APT::Sandbox::User=root -o Dir::State::Lists=$PWD/lists -o Dir::Cache=$PWD/cache"
    $apt update >&2
    # What the server's package needs and a machine need not have.
    needs=$(apt-cache -o Dir::State::Lists="$PWD/lists" depends --important redis-tools |
        sed -n 's/^ *Depends: \(lib[^ <]*\)$/\1/p' | grep -v -e '^libc6' -e '^libgcc' -e '^libstdc' -e '^libssl' -e '^libsystemd')
    $apt download redis-server redis-tools $needs >&2
    for package in *.deb; do dpkg-deb -x "$package" unpacked; done
    mkdir made made/lib
    cp unpacked/usr/bin/redis-check-rdb made/redis-server
    find unpacked -name '*.so*' -exec cp -P {} made/lib/ ';'
    # Whole at once: two may do this at the same time.
    mv -T made "$ours" 2>/dev/null || [ -x "$ours/redis-server" ]
    cd - >/dev/null
fi
echo "$ours"
