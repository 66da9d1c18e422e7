#!/usr/bin/env bash
# Process 1 of a host: its own view of the files, then an SSH server, until the harness closes our standard input.
#
#   host.sh FOLDER SHARED VISIBLE...
#
# FOLDER holds the host's own etc/, home/ and tmp/; SHARED is the folder that all hosts write to; VISIBLE are folders that
# all hosts read (environment, repository). Everything else is read-only here: nothing can be left outside the test's folder.
set -euo pipefail
folder=$1 shared=$2
shift 2
home=$(getent passwd root | cut -d: -f6)

# What the coming mounts would hide is held ready under /run. A bind of a read-only mount is read-only, too.
held=0
hold() {
    mkdir -p "/run/held/$held"
    mount --bind "$1" "/run/held/$held"
    held=$((held + 1))
}
mount -t tmpfs -o size=16m tmpfs /run
hold "$folder"
hold "$shared"
while read -r _ target _; do
    case $target in /dev | /dev/* | /proc | /proc/* | /sys | /sys/* | /run | /run/*) ;;
    *) mount -o remount,bind,ro "$target" || echo "stays writable: $target" >&2 ;; esac
done < <(cat /proc/self/mounts)
for visible in "$@"; do hold "$visible"; done

mount -t tmpfs tmpfs /dev/shm
own=/run/held/0
mount --bind "$own/tmp" /tmp
mount --bind "$own/home" "$home"
for file in "$own"/etc/*; do
    target=$(readlink -m "/etc/${file##*/}")
    [[ -e $target ]] || { mkdir -p "${target%/*}" && touch "$target"; }
    mount --bind "$file" "$target"
done
held=1
for place in "$shared" "$@"; do
    mkdir -p "$place"
    mount --move "/run/held/$held" "$place"
    held=$((held + 1))
done

echo ready
read -r _ # the network is there
mkdir /run/sshd
/usr/sbin/sshd -D -f "$own/sshd_config" -E "$own/sshd.log" &
cat >/dev/null
