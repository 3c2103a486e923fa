"""Fresh Debian machines in network namespaces, each with its own systemd and sshd, to test deployment."""
