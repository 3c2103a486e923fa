"""Certificates, frame keys and the broker's access list: which clients may connect, and which topics each may use."""
