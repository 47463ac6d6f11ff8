#!/bin/sh
# Starts Valkey, or Redis 7 and later, with one user per role: start.sh PROGRAM CONFIG [OPTIONS]
#
# From the environment:
#   OVERPAINT_REDIS_{PRODUCER,WORKER,MONITOR,OPERATOR}_PASSWORD   needed. One that is missing, short, or like another's
#                                   is refused. Only their SHA-256 is written. They are kept from the server itself.
#   OVERPAINT_REDIS_REPLICA_PASSWORD   makes the user `replica`, for replicas of this server. Without: there is none.
#   OVERPAINT_REDIS_PRIMARY=HOST:PORT  this server is a replica of that one; needs OVERPAINT_REDIS_REPLICA_PASSWORD.
#   OVERPAINT_REDIS_TLS_CERT, ..._TLS_KEY, ..._TLS_CA   files in PEM format. With them the server speaks TLS alone, at
#   OVERPAINT_REDIS_TLS_PORT        (default 6379); a replica also reaches its primary by TLS.
#   OVERPAINT_ACL_FILE              where the users are written, anew at each start (default /run/valkey/users.acl).
#   OVERPAINT_CGROUPS               where control groups are mounted (default /sys/fs/cgroup): the server is not started if
#                                   `maxmemory` is more than two thirds of their memory limit.
# `passwd.sh` changes a role's password while the server runs; what it did is kept in the data folder (--dir), in
# the file `passwords`, until the environment names a password that it does not know.
#
# The user `default` is off and has no password, so nobody can log in as it. It has all rights because the server
# replays its append-only file as this user: with fewer rights the server would drop what the file holds.
set -eu
here=$(dirname -- "$0")
acl=${OVERPAINT_ACL_FILE:-/run/valkey/users.acl}
umask 077

fail() {
    echo "$1" >&2
    exit 2
}

# The last one among the options counts.
data=.
maxmemory=$(sed -n 's/^ *maxmemory  *//p' "${2:-/dev/null}" | tail -n 1)
previous=
for word in "$@"; do
    case $previous in
        --dir) data=$word ;;
        --maxmemory) maxmemory=$word ;;
    esac
    previous=$word
done

version=$("$1" --version | sed -n 's/.* v=\([0-9]*\.[0-9]*\).*/\1/p')
case $version in
    [0-6].*) fail "$1 is version $version, which lacks the rights that the users need; take Valkey 8, or Redis 7 or later" ;;
esac

cp -- "$here/users.acl.template" "$acl"
# Redis 7.0 does not know this command.
[ "$version" != 7.0 ] || sed -i 's/ +client|setinfo//' "$acl"

# Passwords of a role that passwd.sh made valid, if it knows the one in the environment.
changed() {
    [ -f "$data/passwords" ] && grep -q "^$1 [a-z]* $2\$" "$data/passwords" || return 0
    sed -n "s/^$1 valid //p" "$data/passwords"
}

seen=
user() {
    role=$1
    name=$(echo "$role" | tr '[:upper:]' '[:lower:]')
    digest=$(printf %s "$2" | sha256sum)
    digest=${digest%% *}
    digests=$(changed "$name" "$digest")
    for each in ${digests:=$digest}; do
        case $seen in *"$each"*) fail "OVERPAINT_REDIS_${role}_PASSWORD is another role's; give each its own" ;; esac
        seen="$seen $each"
    done
    rights=$(printf '#%s ' $digests)
    sed -i "s/@$role@/${rights% }/" "$acl"
}

for role in PRODUCER WORKER MONITOR OPERATOR REPLICA; do
    eval "password=\${OVERPAINT_REDIS_${role}_PASSWORD:-}"
    case $role:$password in
        REPLICA:) sed -i '/@REPLICA@/d' "$acl" ;;
        *:????????????????*) user "$role" "$password" ;;
        *) fail "OVERPAINT_REDIS_${role}_PASSWORD must have 16 characters or more; make one: openssl rand -hex 24" ;;
    esac
done

if [ -n "${OVERPAINT_REDIS_PRIMARY:-}" ]; then
    [ -n "$password" ] || fail "OVERPAINT_REDIS_PRIMARY needs OVERPAINT_REDIS_REPLICA_PASSWORD, the primary's"
    case $OVERPAINT_REDIS_PRIMARY in
        ?*:[0-9]*) ;;
        *) fail "OVERPAINT_REDIS_PRIMARY is $OVERPAINT_REDIS_PRIMARY; write HOST:PORT" ;;
    esac
    # In a file that only we can read: a command line is everybody's to see.
    printf 'replicaof %s %s\nmasteruser replica\nmasterauth "%s"\n' "${OVERPAINT_REDIS_PRIMARY%:*}" \
        "${OVERPAINT_REDIS_PRIMARY##*:}" "$(printf %s "$password" | sed 's/[\\"]/\\&/g')" >"$acl.replica"
    set -- "$@" --include "$acl.replica"
fi

if [ -n "${OVERPAINT_REDIS_TLS_CERT:-}${OVERPAINT_REDIS_TLS_KEY:-}${OVERPAINT_REDIS_TLS_CA:-}" ]; then
    for part in CERT KEY CA; do
        eval "file=\${OVERPAINT_REDIS_TLS_$part:-}"
        [ -r "$file" ] || fail "OVERPAINT_REDIS_TLS_$part must name a file that this user can read; it is '$file'"
    done
    # Clients are known by their passwords, so they need no certificate.
    set -- "$@" --port 0 --tls-port "${OVERPAINT_REDIS_TLS_PORT:-6379}" --tls-cert-file "$OVERPAINT_REDIS_TLS_CERT" \
        --tls-key-file "$OVERPAINT_REDIS_TLS_KEY" --tls-ca-cert-file "$OVERPAINT_REDIS_TLS_CA" --tls-auth-clients no \
        --tls-replication yes --tls-protocols "TLSv1.2 TLSv1.3"
fi

# A size as Valkey writes it, in bytes; nothing if it is none.
bytes() {
    number=$(printf %s "$1" | sed -n 's/^0*\([0-9][0-9]*\)[A-Za-z]*$/\1/p')
    case $number$(printf %s "$1" | tr -d '[:digit:]' | tr '[:upper:]' '[:lower:]') in
        "$number" | "$number"b) unit=1 ;;
        "$number"k) unit=1000 ;;
        "$number"kb) unit=1024 ;;
        "$number"m) unit=1000000 ;;
        "$number"mb) unit=1048576 ;;
        "$number"g) unit=1000000000 ;;
        "$number"gb) unit=1073741824 ;;
        *) return 0 ;;
    esac
    [ -z "$number" ] || echo $((number * unit))
}

# The memory limits of our control groups and of those above them, in bytes. A container sees its own at the top.
limits() {
    { cat /proc/self/cgroup 2>/dev/null || true; echo 0::/; echo 1:memory:/; } | while IFS=: read -r _ kind path; do
        case ,$kind, in
            ,,) file=memory.max ;;
            *,memory,*) path=/memory$path file=memory.limit_in_bytes ;;
            *) continue ;;
        esac
        while cat "${OVERPAINT_CGROUPS:-/sys/fs/cgroup}$path/$file" 2>/dev/null || true; [ -n "$path" ]; do
            path=${path%/*}
        done
    done
}

limit=$(limits | grep '^[0-9][0-9]*$' | sort -n | head -n 1)
filled=$(bytes "${maxmemory:-0}")
# While the append-only file is rewritten, what is changed meanwhile is there twice. Version 1 writes no limit as 2^63.
if [ "${limit:-9000000000000000000}" -lt 9000000000000000000 ] && [ -n "$filled" ]; then
    [ "$filled" -gt 0 ] || fail "memory is limited to $limit bytes here and maxmemory is not set; start with --maxmemory \
$((limit / 2)), so that a full server refuses jobs and is not ended"
    [ $((filled + filled / 2)) -le "$limit" ] || fail "maxmemory is $filled bytes, and memory is limited to $limit bytes here. \
Make the limit twice maxmemory, or 1.5 times at least. maxmemory: --maxmemory, under Compose OVERPAINT_REDIS_MEMORY. The limit: \
under Compose OVERPAINT_REDIS_MEMORY_LIMIT, in Kubernetes resources.limits.memory, with systemd MemoryMax."
fi

unset password OVERPAINT_REDIS_PRODUCER_PASSWORD OVERPAINT_REDIS_WORKER_PASSWORD OVERPAINT_REDIS_MONITOR_PASSWORD \
    OVERPAINT_REDIS_OPERATOR_PASSWORD OVERPAINT_REDIS_REPLICA_PASSWORD
exec "$@" --aclfile "$acl"
