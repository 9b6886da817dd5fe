#!/bin/sh
# Build the CPU images and run them on a mounted folder, as another user: what docker/README.md promises.
# Says why and ends with 0 where no Docker engine runs; with 1 there if RESQ_DOCKER=required.
#
#   DOCKER      the client (default: docker)
#   BASE        base image (default: the Dockerfile's; made from Debian's packages where it cannot be pulled)
#   CA          file of certificates for the build (default: SSL_CERT_FILE, else the system's)
#   PIP_CONF    a pip.conf for the build (default: none)
#   NETWORK     network of the build (default: host)
#   KEEP        folder to keep the results in (default: removed)
set -eu
cd "$(dirname "$0")/.."

give_up() {
    echo "docker-test: not run: $1" >&2
    [ "${RESQ_DOCKER:-}" = required ] && exit 1
    exit 0
}
step() { echo "docker-test: $*" >&2; }
fail() {
    echo "docker-test: FAILED: $*" >&2
    exit 1
}

docker=${DOCKER:-docker}
command -v "$docker" >/dev/null 2>&1 || give_up "there is no docker command"
reason=$("$docker" info 2>&1 >/dev/null) || give_up "no Docker engine answers: $(echo "$reason" | head -n 1)"

major=$("$docker" --version | sed 's/[^0-9]*\([0-9]*\).*/\1/')
if [ "$major" -ge 23 ] && ! "$docker" buildx version >/dev/null 2>&1; then
    give_up "$docker $major has no BuildKit: install docker-buildx, or name another client by DOCKER="
fi

dockerfile=docker/cpu.Dockerfile
default=$(sed -n 's/^ARG BASE=//p' $dockerfile)
base=${BASE:-$default}
network=${NETWORK:-host}
if ! "$docker" image inspect "$base" >/dev/null 2>&1 && ! "$docker" pull -q "$base" >/dev/null 2>&1; then
    command -v debootstrap >/dev/null 2>&1 || give_up "$base cannot be pulled, and there is no debootstrap"
    [ "$(id -u)" = 0 ] || give_up "$base cannot be pulled, and making it takes root"
    step "making $base from Debian's packages"
    docker/debian-base.sh "$base" >/dev/null
fi

ca=${CA:-${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}}
set -- --build-arg "BASE=$base" --network "$network" -f $dockerfile
[ -s "$ca" ] && set -- "$@" --secret "id=ca,src=$ca"
[ -n "${PIP_CONF:-}" ] && set -- "$@" --secret "id=pip,src=$PIP_CONF"
for target in runtime export; do
    step "building $target"
    DOCKER_BUILDKIT=1 "$docker" build "$@" --target $target -t "resq-deploy:$target-cpu" . ||
        fail "building $target"
done

data=${KEEP:-$(mktemp -d)}
[ -n "${KEEP:-}" ] || trap 'rm -rf "$data"' EXIT
caller=$(id -u):$(id -g)
if [ "$(id -u)" = 0 ]; then
    caller=12345:23456 # a user that the image does not know
    chown $caller "$data"
fi
run() {
    image=$1
    shift
    "$docker" run --rm --network none --user "$caller" -v "$data:/data" "resq-deploy:$image-cpu" "$@"
}

step "hardening a small network"
run export resq-harden resnet8 --data digits --stages none --epochs 1 -o /data/model.pt --quiet
step "exporting it with an engine"
run export resq-export /data/model.pt --target tensorrt-rtx --no-adjust --attack fgsm --calib-samples 128 --quiet
step "adding an engine in the runtime image, as on a device"
run runtime resq-export /data/model.resq --target tensorrt-rtx --sm 86 --force -o /data/device.resq --quiet
run runtime resq verify /data/device.resq
step "validating the bundle"
run runtime resq-validate /data/model.resq --trials 10 --samples 32 --ber 1e-3 --quiet -o /data/evidence

for file in model.resq/manifest.json model.resq/engines device.resq/engines/tensorrt-rtx.plan evidence; do
    [ -e "$data/$file" ] || fail "$file was not written"
done
strangers=$(find "$data" ! -user "${caller%:*}" | head -n 3)
[ -z "$strangers" ] || fail "files of another user: $strangers"
if run runtime python -c 'import torch' 2>/dev/null; then fail "the runtime image has torch"; fi
[ "$(run runtime id -u)" != 0 ] || fail "the image runs as root"
[ "$("$docker" run --rm --network none resq-deploy:runtime-cpu id -u)" = 1000 ] || fail "the default user is not 1000"
step "passed"
