#!/bin/sh
# pip of the image's environment, with the host's certificates and settings where the build was given them.
set -eu
if [ -s /run/secrets/ca ]; then
    export PIP_CERT=/run/secrets/ca SSL_CERT_FILE=/run/secrets/ca REQUESTS_CA_BUNDLE=/run/secrets/ca
fi
if [ -s /run/secrets/pip ]; then
    export PIP_CONFIG_FILE=/run/secrets/pip
fi
# NVIDIA's images pin packages of their own for every pip that runs in them.
unset PIP_CONSTRAINT
export PIP_CACHE_DIR=/var/cache/pip PIP_DISABLE_PIP_VERSION_CHECK=1
exec /opt/resq/bin/pip "$@"
