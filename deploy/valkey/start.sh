#!/bin/sh
# Starts Valkey or Redis with one user per role: start.sh PROGRAM CONFIG [OPTIONS]
#
# Passwords come from the environment: OVERPAINT_REDIS_{PRODUCER,WORKER,MONITOR,OPERATOR}_PASSWORD. One that is
# missing, short, or like another's is refused. Only their SHA-256 is written, to $OVERPAINT_ACL_FILE (default
# /run/valkey/users.acl), anew at each start. They are kept from the server's own environment.
#
# The user `default` is off and has no password, so nobody can log in as it. It has all rights because the server
# replays its append-only file as this user: with fewer rights the server would drop what the file holds.
set -eu
here=$(dirname -- "$0")
acl=${OVERPAINT_ACL_FILE:-/run/valkey/users.acl}
umask 077
cp -- "$here/users.acl.template" "$acl"
seen=
for role in PRODUCER WORKER MONITOR OPERATOR; do
    eval "password=\${OVERPAINT_REDIS_${role}_PASSWORD:-}"
    case $password in
        ????????????????*) ;;
        *)
            echo "OVERPAINT_REDIS_${role}_PASSWORD must have 16 characters or more; make one: openssl rand -hex 24" >&2
            exit 2
            ;;
    esac
    digest=$(printf %s "$password" | sha256sum)
    digest=${digest%% *}
    case $seen in
        *"$digest"*)
            echo "OVERPAINT_REDIS_${role}_PASSWORD is another role's; give each its own" >&2
            exit 2
            ;;
    esac
    seen="$seen $digest"
    sed "s/@$role@/$digest/" "$acl" >"$acl.next"
    mv -- "$acl.next" "$acl"
    unset "OVERPAINT_REDIS_${role}_PASSWORD"
done
unset password
exec "$@" --aclfile "$acl"
