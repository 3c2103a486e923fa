"""Fresh Debian machines in network namespaces, each with its own systemd and sshd, to try deployment on."""
