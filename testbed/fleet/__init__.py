"""Deployment to real devices: Ansible playbooks, and what they need to know about wheels, bundles and keys."""
