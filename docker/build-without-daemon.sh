#!/usr/bin/env bash
# Build an image of docker/Dockerfile where there is no container daemon and no registry: on a root
# file system made by debootstrap, with buildah, without namespaces of its own.
#
#   docker/build-without-daemon.sh [cpu|gpu] [FOLDER]
#
# FOLDER (default: build/images) takes buildah's storage and the image's root file system, which
# docker/try-image.sh then runs. Needs root and Debian's packages buildah and debootstrap.
# From the environment:
#   BASE_IMAGE     an image at hand to build on, in place of the debootstrap
#   SUITE          Debian's release (bookworm)
#   WHEELS         a folder of wheels that pip may take from, such as torch's for the CPU
#   TORCH          what pip installs as torch; the Dockerfile's own choice if unset
#   PIP_INDEX_URL  another index than PyPI
set -euo pipefail
cd "$(dirname "$0")/.."

target=${1:-cpu}
folder=$(realpath -m "${2:-build/images}")
suite=${SUITE:-bookworm}
image=localhost/nsa-serve:$target
mkdir -p "$folder"
# Everything of buildah's stays below the folder: vfs needs no kernel support, chroot no namespaces.
storage=(--storage-driver vfs --root "$folder/storage" --runroot "$folder/run")

base=${BASE_IMAGE:-}
if [[ -z $base ]]; then
  base=localhost/base-$suite
  if ! buildah "${storage[@]}" inspect --type image "$base" >/dev/null 2>&1; then
    [[ -e $folder/base/usr/bin/python3 ]] || debootstrap --variant=minbase \
      --include=python3,python3-venv,ca-certificates "$suite" "$folder/base"
    rm -f "$folder"/base/var/cache/apt/archives/*.deb "$folder"/base/var/lib/apt/lists/*_*
    container=$(buildah "${storage[@]}" from scratch)
    buildah "${storage[@]}" add --quiet "$container" "$folder/base" /
    buildah "${storage[@]}" config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
    buildah "${storage[@]}" commit --quiet --rm "$container" "$base"
  fi
fi

options=(
  --isolation chroot --layers=false --force-rm --format docker
  --file docker/Dockerfile --ignorefile docker/Dockerfile.dockerignore --target "$target"
  --build-arg "BASE_IMAGE=$base"
  --build-arg "VERSION=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' nsa_serve/__init__.py)"
  --build-arg "REVISION=$(git rev-parse HEAD 2>/dev/null || echo unknown)"
  --build-arg PYTHON_HEADERS=python3-dev
)
# Nothing of this machine's settings gets into the image: they are mounted while it is built.
mkdir -p "$folder/pip"
{
  echo "[global]"
  echo "cert = /etc/ssl/certs/ca-certificates.crt"
  [[ -z ${PIP_INDEX_URL:-} ]] || echo "index-url = $PIP_INDEX_URL"
  [[ -z ${WHEELS:-} ]] || echo "find-links = /wheels"
} >"$folder/pip/pip.conf"
options+=(--volume /etc/ssl/certs:/etc/ssl/certs:ro --volume "$folder/pip:/root/.config/pip:ro")
[[ -z ${WHEELS:-} ]] || options+=(--volume "$(realpath "$WHEELS"):/wheels:ro")
[[ -z ${TORCH:-} ]] || options+=(--build-arg "TORCH_${target^^}=$TORCH")

buildah "${storage[@]}" build "${options[@]}" --tag "$image" .

# The image's root file system and its settings, as a runtime would unpack them.
container=$(buildah "${storage[@]}" from "$image")
mounted=$(buildah "${storage[@]}" mount "$container")
rm -rf "$folder/$target"
mkdir -p "$folder/$target"
cp -a "$mounted" "$folder/$target/rootfs"
buildah "${storage[@]}" inspect --type image "$image" >"$folder/$target/image.json"
buildah "${storage[@]}" rm "$container" >/dev/null
echo "$image: $(du -sb --apparent-size "$folder/$target/rootfs" | cut -f1) bytes unpacked in $folder/$target/rootfs"
