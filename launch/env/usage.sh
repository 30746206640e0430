#!/usr/bin/env bash
# Sourced first by the scripts that people call, so that --help asks for no cluster, makes no environment and starts
# nothing: it prints the comment at the script's top.
usage() { # of this file
    awk 'NR > 1 { if (!/^#/) exit; if (!/^#SBATCH/) { sub(/^# ?/, ""); print } }' "$1"
}
case ${1:-} in
-h | --help)
    usage "$0"
    exit
    ;;
esac
