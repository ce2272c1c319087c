"""The rehearsal of `tools/rehearse.sh`: its data, its commands, its faults, and what is compared afterwards."""
