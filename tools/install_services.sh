#!/usr/bin/env bash
# Install what the tests of the launchers run against: Slurm and munge from Debian's packages, submitit and Ray from PyPI
# into the virtual environment (VENV=.venv). Starts nothing: the tests do. Quick where everything is there already.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}

install_slurm() {
    local missing=() program policy=/usr/sbin/policy-rc.d
    for program in munged slurmctld slurmd sbatch; do
        PATH="$PATH:/usr/sbin:/sbin" command -v "$program" >/dev/null || missing+=("$program")
    done
    if [ ${#missing[@]} -eq 0 ]; then
        return
    elif ! command -v apt-get >/dev/null; then
        echo "Slurm is not installed (no ${missing[*]}): there is no apt-get here, install it by other means"
        return
    elif [ "$(id -u)" -ne 0 ]; then
        echo "Slurm is not installed (no ${missing[*]}): run $0 as root"
        return
    fi
    # Debian's packages start their daemons as they are installed, unless this says no.
    if [ ! -e "$policy" ]; then
        trap "rm -f $policy" EXIT
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod +x "$policy"
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -qq --no-install-recommends munge slurmctld slurmd slurm-client >/dev/null
    echo "installed Slurm"
}

install_packages() {
    local python=$venv/bin/python
    if [ ! -x "$python" ]; then
        echo "submitit and Ray are not installed: there is no $venv, run 'make venv' first"
    elif ! "$python" -c 'from importlib.util import find_spec as find; exit(not (find("submitit") and find("ray")))'; then
        "$python" -m pip install --quiet -e '.[slurm,ray]'
        echo "installed submitit and Ray"
    fi
}

install_slurm
install_packages
