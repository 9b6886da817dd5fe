#!/bin/sh
# Make a base image for cpu.Dockerfile from Debian's packages, where none can be pulled: debian-base.sh TAG
# Needs root and debootstrap.
set -eu
tag=${1:?usage: debian-base.sh TAG}
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
debootstrap --variant=minbase --include=ca-certificates bookworm "$root" >&2
tar -C "$root" -c . | docker import - "$tag"
