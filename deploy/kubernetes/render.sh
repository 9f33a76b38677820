#!/usr/bin/env bash
# Renders the manifests of this folder again; tests/test_kubernetes.py holds that they are what these commands print.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

keel deploy kubernetes --config configs/quickstart.yaml --output deploy/kubernetes/rayjob-cpu.yaml "run.directory=/mnt/keel/runs/{name}"
keel deploy kubernetes --config configs/quickstart.yaml --output deploy/kubernetes/raycluster-cpu.yaml --kind cluster "run.directory=/mnt/keel/runs/{name}"
keel deploy kubernetes --config deploy/kubernetes/gpu.yaml --output deploy/kubernetes/rayjob-gpu.yaml --storage-size 500Gi --per-pod learners=2 --memory learners=48Gi
keel deploy kubernetes --config deploy/kubernetes/gpu.yaml --output deploy/kubernetes/raycluster-gpu.yaml --kind cluster --memory learners=48Gi
