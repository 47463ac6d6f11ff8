#!/bin/sh
# Changes the password of a role while the server runs, in two steps, so that its clients can be changed in between:
#
#   passwd.sh add ROLE [OPTIONS]     reads a new password from standard input; from now on the old and the new one are valid
#   passwd.sh drop ROLE [OPTIONS]    from now on the newest one alone is valid; the role's connections are closed, so that
#                                    all its clients log in anew
#
# ROLE is producer, worker, monitor, operator or replica. OPTIONS go to valkey-cli (-p PORT, --tls --cacert FILE). Run it on
# the server's host, as its user, with the operator's password in REDISCLI_AUTH. What it did outlives a restart: start.sh
# reads `passwords` in the server's data folder, until the environment names a password that is not in it.
set -eu
umask 077
fail() {
    echo "passwd.sh: $1" >&2
    exit 2
}
[ $# -ge 2 ] || fail "write: passwd.sh add|drop ROLE [OPTIONS of valkey-cli]"
action=$1
role=$2
shift 2
case $action in add | drop) ;; *) fail "'$action' is neither add nor drop" ;; esac
case $role in
    producer | worker | monitor | operator | replica) ;;
    *) fail "'$role' is no role; write producer, worker, monitor, operator or replica" ;;
esac
[ -n "${REDISCLI_AUTH:-}" ] || fail "put the operator's password into REDISCLI_AUTH"
program=$(command -v valkey-cli || command -v redis-cli) || fail "there is no valkey-cli on PATH"

ask() {
    "$program" -e --user operator "$@" </dev/null
}
digest_of() {
    printf %s "$1" | sha256sum | cut -d ' ' -f 1
}

data=$(ask "$@" CONFIG GET dir | tail -n 1)
[ -w "$data" ] || fail "the server's data folder '$data' cannot be written here; run this on its host, as its user"
known=$data/passwords
users=$(ask "$@" ACL LIST)
now=$(echo "$users" | grep "^user $role " | grep -o '#[0-9a-f]\{64\}' | tr -d '#' || true)
[ -n "$now" ] || fail "the server has no user '$role'"

case $action in
    add)
        IFS= read -r password || [ -n "$password" ] || fail "give the new password on standard input"
        case $password in
            ????????????????*) ;;
            *) fail "a password must have 16 characters or more; make one: openssl rand -hex 24" ;;
        esac
        new=$(digest_of "$password")
        case $users in *"#$new"*) fail "a role has this password already; make another one: openssl rand -hex 24" ;; esac
        valid="$now $new"
        past=
        rule="#$new"
        ;;
    drop)
        [ "$(echo "$now" | wc -l)" -gt 1 ] || fail "$role has one password; add the new one first"
        valid=$(sed -n "s/^$role valid //p" "$known" | tail -n 1)
        [ -n "$valid" ] || fail "'$known' does not say which password of $role is the newest"
        [ "$role" != operator ] || [ "$(digest_of "$REDISCLI_AUTH")" = "$valid" ] ||
            fail "REDISCLI_AUTH holds the password that would be dropped; put the new one there"
        past=$(echo "$now" | grep -v "$valid")
        rule="resetpass #$valid"
        ;;
esac

{
    [ ! -f "$known" ] || grep -v "^$role valid " "$known" || true
    for each in $past; do echo "$role past $each"; done
    for each in $valid; do echo "$role valid $each"; done
} >"$known.next"
mv -- "$known.next" "$known"
# shellcheck disable=SC2086
ask "$@" ACL SETUSER "$role" $rule >/dev/null
ask "$@" ACL SAVE >/dev/null
[ "$action" = add ] || ask "$@" CLIENT KILL USER "$role" >/dev/null
