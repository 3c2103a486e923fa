"""Deployment to real devices: Ansible playbooks, and the wheels, bundle files and keys that they need."""
