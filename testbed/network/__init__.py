"""Emulated Wi-Fi: a base station and nodes as network namespaces of one machine, joined by configurable links."""
