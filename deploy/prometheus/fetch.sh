#!/usr/bin/env bash
# Put `prometheus` and `promtool` into a folder, out of Debian's package without installing it: that would start a
# service. Exits with 1, in one line, where they are not to be had.
#
# Usage: deploy/prometheus/fetch.sh FOLDER
set -euo pipefail

folder=$(cd "${1:?usage: fetch.sh FOLDER}" && pwd)
if [[ -x $folder/prometheus && -x $folder/promtool ]]; then exit 0; fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
chmod 755 "$scratch"  # apt downloads as a user of its own
cd "$scratch"
if { apt-get download prometheus || { apt-get update && apt-get download prometheus; }; } >log 2>&1 &&
  dpkg-deb -x prometheus_*.deb . >>log 2>&1; then
  cp usr/bin/prometheus usr/bin/promtool "$folder/"
else
  echo "prometheus and promtool are not to be had here ($(tail -n 1 log))" >&2
  exit 1
fi
