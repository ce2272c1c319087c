#!/usr/bin/env bash
# Installs sshd and iproute2 where they are missing; the cluster tests build hosts with them (tests/hosts.py). Needs root on Debian or Ubuntu.
# .ci/run calls it; nothing else needs it. No ssh server is started, and none will be until /etc/ssh/sshd_not_to_be_run is removed.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
if [[ -n $(command -v sshd) && -n $(command -v ssh) && -n $(command -v ip) ]]; then exit 0; fi
if ((EUID != 0)) || [[ -z $(command -v apt-get) ]]; then
    echo "setup_hosts.sh: the tests of clusters need sshd, ssh and ip, and root: apt install openssh-server openssh-client iproute2" >&2
    exit 0 # without root there are no hosts, and these tests say so
fi
echo "setup_hosts.sh: installing openssh-server and iproute2"
# Debian's and Ubuntu's services obey this file: the package must not open a port on this machine.
if [[ -z $(command -v sshd) ]]; then mkdir -p /etc/ssh && touch /etc/ssh/sshd_not_to_be_run; fi
log=$(mktemp)
install="apt-get install -y --no-install-recommends openssh-server openssh-client iproute2"
if ! { $install || { apt-get update && $install; }; } >"$log" 2>&1; then
    tail -n 5 "$log" >&2
    echo "setup_hosts.sh: error: openssh-server and iproute2 could not be installed; the whole output is in $log" >&2
    exit 1
fi
rm "$log"
