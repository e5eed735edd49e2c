"""Hosts: the machine, the device and the launcher around this process."""
