#!/bin/sh
# Writes deploy/secrets: passwords of the catalogue at random, and one key of a client. Files that are there are kept.
# The folder is closed to other users of this machine. A container reads its own files through a mount, as another user than
# yours; libpq takes no password from a file that others may read, so `pgpass` belongs to the server's user, which needs root.
set -eu
cd "$(dirname "$0")"
umask 077
mkdir -p secrets
random() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }
[ -e secrets/postgres_password ] || random >secrets/postgres_password
[ -e secrets/role_password ] || random >secrets/role_password
[ -e secrets/pgpass ] || printf '*:*:loraweave:loraweave:%s\n' "$(cat secrets/role_password)" >secrets/pgpass
[ -e secrets/keys ] || printf '{"client": {"key": "%s"}}\n' "$(random)" >secrets/keys
chmod 444 secrets/postgres_password secrets/role_password secrets/keys
chmod 400 secrets/pgpass
user=10001
[ "$(id -u)" != 0 ] || { chown "$user" secrets/pgpass && exit 0; }
sudo chown "$user" secrets/pgpass || { echo "run as root: chown $user deploy/secrets/pgpass" >&2; exit 1; }
